"""Device tables: the edits of the requests being run, one slot each."""

from __future__ import annotations

import numpy as np
import torch

from headway.steering import ModelGeometry
from headway.steering.head_words import HeadField, HeadWords
from headway.steering.program import HeadEdit


class SlotTables:
    """Affine head edits of up to `capacity` requests, for the layers and heads of one worker.

    layers: the layers of this pipeline stage (all by default); rank and world_size: of the
    tensor-parallel group, which splits the query heads evenly.

    scale: float32 [num_layers, capacity, local heads].
    shift: layer -> float32 [capacity, local heads, head_size], made when a layer first needs it.
    edited: bool [capacity, num_layers], on the host: which layers a slot edits at all.
    """

    def __init__(
        self,
        geometry: ModelGeometry,
        capacity: int,
        layers: range | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        if geometry.num_heads % world_size:
            raise ValueError(f"{geometry.num_heads} heads do not divide over {world_size} ranks")
        local = geometry.num_heads // world_size
        self.geometry = geometry
        self.heads = slice(rank * local, (rank + 1) * local)
        self.scale = torch.ones(geometry.num_layers, capacity, local, device=device)
        self.shift: dict[int, torch.Tensor] = {}
        self.layers = layers or range(geometry.num_layers)
        self.edited = np.zeros((capacity, geometry.num_layers), dtype=bool)
        self.shifted = np.zeros((capacity, geometry.num_layers), dtype=bool)
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.edited.shape[0]

    @property
    def num_used(self) -> int:
        """Slots that hold a request."""
        return self.capacity - len(self._free)

    def acquire(self, edits: tuple[HeadEdit, ...]) -> int:
        """Upload the edits of a request and return its slot.

        Raises RuntimeError if all slots are taken, ValueError for edits these tables cannot hold;
        no slot is taken then.
        """
        words = _affine_words(edits)
        if not self._free:
            raise RuntimeError(f"all {self.capacity} steering slots are taken")
        slot = self._free[-1]
        scale = words.table[:, self.heads, HeadField.SCALE]
        self.scale[:, slot] = torch.from_numpy(np.ascontiguousarray(scale))
        # A layer counts as edited if any of its heads is, so that all ranks count alike.
        shifted_heads = words.table[..., HeadField.SHIFT_INDEX] >= 0
        for flags, heads in ((self.edited, words.edited), (self.shifted, shifted_heads)):
            for layer in self.layers:
                flags[slot, layer] = heads[layer].any()
        self._upload_shifts(slot, words)
        return self._free.pop()

    def _upload_shifts(self, slot: int, words: HeadWords) -> None:
        layers = np.flatnonzero(self.shifted[slot]).tolist()
        shift = words.dense_shift() if layers else None
        for layer in {*layers, *self.shift}:
            table = self._layer_shift(layer)
            table[slot] = 0
            if shift is not None:
                table[slot] = torch.from_numpy(np.ascontiguousarray(shift[layer, self.heads]))

    def release(self, slot: int) -> None:
        """Give a slot back; its rows are overwritten by the next `acquire`."""
        self.edited[slot] = False
        self.shifted[slot] = False
        self._free.append(slot)

    def _layer_shift(self, layer: int) -> torch.Tensor:
        if layer not in self.shift:
            shape = (self.capacity, self.scale.shape[2], self.geometry.head_size)
            self.shift[layer] = torch.zeros(shape, device=self.scale.device)
        return self.shift[layer]


def _affine_words(edits: tuple[HeadEdit, ...]) -> HeadWords:
    if len(edits) != 1 or not edits[0].words.is_affine:
        raise ValueError("these tables hold one affine edit of all positions per request")
    return edits[0].words
