"""The sixteen objects of the scenes, drawn with PIL's primitives.

Each object is one function, which draws on a square of 100 by 100 units whatever its size in
pixels. Objects take colours from a random palette, so that only their shape tells them apart.

The weights of the demo model know these very pictures. Whatever is changed here, the order in
which random numbers are drawn included, makes other pictures.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

Colour = tuple[int, ...]
Point = tuple[float, float]

METALS = [(190, 195, 205), (150, 155, 165), (215, 190, 120), (110, 115, 130)]
LEAVES = [(50, 140, 60), (90, 160, 50), (200, 130, 50), (40, 110, 90)]
TRUNK = (110, 75, 45)
GLASS = (200, 225, 240)
SIGNALS: list[Colour] = [(230, 40, 40), (240, 200, 50), (50, 200, 80)]
OVERSAMPLING = 2
MAX_TILT = 20
"""Degrees to either side."""


def any_colour(generator: Random, low: int, high: int) -> Colour:
    """Each channel uniform in [low, high]."""
    return tuple(generator.randint(low, high) for _ in range(3))


def vivid_colour(generator: Random) -> Colour:
    """Any hue, neither pale nor dark."""
    hue, saturation, value = (
        generator.random(),
        generator.uniform(0.35, 1),
        generator.uniform(0.35, 1),
    )
    return tuple(int(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))


def similar_colour(generator: Random, colour: Colour, distance: int = 25) -> Colour:
    """Each channel moved by at most `distance`."""
    moved = (channel + generator.randint(-distance, distance) for channel in colour)
    return tuple(max(0, min(255, channel)) for channel in moved)


@dataclass(frozen=True)
class Palette:
    """The colours of one object; few objects use all of them."""

    main: Colour
    second: Colour
    dark: Colour
    metal: Colour

    @classmethod
    def random(cls, generator: Random) -> Palette:
        main, second = vivid_colour(generator), vivid_colour(generator)
        dark = any_colour(generator, 10, 70)
        return cls(main, second, dark, similar_colour(generator, generator.choice(METALS)))


class Pen:
    """Draws filled shapes on a square picture in hundredths of its side."""

    def __init__(self, image: Image.Image, scale: float) -> None:
        self.draw = ImageDraw.Draw(image)
        self.scale = scale

    def points(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def box(self, left: float, top: float, right: float, bottom: float) -> list[float]:
        return [edge * self.scale for edge in (left, top, right, bottom)]

    def bar(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        colour: Colour,
        radius: float = 0,
    ) -> None:
        """A rectangle whose corners are rounded by `radius`."""
        box = self.box(left, top, right, bottom)
        self.draw.rounded_rectangle(box, radius * self.scale, fill=colour)

    def ellipse(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.draw.ellipse(self.box(left, top, right, bottom), fill=colour)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self.draw.polygon(self.points(points), fill=colour)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        self.draw.line(self.points(points), fill=colour, width=max(1, int(width * self.scale)))

    def arc(
        self,
        box: tuple[float, float, float, float],
        start: float,
        end: float,
        colour: Colour,
        width: float,
    ) -> None:
        """Part of an ellipse's outline, between two angles in degrees."""
        self.draw.arc(self.box(*box), start, end, fill=colour, width=int(width * self.scale))


def fork(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.bar(45, 40, 55, 98, palette.metal, 4)
    pen.bar(32, 34, 68, 48, palette.metal, 6)
    for left in (32, 42.5, 53, 63):
        pen.bar(left, 2, left + 5, 40, palette.metal, 2)


def knife(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.polygon([(44, 2), (60, 16), (62, 58), (44, 58)], palette.metal)
    pen.bar(43, 58, 58, 98, generator.choice([palette.dark, palette.main]), 4)


def spoon(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.ellipse(32, 2, 68, 46, palette.metal)
    pen.bar(46, 42, 54, 98, palette.metal, 4)


def cup(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.arc((52, 36, 94, 76), -95, 95, palette.main, 9)
    pen.bar(16, 28, 70, 88, palette.main, 10)
    pen.ellipse(16, 20, 70, 38, similar_colour(generator, palette.second, 10))


def laptop(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.bar(16, 12, 84, 66, palette.dark, 4)
    pen.bar(22, 18, 78, 60, palette.main)
    pen.polygon([(18, 66), (82, 66), (97, 86), (3, 86)], palette.metal)


def mouse(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.line([(50, 30), (56, 14), (44, 2)], palette.dark, 4)
    pen.ellipse(27, 24, 73, 97, palette.main)
    pen.line([(50, 25), (50, 56)], palette.dark, 4)
    pen.line([(29, 56), (71, 56)], palette.dark, 4)


def book(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.polygon([(6, 22), (49, 34), (49, 88), (6, 76)], palette.main)
    pen.polygon([(94, 22), (51, 34), (51, 88), (94, 76)], palette.main)
    for y in (40, 52, 64):
        pen.line([(14, y - 6), (42, y + 2)], palette.dark, 3)
        pen.line([(86, y - 6), (58, y + 2)], palette.dark, 3)


def lamp(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.polygon([(36, 6), (64, 6), (82, 48), (18, 48)], palette.main)
    pen.bar(46, 48, 54, 90, palette.dark)
    pen.ellipse(26, 82, 74, 98, palette.dark)


def car(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.polygon([(20, 48), (34, 22), (68, 22), (84, 48)], palette.main)
    pen.bar(3, 44, 97, 74, palette.main, 8)
    pen.polygon([(29, 44), (38, 28), (49, 28), (49, 44)], GLASS)
    pen.polygon([(54, 44), (54, 28), (65, 28), (74, 44)], GLASS)
    for left in (16, 62):
        pen.ellipse(left, 62, left + 24, 86, palette.dark)
        pen.ellipse(left + 7, 69, left + 17, 79, palette.metal)


def traffic_light(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.bar(46, 70, 54, 99, palette.dark)
    pen.bar(31, 2, 69, 76, similar_colour(generator, palette.dark, 15), 8)
    lit = generator.randrange(len(SIGNALS))
    for position, colour in enumerate(SIGNALS):
        if position != lit:
            colour = tuple(int(channel * generator.uniform(0.45, 1)) for channel in colour)
        top = 7 + 23 * position
        pen.ellipse(40, top, 60, top + 20, colour)


def tree(pen: Pen, palette: Palette, generator: Random) -> None:
    leaves = similar_colour(generator, generator.choice(LEAVES), 20)
    pen.bar(43, 55, 57, 98, TRUNK)
    pen.ellipse(12, 28, 58, 70, leaves)
    pen.ellipse(42, 28, 88, 70, leaves)
    pen.ellipse(26, 3, 74, 50, leaves)


def bench(pen: Pen, palette: Palette, generator: Random) -> None:
    for top in (26, 38):
        pen.bar(4, top, 96, top + 8, palette.main)
    pen.bar(2, 52, 98, 61, palette.main)
    for left in (12, 80):
        pen.bar(left, 26, left + 7, 92, palette.dark)


def chair(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.bar(24, 6, 33, 62, palette.main, 2)
    pen.bar(24, 52, 78, 62, palette.main, 2)
    pen.bar(24, 60, 32, 97, palette.main)
    pen.bar(70, 60, 78, 97, palette.main)
    pen.bar(33, 14, 40, 22, palette.main)


def table(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.bar(2, 30, 98, 42, palette.main, 3)
    pen.bar(12, 42, 21, 92, palette.main)
    pen.bar(79, 42, 88, 92, palette.main)


def boat(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.polygon([(4, 66), (96, 66), (80, 92), (20, 92)], palette.main)
    pen.bar(46, 6, 51, 66, palette.dark)
    pen.polygon([(54, 10), (90, 60), (54, 60)], palette.second)
    pen.polygon([(43, 20), (43, 60), (14, 60)], palette.second)


def fish(pen: Pen, palette: Palette, generator: Random) -> None:
    pen.polygon([(62, 50), (97, 24), (97, 76)], palette.main)
    pen.ellipse(6, 28, 76, 72, palette.main)
    pen.ellipse(18, 42, 27, 51, palette.dark)
    pen.polygon([(34, 32), (52, 14), (58, 34)], palette.main)


DRAWINGS: dict[str, Callable[[Pen, Palette, Random], None]] = {
    "fork": fork,
    "knife": knife,
    "cup": cup,
    "spoon": spoon,
    "laptop": laptop,
    "mouse": mouse,
    "book": book,
    "lamp": lamp,
    "car": car,
    "traffic light": traffic_light,
    "tree": tree,
    "bench": bench,
    "chair": chair,
    "table": table,
    "boat": boat,
    "fish": fish,
}
NEVER_MIRRORED = {"traffic light"}


def icon(name: str, generator: Random, side: int) -> Image.Image:
    """One object as an RGBA picture of `side` by `side` pixels, tilted and perhaps mirrored."""
    large = OVERSAMPLING * side
    image = Image.new("RGBA", (large, large), (0, 0, 0, 0))
    palette = Palette.random(generator)
    DRAWINGS[name](Pen(image, side / 100 * OVERSAMPLING), palette, generator)
    tilt = generator.uniform(-MAX_TILT, MAX_TILT)
    image = image.rotate(tilt, resample=Image.Resampling.BILINEAR)
    if name not in NEVER_MIRRORED and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.resize((side, side), Image.Resampling.BOX)
