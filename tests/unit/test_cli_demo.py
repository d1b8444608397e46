"""The demo's checks and its output; the demo itself is run by `make demo`."""

from __future__ import annotations

from typing import Any

import pytest

from headway.server import vector_demo
from headway.server.demo import Answer, DemoError, check, echo_lines, side_by_side
from headway.steering import ModelGeometry
from headway.steering.vectors import VectorProfile

pytestmark = pytest.mark.unit

ECHO: dict[str, Any] = {
    "fingerprint": "0123456789abcdef0123",
    "methods": [{"method": "vhr", "alpha": 2.0, "layers": [1, 2], "heads": [[1, 0], [2, 0]]}],
    "positions_edited": 7,
    "positions_computed": 7,
}
GOOD = [Answer("unsteered", "plain words"), Answer("steered", "other words", ECHO)]


def test_columns_keep_their_width_and_all_words() -> None:
    answers = [Answer("plain", "one two three " * 9), Answer("a rather long title", "short", ECHO)]
    lines = side_by_side(answers, 60).splitlines()
    assert max(map(len, lines)) <= 60
    assert lines[0].split() == ["PLAIN", "A", "RATHER", "LONG", "TITLE"]
    words = " ".join(line[:30] for line in lines[2:]).replace("short", "").split()
    assert words == ["one", "two", "three"] * 9


def test_the_echo_names_fingerprint_method_and_positions() -> None:
    shown = echo_lines(ECHO, 80)
    assert "0123456789abcdef" in shown
    assert "7 edited of 7 computed" in shown
    assert "vhr, alpha 2.0, 2 heads in layers 1, 2" in shown
    assert all(len(line) <= 40 for line in echo_lines(ECHO, 40).splitlines())


def test_good_answers_pass() -> None:
    check(GOOD)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([GOOD[0], Answer("steered", "plain words", ECHO)], "equals"),
        ([GOOD[0], Answer("steered", "other words")], "lacks the report"),
        ([GOOD[0], Answer("s", "other", {**ECHO, "positions_edited": 0})], "lacks the report"),
        ([Answer("unsteered", "plain", ECHO), GOOD[1]], "claims"),
        ([Answer("unsteered", " "), GOOD[1]], "empty"),
    ],
)
def test_the_demo_fails_unless_steering_is_seen(answers: list[Answer], problem: str) -> None:
    with pytest.raises(DemoError, match=problem):
        check(answers)


VOUCHED = {"text": "#include <cmath>", "steering": {**ECHO, "positions_edited": 3}}
PLAIN = {"text": "def f():", "steering": None}


def test_the_coding_question_shows_both_answers(capsys: pytest.CaptureFixture[str]) -> None:
    vector_demo.check(PLAIN, VOUCHED)
    method = {"method": "gact", "profile": "prefer-cpp", "strength": 2.4, "layers": [12, 14]}
    vector_demo.show(PLAIN, {**VOUCHED, "steering": {"methods": [method]}})
    shown = capsys.readouterr().out
    assert "def f():" in shown and "#include <cmath>" in shown
    assert "profile prefer-cpp, strength 2.4, layers 12, 14" in shown


@pytest.mark.parametrize(
    ("plain", "steered", "problem"),
    [
        ({**PLAIN, "steering": ECHO}, VOUCHED, "claims"),
        (PLAIN, {**VOUCHED, "steering": None}, "lacks the report"),
        (PLAIN, {**VOUCHED, "steering": {**ECHO, "positions_edited": 0}}, "lacks the report"),
        (PLAIN, {**VOUCHED, "text": PLAIN["text"]}, "equals"),
    ],
)
def test_the_coding_question_fails_unless_steering_is_seen(
    plain: dict[str, Any], steered: dict[str, Any], problem: str
) -> None:
    with pytest.raises(vector_demo.VectorDemoError, match=problem):
        vector_demo.check(plain, steered)


def test_the_profile_of_the_demo_fits_smollm2() -> None:
    profile = VectorProfile.load(vector_demo.PROFILE)
    profile.check_model(ModelGeometry(30, 9, 3, 64, 576, architecture="LlamaForCausalLM"))
    assert profile.kind == "gact" and profile.header.licence == "Apache-2.0"
