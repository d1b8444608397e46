"""What docs/security.md says: that tests exist, and what the limits are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from headway.server.engine.config import DEFAULT_SGRS_REQUESTS
from headway.server.http.limits import DEFAULT_BODY_MIB, DEFAULT_BODY_SECONDS
from headway.steering.schema import MAX_METHODS
from headway.steering.spans import MAX_OCCURRENCES
from headway.steering.validation import MAX_SPEC_BYTES
from headway.steering.vectors import MAX_VECTORS_BYTES

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "security.md").read_text()
MIB = 1024 * 1024


def functions(name: str) -> set[str]:
    """The tests in all files of this name, of the engine's `tests/engine` and of others."""
    found: set[str] = set()
    for path in TESTS.rglob(f"{name}.py"):
        body = ast.parse(path.read_text()).body
        found |= {
            each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    return found


def rows() -> list[list[str]]:
    """The cells of the table of threats."""
    section = TEXT.partition("## Threats")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| **")]
    return [re.split(r"\s*\|\s*", line)[1:-1] for line in lines]


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+)::(\w+)`", TEXT)
    assert len(named) > 50
    missing = [f"{file}::{test}" for file, test in named if test not in functions(file)]
    assert not missing


def test_every_threat_has_a_test() -> None:
    found = rows()
    assert len(found) >= 11
    for threat, done, _, tests in found:
        assert done and "::" in tests, threat


def test_every_test_of_the_server_stands_for_a_threat() -> None:
    named = set(re.findall(r"`test_security::(\w+)`", TEXT))
    ours = {name for name in functions("test_security") if name.startswith("test_")}
    assert ours == named


def test_the_limits_are_those_of_the_code() -> None:
    defaults = {
        "--max-steered-requests": None,
        "--max-steered-per-key": None,
        "--max-sgrs-per-key": None,
        "--max-sgrs-requests": DEFAULT_SGRS_REQUESTS,
        "--max-request-body": DEFAULT_BODY_MIB,
        "--request-body-timeout": DEFAULT_BODY_SECONDS,
    }
    table = dict(re.findall(r"^\| `(--[a-z-]+) [A-Z]+`[^|]*\| (\w+) \|", TEXT, re.MULTILINE))
    assert table == {name: str(value or "none") for name, value in defaults.items()}
    options = set(re.findall(r"`(--(?:max|request-body|isolate|steering)-[a-z-]+)", TEXT))
    options -= {"--max-num-seqs", "--max-model-len"}  # vLLM's
    sources = [TESTS.parent / "server" / "commands" / "serve.py"]
    sources += [TESTS.parent / "server" / "commands" / "limit_options.py"]
    sources += list((TESTS.parent / "server" / "http").glob("*.py"))
    known = "".join(path.read_text() for path in sources)
    assert options and all(f'"{option}"' in known for option in options)


def test_the_sizes_are_those_of_the_code() -> None:
    assert f"{MAX_SPEC_BYTES // 1024} KiB, {MAX_METHODS} methods, {MAX_OCCURRENCES} places" in TEXT
    assert f"at most {MAX_VECTORS_BYTES // MIB} MiB" in TEXT
