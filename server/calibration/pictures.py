"""Pictures to measure a model on, and what to ask about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps

DESCRIBE = "Describe the image."
"""What is asked about pictures of which nothing is known."""

Asked = tuple[Image.Image, str]
"""A picture and a question about it."""


def image_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by the suffixes that Pillow knows, in order of their names.

    Raises OSError if it cannot be read, ValueError if there is none in it.
    """
    known = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if not files:
        raise ValueError(f"{folder}: the folder holds no picture")
    return files


def ask_about_files(files: Sequence[Path], questions: Sequence[str]) -> Iterator[Asked]:
    """Every question about every picture; a picture is read when its turn comes.

    Raises OSError for a file that is no picture.
    """
    for path in files:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        yield from ((image, question) for question in questions)


def ask_about_scenes(count: int, questions: Sequence[str]) -> Iterator[Asked]:
    """Every question about the first scenes of the demo's split `test_prior`.

    Without questions, a yes/no question in POPE's words about one of the objects in each.
    """
    from headway.benchmarks.quality.scenes import question, scene

    for index in range(count):
        drawn = scene("test_prior", index)
        present = question(drawn.objects[index % len(drawn.objects)])
        yield from ((drawn.image, text) for text in questions or (present,))
