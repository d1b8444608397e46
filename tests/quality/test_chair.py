"""CHAIR: finding objects in captions, the counts, and a small data set in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headway.benchmarks.quality import chair, coco
from headway.benchmarks.quality.chair import ObjectMatcher, plurals
from headway.benchmarks.quality.intervals import draws, interval

pytestmark = pytest.mark.unit

SYNONYMS = """\
person, girl, boy, man, woman, baby, passenger, child, fireman
dog, puppy
hot dog, hotdog
bear
train, locomotive
toilet
chair, seat, stool
knife, pocketknife
mouse
sheep, lamb
bus, minibus
cell phone, mobile phone, phone
tie

"""


@pytest.fixture
def synonyms(tmp_path: Path) -> Path:
    path = tmp_path / "synonyms.txt"
    path.write_text(SYNONYMS)
    return path


@pytest.fixture
def matcher(synonyms: Path) -> ObjectMatcher:
    return coco.coco_matcher(coco.read_synonyms(synonyms))


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("A man eats a hot dog.", ["person", "hot dog"]),
        ("Two hot dogs and two dogs", ["hot dog", "dog"]),
        ("a hot-dog near the dog", ["hot dog", "dog"]),
        ("Three women, children and firemen", ["person"] * 3),
        ("knives, mice, buses, sheep", ["knife", "mouse", "bus", "sheep"]),
        ("A baby bear sees a baby", ["bear", "person"]),
        ("adult dogs; a passenger train and its passengers", ["dog", "train", "person"]),
        ("a toilet seat by a seat", ["toilet", "chair"]),
        ("a bow tie", ["tie"]),
        ("the catcher stands at home plate", []),
        ("a mobile phone, a phone", ["cell phone", "cell phone"]),
        ("mandatory, chairman, busy: parts of words are none", []),
        ("", []),
    ],
)
def test_objects_are_found_by_whole_words(
    matcher: ObjectMatcher, text: str, objects: list[str]
) -> None:
    assert matcher.mentions(text) == objects


def test_a_listed_word_is_no_plural_of_another() -> None:
    matcher = ObjectMatcher([["glass"], ["spectacles", "glasses"]])
    assert matcher.mentions("glasses and a glass") == ["spectacles", "glass"]


def test_a_word_for_two_objects_is_refused() -> None:
    with pytest.raises(ValueError, match="'mouse' stands for 'animal' and 'device'"):
        ObjectMatcher([["animal", "mouse"], ["device", "mouse"]])


@pytest.mark.parametrize(
    ("singular", "plural"),
    [
        ("cup", "cups"),
        ("bench", "benches"),
        ("berry", "berries"),
        ("boy", "boys"),
        ("knife", "knives"),
        ("potato", "potatoes"),
        ("traffic light", "traffic lights"),
        ("police woman", "police women"),
        ("salesperson", "salespeople"),
    ],
)
def test_plurals(singular: str, plural: str) -> None:
    assert plural in plurals(singular)


def test_the_demo_objects_are_told_apart() -> None:
    from headway.benchmarks.quality.scenes import OBJECTS, caption

    matcher = ObjectMatcher([[name] for name in OBJECTS])
    assert matcher.mentions(caption(OBJECTS)) == OBJECTS


def test_counts_and_measures_by_hand() -> None:
    rows = [
        # two forks (there), a knife (not there): 3 mentions, 1 of them wrong, 1 of 2 objects named
        chair.count("A fork, a fork and a knife.", ["fork", "fork", "knife"], {"fork", "cup"}),
        chair.count("Nothing here", [], {"car"}),
        chair.count("A tree", ["tree"], {"tree"}),
    ]
    assert rows == [[1, 1, 3, 1, 1, 2, 7], [1, 0, 0, 0, 0, 1, 2], [1, 0, 1, 0, 1, 1, 2]]
    table = np.array(rows, float)
    found = {
        name: interval(chair.statistic(name, table), draws(3)).value for name in chair.MEASURES
    }
    expected = {"chair_s": 1 / 3, "chair_i": 1 / 4, "recall": 2 / 4, "words": 11 / 3}
    assert found == pytest.approx(expected)


# COCO's files


def coco_files(folder: Path) -> tuple[Path, Path]:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2, 3)]
    instances: dict[str, Any] = {
        "images": images,
        "categories": [
            {"id": 5, "name": "person"},
            {"id": 7, "name": "cell phone"},
            {"id": 9, "name": "zebra"},
        ],
        "annotations": [
            {"image_id": 1, "category_id": 5},
            {"image_id": 1, "category_id": 5},
            {"image_id": 2, "category_id": 7},
            {"image_id": 2, "category_id": 9},
        ],
    }
    captions = {
        "images": images[:2],
        "annotations": [{"image_id": 1, "caption": "A woman and her puppy on a bus"}],
    }
    for name, data in (("instances", instances), ("captions", captions)):
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder / "instances.json", folder / "captions.json"


def test_ground_truth_from_instances(tmp_path: Path, matcher: ObjectMatcher) -> None:
    instances, _ = coco_files(tmp_path)
    truth = coco.read_ground_truth([instances], matcher)
    assert {key: each.objects for key, each in truth.items()} == {
        1: {"person"},
        2: {"cell phone", "zebra"},  # a category without synonyms stands for itself
        3: set(),
    }
    assert truth[2].file_name == "2.jpg"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ground_truth_with_captions(
    tmp_path: Path, matcher: ObjectMatcher, order: tuple[int, int]
) -> None:
    files = coco_files(tmp_path)
    truth = coco.read_ground_truth([files[each] for each in order], matcher)
    assert truth.keys() == {1, 2}
    assert truth[1].objects == {"person", "dog", "bus"}


def test_other_files_are_refused(tmp_path: Path, matcher: ObjectMatcher) -> None:
    path = tmp_path / "file"
    path.write_text("[]")
    with pytest.raises(ValueError, match="has no COCO"):
        coco.read_ground_truth([path], matcher)
    path.write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        coco.read_ground_truth([path], matcher)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no synonyms"):
        coco.read_synonyms(path)
