"""One request of `headway bench soak`: what is sent, how it is read, and what must come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway.steering import ModelGeometry

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
STEERING_ROUTES = "/v1/steering"


@dataclass(frozen=True)
class Place:
    """The server that is asked, as far as requests depend on it.

    model: the name it answers to. methods: those that it can carry out; presets: names of those
    that are there all the time.
    """

    model: str
    geometry: ModelGeometry
    max_model_len: int
    methods: frozenset[str]
    presets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What must come back. reason and param: of an error of Headway, None for one of vLLM's own."""

    statuses: tuple[int, ...] = (200,)
    reason: str | None = None
    param: str | None = None

    @property
    def is_error(self) -> bool:
        """Whether the request must be refused."""
        return min(self.statuses) >= 400


@dataclass(frozen=True)
class Ask:
    """One request.

    body: a JSON value, or content: bytes. admin: sent with the admin key. steered: its answer must
    show the fingerprint that the compile route gives for its body. sampled: its answer is kept, to
    be compared with stock vLLM's. pause: seconds before each line of a stream is read. leave_lines,
    leave_seconds: when the client goes away, if it does.
    """

    kind: str
    path: str
    body: Any = None
    verb: str = "POST"
    content: bytes | None = None
    admin: bool = False
    expected: Expected = Expected()
    steered: bool = False
    sampled: bool = False
    pause: float = 0.0
    leave_lines: int | None = None
    leave_seconds: float | None = None

    @property
    def is_stream(self) -> bool:
        """Whether its answer comes in events."""
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def generates(self) -> bool:
        """Whether the model answers it."""
        return self.path in (CHAT, COMPLETIONS, RESPONSES)


Script = list[list[Ask]]
"""Steps one after the other; the requests of a step are sent together."""
