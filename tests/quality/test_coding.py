"""The shipped coding tasks: complete, distinct, and in the languages that they claim."""

from __future__ import annotations

import ast
import json
import re

import pytest

from headway.benchmarks.quality.coding import PROMPTS, TASKS, coding_tasks, held_out_prompts
from headway.benchmarks.quality.language import LANGUAGES, NONE, language_of

pytestmark = pytest.mark.unit

LEAST_RECOGNISED = 0.6
NAMED = re.compile(
    r"c\+\+|\b(cpp|python|numpy|java|jvm|julia|rust|fortran|matlab|javascript)\b", re.IGNORECASE
)
COMMENT = re.compile(r"^\s*(//|/\*|#(?!include\b))", re.MULTILINE)


def test_tasks_are_many_and_distinct() -> None:
    tasks = coding_tasks()
    assert len(tasks) >= 84
    assert len({task.id for task in tasks}) == len(tasks)
    assert len({task.prompt for task in tasks}) == len(tasks)


def test_every_task_is_solved_in_every_language() -> None:
    for line, task in zip(
        TASKS.read_text(encoding="utf-8").splitlines(), coding_tasks(), strict=True
    ):
        assert set(json.loads(line)["continuations"]) == set(LANGUAGES), task.id
        assert tuple(task.continuations) == LANGUAGES
        assert len(set(task.continuations.values())) == len(LANGUAGES), task.id


def test_continuations_are_short_bare_code() -> None:
    for task in coding_tasks():
        for language, code in task.continuations.items():
            assert "```" not in code and "\t" not in code, (task.id, language)
            assert code == code.strip(), (task.id, language)
            assert 4 <= len(code.splitlines()) <= 14, (task.id, language)
            assert not COMMENT.search(code), (task.id, language)


def test_python_parses() -> None:
    for task in coding_tasks():
        ast.parse(task.continuations["Python"], filename=task.id)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_language_is_recognised_and_never_mistaken(language: str) -> None:
    found = {task.id: language_of(task.continuations[language]) for task in coding_tasks()}
    assert set(found.values()) <= {language, NONE}, found
    assert list(found.values()).count(language) >= LEAST_RECOGNISED * len(found)


def test_held_out_prompts_are_other_tasks() -> None:
    prompts, tasks = held_out_prompts(), coding_tasks()
    assert len(prompts) >= 60
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & {task.prompt for task in tasks}

    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    assert {row["split"] for row in rows} == {"test", "choice"}
    ids = {row["id"] for row in rows}
    assert len(ids) == len(rows)
    assert not ids & {task.id for task in tasks}
    assert {row["topic"] for row in rows} <= {task.topic for task in tasks}


def test_no_prompt_names_a_language() -> None:
    for prompt in (*held_out_prompts(), *(task.prompt for task in coding_tasks())):
        assert not NAMED.search(prompt), prompt
