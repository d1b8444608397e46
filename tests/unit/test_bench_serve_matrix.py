"""What `headway bench serve` measures: cells, comparisons, and what its arms ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headway.benchmarks.serve import QUICK_ROUNDS
from headway.benchmarks.serve_matrix import (
    CPU_ONLY,
    IMAGE_CONTEXT,
    METRICS,
    POINTS,
    QUICK_POINTS,
    SGRS_STREAMS,
    STEERING,
    STREAMS,
    cells,
    comparisons,
    drawn_profile,
    profile_name,
)
from headway.server.models.demo_vlm import TOKENS_PER_IMAGE
from headway.steering import ModelGeometry, compile_spec, parse_spec
from headway.steering.vectors import VectorProfile

pytestmark = pytest.mark.unit

SMOLLM2 = ModelGeometry(30, 9, 3, 64, 576)
DEMO_VLM = replace(SMOLLM2, supports_images=True)
EVERY, QUICK = comparisons(POINTS), comparisons(QUICK_POINTS)


@pytest.mark.parametrize("compared", [EVERY, QUICK])
def test_every_cell_and_comparison_has_a_name_of_its_own(compared: Any) -> None:
    found = cells(compared)
    assert len({cell.name for cell in found}) == len(found)
    assert len({(each.name, each.metric) for each in compared}) == len(compared)
    for each in compared:
        assert (each.reference.server == "stock") == (each.baseline == "stock")
        same = ("batch", "context", "modality")
        assert all(getattr(each.cell, name) == getattr(each.reference, name) for name in same)
        assert each.reference.share == "none" and each.metric in METRICS


def test_the_axes_are_covered() -> None:
    steered = [cell for cell in cells(EVERY) if cell.share != "none"]
    text = [cell for cell in steered if cell.modality == "text"]
    assert {cell.batch for cell in text} == {1, 4, 16}
    assert {cell.context for cell in text} == {128, 512, 2048, 4096}
    base = [cell for cell in text if (cell.batch, cell.context) == (16, 512)]
    assert {cell.configurations for cell in base if cell.share == "all"} == {1, 4, 16}
    assert {cell.share for cell in base} == {"all", "one"}
    assert {(cell.arm, cell.modality) for cell in steered} == STEERING.keys()
    pictures = [cell for cell in steered if cell.modality == "image"]
    assert {cell.context for cell in pictures} == {IMAGE_CONTEXT}
    assert {cell.share for cell in pictures} == {"all", "one"}
    assert TOKENS_PER_IMAGE < IMAGE_CONTEXT


def test_no_cell_asks_for_more_than_a_server_takes_at_once() -> None:
    for cell in cells((*EVERY, *QUICK)):
        assert cell.batch <= (SGRS_STREAMS if cell.arm == "sgrs" else STREAMS)
        assert cell.configurations <= cell.steered <= cell.batch
        assert (cell.server == "stock") <= (cell.arm == "unsteered")


def test_quick_stays_small() -> None:
    chosen = cells(QUICK)
    assert len(chosen) <= 10 and {cell.modality for cell in chosen} == {"text"}
    prompts = sum(cell.batch * cell.prompt_tokens for cell in chosen)
    assert prompts < 10_000  # at the 500 tokens/s of two old cores: 20 s a round
    assert (QUICK[0].bar, QUICK_ROUNDS) == (0.99, 3)


@pytest.mark.parametrize(("arm", "modality"), STEERING)
def test_every_configuration_is_a_program_of_its_own(
    arm: str, modality: str, tmp_path: Path
) -> None:
    geometry = DEMO_VLM if modality == "image" else SMOLLM2
    if arm == "gact":
        digests = set()
        for index in range(STREAMS):
            path = tmp_path / f"{profile_name(index)}.safetensors"
            digests.add(drawn_profile(SMOLLM2, index).save(path))
            VectorProfile.load(path).check_model(SMOLLM2)
            spec = STEERING[arm, modality](SMOLLM2, index)
            assert parse_spec(spec).methods[0]["profile"] == path.stem
        assert len(digests) == STREAMS
        return
    programs = [
        compile_spec(parse_spec(STEERING[arm, modality](geometry, index)), geometry)
        for index in range(STREAMS)
    ]
    assert not any(program.is_identity for program in programs)
    number = 1 if arm == "sgrs" else STREAMS
    assert len({program.fingerprint for program in programs}) == number


def test_comparisons_are_chosen_by_a_text() -> None:
    chosen = comparisons(POINTS, "LOCORE / idle, 4 at once, context 2048")
    assert [each.metric for each in chosen] == list(METRICS)
    assert [cell.arm for cell in cells(chosen)] == ["unsteered", "locore"]
    with pytest.raises(ValueError, match='no comparison has "x y z"'):
        comparisons(POINTS, "x y z")
    without = comparisons(POINTS, None, CPU_ONLY)
    assert not {cell.arm for cell in cells(without)} & CPU_ONLY
    assert {cell.arm for cell in cells(without)} == {"unsteered", "affine", "locore", "vhr"}
