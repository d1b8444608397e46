"""The demo's checks and its output; the demo itself is run by `make demo`."""

from __future__ import annotations

from typing import Any

import pytest

from headway.server.demo import Answer, DemoError, check, echo_lines, side_by_side

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
