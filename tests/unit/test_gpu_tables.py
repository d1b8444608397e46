"""Device tables of the GPU path: what an upload leaves in them."""

from __future__ import annotations

import numpy as np
import pytest

from headway.server.engine import gpu_tables
from headway.server.engine.gpu_tables import GpuTables
from headway.steering import ModelGeometry
from headway.steering.head_words import HeadField, HeadWords, index_shifts

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(4, 4, 2, 8, 32)


def shifted_words(seed: int, geometry: ModelGeometry = GEOMETRY) -> HeadWords:
    """Words with drawn fields, some of them with a shift."""
    draw = np.random.default_rng(seed)
    words = HeadWords.identity(geometry)
    words.table[..., HeadField.SCALE] = draw.random(words.table.shape[:2])
    words.table[..., HeadField.BIAS_B] = draw.integers(0, 2, words.table.shape[:2])
    shape = geometry.num_layers, geometry.num_heads, geometry.head_size
    shift = draw.standard_normal(shape) * (draw.random(shape[:2]) < 0.4)[..., None]
    words.table[..., HeadField.SHIFT_INDEX], shifts = index_shifts(shift.astype(np.float32))
    return HeadWords(words.table, shifts)


def dense(tables: GpuTables, slot: int) -> np.ndarray:
    """Shifts as the kernels find them: [layers, local heads, head_size]."""
    index = tables.head_words[:, slot, :, HeadField.SHIFT_INDEX].long()
    rows = tables.shifts[index.clamp_min(0)] * (index >= 0)[..., None]
    return rows.numpy()


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (0, 2), (1, 2)])
def test_words_and_shifts_of_several_slots_stay_apart(rank, world):
    tables = GpuTables(GEOMETRY, 4, 16, layers=range(1, 3), rank=rank, world_size=world)
    held = {tables.acquire(words): words for words in map(shifted_words, range(5))}
    gone = next(iter(held))
    tables.release(gone)
    del held[gone]
    again = shifted_words(9)
    held[tables.acquire(again)] = again
    columns = [field for field in HeadField if field is not HeadField.SHIFT_INDEX]
    for slot, words in held.items():
        own = words.table[1:3, tables.heads]
        assert (tables.head_words[:, slot][..., columns].numpy() == own[..., columns]).all()
        assert (dense(tables, slot) == words.dense_shift()[1:3, tables.heads]).all()
        edits = words.edits_attention[1:3, tables.heads]
        assert (tables.edits[:, slot].numpy() == edits).all()


def shift_everywhere(seed: int) -> HeadWords:
    """Words that shift every head, each otherwise."""
    shape = GEOMETRY.num_layers, GEOMETRY.num_heads, GEOMETRY.head_size
    words = HeadWords.identity(GEOMETRY)
    shift = np.random.default_rng(seed).standard_normal(shape)
    words.table[..., HeadField.SHIFT_INDEX], shifts = index_shifts(shift.astype(np.float32))
    return HeadWords(words.table, shifts)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_there_is_room_for_a_profile_of_each_request(rank, world):
    tables = GpuTables(GEOMETRY, 3, 16, layers=range(1, 4), rank=rank, world_size=world)
    held = {tables.acquire(words): words for words in map(shift_everywhere, range(3))}
    for slot, words in held.items():
        assert (dense(tables, slot) == words.dense_shift()[1:4, tables.heads]).all()


def test_more_shifts_than_there_is_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(gpu_tables, "SHIFT_SETS", 2)
    tables = GpuTables(GEOMETRY, 4, 16)
    for seed in range(2):
        tables.acquire(shift_everywhere(seed))
    with pytest.raises(RuntimeError, match="shifts of running requests exceed 32"):
        tables.acquire(shift_everywhere(2))
    assert tables.num_used == 2 and not tables._free_shifts


def test_shifts_are_given_back_with_their_slot():
    tables = GpuTables(GEOMETRY, 4, 16)
    free = len(tables._free_shifts)
    slots = [tables.acquire(shifted_words(seed)) for seed in range(3)]
    assert len(tables._free_shifts) < free
    for slot in slots:
        tables.release(slot)
    assert len(tables._free_shifts) == free


def test_requests_of_a_profile_share_its_shifts():
    words = shift_everywhere(0)
    tables = GpuTables(GEOMETRY, 256, 16)
    slots = [tables.acquire(words) for _ in range(gpu_tables.SHIFT_SETS + 1)]
    assert all((dense(tables, slot) == words.dense_shift()).all() for slot in slots)
    for slot in slots[1:]:
        tables.release(slot)
    others = [tables.acquire(shifted_words(seed)) for seed in range(3)]
    assert (dense(tables, slots[0]) == words.dense_shift()).all()
    for slot in (slots[0], *others):
        tables.release(slot)
    assert sorted(tables._free_shifts) == list(range(tables.max_shifts))


def test_an_engine_that_refuses_residual_edits_has_no_memory_for_them():
    def size(**options: bool) -> int:
        tables = GpuTables(GEOMETRY, 4, 16, device="meta", **options)
        return tables.probe_weights.nbytes + tables.directions.nbytes

    one_set = 2 * gpu_tables.MAX_CLUSTERS * GEOMETRY.hidden_size * 4
    assert size(residual=False) == one_set
    assert size() == gpu_tables.MAX_VECTORS * one_set
