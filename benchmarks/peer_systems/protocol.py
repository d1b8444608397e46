"""What a peer is, and the lines of JSON that its process exchanges with the benchmark.

This file, and what peers import of this package, needs nothing but Python and the peer's own
requirements: Headway is not installed where they run.

The first line that a process reads is {"model": folder, "dtype": name}; it answers {}. Each further
one is a batch, {"requests": [...], "output_tokens": n}, answered with {"seconds": of generating,
"answers": [...]} or {"error": text}. A request is {"tokens": [...], "steering": None or an object
of `loads.py`}. It runs as `python -P -c START <this package's folder> <module> <class>`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict

START = """\
import importlib, pathlib, sys, types
folder, module, system = sys.argv[1:]
for name, path in (("headway", []), ("headway.benchmarks", [str(pathlib.Path(folder).parent)])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
load = lambda name: importlib.import_module(f"headway.benchmarks.peer_systems.{name}")
load("protocol").serve(getattr(load(module), system))
"""
"""Makes this package importable where Headway is not installed, and serves a system of it."""


@dataclass(frozen=True)
class Peer:
    """An alternative to Headway.

    package: its name on the package registry, "" for Headway's own environment, and which version
    of it. also: what it needs beside it, as pip's requirements. module, system: the class in this
    package that drives it; system "" for one that is never started, for the reason `unavailable`.
    methods: that it is asked for. shared: whether all requests of a batch must share one
    configuration, so that an unsteered one cannot be among them. checked: whether it has options
    of its own that it could refuse. notes: for the report.
    """

    name: str
    module: str
    system: str
    methods: tuple[str, ...]
    package: str = ""
    version: str = ""
    also: tuple[str, ...] = ()
    shared: bool = False
    checked: bool = True
    notes: str = ""
    unavailable: str = ""


class Request(TypedDict):
    """A prompt and how its answer is steered."""

    tokens: list[int]
    steering: dict[str, Any] | None


class Answer(TypedDict):
    """The output tokens, and the log-probabilities of the likeliest first ones.

    draws, layers: of the method `sgrs` alone. cached_tokens: of the prompt, where that is known.
    """

    token_ids: list[int]
    first: dict[str, float]
    draws: NotRequired[int]
    layers: NotRequired[list[int]]
    cached_tokens: NotRequired[int]


class System(Protocol):
    """What serves requests."""

    def answer(self, requests: Sequence[Request], output_tokens: int) -> list[Answer]:
        """Generate so many tokens greedily for all requests at once, whatever the tokens are.

        Raises an exception of any kind for steering that it refuses.
        """
        ...


def serve(system: type[Any]) -> None:
    """Answer lines until stdin ends. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    started = system(**json.loads(sys.stdin.readline()))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(reply(started, json.loads(line))), file=answers, flush=True)


def reply(system: System, message: dict[str, Any]) -> dict[str, Any]:
    """The answer to a line: what was generated, or the error that refused it."""
    began = time.perf_counter()
    try:
        answers = system.answer(message["requests"], message["output_tokens"])
    except Exception as error:  # a peer may refuse with any of them
        return {"error": f"{type(error).__name__}: {error}"}
    return {"seconds": time.perf_counter() - began, "answers": answers}
