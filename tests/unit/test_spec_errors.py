"""What is refused, with which reason, where and in which words."""

from __future__ import annotations

import json

import pytest

from headway.steering import ModelGeometry, SteeringError, compile_spec, parse_spec
from headway.steering.validation import MAX_SPEC_BYTES

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(num_layers=4, num_heads=6, num_kv_heads=2, head_size=8, hidden_size=48)


def vhr(**options):
    return {"methods": [{"method": "vhr", "heads": [[1, 2]], **options}]}


def scale(*entries):
    return {"methods": [{"method": "head_scale", "scales": list(entries)}]}


NAN, INF = float("nan"), float("inf")

BAD = [
    ({}, "E_BAD_PARAM", "steering", "exactly one of"),
    ([], "E_BAD_PARAM", "steering", "object"),
    ("vhr", "E_BAD_PARAM", "steering", ""),
    (True, "E_BAD_PARAM", "steering", "object"),
    ({"method": "vhr"}, "E_BAD_PARAM", "steering.method", "unknown key"),
    ({"methods": []}, "E_BAD_PARAM", "steering.methods", "at least 1"),
    ({"methods": {}}, "E_BAD_PARAM", "steering.methods", "array"),
    ({"methods": [1]}, "E_BAD_PARAM", "steering.methods[0]", "got 1"),
    ({"methods": [{}]}, "E_BAD_PARAM", "steering.methods[0]", '"method"'),
    ({"methods": [{"method": 3}]}, "E_BAD_PARAM", "steering.methods[0]", '"method"'),
    ({"methods": [{"method": "VHR"}]}, "E_UNKNOWN_METHOD", "steering.methods[0].method", "vhr"),
    ({"methods": [vhr()["methods"][0]] * 17}, "E_BAD_PARAM", "steering.methods", "16"),
    ({"preset": "x", **vhr()}, "E_BAD_PARAM", "steering", "exactly one of"),
    ({"preset": "x"}, "E_PRESET_NOT_FOUND", "steering.preset", "none"),
    ({"preset": "../x"}, "E_BAD_PARAM", "steering.preset", "pattern"),
    ({"report": "all", **vhr()}, "E_BAD_PARAM", "steering.report", "summary"),
    (vhr(alpha=NAN), "E_BAD_PARAM", "steering.methods[0].alpha", "finite"),
    (vhr(alpha=INF), "E_BAD_PARAM", "steering.methods[0].alpha", "finite"),
    (vhr(alpha=-0.5), "E_BAD_PARAM", "steering.methods[0].alpha", "-0.5"),
    (vhr(alpha=11), "E_BAD_PARAM", "steering.methods[0].alpha", "less than or equal to 10"),
    (vhr(alpha="2"), "E_BAD_PARAM", "steering.methods[0].alpha", "number"),
    (vhr(alpha=True), "E_BAD_PARAM", "steering.methods[0].alpha", "number"),
    (vhr(alpha=None), "E_BAD_PARAM", "steering.methods[0].alpha", "null"),
    (vhr(strength=1), "E_BAD_PARAM", "steering.methods[0].strength", "alpha"),
    (vhr(heads="auto"), "E_NO_IMAGE", "steering.methods[0]", "takes no images"),
    (vhr(layers=[1]), "E_BAD_PARAM", "steering.methods[0].layers", "nothing to choose"),
    (
        vhr(reinforce_baseline=True),
        "E_BAD_PARAM",
        "steering.methods[0].reinforce_baseline",
        "nothing to choose",
    ),
    (vhr(heads=[]), "E_BAD_PARAM", "steering.methods[0].heads", "selects no head"),
    (vhr(heads=[[1]]), "E_BAD_PARAM", "steering.methods[0].heads[0]", "2 items"),
    (vhr(heads=[[1, 2, 3]]), "E_BAD_PARAM", "steering.methods[0].heads[0]", "2 items"),
    (vhr(heads=[[1, 2.5]]), "E_BAD_PARAM", "steering.methods[0].heads[0][1]", "2.5"),
    (vhr(heads=[[1, 2], [1, 2]]), "E_BAD_PARAM", "steering.methods[0].heads[1]", "twice"),
    (vhr(heads=[[4, 0]]), "E_LAYER_RANGE", "steering.methods[0].heads[0][0]", "0 .. 3"),
    (vhr(heads=[[-1, 0]]), "E_LAYER_RANGE", "steering.methods[0].heads[0][0]", "0 .. 3"),
    (vhr(heads=[[0, 6]]), "E_HEAD_RANGE", "steering.methods[0].heads[0][1]", "0 .. 5"),
    (vhr(heads=[[0, 10**30]]), "E_HEAD_RANGE", "steering.methods[0].heads[0][1]", "0 .. 5"),
    (scale(), "E_BAD_PARAM", "steering.methods[0].scales", "selects no head"),
    (scale([0, 0]), "E_BAD_PARAM", "steering.methods[0].scales[0]", "required"),
    (scale([0, 0, 101]), "E_BAD_PARAM", "steering.methods[0].scales[0][2]", "100"),
    (scale([0, 0, -INF]), "E_BAD_PARAM", "steering.methods[0].scales[0][2]", "finite"),
    (scale([0, 9, 1.0]), "E_HEAD_RANGE", "steering.methods[0].scales[0][1]", "0 .. 5"),
    (
        {"methods": [{"method": "head_ablation", "heads": [[0, 0]], "mode": "mean"}]},
        "E_BAD_PARAM",
        "steering.methods[0].mode",
        "zero",
    ),
    ({"methods": [{"method": "head_ablation"}]}, "E_BAD_PARAM", "steering.methods[0].heads", "req"),
]


@pytest.mark.parametrize(("spec", "reason", "param", "words"), BAD)
@pytest.mark.parametrize("as_text", [False, True])
def test_bad_specs_are_refused(spec, reason, param, words, as_text):
    with pytest.raises(SteeringError) as caught:
        compile_spec(parse_spec(json.dumps(spec) if as_text else spec), GEOMETRY)
    error = caught.value
    assert (error.reason, error.param) == (reason, param)
    assert words in error.message


def test_text_that_is_not_json():
    with pytest.raises(SteeringError, match="steering: Invalid JSON"):
        parse_spec("{'methods': []}")


def test_oversize():
    with pytest.raises(SteeringError) as caught:
        parse_spec(vhr(heads=[[0, 0]] * MAX_SPEC_BYTES))
    assert caught.value.status == 413
    assert str(MAX_SPEC_BYTES) in caught.value.message


def test_the_root_of_the_path_is_the_carriage():
    with pytest.raises(SteeringError) as caught:
        parse_spec({"x": 1}, "vllm_xargs.steering")
    assert caught.value.param == "vllm_xargs.steering.x"


def test_statuses():
    statuses = {}
    for spec, reason, _, _ in BAD:
        with pytest.raises(SteeringError) as caught:
            compile_spec(parse_spec(spec), GEOMETRY)
        statuses[reason] = caught.value.status
    assert statuses.pop("E_PRESET_NOT_FOUND") == 404
    assert set(statuses.values()) == {400}
