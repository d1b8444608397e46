"""Pictures of a small world in which some things go together, and of one in which they do not.

Sixteen objects make eight pairs. In the splits that train the language model an object mostly
comes with its partner; in `test_counter` never. A model that answers from habit rather than from
the picture says "Yes." there to the absent partner, and names it in its captions: the hallucination
that POPE's adversarial questions and CHAIR measure (Li et al. 2023; Rohrbach et al. 2018).

Picture `index` of a split is the same on every machine: `scene("test_counter", 0)`. The weights of
the demo model know these pictures; see `icons` before changing what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from headway.benchmarks.quality.icons import any_colour, icon, similar_colour

PAIRS = [
    ("fork", "knife"),
    ("cup", "spoon"),
    ("laptop", "mouse"),
    ("book", "lamp"),
    ("car", "traffic light"),
    ("tree", "bench"),
    ("chair", "table"),
    ("boat", "fish"),
]
OBJECTS = [name for pair in PAIRS for name in pair]
PARTNER: dict[str, str] = {
    name: partner for one, other in PAIRS for name, partner in ((one, other), (other, one))
}

IMAGE_SIZE = 96
PATCHES_PER_SIDE = 6
PATCH_SIZE = IMAGE_SIZE // PATCHES_PER_SIDE
BACKGROUND = len(OBJECTS)
"""The label of a patch without an object."""
CANVAS = 2 * IMAGE_SIZE
"""Scenes are drawn at twice their size; all lengths below are in pixels of the canvas."""
OBJECT_SIDES = (48, 72)
SIDE_WHERE_CROWDED = 46
PLACEMENTS_TRIED = 60
SPACING = 0.85
"""Two squares of this share of the objects' sides must not overlap."""
FAINT_SHARE = 0.25
NOISE = [0, 4, 8, 14]
"""Standard deviations of the noise, in grey levels."""
MIN_COVERED = 0.3

CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class Box:
    """Where an object is, in pixels of the picture; edges may lie on half a pixel."""

    name: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Scene:
    """A picture of 96 by 96 pixels (RGB), what it shows, and where.

    `objects` are in the order in which a caption names them, `boxes` in that of drawing: what comes
    later may cover a little of what came before.
    """

    image: Image.Image
    objects: tuple[str, ...]
    boxes: tuple[Box, ...]


# What a scene holds


def sample_uniform(generator: Random) -> list[str]:
    """Up to four objects, each as likely beside any other."""
    count = generator.choices([0, 1, 2, 3, 4], [0.03, 0.2, 0.27, 0.27, 0.23])[0]
    return generator.sample(OBJECTS, count)


def sample_dense(generator: Random) -> list[str]:
    """Four to eight objects, each as likely beside any other."""
    return generator.sample(OBJECTS, generator.randint(4, 8))


def sample_prior(generator: Random) -> list[str]:
    """One or two pairs; of each, one object is left out once in ten times."""
    objects: list[str] = []
    for pair in generator.sample(PAIRS, generator.choices([1, 2], [0.45, 0.55])[0]):
        ordered = list(pair)
        if generator.random() < 0.3:
            ordered.reverse()
        objects += ordered if generator.random() < 0.9 else [generator.choice(ordered)]
    return objects


def sample_counter(generator: Random) -> list[str]:
    """One to three objects, never with their partner."""
    count = generator.choices([1, 2, 3], [0.3, 0.4, 0.3])[0]
    return [generator.choice(pair) for pair in generator.sample(PAIRS, count)]


class Split(NamedTuple):
    """A sequence of scenes: the seed they are made from, and what they may hold."""

    seed: int
    sampler: Callable[[Random], list[str]]


SPLITS = {
    "vit": Split(1, sample_uniform),
    "vitval": Split(2, sample_uniform),
    "prior": Split(3, sample_prior),
    "test_prior": Split(4, sample_prior),
    "test_counter": Split(5, sample_counter),
    "dense": Split(6, sample_dense),
}
SCENES_PER_SPLIT = 10**7
"""Further ones would repeat those of the next seed."""


def scene(split: str, index: int) -> Scene:
    """Picture `index` of a split. Raises KeyError or IndexError if there is no such picture."""
    seed, sampler = SPLITS[split]
    if not 0 <= index < SCENES_PER_SPLIT:
        raise IndexError(f"a split has {SCENES_PER_SPLIT} pictures, there is no number {index}")
    generator = Random(seed * SCENES_PER_SPLIT + index)
    return draw_scene(sampler(generator), generator)


# How it is drawn


def draw_scene(objects: Sequence[str], generator: Random) -> Scene:
    """Draw the named objects at random places on a random, slightly cluttered background."""
    image = background(generator)
    add_clutter(image, generator)
    boxes = []
    placed: list[tuple[int, int, int]] = []
    order = list(objects)
    generator.shuffle(order)
    for name in order:
        x, y, side = place(placed, generator)
        placed.append((x, y, side))
        picture = icon(name, generator, side)
        if generator.random() < FAINT_SHARE:
            make_faint(picture, generator.uniform(0.3, 0.65))
        image.paste(picture, (x, y), picture)
        boxes.append(Box(name, x / 2, y / 2, (x + side) / 2, (y + side) / 2))
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return Scene(add_noise(image, generator), tuple(objects), tuple(boxes))


def background(generator: Random) -> Image.Image:
    """A gradient between two similar colours in a random direction."""
    bounds = (90, 250) if generator.random() < 0.7 else (20, 120)
    start = np.array(any_colour(generator, *bounds), float)
    change = np.array([generator.uniform(-45, 45) for _ in range(3)])
    end = np.clip(start + change, 0, 255)
    angle = generator.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] / (CANVAS - 1) - 0.5
    share = np.clip(0.5 + math.cos(angle) * x + math.sin(angle) * y, 0, 1)[..., None]
    return Image.fromarray((start * (1 - share) + end * share).astype(np.uint8))


def add_clutter(image: Image.Image, generator: Random) -> None:
    """Draw up to four lines, ellipses and empty rectangles in colours like the background's."""
    draw = ImageDraw.Draw(image)
    for _ in range(generator.randint(0, 4)):
        middle = image.getpixel((CANVAS // 2, CANVAS // 2))
        assert isinstance(middle, tuple)
        colour = similar_colour(generator, middle, 50)
        x, y = generator.randint(0, CANVAS), generator.randint(0, CANVAS)
        width, height = generator.randint(6, 40), generator.randint(6, 40)
        kind = generator.random()
        if kind < 0.4:
            end = (x + generator.randint(-60, 60), y + generator.randint(-60, 60))
            draw.line([(x, y), end], fill=colour, width=generator.randint(1, 4))
        elif kind < 0.7:
            draw.ellipse([x, y, x + width, y + height], fill=colour)
        else:
            draw.rectangle([x, y, x + width, y + height], outline=colour, width=2)


def place(placed: Sequence[tuple[int, int, int]], generator: Random) -> tuple[int, int, int]:
    """Left, top and side of a square beside those placed; where none fits, a small one anywhere."""
    side = generator.randint(*OBJECT_SIDES)
    for _ in range(PLACEMENTS_TRIED):
        x, y = generator.randint(0, CANVAS - side), generator.randint(0, CANVAS - side)
        if all(are_apart((x, y, side), other) for other in placed):
            return x, y, side
    return x, y, SIDE_WHERE_CROWDED


def are_apart(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Whether two squares overlap at most at their margins."""
    reach, other_reach = one[2] * SPACING, other[2] * SPACING
    return any(
        one[axis] + reach < other[axis] or other[axis] + other_reach < one[axis] for axis in (0, 1)
    )


def make_faint(picture: Image.Image, opacity: float) -> None:
    """Scale the opacity of an RGBA picture in place."""
    alpha = picture.getchannel("A").point(lambda value: int(value * opacity))
    picture.putalpha(alpha)


def add_noise(image: Image.Image, generator: Random) -> Image.Image:
    """Gaussian noise of a random strength, which may be none."""
    deviation = generator.choice(NOISE)
    if not deviation:
        return image
    # numpy's generator, since 27,648 draws in Python would take longer than all the drawing.
    numbers = np.random.default_rng(generator.getrandbits(32))
    noisy = np.asarray(image, float) + numbers.normal(0, deviation, (IMAGE_SIZE, IMAGE_SIZE, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


# What there is to say about it


def patch_labels(scene: Scene) -> np.ndarray:
    """The object in each patch, as an index into OBJECTS, or BACKGROUND: int64 `(36,)`, row by row.

    It is the one whose box covers most of the patch, at least more than 30 %; of two that cover the
    same, the one drawn first.
    """
    labels = np.full((PATCHES_PER_SIDE, PATCHES_PER_SIDE), BACKGROUND)
    most_covered = np.full(labels.shape, MIN_COVERED)
    edges = PATCH_SIZE * np.arange(PATCHES_PER_SIDE)
    for box in scene.boxes:
        widths = overlap(edges, box.left, box.right)
        heights = overlap(edges, box.top, box.bottom)
        covered = heights[:, None] * widths / PATCH_SIZE**2
        better = covered > most_covered
        most_covered[better] = covered[better]
        labels[better] = OBJECTS.index(box.name)
    return labels.reshape(-1)


def overlap(edges: np.ndarray, start: float, end: float) -> np.ndarray:
    """How much of the patch that begins at each edge lies between `start` and `end`."""
    return np.clip(np.minimum(end, edges + PATCH_SIZE) - np.maximum(start, edges), 0, None)


def question(name: str) -> str:
    """The yes/no question for an object, in POPE's words."""
    return f"Is there a {name} in the image?"


def caption(objects: Sequence[str]) -> str:
    """The true answer to CAPTION_PROMPT. Raises ValueError where there is nothing to name."""
    if not objects:
        raise ValueError("a scene without objects has no caption")
    *others, last = [f"a {name}" for name in objects]
    return f"There is {', '.join(others)} and {last}." if others else f"There is {last}."
