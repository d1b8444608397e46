"""Device tables of the GPU path: as in `slots.py`, all of them allocated at start.

A captured CUDA graph reads them by address, whatever requests come later. Uploads are asynchronous
copies on the stream of the forward pass, and happen when a request comes, not in every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from headway.server.engine.slots import ResidualPart, SlotTables
from headway.steering.head_words import HeadField, HeadWords

SHIFT_SETS = 64
"""So many requests of different profiles may run together that add a vector to every head."""

MAX_CLUSTERS = 16
"""Most directions of a set, which is what a request adds to the residual stream at one place."""

MAX_VECTORS, VECTOR_BYTES = 1024, 256 * 1024 * 1024
"""Sets that all running requests together may use, on one worker, and the memory for them."""


def upload(target: torch.Tensor, values: np.ndarray) -> None:
    """Copy an array to a tensor of the same shape on the device, without waiting for it."""
    async_tensor_h2d(np.ascontiguousarray(values), out=target)


class GpuTables(SlotTables):
    """words: float32 [layers of this stage, capacity, local heads, len(HeadField)]; SHIFT_INDEX
    points into `shifts`, float32 [max_shifts, head_size]; max_shifts follows from SHIFT_SETS.

    edits: uint8, as words without the last dimension: where a word edits attention.
    tags: uint8 [max_num_seqs, max_len].
    added, strengths, forms: int32, float32 and int32 [points of this stage, capacity], the vectors
    that a slot adds, -1 for none, how strongly, and in which `Form`. probe_weights, directions:
    float32 [max_vectors, MAX_CLUSTERS, hidden_size]; probe_bias: float32 [max_vectors,
    MAX_CLUSTERS]; max_vectors follows from VECTOR_BYTES, and is 1 without `residual`, for engines
    that refuse residual edits.
    """

    max_clusters = MAX_CLUSTERS

    def __init__(self, *args: Any, residual: bool = True, **options: Any) -> None:
        self._residual = residual
        super().__init__(*args, **options)

    def _allocate(self, device: str | torch.device) -> None:
        shape = len(self.layers), self.capacity, self.local_heads
        self.head_words = torch.zeros(*shape, len(HeadField), device=device)
        self.edits = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.max_shifts = min(self.max_num_seqs, SHIFT_SETS) * shape[0] * shape[2]
        self.shifts = torch.zeros(self.max_shifts, self.geometry.head_size, device=device)
        self.position_tags = torch.zeros(
            self.max_num_seqs, self.max_len, dtype=torch.uint8, device=device
        )
        points = len(self.points), self.capacity
        self.added = torch.full(points, -1, dtype=torch.int32, device=device)
        self.strengths = torch.zeros(points, device=device)
        self.forms = torch.zeros(points, dtype=torch.int32, device=device)
        set_bytes = 2 * 4 * MAX_CLUSTERS * self.geometry.hidden_size
        # One set that nothing uses keeps the tables valid where no request may edit the stream.
        self.max_vectors = min(MAX_VECTORS, VECTOR_BYTES // set_bytes) if self._residual else 1
        vectors = self.max_vectors, MAX_CLUSTERS, self.geometry.hidden_size
        self.probe_weights = torch.zeros(vectors, device=device)
        self.directions = torch.zeros(vectors, device=device)
        self.probe_bias = torch.full(vectors[:2], -torch.inf, device=device)
        self._vectors: dict[tuple[str, int | None], int] = {}
        self._users: list[set[int]] = [set() for _ in range(self.max_vectors)]
        self._free_shifts = list(range(self.max_shifts - 1, -1, -1))
        # By content: requests of a profile share its rows.
        self._shift_rows: dict[bytes, int] = {}
        self._shift_users: Counter[bytes] = Counter()
        self._shifts_of: dict[int, list[bytes]] = {}

    def row_of(self, layer: int) -> int:
        """Where a layer of this stage is in the tables."""
        return layer - self.layers.start

    def row_of_point(self, point: int) -> int:
        """Where a point of this stage is in the tables."""
        return point - self.points.start

    def multiply(self, layer: int, slot: int, scale: torch.Tensor) -> None:
        self.head_words[self.row_of(layer), slot, :, HeadField.SCALE] *= scale

    def release(self, slot: int) -> None:
        """Give a slot and its shifts back."""
        super().release(slot)
        for content in self._shifts_of.pop(slot, []):
            self._shift_users[content] -= 1
            if not self._shift_users[content]:
                del self._shift_users[content]
                self._free_shifts.append(self._shift_rows.pop(content))
        for users in self._users:
            users.discard(slot)

    def _upload(self, slot: int, words: HeadWords) -> None:
        stage = slice(self.layers.start, self.layers.stop)
        table = words.table[stage, self.heads].copy()
        table[..., HeadField.SHIFT_INDEX] = self._upload_shifts_of(slot, words, table)
        upload(self.head_words[:, slot], table)
        upload(self.edits[:, slot], self.edited_heads[slot, stage].astype(np.uint8))

    def _upload_shifts_of(self, slot: int, words: HeadWords, table: np.ndarray) -> np.ndarray:
        """Upload the shifts that a table points at and no slot has; returns rows of `shifts`."""
        indices = table[..., HeadField.SHIFT_INDEX].astype(np.int64)
        wanted = np.unique(indices[indices >= 0])
        contents = [words.shifts[index].tobytes() for index in wanted]
        new = dict(zip(contents, wanted.tolist(), strict=True))
        new = {content: index for content, index in new.items() if content not in self._shift_rows}
        if len(new) > len(self._free_shifts):
            raise RuntimeError(f"the shifts of running requests exceed {self.max_shifts}")
        for content, index in new.items():
            self._shift_rows[content] = row = self._free_shifts.pop()
            upload(self.shifts[row], words.shifts[index])
        self._shift_users.update(contents)
        self._shifts_of[slot] = contents
        rows = [self._shift_rows[content] for content in contents]
        found = np.searchsorted(wanted, np.maximum(indices, 0))
        places = np.array([*rows, -1])[np.minimum(found, len(rows))]
        return np.where(indices >= 0, places, -1)

    def _upload_parts(self, slot: int, parts: Sequence[ResidualPart]) -> None:
        added = np.full(len(self.points), -1, dtype=np.int32)
        strengths = np.zeros(len(self.points), dtype=np.float32)
        forms = np.zeros(len(self.points), dtype=np.int32)
        for users in self._users:
            users.discard(slot)
        for part in parts:
            row = self.row_of_point(part.point)
            added[row], strengths[row] = self._vectors_of(part, slot), part.strength
            forms[row] = part.form
        upload(self.added[:, slot], added)
        upload(self.strengths[:, slot], strengths)
        upload(self.forms[:, slot], forms)

    def _vectors_of(self, part: ResidualPart, slot: int) -> int:
        """Where the vectors of a part are; uploads them if they are not there."""
        row = self._vectors.get(part.key)
        if row is None:
            unused = (row for row, users in enumerate(self._users) if not users)
            row = next(unused, None)
            if row is None:
                raise RuntimeError(
                    f"running requests add vectors of more than {self.max_vectors} sets"
                )
            self._vectors = {key: at for key, at in self._vectors.items() if at != row}
            weights, bias, directions = part.vectors()
            count = len(bias)
            upload(self.probe_weights[row, :count], weights)
            upload(self.directions[row, :count], directions)
            padded = np.full(MAX_CLUSTERS, -np.inf, dtype=np.float32)
            padded[:count] = bias
            upload(self.probe_bias[row], padded)
            self._vectors[part.key] = row
        self._users[row].add(slot)
        return row

    def _upload_tags(self, row: int, tags: np.ndarray) -> None:
        upload(self.position_tags[row], tags)
