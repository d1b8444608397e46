"""Named method lists; those of files are given at start with `--steering-preset name=path`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from headway.steering import (
    ModelGeometry,
    Reason,
    SteeringError,
    SteeringProgram,
    SteeringSpec,
    compile_spec,
    parse_spec,
)
from headway.steering.schema import PresetName

PRESET_KEYS = {"methods", "description"}
Description = Annotated[str, Field(max_length=1024)]
_NAME: TypeAdapter[str] = TypeAdapter(PresetName)
_DESCRIPTION: TypeAdapter[str] = TypeAdapter(Description)


class PresetError(ValueError):
    """A preset file that cannot be used; ends the start of the server."""


@dataclass(frozen=True)
class Preset:
    """A named method list, and what it compiles to for the served model."""

    name: str
    methods: list[dict[str, Any]]
    program: SteeringProgram
    description: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, for clients."""
        return {
            "name": self.name,
            "description": self.description,
            "methods": self.methods,
            "applied": [applied.as_dict() for applied in self.program.applied],
            "fingerprint": self.program.fingerprint,
        }


def named_file(option: str, flag: str) -> tuple[str, str]:
    """Name and path of an option `flag name=path`. Raises ValueError that names the option."""
    name, separator, path = option.partition("=")
    if not separator or not path:
        raise ValueError(f"{flag} {option}: must be name=path")
    try:
        return _NAME.validate_python(name), path
    except ValidationError:
        pattern = "letters, digits, '.', '_' and '-', 64 at most"
        raise ValueError(f"{flag} {option}: a name is made of {pattern}") from None


def load_presets(options: Iterable[str], geometry: ModelGeometry) -> dict[str, Preset]:
    """Presets by name, from `name=path` options.

    Raises PresetError that names the option and what is wrong with the name, the file or a
    method in it.
    """
    presets: dict[str, Preset] = {}
    for option in options:
        preset = _load(option, geometry)
        if preset.name in presets:
            raise PresetError(f"--steering-preset: the name {preset.name} is given twice")
        presets[preset.name] = preset
    return presets


def _load(option: str, geometry: ModelGeometry) -> Preset:
    where = f"--steering-preset {option}"
    try:
        name, path = named_file(option, "--steering-preset")
    except ValueError as error:
        raise PresetError(str(error)) from None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PresetError(f"{where}: {error}") from None
    try:
        return parse_preset(name, content, geometry, name)
    except SteeringError as error:
        raise PresetError(f"{where}: {error}") from None


def parse_preset(name: str, content: Any, geometry: ModelGeometry, param: str) -> Preset:
    """A preset from the JSON value of its file, compiled for a model.

    Raises SteeringError with paths under `param`.
    """
    if not isinstance(content, dict) or not isinstance(content.get("methods"), list):
        raise SteeringError(Reason.BAD_PARAM, 'must be {"methods": [...]}', param)
    unknown = sorted(content.keys() - PRESET_KEYS)
    if unknown:
        message = f"unknown key {unknown[0]!r}; the keys are: methods, description"
        raise SteeringError(Reason.BAD_PARAM, message, param)
    description = content.get("description")
    try:
        if description is not None:
            _DESCRIPTION.validate_python(description)
    except ValidationError as error:  # also of half a surrogate pair, which no answer could hold
        message = error.errors(include_input=False)[0]["msg"]
        raise SteeringError(Reason.BAD_PARAM, message, f"{param}.description") from None
    spec: SteeringSpec = parse_spec({"methods": content["methods"]}, param)
    program = compile_spec(spec, geometry, param=param)
    return Preset(name, content["methods"], program, description)


def preset_content(preset: Preset) -> dict[str, Any]:
    """The JSON value of a preset's file."""
    content: dict[str, Any] = {"methods": preset.methods}
    if preset.description is not None:
        content["description"] = preset.description
    return content
