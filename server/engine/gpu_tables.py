"""Device tables of the GPU path: as in `slots.py`, all of them allocated at start.

A captured CUDA graph reads them by address, whatever requests come later. Uploads are asynchronous
copies on the stream of the forward pass, and happen when a request comes, not in every step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from headway.server.engine.slots import SlotTables
from headway.steering.head_words import HeadField, HeadWords

MAX_SHIFTS = 4096
"""Vectors that all running requests together may add to head outputs, on one worker."""


def upload(target: torch.Tensor, values: np.ndarray) -> None:
    """Copy an array to a tensor of the same shape on the device, without waiting for it."""
    async_tensor_h2d(np.ascontiguousarray(values), out=target)


class GpuTables(SlotTables):
    """words: float32 [layers of this stage, capacity, local heads, len(HeadField)]; SHIFT_INDEX
    points into `shifts`, float32 [MAX_SHIFTS, head_size].

    edits: uint8, as words without the last dimension: where a word edits attention.
    tags: uint8 [max_num_seqs, max_len].
    """

    def _allocate(self, device: str | torch.device) -> None:
        shape = len(self.layers), self.capacity, self.local_heads
        self.head_words = torch.zeros(*shape, len(HeadField), device=device)
        self.edits = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.shifts = torch.zeros(MAX_SHIFTS, self.geometry.head_size, device=device)
        self.position_tags = torch.zeros(
            self.max_num_seqs, self.max_len, dtype=torch.uint8, device=device
        )
        self._free_shifts = list(range(MAX_SHIFTS - 1, -1, -1))
        self._shifts_of: dict[int, list[int]] = {}

    def row_of(self, layer: int) -> int:
        """Where a layer of this stage is in the tables."""
        return layer - self.layers.start

    def release(self, slot: int) -> None:
        """Give a slot and its shifts back."""
        super().release(slot)
        self._free_shifts += self._shifts_of.pop(slot, [])

    def _upload(self, slot: int, words: HeadWords) -> None:
        stage = slice(self.layers.start, self.layers.stop)
        table = words.table[stage, self.heads].copy()
        table[..., HeadField.SHIFT_INDEX] = self._upload_shifts_of(slot, words, table)
        upload(self.head_words[:, slot], table)
        upload(self.edits[:, slot], self.edited_heads[slot, stage].astype(np.uint8))

    def _upload_shifts_of(self, slot: int, words: HeadWords, table: np.ndarray) -> np.ndarray:
        """Upload the shifts that a table points at; returns its indices into `shifts`."""
        indices = table[..., HeadField.SHIFT_INDEX].astype(np.int64)
        wanted = np.unique(indices[indices >= 0])
        if len(wanted) > len(self._free_shifts):
            raise RuntimeError(f"the shifts of running requests exceed {MAX_SHIFTS}")
        rows = [self._free_shifts.pop() for _ in wanted]
        self._shifts_of[slot] = rows
        for index, row in zip(wanted.tolist(), rows, strict=True):
            upload(self.shifts[row], words.shifts[index])
        found = np.searchsorted(wanted, np.maximum(indices, 0))
        places = np.array([*rows, -1])[np.minimum(found, len(rows))]
        return np.where(indices >= 0, places, -1)

    def _upload_tags(self, row: int, tags: np.ndarray) -> None:
        upload(self.position_tags[row], tags)

    def device_bytes(self) -> int:
        """Memory that the tables take."""
        tensors: list[Any] = [self.head_words, self.edits, self.shifts, self.position_tags]
        return sum(tensor.nbytes for tensor in tensors)
