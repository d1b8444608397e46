"""What all calibration profiles have in common: the file, and the model that they were made for."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

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
        """A profile of the model of `geometry`; found: the fields of the subclass."""
        [kind] = get_args(cls.model_fields["kind"].annotation)
        return cls(
            kind=kind,
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
        if self.fingerprint != geometry.fingerprint:
            made_for = _describe(self.architecture, self.num_layers, self.hidden_size)
            model = _describe(geometry.architecture, geometry.num_layers, geometry.hidden_size)
            message = (
                f"made for another model: {made_for}, fingerprint {self.fingerprint}; "
                f"this one is {model}, fingerprint {geometry.fingerprint}"
            )
            raise SteeringError(Reason.PROFILE_MISMATCH, message, param)


def read_json(path: Path, param: str = "profile") -> Any:
    """The JSON value in a file. Raises SteeringError(E_BAD_PARAM)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
