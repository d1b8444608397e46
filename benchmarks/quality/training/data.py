"""Pictures of a split in arrays, drawn once and kept under `$HEADWAY_HOME/scenes`."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from headway.benchmarks.quality import icons, scenes
from headway.benchmarks.quality.scenes import IMAGE_SIZE, OBJECTS, PATCHES_PER_SIDE
from headway.server.models import headway_home

ABSENT = -1
MAX_OBJECTS = 8
WORTH_PROCESSES = 2000
"""Drawing takes about 8 ms a picture, starting processes some seconds."""

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """Scenes of one or more splits, in numpy so that drawing needs no torch.

    images: uint8 `(pictures, 96, 96, 3)`; objects: int8 `(pictures, 8)`, indices into OBJECTS in
    the order of the caption, then ABSENT; labels: int8 `(pictures, 36)`, see `patch_labels`.
    """

    images: np.ndarray
    objects: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(
            np.concatenate([self.images, other.images]),
            np.concatenate([self.objects, other.objects]),
            np.concatenate([self.labels, other.labels]),
        )

    def names(self, index: int) -> list[str]:
        """The objects of one picture."""
        return [OBJECTS[number] for number in self.objects[index] if number != ABSENT]

    def presence(self) -> np.ndarray:
        """Which objects each picture shows: float32 `(pictures, 16)` of zeros and ones."""
        shown = np.any(self.objects[:, :, None] == np.arange(len(OBJECTS)), axis=1)
        return shown.astype(np.float32)


def pictures(split: str, count: int) -> Pictures:
    """The first `count` pictures of a split, from the cache if they were drawn before."""
    file = headway_home() / "scenes" / f"{split}-{count}-{drawing_digest()}.npz"
    if not file.exists():
        drawn = draw(split, count)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Appears complete or not at all, for runs at the same time and ones that were stopped.
        unfinished = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(unfinished, images=drawn.images, objects=drawn.objects, labels=drawn.labels)
        unfinished.rename(file)
        return drawn
    with np.load(file) as kept:
        return Pictures(kept["images"], kept["objects"], kept["labels"])


def drawing_digest() -> str:
    """Changes whenever the code that draws the scenes does."""
    sources = [Path(module.__file__ or "").read_bytes() for module in (scenes, icons)]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def draw(split: str, count: int) -> Pictures:
    """Draw the first `count` pictures of a split, many of them on all cores."""
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    objects = np.empty((count, MAX_OBJECTS), np.int8)
    labels = np.empty((count, PATCHES_PER_SIDE**2), np.int8)
    tasks = [(split, index) for index in range(count)]
    with ExitStack() as stack:
        made: Iterable[Drawn]
        if count < WORTH_PROCESSES:
            made = map(draw_one, tasks)
        else:
            # Not forked: the parent may have started torch's threads.
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool())
            made = pool.imap(draw_one, tasks, chunksize=100)
        progress = tqdm(made, total=count, desc=f"drawing {split}", unit="picture")
        for index, (image, shown, patches) in enumerate(progress):
            images[index], objects[index], labels[index] = image, shown, patches
    return Pictures(images, objects, labels)


def draw_one(task: tuple[str, int]) -> Drawn:
    """Image, objects and patch labels of one picture, as rows of `Pictures`."""
    scene = scenes.scene(*task)
    shown = np.full(MAX_OBJECTS, ABSENT, np.int8)
    shown[: len(scene.objects)] = [OBJECTS.index(name) for name in scene.objects]
    return np.asarray(scene.image), shown, scenes.patch_labels(scene).astype(np.int8)
