"""Which residual edits an engine refuses before it sees the request, and how much it keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from headway.server.engine.config import max_vector_bytes, refuse_unsupported
from headway.steering import SteeringError
from headway.steering.program import ResidualEdit, ResidualSite, SteeringProgram

pytestmark = pytest.mark.unit

LAYERS = 4
INSIDE, BEHIND = ResidualSite.AFTER_ATTENTION, ResidualSite.BLOCK_OUTPUT


def engine(**changes: Any) -> Any:
    given = {"model_type": "llama", "eager": True, "settings": {}, "v2": False, "graphs": False}
    values = {**given, **changes}
    return SimpleNamespace(
        additional_config={"headway": values["settings"]},
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(model_type=values["model_type"]),
            get_total_num_hidden_layers=lambda: LAYERS,
            enforce_eager=values["eager"],
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=values["graphs"]),
        use_v2_model_runner=values["v2"],
    )


def edit(layer: int, site: ResidualSite = BEHIND) -> SteeringProgram:
    return SteeringProgram(residual_edits=(ResidualEdit(layer, "0" * 64, 1.0, site=site),))


@pytest.mark.parametrize(
    ("changes", "program"),
    [
        ({}, edit(3)),
        ({}, edit(1, INSIDE)),
        ({"model_type": "strange"}, edit(2)),
        ({"model_type": "strange"}, edit(0, ResidualSite.BLOCK_INPUT)),
        ({"eager": False}, edit(3)),
        ({"eager": False, "settings": {"residual_edits": "after_attention"}}, edit(1, INSIDE)),
        ({"v2": True, "graphs": True, "settings": {"residual_edits": True}}, edit(1)),
        ({"v2": True}, edit(1, INSIDE)),
    ],
)
def test_what_an_engine_can_edit(changes, program):
    refuse_unsupported(program, engine(**changes))


@pytest.mark.parametrize(
    ("changes", "program", "words"),
    [
        ({"model_type": "strange"}, edit(3), "Headway does not for strange"),
        ({"model_type": "strange"}, edit(0, INSIDE), "Headway does not for strange"),
        ({"eager": False}, edit(1, INSIDE), "need the setting .*after_attention"),
        (
            {"eager": False, "settings": {"residual_edits": True}},
            edit(1, INSIDE),
            "need the setting",
        ),
        ({"v2": True, "graphs": True}, edit(1), "CUDA graphs were captured without"),
    ],
)
def test_what_it_refuses(changes, program, words):
    with pytest.raises(SteeringError, match=words) as caught:
        refuse_unsupported(program, engine(**changes))
    assert caught.value.reason == "E_UNSUPPORTED"


def test_the_memory_for_vectors():
    assert max_vector_bytes(engine()) == 512 * 1024 * 1024
    assert max_vector_bytes(engine(settings={"max_vector_memory": 2})) == 2 * 1024 * 1024
    for number in (-1, True, "8", 1.5):
        with pytest.raises(ValueError, match="max_vector_memory"):
            max_vector_bytes(engine(settings={"max_vector_memory": number}))
