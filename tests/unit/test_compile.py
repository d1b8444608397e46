"""Compilation: what methods mean, how they compose, when two programs are the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.steering import ModelGeometry, SteeringError, compile_spec, parse_spec
from headway.steering.head_words import HeadField, HeadWords, index_shifts
from headway.steering.profiles import NamedProfiles
from headway.steering.program import Feature, HeadEdit, SteeringProgram
from headway.steering.wire import decode_program, encode_program
from tests.vectors import drawn_profile

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(num_layers=4, num_heads=6, num_kv_heads=2, head_size=8, hidden_size=48)

heads = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=8, unique=True
)


def compiled(*methods, **options):
    return compile_spec(parse_spec({"methods": list(methods), **options}), GEOMETRY)


def scales_of(program: SteeringProgram) -> np.ndarray:
    """float32 [layers, heads]: the scale of every head, 1 where it is not edited."""
    if not program.head_edits:
        return np.ones((GEOMETRY.num_layers, GEOMETRY.num_heads), np.float32)
    (edit,) = program.head_edits
    return edit.words.table[..., HeadField.SCALE]


@given(heads, st.floats(0, 10, width=32))
def test_vhr_scales_the_chosen_heads_and_no_other(chosen, alpha):
    scales = scales_of(
        compiled({"method": "vhr", "heads": [list(head) for head in chosen], "alpha": alpha})
    )
    for layer in range(4):
        for head in range(6):
            expected = np.float32(alpha) if (layer, head) in chosen else 1.0
            assert scales[layer, head] == expected


def test_ablation_is_scale_zero():
    scales = scales_of(compiled({"method": "head_ablation", "heads": [[3, 5]]}))
    assert scales[3, 5] == 0
    assert scales.sum() == 4 * 6 - 1


def test_methods_compose_by_multiplication():
    scales = scales_of(
        compiled(
            {"method": "vhr", "heads": [[0, 0], [1, 1]], "alpha": 3.0},
            {"method": "head_scale", "scales": [[1, 1, 0.5], [2, 2, -1.0]]},
            {"method": "head_ablation", "heads": [[2, 2]]},
        )
    )
    assert scales[0, 0] == 3.0
    assert scales[1, 1] == 1.5
    assert scales[2, 2] == 0.0


def test_shifts_are_added_after_all_scales():
    rng = np.random.default_rng(0)

    def drawn() -> HeadWords:
        words = HeadWords.identity(GEOMETRY)
        words.table[..., HeadField.SCALE] = rng.normal(size=(4, 6))
        shift = rng.normal(size=(4, 6, 8)).astype(np.float32)
        shift[rng.random((4, 6)) < 0.5] = 0
        words.table[..., HeadField.SHIFT_INDEX], shifts = index_shifts(shift)
        return HeadWords(words.table, shifts)

    first, second = drawn(), drawn()
    for both in (first.then(second), second.then(first)):
        scales = first.table[..., HeadField.SCALE] * second.table[..., HeadField.SCALE]
        np.testing.assert_array_equal(both.table[..., HeadField.SCALE], scales)
        shift = first.dense_shift() + second.dense_shift()
        np.testing.assert_array_equal(both.dense_shift(), shift)


SHIFTS = drawn_profile(GEOMETRY, "act", layers=(1,))
WITH_SHIFTS = replace(GEOMETRY, profiles=NamedProfiles({"shifts": SHIFTS}))


@pytest.mark.parametrize("scope", ["all", "output", "from_last_prompt_token"])
def test_the_order_of_shifts_and_scales_does_not_matter(scope):
    """Nor do the names of their scopes, by which the workers compose them."""
    methods = [
        {"method": "act", "profile": "shifts", "strength": 1.0, "scope": scope},
        {"method": "vhr", "heads": [[1, 0]], "alpha": 2.0},
    ]
    one, other = (
        compile_spec(parse_spec({"methods": given}), WITH_SHIFTS)
        for given in (methods, methods[::-1])
    )
    assert one.fingerprint == other.fingerprint
    both = reduce(HeadWords.then, [edit.words for edit in one.head_edits])
    assert both.table[1, 0, HeadField.SCALE] == 2.0
    np.testing.assert_array_equal(both.dense_shift()[1, 0], SHIFTS.tensors["shifts"][0])


@pytest.mark.parametrize(
    "silent",
    [
        {"method": "head_ablation", "heads": [[1, 1]]},
        {"method": "head_scale", "scales": [[1, 1, 0.0]]},
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_a_head_is_not_silenced_and_shifted(silent, swap):
    act = {"method": "act", "profile": "shifts", "scope": "output"}
    pair = [act, silent] if swap else [silent, act]
    with pytest.raises(SteeringError, match="silences layer 1, head 1") as caught:
        compile_spec(parse_spec({"methods": pair}), WITH_SHIFTS)
    assert (caught.value.reason, caught.value.param) == ("E_CONFLICT", "steering.methods[1]")
    compile_spec(parse_spec({"methods": [{**act, "strength": 0.0}, silent]}), WITH_SHIFTS)


@pytest.mark.parametrize(("alpha", "edits"), [(1.0, False), (2.0, True)])
def test_a_method_tells_whether_it_changes_anything(alpha, edits):
    methods = [{"method": "vhr", "heads": [[0, 0]], "alpha": alpha}]
    methods.append({"method": "act", "profile": "shifts", "strength": alpha - 1.0})
    program = compile_spec(parse_spec({"methods": methods}), WITH_SHIFTS)
    assert [applied.edits for applied in program.applied] == [edits, edits]


def test_attention_edits_are_a_feature_of_their_own():
    words = HeadWords.identity(GEOMETRY)
    words.table[0, 0, HeadField.GAMMA] = 0.0
    assert not words.is_affine
    assert SteeringProgram((HeadEdit(words),)).features == {Feature.ATTENTION_EDIT}


@pytest.mark.parametrize(
    "methods",
    [
        [{"method": "vhr", "heads": [[1, 1]], "alpha": 1.0}],
        [{"method": "head_scale", "scales": [[0, 0, 1]]}],
        [
            {"method": "head_scale", "scales": [[0, 0, 2.0]]},
            {"method": "head_scale", "scales": [[0, 0, 0.5]]},
        ],
    ],
)
def test_strength_zero_is_the_identity(methods):
    program = compiled(*methods)
    assert program.is_identity
    assert program.head_edits == ()
    assert program.features == frozenset()
    assert [applied.method for applied in program.applied] == [m["method"] for m in methods]


def test_fingerprint_is_of_the_edit_not_of_its_wording():
    one = compiled({"method": "vhr", "heads": [[1, 2], [0, 3]], "alpha": 2})
    other = compiled(
        {"method": "head_scale", "scales": [[0, 3, 2.0]]},
        {"method": "vhr", "heads": [[1, 2]]},
        report="none",
    )
    assert one.fingerprint == other.fingerprint
    assert len(one.fingerprint) == 64


def test_negative_zero_is_zero():
    one = compiled({"method": "head_scale", "scales": [[0, 0, 0.0]]})
    other = compiled({"method": "head_scale", "scales": [[0, 0, -0.0]]})
    assert one.fingerprint == other.fingerprint


@given(heads, heads, st.floats(0, 10, width=32), st.floats(0, 10, width=32))
def test_fingerprints_differ_where_edits_do(first, second, alpha, beta):
    one = compiled({"method": "vhr", "heads": [list(h) for h in first], "alpha": alpha})
    other = compiled({"method": "vhr", "heads": [list(h) for h in second], "alpha": beta})
    same = np.array_equal(scales_of(one), scales_of(other))
    assert (one.fingerprint == other.fingerprint) == same


def test_fingerprint_sees_shifts_and_scope():
    words = HeadWords.identity(GEOMETRY)
    words.table[0, 0, HeadField.SHIFT_INDEX] = 0
    shifts = np.ones((1, 8), np.float32)
    base = SteeringProgram((HeadEdit(HeadWords(words.table, shifts)),))
    other = SteeringProgram((HeadEdit(HeadWords(words.table, 2 * shifts)),))
    assert base.fingerprint != other.fingerprint
    assert base.fingerprint != SteeringProgram(()).fingerprint


@given(heads, st.floats(-100, 100, width=32))
def test_wire_keeps_everything(chosen, scale):
    program = compiled({"method": "head_scale", "scales": [[*head, scale] for head in chosen]})
    wire = encode_program(program)
    edits = decode_program(wire, GEOMETRY).head_edits
    assert SteeringProgram(edits).fingerprint == program.fingerprint == wire["fingerprint"]


def test_wire_for_another_model_does_not_decode():
    wire = encode_program(compiled({"method": "vhr", "heads": [[3, 5]]}))
    small = ModelGeometry(num_layers=2, num_heads=2, num_kv_heads=2, head_size=8, hidden_size=16)
    with pytest.raises(IndexError):
        decode_program(wire, small)


def test_presets():
    presets = {"strong": [{"method": "vhr", "heads": [[0, 0]], "alpha": 4.0}]}
    spec = parse_spec({"preset": "strong"})
    program = compile_spec(spec, GEOMETRY, presets)
    assert program.fingerprint == compiled(*presets["strong"]).fingerprint


def test_programs_and_specs_survive_deepcopy_unchanged():
    spec = parse_spec({"methods": [{"method": "vhr", "heads": [[0, 0]]}]})
    program = compile_spec(spec, GEOMETRY)
    assert copy.deepcopy({"a": spec, "b": program}) == {"a": spec, "b": program}
    assert copy.deepcopy(program) is program


def test_echo_tells_what_was_applied():
    (applied,) = compiled({"method": "vhr", "heads": [[2, 1], [0, 3]]}).applied
    assert applied.as_dict() == {
        "method": "vhr",
        "alpha": 2.0,
        "layers": [0, 2],
        "heads": [[0, 3], [2, 1]],
        "scope": "all",
    }
