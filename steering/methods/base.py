"""What every method file provides, and the checks that several of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field

from headway.steering.errors import Reason, SteeringError
from headway.steering.geometry import ModelGeometry
from headway.steering.program import HeadEdit
from headway.steering.validation import StrictModel

HeadIndex = Annotated[
    list[int],
    Field(min_length=2, max_length=2, description="[layer, head], 0-based, query heads"),
]


@dataclass(frozen=True)
class CompiledMethod:
    """One method, compiled: its edits, what to echo to the client, and warnings."""

    head_edits: tuple[HeadEdit, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Method(StrictModel):
    """Options of a method as they stand in a request; a subclass per method, one per file.

    The `method` key of a request names the subclass by `name` and is checked by the registry.
    """

    name: ClassVar[str]
    method: str

    @abstractmethod
    def compile(self, geometry: ModelGeometry, param: str) -> CompiledMethod:
        """Compile for a model; `param` is the JSON path of this method in the request.

        Raises SteeringError where the options do not fit the model.
        """


def check_heads(
    heads: Sequence[Sequence[int]], geometry: ModelGeometry, param: str
) -> list[tuple[int, int]]:
    """The (layer, head) pairs, checked against the model and against repetition.

    Raises SteeringError: E_LAYER_RANGE, E_HEAD_RANGE, or E_BAD_PARAM for none or a repeated one.
    """
    if not heads:
        raise SteeringError(Reason.BAD_PARAM, "selects no head", param)
    seen: set[tuple[int, int]] = set()
    for index, (layer, head) in enumerate(heads):
        where = f"{param}[{index}]"
        if not 0 <= layer < geometry.num_layers:
            allowed = f"0 .. {geometry.num_layers - 1}"
            message = f"layer {layer} does not exist; this model has layers {allowed}"
            raise SteeringError(Reason.LAYER_RANGE, message, f"{where}[0]")
        if not 0 <= head < geometry.num_heads:
            allowed = f"0 .. {geometry.num_heads - 1}"
            message = f"head {head} does not exist; this model has query heads {allowed}"
            raise SteeringError(Reason.HEAD_RANGE, message, f"{where}[1]")
        if (layer, head) in seen:
            message = f"head {head} of layer {layer} is given twice"
            raise SteeringError(Reason.BAD_PARAM, message, where)
        seen.add((layer, head))
    return sorted(seen)
