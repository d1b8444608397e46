"""Activation steering from a vector profile: gact, caa and act, as requests ask for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headway.steering import ModelGeometry, SteeringError, compile_spec, parse_spec
from headway.steering.head_words import HeadField
from headway.steering.profiles import NamedProfiles
from headway.steering.program import (
    Feature,
    QueryScope,
    ResidualForm,
    ResidualSite,
    SteeringProgram,
)
from tests.vectors import drawn_profile

pytestmark = pytest.mark.unit

GEOMETRY = ModelGeometry(4, 4, 2, 8, 32, architecture="LlamaForCausalLM")
GACT, CAA, ACT = (drawn_profile(GEOMETRY, kind) for kind in ("gact", "caa", "act"))
INSIDE = drawn_profile(GEOMETRY, site=ResidualSite.AFTER_ATTENTION, seed=1)
FOREIGN = drawn_profile(ModelGeometry(5, 4, 2, 8, 32))
SERVED = replace(
    GEOMETRY,
    profiles=NamedProfiles(
        {"cpp": GACT, "polite": CAA, "shifts": ACT, "inside": INSIDE, "foreign": FOREIGN}
    ),
)


def compiled(*methods: dict[str, Any]) -> SteeringProgram:
    return compile_spec(parse_spec({"methods": list(methods)}), SERVED)


def gact(**options: Any) -> dict[str, Any]:
    return {"method": "gact", "profile": "cpp", **options}


def caa(**options: Any) -> dict[str, Any]:
    return {"method": "caa", "profile": "polite", **options}


def test_gact_adds_in_units_of_rms_what_the_probe_picks():
    program = compiled(gact(strength=2.5))
    assert [(edit.layer, edit.artifact) for edit in program.residual_edits] == [
        (layer, GACT.artifacts[layer].digest) for layer in (1, 2)
    ]
    for edit in program.residual_edits:
        assert (edit.strength, edit.cluster, edit.form) == (2.5, None, ResidualForm.RMS)
        assert edit.site is ResidualSite.BLOCK_OUTPUT
        assert edit.scope is QueryScope.FROM_LAST_PROMPT_TOKEN
    assert {each.digest for each in program.artifacts} == {
        each.digest for each in GACT.artifacts.values()
    }
    assert program.features == {Feature.RESIDUAL_EDIT}
    [applied] = program.applied
    assert applied.as_dict() == {
        "method": "gact",
        "profile": "cpp",
        "digest": f"sha256:{GACT.digest}",
        "strength": 2.5,
        "layers": [1, 2],
        "site": "block_output",
        "cluster": "auto",
        "scope": "from_last_prompt_token",
    }
    assert applied.profile == GACT.digest
    assert applied.scope is QueryScope.FROM_LAST_PROMPT_TOKEN


def test_the_profile_says_how_strong_where_the_request_does_not():
    strong = {kind: drawn_profile(GEOMETRY, kind, strength=7.5) for kind in ("gact", "caa", "act")}
    served = replace(GEOMETRY, profiles=NamedProfiles(strong))
    for kind in strong:
        for options, expected in (({}, 7.5), ({"strength": "profile"}, 7.5), ({"strength": 2}, 2)):
            spec = parse_spec({"methods": [{"method": kind, "profile": kind, **options}]})
            [applied] = compile_spec(spec, served).applied
            assert applied.details["strength"] == expected


def test_layers_cluster_scope_and_site():
    [edit] = compiled(gact(layers=[2], cluster=1, scope="all")).residual_edits
    assert (edit.layer, edit.cluster, edit.scope) == (2, 1, QueryScope.ALL)
    sites = {edit.site for edit in compiled(gact(profile="inside")).residual_edits}
    assert sites == {ResidualSite.AFTER_ATTENTION}


@pytest.mark.parametrize(("mode", "form"), [("add", "add"), ("remove", "remove")])
def test_caa_adds_or_removes_a_fixed_direction(mode, form):
    edits = compiled(caa(mode=mode, strength=-0.5)).residual_edits
    assert [edit.form for edit in edits] == [ResidualForm(form)] * 2
    assert [edit.strength for edit in edits] == [-0.5] * 2


def test_act_shifts_heads():
    [edit] = compiled({"method": "act", "profile": "shifts", "strength": 3.0}).head_edits
    shift = edit.words.dense_shift()
    for row, head in enumerate(ACT.header.heads):
        np.testing.assert_allclose(shift[head], 3.0 * ACT.tensors["shifts"][row], rtol=1e-6)
        shift[head] = 0
    assert not shift.any()
    assert edit.scope is QueryScope.FROM_LAST_PROMPT_TOKEN
    assert (edit.words.table[..., HeadField.SCALE] == 1).all()
    [one] = compiled({"method": "act", "profile": "shifts", "layers": [2]}).head_edits
    assert not one.words.dense_shift()[1].any() and one.words.dense_shift()[2].any()


@pytest.mark.parametrize(
    "method",
    [gact(strength=0.0), caa(strength=0), {"method": "act", "profile": "shifts", "strength": 0}],
)
def test_a_strength_of_zero_changes_nothing(method):
    program = compiled(method)
    assert program.is_identity and not program.artifacts
    assert program.applied[0].details["layers"] == [1, 2]


def test_the_fingerprint_is_that_of_the_vectors_and_of_how_they_are_used():
    variants = [
        gact(),
        gact(strength=2.0),
        gact(cluster=0),
        gact(layers=[1]),
        gact(scope="output"),
        gact(profile="inside"),
        caa(),
        caa(mode="remove"),
    ]
    assert len({compiled(each).fingerprint for each in variants}) == len(variants)
    renamed = replace(GEOMETRY, profiles=NamedProfiles({"other": GACT}))
    spec = parse_spec({"methods": [gact(profile="other")]})
    assert compile_spec(spec, renamed).fingerprint == compiled(gact()).fingerprint


def test_methods_go_together_where_they_edit_different_places():
    program = compiled(gact(layers=[2]), {"method": "act", "profile": "shifts"}, caa(layers=[1]))
    assert [edit.layer for edit in program.residual_edits] == [1, 2]
    assert len(program.head_edits) == 1
    swapped = compiled(caa(layers=[1]), {"method": "act", "profile": "shifts"}, gact(layers=[2]))
    assert swapped.fingerprint == program.fingerprint
    assert len(compiled(gact(), gact(profile="inside")).residual_edits) == 4


@pytest.mark.parametrize(
    ("method", "reason", "param", "words"),
    [
        (gact(profile="none"), "E_PROFILE_NOT_FOUND", "profile", "the profiles are: cpp, foreign"),
        (gact(profile="polite"), "E_BAD_PARAM", "profile", "of the kind caa, not gact"),
        (gact(profile="foreign"), "E_PROFILE_MISMATCH", "profile", "made for another model"),
        (gact(layers=[0]), "E_BAD_PARAM", "layers", r"nothing for layer 0; it has: \[1, 2\]"),
        (gact(layers=[9]), "E_LAYER_RANGE", "layers", "layer 9 does not exist"),
        (gact(layers=[]), "E_BAD_PARAM", "layers", "selects no layer"),
        (gact(cluster=3), "E_BAD_PARAM", "cluster", r"the profile has 0 \.\. 2"),
        (gact(cluster=-1), "E_BAD_PARAM", "cluster", "-1"),
        (gact(strength=101), "E_BAD_PARAM", "strength", "100"),
        (gact(scope="prompt"), "E_BAD_PARAM", "scope", "prompt"),
        (caa(cluster=0), "E_BAD_PARAM", "cluster", "unknown key"),
        (caa(mode="x"), "E_BAD_PARAM", "mode", "x"),
        (
            {"method": "act", "profile": "shifts", "layers": [3]},
            "E_BAD_PARAM",
            "layers",
            "no head in layer 3",
        ),
        ({"method": "act", "profile": "cpp"}, "E_BAD_PARAM", "profile", "gact, not act"),
        ({"method": "gact"}, "E_BAD_PARAM", "profile", "required"),
    ],
)
def test_what_does_not_fit_is_refused(method, reason, param, words):
    with pytest.raises(SteeringError, match=words) as caught:
        compiled(method)
    assert caught.value.reason == reason
    assert caught.value.param.startswith(f"steering.methods[0].{param}")


def test_two_methods_cannot_edit_one_place():
    with pytest.raises(
        SteeringError, match=r"caa and gact .*both edit the residual stream of layer 1"
    ):
        compiled(gact(), caa())
