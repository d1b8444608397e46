"""The formats there are importers for, and telling them apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headway.server.importers import repeng, steering_vectors
from headway.server.importers.imported import ImportedVectors
from headway.steering.vectors import MAX_VECTORS_BYTES

AUTO = "auto"


@dataclass(frozen=True)
class Format:
    """How files of a format are read, and the bytes that one of them begins with."""

    read: Callable[[Path], ImportedVectors]
    signatures: tuple[bytes, ...]


FORMATS: dict[str, Format] = {
    repeng.NAME: Format(repeng.read, (b"GGUF",)),
    # A zip archive, as torch.save writes it now; a bare pickle, as it did before.
    steering_vectors.NAME: Format(steering_vectors.read, (b"PK\x03\x04", b"\x80")),
}


def read_vectors(path: Path, name: str = AUTO) -> ImportedVectors:
    """The directions of a file in the format of that name, which `auto` tells by its first bytes.

    Raises ValueError that says what is wrong with the file, OSError, and ImportError where a
    package is missing.
    """
    size = path.stat().st_size
    if size > MAX_VECTORS_BYTES:
        raise ValueError(f"has {size} bytes; at most {MAX_VECTORS_BYTES} are allowed")
    return FORMATS[detect(path) if name == AUTO else name].read(path)


def detect(path: Path) -> str:
    """The name of the format that a file begins like. Raises ValueError if there is none."""
    with path.open("rb") as file:
        start = file.read(8)
    for name, each in FORMATS.items():
        if start.startswith(each.signatures):
            return name
    raise ValueError(f"its format cannot be told; there are importers for: {', '.join(FORMATS)}")
