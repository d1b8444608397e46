"""The process that a peer runs in, as the benchmark sees it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.benchmarks.engine import KEEP_MEMORY, ask, end
from headway.benchmarks.peer_systems.protocol import START, Answer, Peer, Request

PACKAGE = Path(__file__).resolve().parent
SETTINGS = {**KEEP_MEMORY, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of every peer."""


class Refused(RuntimeError):
    """The peer answered with an error."""


class PeerError(RuntimeError):
    """The process of a peer ended."""


class WorkerProcess:
    """A peer in its own interpreter: start it, `answer` batches, `close`.

    seconds: that the last batch took, measured in the process.
    """

    def __init__(self, peer: Peer, python: Path, model: Path, dtype: str, log: Path) -> None:
        self.name = peer.name
        self.log = log
        self.seconds = 0.0
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [python, "-P", "-c", START, PACKAGE, peer.module, peer.system],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **SETTINGS},
                cwd=log.parent,
                text=True,
            )
        self._exchange({"model": str(model), "dtype": dtype})

    def answer(self, requests: Sequence[Request], output_tokens: int) -> list[Answer]:
        """See `protocol.System`. Raises Refused, and PeerError if the process has ended."""
        reply = self._exchange({"requests": list(requests), "output_tokens": output_tokens})
        if "error" in reply:
            raise Refused(reply["error"])
        self.seconds = reply["seconds"]
        answers: list[Answer] = reply["answers"]
        return answers

    def close(self) -> None:
        """End the process."""
        end(self.process)

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        line = ask(self.process, json.dumps(message))
        if not line:
            tail = self.log.read_text()[-3000:]
            raise PeerError(f"the process of {self.name} ended; the end of its log:\n{tail}")
        reply: dict[str, Any] = json.loads(line)
        return reply
