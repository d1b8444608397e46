"""The `steering` object of a request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from headway.steering.errors import Reason, SteeringError
from headway.steering.validation import StrictModel, validate

MAX_METHODS = 16
"""Most methods one request may combine."""

PresetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ReportOptions(StrictModel):
    """How much an answer reports: a word, or an object that may also ask for saliencies."""

    level: Literal["none", "summary", "full"] = "full"
    saliency: bool = False

    @model_validator(mode="before")
    @classmethod
    def _accept_word(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"level": value}


class SteeringSpec(StrictModel):
    """What a client sends: a named preset or a list of methods, and how much to report.

    Both may be missing where all that it asks for is to read saliencies.
    """

    preset: PresetName | None = Field(
        default=None, description="Name of a preset of this server; excludes `methods`."
    )
    methods: list[dict[str, Any]] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_METHODS,
        description="Methods to apply together, each with its options.",
    )
    report: ReportOptions = Field(
        default=ReportOptions(level="summary"),
        description="How much of what was applied the answer shows.",
    )

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> SteeringSpec:
        # Immutable; vLLM deep-copies sampling parameters, which may carry a spec.
        return self


def parse_spec(value: Any, param: str = "steering") -> SteeringSpec:
    """Validate the `steering` object of a request (a JSON value, or JSON text).

    Raises SteeringError: E_BAD_PARAM with the JSON path of the culprit, or E_TOO_LARGE.
    """
    spec = validate(SteeringSpec, value, param)
    given = (spec.preset is not None) + (spec.methods is not None)
    if given != 1 and not (given == 0 and spec.report.saliency):
        message = "give exactly one of `preset` and `methods`"
        raise SteeringError(Reason.BAD_PARAM, message, param)
    return spec
