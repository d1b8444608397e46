"""What VAR, LocoRE, emphasis and the ablation modes compile to, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from headway.steering import ModelGeometry, SteeringError, SteeringProgram, compile_spec, parse_spec
from headway.steering.head_words import IDENTITY_WORD, HeadField, KeyTag
from headway.steering.methods.var import above
from headway.steering.program import QueryScope, Readout, SinkRule

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(32, 4, 2, 8, 64, supports_images=True, sink_dims=(3, 5))
F = HeadField


def compiled(*methods: dict, geometry: ModelGeometry = GEOMETRY, **spec) -> SteeringProgram:
    return compile_spec(parse_spec({"methods": list(methods), **spec}), geometry)


def refused(*methods: dict, geometry: ModelGeometry = GEOMETRY) -> SteeringError:
    with pytest.raises(SteeringError) as caught:
        compiled(*methods, geometry=geometry)
    return caught.value


def only_word(program: SteeringProgram, layer: int, head: int = 0) -> dict[HeadField, float]:
    """The fields of a word that are not the identity's."""
    (edit,) = program.head_edits
    word = edit.words.table[layer, head]
    return {field: float(word[field]) for field in F if word[field] != IDENTITY_WORD[field]}


def edited_layers(program: SteeringProgram) -> list[int]:
    (edit,) = program.head_edits
    return np.flatnonzero(edit.words.edited.any(axis=-1)).tolist()


def test_var_by_the_paper():
    program = compiled({"method": "var"})
    assert program.head_edits[0].scope is QueryScope.AFTER_IMAGE
    assert program.sink_rule == SinkRule((3, 5), 20.0)
    assert edited_layers(program) == list(range(2, 31))  # neither 0 and 1 nor the last
    assert only_word(program, 2) == {
        F.MOVED_SHARE: pytest.approx(0.6),
        F.MIN_IMAGE_MASS: pytest.approx(0.2),
        F.MIN_SHARE_B: 0.5,
        F.REQUIRE_A: KeyTag.SINK,
        F.REQUIRE_B: KeyTag.IMAGE,
        F.EXCLUDE_B: KeyTag.SINK,
    }
    assert program.applied[0].details["layers"] == list(range(2, 31))
    assert program.applied[0].attention_layers == 29


def test_var_as_the_released_code_does():
    program = compiled({"method": "var", "compat": "reference-code", "rho": 0.7, "p": 0.6})
    assert edited_layers(program) == list(range(2, 32))
    word = only_word(program, 31)
    assert word[F.MOVED_SHARE] == pytest.approx(0.4)  # its p is what is kept
    assert word[F.MIN_SHARE_B] == pytest.approx(0.3)  # its rho bounds the sinks' share
    assert word[F.MIN_IMAGE_MASS] > np.float32(0.2)  # strictly more
    assert word[F.MIN_IMAGE_REST] > 0  # an image without a sink is left alone
    assert program.sink_rule.tau > 20


def test_above_is_a_strict_comparison():
    value = np.float32(0.2)
    assert not value >= np.float32(above(0.2))
    assert np.nextafter(value, np.float32(1)) >= np.float32(above(0.2))


@pytest.mark.parametrize(
    "method",
    [
        {"method": "var", "p": 0.0},
        {"method": "var", "p": 1.0, "compat": "reference-code"},
        {"method": "locore", "beta": 0.0},
        {"method": "locore", "beta": 0.0, "renormalize": False},
        {"method": "emphasis", "spans": [{"tokens": [0, 2]}], "alpha": 1.0},
        {"method": "head_ablation", "heads": [[0, 0]], "mode": "identity", "u": 0.0},
    ],
)
def test_strength_zero_is_the_identity(method):
    program = compiled(method)
    assert program.is_identity and program.head_edits == () and program.features == frozenset()
    assert (program.sink_rule, program.marks) == (None, ())


def test_locore_renormalised_is_a_bias():
    program = compiled({"method": "locore"})
    assert program.head_edits[0].scope is QueryScope.OUTPUT
    assert edited_layers(program) == list(range(9, 15))
    assert only_word(program, 9, 3) == {
        F.BIAS_B: pytest.approx(math.log(1.15)),
        F.REQUIRE_B: KeyTag.OUTPUT,
        F.WINDOW_B: 8,
    }


def test_locore_unnormalised_is_a_gain_and_any_history_asks_for_no_tag():
    program = compiled(
        {"method": "locore", "renormalize": False, "history": "any", "heads": [[3, 1]], "window": 2}
    )
    assert edited_layers(program) == [3]
    assert only_word(program, 3, 1) == {F.GAIN_B: pytest.approx(1.15), F.WINDOW_B: 2}
    assert program.applied[0].details["heads"] == [[3, 1]]


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(32, range(9, 15)), (30, range(8, 14)), (80, range(22, 36)), (4, [1, 2])],
)
def test_default_layers_scale_with_depth(num_layers, layers):
    program = compiled({"method": "locore"}, geometry=replace(GEOMETRY, num_layers=num_layers))
    assert edited_layers(program) == list(layers)


def test_emphasis_is_a_bias_on_the_rest_of_the_prompt():
    program = compiled({"method": "emphasis", "spans": [{"tokens": [0, 2]}], "layers": [1, 4]})
    assert program.head_edits[0].scope is QueryScope.ALL
    assert edited_layers(program) == [1, 4]
    assert only_word(program, 4) == {
        F.BIAS_A: pytest.approx(math.log(0.01)),
        F.EXCLUDE_A: KeyTag.EMPHASISED | KeyTag.OUTPUT,
    }
    assert len(program.marks) == 1


@pytest.mark.parametrize(
    ("mode", "fields"),
    [
        ({"mode": "zero"}, {F.SCALE: 0.0}),
        ({"mode": "uniform"}, {F.GAMMA: 0.0}),
        ({"mode": "identity"}, {F.IDENTITY_MIX: 1.0}),
        ({"mode": "identity", "u": 0.25}, {F.IDENTITY_MIX: 0.25}),
    ],
)
def test_ablation_modes(mode, fields):
    program = compiled({"method": "head_ablation", "heads": [[5, 2]], **mode})
    assert only_word(program, 5, 2) == fields


def test_vhr_locore_and_emphasis_compose():
    program = compiled(
        {"method": "vhr", "heads": [[9, 0]], "alpha": 2.0},
        {"method": "locore"},
        {"method": "emphasis", "spans": [{"tokens": [0, 2]}]},
    )
    scopes = {edit.scope: edit.words for edit in program.head_edits}
    assert set(scopes) == {QueryScope.ALL, QueryScope.OUTPUT}
    word = scopes[QueryScope.ALL].then(scopes[QueryScope.OUTPUT]).table[9, 0]
    assert word[F.SCALE] == 2.0
    assert word[F.BIAS_A] == pytest.approx(math.log(0.01))
    assert word[F.BIAS_B] == pytest.approx(math.log(1.15))
    assert (word[F.EXCLUDE_A], word[F.REQUIRE_B], word[F.WINDOW_B]) == (12, 8, 8)


def test_biases_of_one_class_add_and_gammas_multiply():
    program = compiled({"method": "locore"}, {"method": "locore", "beta": 0.5})
    assert only_word(program, 9)[F.BIAS_B] == pytest.approx(math.log(1.15) + math.log(1.5))
    uniform = {"method": "head_ablation", "heads": [[9, 0]], "mode": "uniform"}
    word = only_word(compiled(uniform, {"method": "vhr", "heads": [[9, 0]], "alpha": 3.0}), 9)
    assert word == {F.GAMMA: 0.0, F.SCALE: 3.0}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"method": "var"}, {"method": "locore"}),
        ({"method": "var"}, {"method": "var", "p": 0.5}),
        ({"method": "var"}, {"method": "emphasis", "spans": [{"tokens": [0, 2]}]}),
        ({"method": "var"}, {"method": "head_ablation", "heads": [[5, 0]], "mode": "identity"}),
        ({"method": "locore"}, {"method": "locore", "window": 4}),
        (
            {"method": "locore", "renormalize": False},
            {"method": "locore", "renormalize": False},
        ),
        (
            {"method": "emphasis", "spans": [{"tokens": [0, 2]}]},
            {"method": "emphasis", "spans": [{"tokens": [0, 3]}]},
        ),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_methods_that_redistribute_the_same_rows_conflict(first, second, swap):
    pair = (second, first) if swap else (first, second)
    error = refused(*pair)
    assert (error.reason, error.param) == ("E_CONFLICT", "steering.methods[1]")
    assert "steering.methods[0]" in error.message
    assert first["method"] in error.message and second["method"] in error.message


def test_the_same_methods_on_other_layers_do_not_conflict():
    program = compiled({"method": "var", "layers": [2, 3]}, {"method": "locore", "layers": [9]})
    assert len(program.head_edits) == 2


TEXT_ONLY = replace(GEOMETRY, supports_images=False)


@pytest.mark.parametrize(
    ("method", "geometry", "reason", "param", "words"),
    [
        ({"method": "var"}, TEXT_ONLY, "E_NO_IMAGE", "", "takes no images"),
        (
            {"method": "var"},
            replace(GEOMETRY, sink_dims=()),
            "E_NO_SINK_DIMS",
            ".sink_dims",
            "calibrate",
        ),
        ({"method": "var", "sink_dims": [64]}, GEOMETRY, "E_BAD_PARAM", ".sink_dims[0]", "0 .. 63"),
        ({"method": "var", "layers": [2, 40]}, GEOMETRY, "E_LAYER_RANGE", ".layers[1]", "0 .. 31"),
        ({"method": "var", "layers": []}, GEOMETRY, "E_BAD_PARAM", ".layers", "no layer"),
        ({"method": "var", "p": 1.5}, GEOMETRY, "E_BAD_PARAM", ".p", "1.5"),
        ({"method": "var", "compat": "code"}, GEOMETRY, "E_BAD_PARAM", ".compat", "reference-code"),
        ({"method": "locore", "window": 0}, GEOMETRY, "E_BAD_PARAM", ".window", "0"),
        ({"method": "locore", "beta": -1.0}, GEOMETRY, "E_BAD_PARAM", ".beta", "-1"),
        ({"method": "locore", "layers": [3, 3]}, GEOMETRY, "E_BAD_PARAM", ".layers[1]", "twice"),
        (
            {"method": "locore", "heads": [[0, 0]], "layers": [0]},
            GEOMETRY,
            "E_BAD_PARAM",
            ".layers",
            "leave",
        ),
        (
            {"method": "locore", "heads": [[0, 9]]},
            GEOMETRY,
            "E_HEAD_RANGE",
            ".heads[0][1]",
            "0 .. 3",
        ),
        ({"method": "emphasis", "spans": []}, GEOMETRY, "E_BAD_PARAM", ".spans", ""),
        (
            {"method": "emphasis", "spans": [{"tokens": [0, 1]}], "alpha": 0.0},
            GEOMETRY,
            "E_BAD_PARAM",
            ".alpha",
            "greater than 0",
        ),
        (
            {"method": "head_ablation", "heads": [[0, 0]], "mode": "uniform", "u": 0.5},
            GEOMETRY,
            "E_BAD_PARAM",
            ".u",
            "identity",
        ),
    ],
)
def test_errors_name_the_field_the_value_and_the_range(method, geometry, reason, param, words):
    error = refused(method, geometry=geometry)
    assert (error.reason, error.param) == (reason, f"steering.methods[0]{param}")
    assert words in error.message


def test_a_full_report_reads_masses_where_attention_is_edited_and_changes_no_fingerprint():
    plain = compiled({"method": "locore"})
    full = compiled({"method": "locore"}, report="full")
    assert full.readouts == (Readout.CLASS_MASSES,) and plain.readouts == ()
    assert full.fingerprint == plain.fingerprint
    assert compiled({"method": "vhr", "heads": [[0, 0]]}, report="full").readouts == ()
