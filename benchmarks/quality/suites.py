"""What is asked: pictures with yes/no questions and captions, drawn or from data sets on disk."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random

from PIL import Image

from headway.benchmarks.quality import scenes
from headway.benchmarks.quality.chair import ObjectMatcher
from headway.benchmarks.quality.coco import coco_matcher, read_ground_truth, read_synonyms

SCENE_ANSWER_TOKENS = 1
"""The demo model answers "Yes." or "No."; the first token says which."""
ANSWER_TOKENS = 16
SCENE_CAPTION_TOKENS = 40
CAPTION_TOKENS = 512
COCO_PROMPT = "Please describe this image in detail."
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Picture:
    """A picture by name, drawn or in a file, and the objects that it is known to show."""

    name: str
    source: Image.Image | Path
    objects: frozenset[str] = frozenset()

    @cached_property
    def url(self) -> str:
        """A data URL: the bytes of a PNG or JPEG file as they are, everything else as PNG.

        Raises OSError for a file that cannot be read.
        """
        if isinstance(self.source, Path) and self.source.suffix.lower() in MEDIA_TYPES:
            media_type, data = MEDIA_TYPES[self.source.suffix.lower()], self.source.read_bytes()
        else:
            image = Image.open(self.source) if isinstance(self.source, Path) else self.source
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
            media_type, data = "image/png", buffer.getvalue()
        return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Question:
    """A yes/no question about a picture; sets: the question sets that it belongs to."""

    picture: str
    text: str
    truth: bool
    sets: frozenset[str]


@dataclass(frozen=True)
class Suite:
    """Everything that is asked of each arm.

    captioned: names of the pictures to describe; focus: the question set that separability and the
    threshold baseline are computed on.
    """

    name: str
    pictures: Mapping[str, Picture]
    questions: Sequence[Question] = ()
    captioned: Sequence[str] = ()
    focus: str = ""
    caption_prompt: str = ""
    answer_tokens: int = ANSWER_TOKENS
    caption_tokens: int = CAPTION_TOKENS
    matcher: ObjectMatcher = field(default_factory=lambda: ObjectMatcher([]))

    @property
    def sets(self) -> list[str]:
        """The names of the question sets, the focus first."""
        names = {name for question in self.questions for name in question.sets}
        return sorted(names, key=lambda name: (name != self.focus, name))


def scene_suite(split: str, count: int, first: int = 0, seed: int = 0) -> Suite:
    """Scenes `first` to `first + count - 1` of the split "prior" or "counter".

    Every present object is asked for. As many absent ones are drawn at random among those that are
    no partner of a present object ("random"), taken as the most frequent of these scenes
    ("popular"), and taken from the absent partners first, filled up at random ("adversarial").
    "partner" has the questions about all absent partners alone.
    """
    drawn = {
        f"{split}/{index}": scenes.scene(f"test_{split}", index)
        for index in range(first, first + count)
    }
    pictures = {
        name: Picture(name, scene.image, frozenset(scene.objects)) for name, scene in drawn.items()
    }
    frequency = Counter(name for scene in drawn.values() for name in scene.objects)
    by_frequency = sorted(scenes.OBJECTS, key=lambda name: (-frequency[name], name))
    questions = []
    for picture in pictures.values():
        generator = Random(f"{seed} {picture.name}")
        sets = absent_sets(picture.objects, by_frequency, generator)
        everywhere = frozenset(sets)
        for name in scenes.OBJECTS:
            own = frozenset(key for key, names in sets.items() if name in names)
            present = name in picture.objects
            if present or own:
                text = scenes.question(name)
                questions.append(
                    Question(picture.name, text, present, everywhere if present else own)
                )
    return Suite(
        name=split,
        pictures=pictures,
        questions=questions,
        captioned=list(pictures),
        focus="partner",
        caption_prompt=scenes.CAPTION_PROMPT,
        answer_tokens=SCENE_ANSWER_TOKENS,
        caption_tokens=SCENE_CAPTION_TOKENS,
        matcher=ObjectMatcher([[name] for name in scenes.OBJECTS]),
    )


def absent_sets(
    objects: frozenset[str], by_frequency: Sequence[str], generator: Random
) -> dict[str, list[str]]:
    """The absent objects that each question set asks for; see `scene_suite`."""
    absent = [name for name in scenes.OBJECTS if name not in objects]
    partners = [name for name in absent if scenes.PARTNER[name] in objects]
    others = [name for name in absent if name not in partners]
    fill = generator.sample(others, min(len(objects), len(others)))
    return {
        "random": generator.sample(others, min(len(objects), len(others))),
        "popular": [name for name in by_frequency if name in absent][: len(objects)],
        "adversarial": (partners + fill)[: len(objects)],
        "partner": partners,
    }


def without_sets(suite: Suite, names: frozenset[str]) -> Suite:
    """The suite less some of its question sets, and less the questions only they have."""
    kept = [
        Question(each.picture, each.text, each.truth, each.sets - names)
        for each in suite.questions
        if each.sets - names
    ]
    return replace(suite, questions=kept)


def only_focus(suite: Suite) -> Suite:
    """The pictures that have a question of the focus to be denied, and nothing but the focus.

    Where such questions are rare, as on the prior split, most pictures have none.
    """
    focus = frozenset({suite.focus})
    asked = {
        each.picture for each in suite.questions if not each.truth and suite.focus in each.sets
    }
    return replace(
        suite,
        pictures={name: picture for name, picture in suite.pictures.items() if name in asked},
        questions=[
            replace(each, sets=focus)
            for each in suite.questions
            if each.picture in asked and suite.focus in each.sets
        ],
        captioned=(),
    )


def pope_suite(files: Sequence[Path], images: Path, most_pictures: int | None = None) -> Suite:
    """POPE's own files, JSON lines of `image`, `text` and `label`; each is one question set.

    The focus is the file with "adversarial" in its name, else the last. most_pictures: only the
    first so many pictures. Raises OSError or ValueError.
    """
    merged: dict[tuple[str, str], tuple[bool, set[str]]] = {}
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                key, truth = (str(row["image"]), str(row["text"])), _label(row["label"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: {error!r}") from None
            known, sets = merged.setdefault(key, (truth, set()))
            if known != truth:
                raise ValueError(f"{path}, line {number}: labelled otherwise before")
            sets.add(path.stem)
    names = list(dict.fromkeys(image for image, _ in merged))[:most_pictures]
    pictures = {name: Picture(name, _existing(images / name)) for name in names}
    adversarial = [path.stem for path in files if "adversarial" in path.stem]
    return Suite(
        name="pope",
        pictures=pictures,
        questions=[
            Question(image, text, truth, frozenset(sets))
            for (image, text), (truth, sets) in merged.items()
            if image in pictures
        ],
        focus=adversarial[0] if adversarial else files[-1].stem,
    )


def coco_suite(
    annotations: Sequence[Path], synonyms: Path, images: Path, count: int, seed: int = 0
) -> Suite:
    """Captions of `count` pictures of COCO, drawn at random. Raises OSError or ValueError."""
    matcher = coco_matcher(read_synonyms(synonyms))
    truth = read_ground_truth(annotations, matcher)
    keys = Random(seed).sample(sorted(truth), min(count, len(truth)))
    pictures = {}
    for key in keys:
        name = truth[key].file_name
        pictures[name] = Picture(name, _existing(images / name), frozenset(truth[key].objects))
    return Suite(
        name="coco",
        pictures=pictures,
        captioned=list(pictures),
        caption_prompt=COCO_PROMPT,
        matcher=matcher,
    )


def _label(value: object) -> bool:
    if value not in ("yes", "no"):
        raise ValueError(f"a label is yes or no, not {value!r}")
    return value == "yes"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}")
    return path
