"""Device tables: the edits of the requests being run.

A request takes a slot for every set of its edits that is active together: most have one, a request
whose edits differ between prompt and output has two. Requests whose keys have tags by position
take a row of the tag table as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from headway.kernels.residual_edit import Edit, Form
from headway.steering import ModelGeometry
from headway.steering.artifacts import ResidualArtifact
from headway.steering.head_words import HeadField, HeadWords, KeyTag
from headway.steering.positions import PromptFacts
from headway.steering.program import ResidualForm, num_points

FORMS = {
    ResidualForm.RMS: Form.RMS,
    ResidualForm.ADD: Form.ADD,
    ResidualForm.REMOVE: Form.REMOVE,
}
"""The kernels' word for a form of residual edits."""


@dataclass(frozen=True)
class ResidualPart:
    """A residual edit as a slot holds it.

    point: where, as `num_points` counts; cluster: the direction that is always taken, if any.
    """

    point: int
    artifact: ResidualArtifact
    strength: float
    cluster: int | None = None
    form: Form = Form.RMS

    @property
    def key(self) -> tuple[str, int | None]:
        """Equal for parts that need the same vectors."""
        return self.artifact.digest, self.cluster

    @cached_property
    def edit(self) -> Edit:
        """It with its vectors as tensors on CPU, which share the memory of its artefact."""
        artifact, chosen = self.artifact, self.cluster
        directions = torch.from_numpy(artifact.directions)
        if chosen is not None:
            directions = directions[chosen : chosen + 1]
        if len(directions) == 1:
            return Edit(directions, self.strength, self.form)
        probe = (torch.from_numpy(each) for each in (artifact.probe_weights, artifact.probe_bias))
        return Edit(directions, self.strength, self.form, *probe)

    def vectors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights and bias of the probe, and the directions."""
        artifact, bias = self.artifact, self.artifact.probe_bias
        if self.cluster is not None:
            bias = np.full_like(bias, -np.inf)
            bias[self.cluster] = 0.0
        return artifact.probe_weights, bias, artifact.directions


SLOTS_PER_REQUEST = 4
"""Query scopes are nested, so a request has at most this many sets of active edits."""


class SlotTables:
    """Head words of up to `max_num_seqs` requests, for the layers and heads of one worker.

    layers: the layers of this pipeline stage (all by default); rank and world_size: of the
    tensor-parallel group, which splits the query heads evenly; max_len: longest sequence.

    capacity: number of slots; local_heads: query heads of this rank.
    scale: float32 [num_layers, capacity, local heads].
    shift: layer -> float32 [capacity, local heads, head_size], made when a layer first needs it.
    words: layer -> float32 [capacity, local heads, SCALE], the columns of the head word before
        the affine ones; made when a layer first needs it.
    tags: uint8 [max_num_seqs, max_len], bits of KeyTag by position, made when first needed.
    parts: slot -> point -> its residual edit.
    affine, shifted, attends, moves: bool [capacity, num_layers], on the host: what a slot edits
        where; moves: whether mass is moved, gained or asked about.
    adds: bool [capacity, num_points], on the host: where a slot has residual edits.
    points: those of this pipeline stage.
    edited_heads, conditional: bool [capacity, num_layers, local heads], on the host: words that
        edit attention weights, and those that do on a condition.
    """

    max_clusters: int | None = None
    """Most directions of an artefact, None for any number."""

    def __init__(
        self,
        geometry: ModelGeometry,
        max_num_seqs: int,
        max_len: int = 0,
        layers: range | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        if geometry.num_heads % world_size:
            raise ValueError(f"{geometry.num_heads} heads do not divide over {world_size} ranks")
        local = geometry.num_heads // world_size
        capacity = max_num_seqs * SLOTS_PER_REQUEST
        self.geometry = geometry
        self.heads = slice(rank * local, (rank + 1) * local)
        self.layers = layers or range(geometry.num_layers)
        self.max_num_seqs, self.max_len = max_num_seqs, max_len
        self.local_heads = local
        self.capacity = capacity
        self.affine, self.shifted, self.attends, self.moves = np.zeros(
            (4, capacity, geometry.num_layers), dtype=bool
        )
        self.adds = np.zeros((capacity, num_points(geometry.num_layers)), dtype=bool)
        # The last point of all, behind the last layer, is that of the last stage.
        end = self.layers.stop == geometry.num_layers
        self.points = range(2 * self.layers.start, 2 * self.layers.stop + end)
        self.edited_heads, self.conditional = np.zeros(
            (2, capacity, geometry.num_layers, local), dtype=bool
        )
        self._free = list(range(capacity - 1, -1, -1))
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._allocate(device)

    @property
    def num_used(self) -> int:
        """Slots that are taken."""
        return self.capacity - len(self._free)

    def acquire(
        self, words: HeadWords, parts: Sequence[ResidualPart] = (), chosen: Sequence[int] = ()
    ) -> int:
        """Upload one set of active edits, head words and residual edits, and return its slot.

        chosen: layers whose scales are still to be chosen, and told by `multiply`.

        Raises RuntimeError if all slots are taken, ValueError for words these tables cannot hold;
        no slot is taken then.
        """
        if not self._free:
            raise RuntimeError(f"all {self.capacity} steering slots are taken")
        slot = self._free[-1]
        own = np.zeros(self.geometry.num_layers, dtype=bool)
        own[self.layers] = True
        # A layer counts as edited if any of its heads is, so that all ranks count alike.
        self.attends[slot] = own & words.edits_attention.any(axis=-1)
        self.shifted[slot] = own & (words.table[..., HeadField.SHIFT_INDEX] >= 0).any(axis=-1)
        scaled = (words.table[..., HeadField.SCALE] != 1).any(axis=-1)
        self.affine[slot] = own & scaled | self.shifted[slot]
        self.affine[slot, list(chosen)] |= own[list(chosen)]
        self.edited_heads[slot] = words.edits_attention[:, self.heads]
        self.conditional[slot] = words.is_conditional[:, self.heads]
        self.moves[slot] = own & words.moves_mass.any(axis=-1)
        parts = [part for part in parts if part.point in self.points]
        self.adds[slot] = False
        self.adds[slot, [part.point for part in parts]] = True
        if self.adds[slot].sum() != len(parts):
            raise ValueError("two residual edits of one place at the same positions")
        self._upload_parts(slot, parts)
        self._upload(slot, words)
        return self._free.pop()

    def acquire_tags(self, facts: PromptFacts) -> int:
        """Upload the tags of a request's positions and return their row.

        Raises RuntimeError if all rows are taken, ValueError for a prompt that is too long.
        """
        if not self._free_rows:
            raise RuntimeError(f"all {self.max_num_seqs} rows of tags are taken")
        if facts.prompt_len > self.max_len:
            raise ValueError(f"a prompt of {facts.prompt_len}, longer than {self.max_len} tokens")
        row = self._free_rows[-1]
        tags = np.zeros(self.max_len, dtype=np.uint8)
        for tag, ranges in ((KeyTag.IMAGE, facts.image_tokens), (KeyTag.EMPHASISED, facts.marks)):
            for start, stop in ranges:
                tags[start:stop] |= np.uint8(tag)
        self._upload_tags(row, tags)
        return self._free_rows.pop()

    def multiply(self, layer: int, slot: int, scale: torch.Tensor) -> None:
        """Multiply the scales of a slot's heads; scale: float32 [local heads]."""
        self.scale[layer, slot] *= scale

    def release(self, slot: int) -> None:
        """Give a slot back; its rows are overwritten by the next `acquire`."""
        for flags in (self.affine, self.shifted, self.attends, self.moves, self.adds):
            flags[slot] = False
        self._free.append(slot)

    def release_tags(self, row: int) -> None:
        """Give a row of tags back."""
        self._free_rows.append(row)

    def _allocate(self, device: str | torch.device) -> None:
        self.scale = torch.ones(
            self.geometry.num_layers, self.capacity, self.local_heads, device=device
        )
        self.shift: dict[int, torch.Tensor] = {}
        self.words: dict[int, torch.Tensor] = {}
        self.tags: torch.Tensor | None = None
        self.parts: dict[int, dict[int, ResidualPart]] = {}

    def _upload_parts(self, slot: int, parts: Sequence[ResidualPart]) -> None:
        self.parts[slot] = {part.point: part for part in parts}

    def _upload(self, slot: int, words: HeadWords) -> None:
        scale = words.table[:, self.heads, HeadField.SCALE]
        self.scale[:, slot] = torch.from_numpy(np.ascontiguousarray(scale))
        self._upload_shifts(slot, words)
        for layer in np.flatnonzero(self.attends[slot]).tolist():
            fields = words.table[layer, self.heads, : HeadField.SCALE]
            self._layer_words(layer)[slot] = torch.from_numpy(np.ascontiguousarray(fields))

    def _upload_tags(self, row: int, tags: np.ndarray) -> None:
        if self.tags is None:
            shape = self.max_num_seqs, self.max_len
            self.tags = torch.zeros(shape, dtype=torch.uint8, device=self.scale.device)
        self.tags[row] = torch.from_numpy(tags)

    def _upload_shifts(self, slot: int, words: HeadWords) -> None:
        layers = np.flatnonzero(self.shifted[slot]).tolist()
        shift = words.dense_shift() if layers else None
        for layer in {*layers, *self.shift}:
            table = self._layer_shift(layer)
            table[slot] = 0
            if shift is not None:
                table[slot] = torch.from_numpy(np.ascontiguousarray(shift[layer, self.heads]))

    def _layer_shift(self, layer: int) -> torch.Tensor:
        if layer not in self.shift:
            shape = (self.capacity, self.local_heads, self.geometry.head_size)
            self.shift[layer] = torch.zeros(shape, device=self.scale.device)
        return self.shift[layer]

    def _layer_words(self, layer: int) -> torch.Tensor:
        if layer not in self.words:
            shape = (self.capacity, self.local_heads, int(HeadField.SCALE))
            self.words[layer] = torch.zeros(shape, device=self.scale.device)
        return self.words[layer]
