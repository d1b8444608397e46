"""Requests and specs that the server tests share."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.server.conftest import MODEL, Server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
PROMPT = "Once upon a time, in a small village by the sea,"

QUIET = [{"method": "head_ablation", "heads": [[3, 1], [10, 4]]}]
LOUD = [{"method": "vhr", "alpha": 3.0, "heads": [[0, 0], [5, 2], [20, 8]]}]
SCALED = [{"method": "head_scale", "scales": [[0, 1, -1.0], [7, 7, 2.5], [29, 0, 0.0]]}]
IDENTITY = [{"method": "vhr", "alpha": 1.0, "heads": [[0, 0], [5, 2]]}]


def chat_body(prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
    """A greedy chat request."""
    messages = [{"role": "user", "content": prompt}]
    return {"model": MODEL, "messages": messages, "max_tokens": 16, "temperature": 0, **fields}


def bodies(**fields: Any) -> dict[str, dict[str, Any]]:
    """One greedy request for every steerable route."""
    return {
        CHAT: chat_body(**fields),
        COMPLETIONS: {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": 16,
            "temperature": 0,
            **fields,
        },
        RESPONSES: {
            "model": MODEL,
            "input": PROMPT,
            "max_output_tokens": 16,
            "temperature": 0,
            **fields,
        },
    }


def post(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a 200 answer."""
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(answer: dict[str, Any]) -> str:
    """The text of an answer of any steerable route."""
    if "output" in answer:
        return str(answer["output"][0]["content"][0]["text"])
    choice = answer["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def events(server: Server, path: str, body: dict[str, Any]) -> list[str]:
    """The data of every server-sent event of a streamed answer."""
    lines = []
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                lines.append(line.removeprefix("data: "))
    return lines


def plain(answer: dict[str, Any]) -> str:
    """An answer without what differs from one call to the next, as text."""
    volatile = {"id", "created", "created_at", "steering", "completed_at"}

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in volatile}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return json.dumps(strip(answer))


def wait_for(condition: Any, seconds: float = 15.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
