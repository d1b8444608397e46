"""The checks and the picture of the image demo; the demo itself is run by `make demo`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headway.benchmarks.quality.scenes import PARTNER, scene
from headway.server import image_demo
from headway.server.image_demo import ImageDemoError, check, picture

pytestmark = pytest.mark.unit

ECHO = {"positions_edited": 9, "methods": [{"heads": [[1, 0], [2, 3]]}]}
PLAIN: dict[str, Any] = {"text": "Yes.", "steering": None}
STEERED: dict[str, Any] = {"text": "No.", "steering": ECHO}


def test_it_asks_for_the_absent_partner_of_what_is_there() -> None:
    objects = scene(*image_demo.SCENE).objects
    assert image_demo.ABSENT not in objects and PARTNER[image_demo.ABSENT] in objects


def test_good_answers_pass() -> None:
    check(PLAIN, STEERED)


@pytest.mark.parametrize(
    ("plain", "steered", "problem"),
    [
        ({**PLAIN, "text": " "}, STEERED, "empty"),
        ({**PLAIN, "steering": ECHO}, STEERED, "claims"),
        (PLAIN, {**STEERED, "steering": None}, "lacks"),
        (PLAIN, {**STEERED, "steering": {**ECHO, "positions_edited": 0}}, "lacks"),
        (PLAIN, {**STEERED, "steering": {**ECHO, "methods": [{"heads": []}]}}, "lacks"),
    ],
)
def test_the_demo_fails_unless_heads_were_chosen(plain: Any, steered: Any, problem: str) -> None:
    with pytest.raises(ImageDemoError, match=problem):
        check(plain, steered)


def test_the_picture_shows_scene_and_answers() -> None:
    drawn = scene(*image_demo.SCENE)
    page = picture(drawn, [("Is there a fork?", "Yes.", "No.")], [2])
    zoom, margin = image_demo.ZOOM, image_demo.MARGIN
    shown = np.asarray(page)[margin:, margin:][: 96 * zoom : zoom, : 96 * zoom : zoom]
    assert np.array_equal(shown, np.asarray(drawn.image))
    beside = np.asarray(page)[:, 96 * zoom + 2 * margin :]
    assert (beside != 255).any()
    without = np.asarray(picture(drawn, [("Is there a fork?", "Yes.", "")], [2]))
    assert not np.array_equal(np.asarray(page), without)
