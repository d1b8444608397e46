"""COCO's ground truth for CHAIR, read from files that their owners distribute.

The synonyms are the text file of the CHAIR release (one object a line: its name, then other words,
separated by commas); objects come from instance annotations and, as in the paper, from the
reference captions too where a file of them is given.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.benchmarks.quality.chair import ObjectMatcher

AMBIGUOUS = {
    ("baby", "adult"): "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub",
    ("passenger",): "jet train",
}
"""Words for people that do not mean one before these, as in the CHAIR release."""


@dataclass
class CocoPicture:
    """A picture of COCO and the objects in it, by the names of the synonyms' file."""

    file_name: str
    objects: set[str] = field(default_factory=set)


def read_synonyms(path: Path) -> list[list[str]]:
    """The synonyms, one list an object. Raises OSError, or ValueError for an empty file."""
    rows = [
        [word.strip() for word in line.split(",") if word.strip()]
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError(f"{path} holds no synonyms")
    return rows


def coco_matcher(synonyms: Sequence[Sequence[str]]) -> ObjectMatcher:
    """A matcher with the special cases of the CHAIR release: "baby elephant" is no person."""
    names = {word.lower(): row[0] for row in synonyms for word in row}
    phrases = {
        f"{qualifier} {noun}": names.get(noun)
        for qualifiers, nouns in AMBIGUOUS.items()
        for qualifier in qualifiers
        for noun in nouns.split()
    }
    phrases |= {"bow tie": names.get("tie"), "toilet seat": names.get("toilet")}
    phrases |= {"home plate": None}
    return ObjectMatcher(synonyms, phrases)


def read_ground_truth(paths: Sequence[Path], matcher: ObjectMatcher) -> dict[int, CocoPicture]:
    """Pictures by COCO's image id, from files of instances or captions in any order.

    Only pictures that every file lists. Raises OSError, or ValueError for another kind of file.
    """
    pictures: dict[int, CocoPicture] = {}
    for number, path in enumerate(paths):
        data = _read(path)
        files = {image["id"]: image["file_name"] for image in data["images"]}
        if number == 0:
            pictures = {key: CocoPicture(name) for key, name in files.items()}
        else:
            pictures = {key: each for key, each in pictures.items() if key in files}
        categories = {each["id"]: each["name"] for each in data.get("categories", ())}
        for annotation in data["annotations"]:
            picture = pictures.get(annotation["image_id"])
            if picture is None:
                continue
            if "caption" in annotation:
                picture.objects.update(matcher.mentions(annotation["caption"]))
            else:
                picture.objects.add(matcher.name(categories[annotation["category_id"]]))
    return pictures


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(data, dict) or not {"images", "annotations"} <= data.keys():
        raise ValueError(f"{path} has no COCO `images` and `annotations`")
    return data
