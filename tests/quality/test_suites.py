"""What is asked: question sets of the drawn scenes, POPE's files, COCO's pictures."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from headway.benchmarks.quality.scenes import OBJECTS, PARTNER, scene
from headway.benchmarks.quality.suites import (
    Picture,
    Suite,
    coco_suite,
    only_focus,
    pope_suite,
    scene_suite,
    without_sets,
)

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module", params=["counter", "prior"])
def suite(request: pytest.FixtureRequest) -> Suite:
    return scene_suite(request.param, 30)


def asked(suite: Suite, picture: str, question_set: str) -> dict[bool, list[str]]:
    """The objects of a set's questions by what is true."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for question in suite.questions:
        if question.picture == picture and question_set in question.sets:
            name = question.text.removeprefix("Is there a ").removesuffix(" in the image?")
            found[question.truth].append(name)
    return found


@pytest.mark.parametrize("question_set", ["random", "popular", "adversarial"])
def test_every_set_asks_for_all_present_and_as_many_absent_objects(
    suite: Suite, question_set: str
) -> None:
    for name, picture in suite.pictures.items():
        objects = asked(suite, name, question_set)
        assert set(objects[True]) == picture.objects and picture.objects
        assert len(objects[False]) == len(set(objects[False])) == len(picture.objects)
        assert not picture.objects & set(objects[False])


def test_partners_are_asked_for_by_two_sets_and_not_by_chance(suite: Suite) -> None:
    for name, picture in suite.pictures.items():
        partners = {PARTNER[each] for each in picture.objects} - picture.objects
        assert set(asked(suite, name, "partner")[False]) == partners
        assert partners <= set(asked(suite, name, "adversarial")[False])
        assert not partners & set(asked(suite, name, "random")[False])


def test_popular_objects_are_the_most_frequent_absent_ones(suite: Suite) -> None:
    frequency = Counter(each for picture in suite.pictures.values() for each in picture.objects)
    for name, picture in suite.pictures.items():
        chosen = asked(suite, name, "popular")[False]
        left = set(OBJECTS) - picture.objects - set(chosen)
        assert min(frequency[each] for each in chosen) >= max(frequency[each] for each in left)


def test_no_question_is_asked_twice(suite: Suite) -> None:
    keys = [(question.picture, question.text) for question in suite.questions]
    assert len(keys) == len(set(keys))


def test_scenes_and_questions_are_the_same_every_time_and_begin_where_asked() -> None:
    one, other = scene_suite("counter", 3, first=7), scene_suite("counter", 3, first=7)
    assert list(one.pictures) == ["counter/7", "counter/8", "counter/9"]
    assert one.questions == other.questions
    assert one.questions != scene_suite("counter", 3, first=7, seed=1).questions
    expected = scene("test_counter", 7)
    assert one.pictures["counter/7"].objects == set(expected.objects)
    data = base64.b64decode(one.pictures["counter/7"].url.removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).tobytes() == expected.image.tobytes()


def test_a_set_can_be_left_out_with_the_questions_only_it_has(suite: Suite) -> None:
    less = without_sets(suite, frozenset({"popular", "random"}))
    assert less.sets == ["partner", "adversarial"] and suite.sets[0] == "partner"
    assert 0 < len(less.questions) < len(suite.questions)
    for name in less.pictures:
        assert asked(less, name, "adversarial") == asked(suite, name, "adversarial")


def test_the_focus_alone_leaves_pictures_with_something_to_deny() -> None:
    suite = scene_suite("prior", 40)
    less = only_focus(suite)
    assert less.sets == ["partner"] and not less.captioned
    lacking = {
        name
        for name, picture in suite.pictures.items()
        if any(PARTNER[each] not in picture.objects for each in picture.objects)
    }
    assert 0 < len(lacking) < 40 and set(less.pictures) == lacking
    for name in lacking:
        assert asked(less, name, "partner") == asked(suite, name, "partner")


# Data sets


def pope_files(folder: Path) -> list[Path]:
    rows: dict[str, list[dict[str, Any]]] = {
        "coco_pope_random": [
            {"question_id": 1, "image": "a.png", "text": "Is there a cat?", "label": "yes"},
            {"question_id": 2, "image": "a.png", "text": "Is there a car?", "label": "no"},
        ],
        "coco_pope_adversarial": [
            {"question_id": 1, "image": "a.png", "text": "Is there a cat?", "label": "yes"},
            {"question_id": 2, "image": "b.jpg", "text": "Is there a dog?", "label": "no"},
        ],
        "coco_pope_popular": [],
    }
    paths = []
    for name, lines in rows.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (4, 4), "red").save(folder / "a.png")
    Image.new("RGB", (4, 4), "blue").save(folder / "b.jpg")
    return paths


def test_popes_files(tmp_path: Path) -> None:
    suite = pope_suite(pope_files(tmp_path), tmp_path)
    assert suite.focus == "coco_pope_adversarial"
    assert suite.sets == ["coco_pope_adversarial", "coco_pope_random"]
    assert len(suite.questions) == 3  # one is in both files and asked once
    shared = next(each for each in suite.questions if "cat" in each.text)
    assert shared.truth and shared.sets == {"coco_pope_random", "coco_pope_adversarial"}
    assert suite.pictures["b.jpg"].url.startswith("data:image/jpeg;base64,")
    assert list(pope_suite(pope_files(tmp_path), tmp_path, 1).pictures) == ["a.png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3"),
        ('{"image": "a.png", "text": "?"}', "line 3: KeyError"),
        ('{"image": "a.png", "text": "?", "label": "maybe"}', "a label is yes or no"),
        ('{"image": "a.png", "text": "Is there a cat?", "label": "no"}', "otherwise before"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    paths = pope_files(tmp_path)
    paths[0].write_text(paths[0].read_text() + line)
    with pytest.raises(ValueError, match=message):
        pope_suite(paths, tmp_path)


def test_a_missing_picture_is_found_before_anything_is_asked(tmp_path: Path) -> None:
    paths = pope_files(tmp_path)
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no picture .*b.jpg"):
        pope_suite(paths, tmp_path)


def test_coco_pictures(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(5)]
    data = {
        "images": images,
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": number, "category_id": 1} for number in range(5)],
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    (tmp_path / "synonyms.txt").write_text("cat, kitten\ndog, puppy\n")
    for image in images:
        Image.new("L", (4, 4)).save(tmp_path / image["file_name"])
    files = ([tmp_path / "instances.json"], tmp_path / "synonyms.txt", tmp_path)
    suite = coco_suite(*files, count=3, seed=1)
    assert len(suite.pictures) == 3 and suite.captioned == list(suite.pictures)
    assert all(picture.objects == {"cat"} for picture in suite.pictures.values())
    assert suite.matcher.mentions("Two kittens") == ["cat"]
    assert list(coco_suite(*files, count=3, seed=1).pictures) == list(suite.pictures)
    assert len(coco_suite(*files, count=99).pictures) == 5


def test_a_picture_of_another_format_becomes_png(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "green").save(tmp_path / "a.bmp")
    url = Picture("a", tmp_path / "a.bmp").url
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (0, 128, 0)
