"""Scientific coding tasks solved in four languages, and prompts held out from them.

The tasks are contrasts for steering towards a language: one prompt, which names none, and the same
solution in each. Whether steering works is seen on the held-out prompts, whose tasks are others.
`data/README.md` describes the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.benchmarks.quality.language import LANGUAGES

DATA = Path(__file__).with_name("data")
TASKS = DATA / "coding_tasks.jsonl"
PROMPTS = DATA / "coding_prompts.jsonl"


@dataclass(frozen=True)
class CodingTask:
    """A prompt and one solution, a bare code snippet, per language of LANGUAGES."""

    id: str
    topic: str
    prompt: str
    continuations: dict[str, str]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def coding_tasks() -> tuple[CodingTask, ...]:
    """All tasks of TASKS, in the order of the file, continuations in the order of LANGUAGES."""
    return tuple(
        CodingTask(
            id=row["id"],
            topic=row["topic"],
            prompt=row["prompt"],
            continuations={language: row["continuations"][language] for language in LANGUAGES},
        )
        for row in _rows(TASKS)
    )


def held_out_prompts() -> tuple[str, ...]:
    """The prompts of PROMPTS in the split "test", in the order of the file.

    Those of the split "choice" are for choosing how to steer (layers, strengths).
    """
    return tuple(row["prompt"] for row in _rows(PROMPTS) if row["split"] == "test")
