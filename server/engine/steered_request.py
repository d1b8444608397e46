"""One steered request as a worker keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch

from headway.server.engine.head_choice import Capture, Choice, TextRows
from headway.server.engine.request import FORGOTTEN_TEXTS, TEXT, TEXT_PASS
from headway.server.engine.slots import FORMS, ResidualPart
from headway.steering import ModelGeometry
from headway.steering.artifacts import ResidualArtifact
from headway.steering.head_words import HeadField, HeadWords, KeyTag
from headway.steering.positions import PromptFacts, Run, runs
from headway.steering.program import Readout, ResidualEdit, SteeringProgram
from headway.steering.wire import decode_facts, decode_program


@dataclass
class SteeredRequest:
    """One sequence being steered.

    slots: set of active edits -> slot, tag_row: row of its tags; held while it is in the batch.
    scopes_of: slot -> names of the scopes of its edits. output_edits: those at output positions.
    sink_layers: bool [num_layers], where its key classes ask for sinks. reads: whether masses of
    key classes are read for it.
    text: what its prompt gives without images, if heads are chosen by it or if this is the request
    that finds it out (`is_text_pass`). chosen: layer -> scale of the local heads, once chosen.
    """

    report_id: str
    program: SteeringProgram = field(default_factory=SteeringProgram)
    facts: PromptFacts = field(default_factory=lambda: PromptFacts(0))
    slots: dict[tuple[int, ...], int] = field(default_factory=dict)
    scopes_of: dict[int, frozenset[str]] = field(default_factory=dict)
    output_edits: tuple[int, ...] = ()
    tag_row: int | None = None
    has_tags: bool = False
    sink_layers: np.ndarray | None = None
    reads: bool = False
    parts: list[ResidualPart] = field(default_factory=list)
    text: TextRows | None = None
    is_text_pass: bool = False
    chosen: dict[int, torch.Tensor] | None = None

    @property
    def must_choose(self) -> bool:
        """Whether its heads are still to be chosen."""
        return bool(self.unchosen_layers)

    @property
    def unchosen_layers(self) -> tuple[int, ...]:
        """The layers whose heads are still to be chosen."""
        selection = self.program.head_selection
        return selection.layers if selection is not None and self.chosen is None else ()

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
        self.output_edits = self._runs(self.facts.prompt_len, self.facts.prompt_len + 1)[0].active
        words = [edit.words for edit in self.program.head_edits]
        if self.program.sink_rule is not None:
            self.sink_layers = np.zeros(geometry.num_layers, dtype=bool)
            asked = np.any([each.mentions(KeyTag.SINK).any(axis=-1) for each in words], axis=0)
            self.sink_layers[layers] = asked[layers]
        self.reads = Readout.CLASS_MASSES in self.program.readouts or any(
            each.is_conditional.any() for each in words
        )
        self.has_tags = (
            self.program.mentions(KeyTag.IMAGE)
            or self.program.mentions(KeyTag.EMPHASISED)
            or (self.reads and bool(self.facts.image_tokens))
        )

    def runs(self, start: int, stop: int) -> list[Run]:
        """The positions [start, stop), cut where the set of its active edits changes."""
        if start >= self.facts.prompt_len:
            # No scope begins or ends behind the prompt, and this is asked in every decoding step.
            return [Run(start, stop, self.output_edits)]
        return self._runs(start, stop)

    def _runs(self, start: int, stop: int) -> list[Run]:
        return runs(self.program.scopes, self.facts, start, stop)

    def take_slot(self, active: tuple[int, ...], slot: int) -> None:
        """Note the slot of some of its edits."""
        self.slots[active] = slot
        self.scopes_of[slot] = frozenset(str(self.program.scopes[index]) for index in active)

    def take_text(self, payload: dict[str, Any], texts: dict[str, TextRows]) -> None:
        """Find what the prompt gives without images among `texts`, or make room for it there."""
        for key in payload.get(FORGOTTEN_TEXTS) or ():
            texts.pop(key, None)
        if TEXT_PASS in payload:
            self.is_text_pass = True
            self.text = texts.setdefault(payload[TEXT_PASS], TextRows())
        elif self.must_choose:
            # It keeps what it was given, whatever is forgotten; its pass may come in this step.
            self.text = self.text or texts.setdefault(payload[TEXT], TextRows())

    @property
    def reads_probes(self) -> bool:
        """Whether what its probes read at the last prompt position is kept."""
        return Readout.PROBES in self.program.readouts

    def capture(self, request_id: str, start: int, position: int, count: int) -> Capture | None:
        """What a text pass keeps of a step.

        start: first of its `count` rows in the batch, for the token at `position`.
        """
        row = self.facts.prompt_len - 1 - position
        if not self.is_text_pass or not 0 <= row < count:
            return None
        assert self.text is not None
        return Capture(request_id, self.text, start + row)

    def choice(
        self, request_id: str, start: int, position: int, count: int, layers: range
    ) -> Choice | None:
        """The choice of heads that a step is to make. Arguments as for `capture`.

        layers: those of this worker. Raises RuntimeError if the step ends before the prompt does.
        """
        selection = self.program.head_selection
        if selection is None or not self.must_choose or self.is_text_pass:
            return None
        row = self.facts.prompt_len - 1 - position
        if not 0 <= row < count or self.text is None:
            raise RuntimeError(f"its prompt of {self.facts.prompt_len} tokens was not run at once")
        own = frozenset(selection.layers) & frozenset(layers)
        return Choice(request_id, selection, self.text, start + row, [], own)

    def edits(
        self, active: Iterable[int], geometry: ModelGeometry, heads: slice
    ) -> tuple[HeadWords, list[ResidualPart]]:
        """The composition of some of its edits, numbered as in `SteeringProgram.scopes`.

        The scales that were chosen come first; those still to be chosen are not in it.
        """
        count, end = len(self.program.head_edits), len(self.program.head_edits) + len(self.parts)
        active = tuple(active)
        words = [self.program.head_edits[index].words for index in active if index < count]
        parts = [self.parts[index - count] for index in active if count <= index < end]
        first = HeadWords.identity(geometry)
        if self.chosen is not None and active and active[-1] >= end:
            for layer, scale in self.chosen.items():
                first.table[layer, heads, HeadField.SCALE] = scale.cpu().numpy()
        return reduce(HeadWords.then, words, first), parts


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
    return ResidualPart(edit.point, artifact, edit.strength, edit.cluster, FORMS[edit.form])
