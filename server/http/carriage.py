"""The three ways in which a request can carry steering; at most one may be used.

1. the body field `steering`, an object;
2. `vllm_xargs: {"steering": "<JSON of the same object>"}`, for clients that know stock fields only;
3. the model alias `<base>:<preset>`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headway.steering import Reason, SteeringError, SteeringSpec, parse_spec

FIELD = "steering"
XARGS = "vllm_xargs"
XARGS_PATH = f"{XARGS}.{FIELD}"
ALIAS_PATH = "model"
CARRIAGES = (FIELD, XARGS_PATH, ALIAS_PATH)
"""The JSON paths of the three carriages."""

FILES = frozenset({"preset", "profile"})
"""The keys of a spec and of its methods that may stand for a file."""


@dataclass(frozen=True)
class Carriage:
    """Steering as it stands in a request: the value, and its JSON path for error messages."""

    value: Any
    param: str

    @property
    def may_name_files(self) -> bool:
        """Whether it names, as far as a glance tells, a preset or a profile."""
        if isinstance(self.value, str):
            return any(word in self.value for word in (*FILES, "\\u"))
        if not isinstance(self.value, dict):
            return False
        methods = self.value.get("methods")
        parts = [self.value, *methods] if isinstance(methods, list) else [self.value]
        return any(isinstance(each, dict) and not each.keys().isdisjoint(FILES) for each in parts)

    def spec(self) -> SteeringSpec:
        """The validated spec. Raises SteeringError with paths under `param`."""
        if self.param == ALIAS_PATH:
            return SteeringSpec(preset=self.value)
        is_text = isinstance(self.value, str)
        if self.param == XARGS_PATH and not is_text:
            message = "must be a string that holds the JSON of a steering object"
            raise SteeringError(Reason.BAD_PARAM, message, self.param)
        if self.param == FIELD and is_text:
            message = f"must be an object, not a string; a string goes into {XARGS_PATH}"
            raise SteeringError(Reason.BAD_PARAM, message, self.param)
        return parse_spec(self.value, self.param)


def take_carriages(body: Mapping[str, Any]) -> tuple[tuple[Carriage, ...], dict[str, Any]]:
    """The carriages in a JSON body except the alias, and the body without them.

    `"steering": null` counts as absent.
    """
    carriages = []
    rest = {key: value for key, value in body.items() if key != FIELD}
    if body.get(FIELD) is not None:
        carriages.append(Carriage(body[FIELD], FIELD))
    xargs = body.get(XARGS)
    if isinstance(xargs, dict) and FIELD in xargs:
        carriages.append(Carriage(xargs[FIELD], XARGS_PATH))
        rest[XARGS] = {key: value for key, value in xargs.items() if key != FIELD} or None
    return tuple(carriages), rest


def split_alias(
    model: str | None,
    presets: Container[str],
    is_served: Callable[[str], bool],
    any_base: bool = False,
) -> tuple[str, Carriage] | None:
    """The base model of `<base>:<preset>` and its carriage; None where `model` is no alias.

    A served name is never an alias, whatever colons it has. any_base: whether the server takes
    every name for its model.
    """
    if not model or ":" not in model or is_served(model):
        return None
    base, _, preset = model.rpartition(":")
    if preset not in presets or not (any_base or is_served(base)):
        return None
    return base, Carriage(preset, ALIAS_PATH)


def single(carriages: Sequence[Carriage]) -> Carriage:
    """The only carriage. Raises SteeringError(E_CONFLICT) if there are several."""
    if len(carriages) > 1:
        paths = " and ".join(f"`{carriage.param}`" for carriage in carriages)
        message = f"steering is given more than once, in {paths}; give it once"
        raise SteeringError(Reason.CONFLICT, message, carriages[0].param)
    return carriages[0]
