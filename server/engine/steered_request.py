"""One steered request as a worker keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np

from headway.server.engine.slots import ResidualPart
from headway.steering import ModelGeometry
from headway.steering.artifacts import ResidualArtifact
from headway.steering.head_words import HeadWords, KeyTag
from headway.steering.positions import PromptFacts
from headway.steering.program import ResidualEdit, SteeringProgram
from headway.steering.wire import decode_facts, decode_program


@dataclass
class SteeredRequest:
    """One sequence being steered.

    slots: set of active edits -> slot, tag_row: row of its tags; held while it is in the batch.
    sink_layers: bool [num_layers], where its key classes ask for sinks.
    """

    report_id: str
    program: SteeringProgram = field(default_factory=SteeringProgram)
    facts: PromptFacts = field(default_factory=lambda: PromptFacts(0))
    slots: dict[tuple[int, ...], int] = field(default_factory=dict)
    tag_row: int | None = None
    has_tags: bool = False
    sink_layers: np.ndarray | None = None
    reads: bool = False
    parts: list[ResidualPart] = field(default_factory=list)

    def prepare(
        self,
        payload: dict[str, Any],
        geometry: ModelGeometry,
        layers: range,
        artifacts: Mapping[str, ResidualArtifact],
    ) -> None:
        """Take over an encoded program for a worker that runs these layers.

        Raises ValueError, KeyError or IndexError for a program that cannot be carried out.
        """
        self.program = decode_program(payload, geometry)
        self.parts = [_part(edit, artifacts, geometry) for edit in self.program.residual_edits]
        self.facts = decode_facts(payload["facts"])
        words = [edit.words for edit in self.program.head_edits]
        if self.program.sink_rule is not None:
            self.sink_layers = np.zeros(geometry.num_layers, dtype=bool)
            asked = np.any([each.mentions(KeyTag.SINK).any(axis=-1) for each in words], axis=0)
            self.sink_layers[layers] = asked[layers]
        self.reads = bool(self.program.readouts) or any(each.is_conditional.any() for each in words)
        self.has_tags = (
            self.program.mentions(KeyTag.IMAGE)
            or self.program.mentions(KeyTag.EMPHASISED)
            or (self.reads and bool(self.facts.image_tokens))
        )

    def edits(
        self, active: Iterable[int], geometry: ModelGeometry
    ) -> tuple[HeadWords, list[ResidualPart]]:
        """The composition of some of its edits, numbered as in `SteeringProgram.scopes`."""
        count = len(self.program.head_edits)
        words = [self.program.head_edits[index].words for index in active if index < count]
        parts = [self.parts[index - count] for index in active if index >= count]
        return reduce(HeadWords.then, words or [HeadWords.identity(geometry)]), parts


def _part(
    edit: ResidualEdit, artifacts: Mapping[str, ResidualArtifact], geometry: ModelGeometry
) -> ResidualPart:
    if edit.artifact not in artifacts:
        raise KeyError(f"the artefact {edit.artifact} is not loaded")
    artifact = artifacts[edit.artifact]
    if artifact.directions.shape[1] != geometry.hidden_size:
        raise ValueError(f"the artefact {edit.artifact} is for another hidden size")
    if edit.cluster is not None and not 0 <= edit.cluster < artifact.num_clusters:
        raise ValueError(f"cluster {edit.cluster} of {artifact.num_clusters}")
    return ResidualPart(edit.layer, artifact, edit.strength, edit.cluster)
