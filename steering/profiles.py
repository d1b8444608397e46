"""What all calibration profiles have in common: the file, and the model that they were made for."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, get_args

from pydantic import Field, StringConstraints

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.validation import StrictModel, validate

MAX_PROFILE_BYTES = 1024 * 1024
"""Largest profile file, in bytes of JSON."""

Index = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]


class Profile(StrictModel):
    """What `headway calibrate` found for one model; a subclass per kind.

    A subclass narrows `kind` to one word. fingerprint: of the model's `ModelGeometry`.
    """

    kind: str
    version: Literal[1]
    fingerprint: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    architecture: str
    hidden_size: Size
    num_layers: Size

    @classmethod
    def of(cls, geometry: ModelGeometry, **found: Any) -> Self:
        """A profile of the model of `geometry`; found: the fields of the subclass.

        The kind need not be given where a subclass has but one.
        """
        kinds = get_args(cls.model_fields["kind"].annotation)
        if len(kinds) == 1:
            found["kind"] = kinds[0]
        return cls(
            version=1,
            fingerprint=geometry.fingerprint,
            architecture=geometry.architecture,
            hidden_size=geometry.hidden_size,
            num_layers=geometry.num_layers,
            **found,
        )

    def save(self, path: Path) -> None:
        """Write the profile as JSON. Raises OSError."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, param: str = "profile") -> Self:
        """Read a profile. Raises SteeringError(E_BAD_PARAM) that names the key under `param`."""
        return cls.parse(read_json(path, param), param)

    @classmethod
    def parse(cls, value: Any, param: str = "profile") -> Self:
        """Validate a JSON value. Raises SteeringError(E_BAD_PARAM) as `load` does."""
        profile = validate(cls, value, param, MAX_PROFILE_BYTES)
        profile.check_shapes(param)
        return profile

    @abstractmethod
    def check_shapes(self, param: str) -> None:
        """Raise SteeringError(E_BAD_PARAM) where the parts of the profile do not fit together."""

    def check_model(self, geometry: ModelGeometry, param: str = "profile") -> None:
        """Raise SteeringError(E_PROFILE_MISMATCH) if it was made for a model of other sizes."""
        sizes = geometry.fingerprint, geometry.num_layers, geometry.hidden_size
        # A file may claim any fingerprint; its parts were checked against the sizes it claims.
        if (self.fingerprint, self.num_layers, self.hidden_size) != sizes:
            made_for = _describe(self.architecture, self.num_layers, self.hidden_size)
            model = _describe(geometry.architecture, geometry.num_layers, geometry.hidden_size)
            message = (
                f"made for another model: {made_for}, fingerprint {self.fingerprint}; "
                f"this one is {model}, fingerprint {geometry.fingerprint}"
            )
            raise SteeringError(Reason.PROFILE_MISMATCH, message, param)


class AnyProfile(Protocol):
    """What profiles of all kinds have, also those that are no JSON file."""

    @property
    def kind(self) -> str:
        """Which of the kinds of profiles it is."""

    def check_model(self, geometry: ModelGeometry, param: str = "profile") -> None:
        """Raise SteeringError(E_PROFILE_MISMATCH) if it was made for a model of other sizes."""


@dataclass(frozen=True)
class FoundProfile:
    """A profile as a request may name it; reference: its name, with its version if it has one."""

    reference: str
    profile: AnyProfile


class Profiles(Protocol):
    """The profiles that requests may name."""

    def find(self, reference: str) -> FoundProfile | None:
        """That of a name (the newest version), `name@version` or `sha256:digest`; else None."""

    def names(self) -> tuple[str, ...]:
        """The names there are, sorted."""


@dataclass(frozen=True)
class NamedProfiles:
    """Profiles by name, without versions: those that a server was started with."""

    profiles: Mapping[str, AnyProfile]

    def find(self, reference: str) -> FoundProfile | None:
        """The profile of that name, if there is one."""
        profile = self.profiles.get(reference)
        return None if profile is None else FoundProfile(reference, profile)

    def names(self) -> tuple[str, ...]:
        """The names there are, sorted."""
        return tuple(sorted(self.profiles))


def read_json(path: Path, param: str = "profile") -> Any:
    """The JSON value in a file. Raises SteeringError(E_BAD_PARAM)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"cannot be read as JSON: {error}"
        raise SteeringError(Reason.BAD_PARAM, message, param) from None


def check_ascending(values: tuple[int, ...], size: int, what: str, param: str) -> None:
    """Raise SteeringError(E_BAD_PARAM), naming the value, unless 0 <= values < size ascend."""
    for index, value in enumerate(values):
        if value >= size:
            message = f"{what} {value} does not exist; allowed: 0 .. {size - 1}"
            raise SteeringError(Reason.BAD_PARAM, message, f"{param}[{index}]")
        if index and value <= values[index - 1]:
            raise SteeringError(Reason.BAD_PARAM, f"the {what}s must ascend", f"{param}[{index}]")


def _describe(architecture: str, num_layers: int, hidden_size: int) -> str:
    return f"{architecture} with {num_layers} layers and hidden size {hidden_size}"
