"""Tables for people."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text, aligned on the right, the last column on the left."""
    *widths, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = ([*map(str.rjust, row[:-1], widths), row[-1]] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)
