"""The arms: what each asks for, what controls draw, and which are left out where."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from headway.benchmarks.quality.methods import (
    NAMES,
    Arm,
    Control,
    Settings,
    control_methods,
    left_out,
    named_arms,
    parse_arm,
    parse_value,
    read_vhd,
    sweep_arms,
)
from headway.steering import ModelGeometry, compile_spec, parse_spec

pytestmark = pytest.mark.unit

HEADS = [[1, 0], [1, 4], [3, 2], [3, 5], [3, 8]]
ECHO: dict[str, Any] = {"methods": [{"method": "vhr", "alpha": 1.5, "heads": HEADS}]}
CAPABILITIES = {"methods": {"vhr": {}, "locore": {}}, "model": {"num_layers": 4, "num_heads": 9}}


def drawn(control: Control, request: str = "a", **options: Any) -> list[list[int]]:
    (method,) = control_methods(control, request, ECHO, 9, **options)
    assert (method["method"], method["alpha"]) == ("vhr", 1.5)
    return method["heads"]


def test_random_heads_are_as_many_in_the_same_layers() -> None:
    heads = drawn(Control("random"))
    assert Counter(layer for layer, _ in heads) == {1: 2, 3: 3}
    assert len({tuple(head) for head in heads}) == 5
    assert all(0 <= head < 9 for _, head in heads)


def test_random_heads_follow_from_seed_and_request_alone() -> None:
    first = drawn(Control("random", seed=1))
    assert first == drawn(Control("random", seed=1))
    others = [drawn(Control("random", seed=seed), request) for seed in (1, 2) for request in "bc"]
    assert all(first != other for other in others)


def test_random_heads_are_drawn_evenly() -> None:
    found = Counter(
        head for number in range(900) for layer, head in drawn(Control("random"), str(number))
        if layer == 3
    )  # fmt: skip
    assert found.keys() == set(range(9))
    assert all(230 < times < 370 for times in found.values())  # 300 expected, sd 14


def test_the_lowest_heads_are_those_of_least_vhd() -> None:
    vhd = [[0.0] * 9, [5, 4, 3, 2, 1, 0, 6, 7, 8], [0.0] * 9, [1, 9, 1.5, 9, 9, 9, 9, 9, 0.5]]
    assert drawn(Control("lowest"), vhd=vhd) == [[1, 4], [1, 5], [3, 0], [3, 2], [3, 8]]
    with pytest.raises(ValueError, match="no VHD"):
        drawn(Control("lowest"))


@pytest.mark.parametrize(
    "echo",
    [
        None,
        {},
        {"methods": [{"method": "var"}]},
        {"methods": [{"method": "vhr", "heads": "auto"}]},
    ],
)
def test_an_answer_without_heads_has_no_control(echo: Any) -> None:
    with pytest.raises(ValueError, match="vhr name no heads"):
        control_methods(Control("random"), "a", echo, 9)


def test_named_arms() -> None:
    settings = Settings(vhr_alpha=1.5, vhr_layers=(1, 2), var={"sink_dims": [507]}, random_seeds=2)
    arms = {arm.name: arm for name in NAMES for arm in named_arms(name, settings)}
    vhr = {"method": "vhr", "alpha": 1.5, "heads": "auto", "layers": [1, 2]}
    assert arms["vhr"].methods == (vhr,)
    assert arms["vhr+locore"].methods == (vhr, {"method": "locore"})
    assert arms["var"].methods == ({"method": "var", "sink_dims": [507]},)
    assert arms["random 0"].control == Control("random", seed=0)
    assert arms["random 1"].control == Control("random", seed=1)
    assert arms["unsteered"] == Arm("unsteered")
    (plain,) = named_arms("vhr", Settings())
    assert plain.methods == ({"method": "vhr", "alpha": 2.0, "heads": "auto"},)


@pytest.mark.parametrize("name", ["vhr", "var", "locore", "vhr+locore", "sgrs"])
def test_what_named_arms_ask_for_is_a_valid_spec(name: str) -> None:
    settings = Settings(vhr_layers=(1, 2), var={"sink_dims": [507], "tau": 20})
    (arm,) = named_arms(name, settings)
    geometry = ModelGeometry(30, 9, 3, 64, 576, supports_images=True)
    spec = parse_spec({"methods": [dict(method) for method in arm.methods]})
    program = compile_spec(spec, geometry)
    assert [applied.method for applied in program.applied] == name.split("+")


def test_a_sweep_changes_one_parameter_of_an_arm() -> None:
    arms = [*named_arms("vhr", Settings()), *named_arms("locore", Settings())]
    swept = sweep_arms("locore.beta=0.1,1", arms)
    assert [arm.name for arm in swept] == ["locore beta=0.1", "locore beta=1"]
    assert [arm.methods[0]["beta"] for arm in swept] == [0.1, 1]
    (layers,) = sweep_arms("vhr.layers=1-3", arms)
    assert layers.methods[0]["layers"] == [1, 2, 3]
    for wrong in ("locore", "locore.beta", "locore.beta=", "var.p=1", ".=1"):
        with pytest.raises(ValueError, match="vhr, locore"):
            sweep_arms(wrong, arms)


def test_values_of_a_sweep() -> None:
    assert [parse_value(text) for text in ("1", "0.5", "true", "any", "2-4", "-1", "1e-3")] == [
        1, 0.5, True, "any", [2, 3, 4], -1, 1e-3,
    ]  # fmt: skip


def test_own_arms() -> None:
    assert parse_arm('mine=[{"method": "locore"}]') == Arm("mine", ({"method": "locore"},))
    for wrong in ("mine", "mine={}", "mine=[]", 'mine=[{"beta": 1}]', '=[{"method": "a"}]'):
        with pytest.raises(ValueError, match="mine|=" if wrong else ""):
            parse_arm(wrong)


def test_arms_are_left_out_with_the_reason() -> None:
    settings = Settings()
    (unsteered,) = named_arms("unsteered", settings)
    (vhr,) = named_arms("vhr", settings)
    (sgrs,) = named_arms("sgrs", settings)
    (lowest,) = named_arms("lowest", settings)
    assert left_out(unsteered, settings, None) is None
    assert "no Headway server" in (left_out(vhr, settings, None) or "")
    assert left_out(vhr, settings, CAPABILITIES) is None
    assert "no method sgrs" in (left_out(sgrs, settings, CAPABILITIES) or "")
    assert "--vhd" in (left_out(lowest, settings, CAPABILITIES) or "")
    fitting = Settings(vhd=((0.0,) * 9,) * 4)
    assert left_out(lowest, fitting, CAPABILITIES) is None
    assert "other sizes" in (left_out(lowest, Settings(vhd=((0.0,),)), CAPABILITIES) or "")


def test_the_vhd_is_read_from_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"kind": "heads", "vhd": [[1, 2.5], [0, 3]]}))
    assert read_vhd(path) == ((1.0, 2.5), (0.0, 3.0))
    for wrong in ("{", "{}", '{"vhd": []}', '{"vhd": [[1], [1, 2]]}', '{"vhd": 3}', "[]"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="vhd"):
            read_vhd(path)
