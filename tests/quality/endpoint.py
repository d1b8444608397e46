"""A small OpenAI-compatible server over real HTTP, that answers by rule and not by a model."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from headway.server.launch import free_port

Margin = Callable[[dict[str, Any]], float]


class Endpoint:
    """What the server does, and the bodies it was sent.

    margin: of the answer to a yes/no question, by the body of the request; echoes: whether answers
    to steered requests say so; methods: those it says to have, None if it is no Headway server.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.margin: Margin = lambda body: 1.0
        self.caption: Callable[[dict[str, Any]], str] = lambda body: "There is a fork."
        self.echoes = True
        self.methods: tuple[str, ...] | None = ("vhr", "var", "locore")
        self.refuses: str | None = None
        self.most_at_once = self._now = 0
        self.url = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/steering/capabilities")
        async def capabilities() -> Any:
            if self.methods is None:
                return JSONResponse({"detail": "Not Found"}, 404)
            model = {"num_layers": 4, "num_heads": 9}
            return {"methods": dict.fromkeys(self.methods, {}), "model": model}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            return await self._answer(await request.json(), self._chat)

        @app.post("/v1/completions")
        async def completions(request: Request) -> Any:
            return await self._answer(await request.json(), self._completion)

        return app

    async def _answer(self, body: dict[str, Any], respond: Callable[..., dict[str, Any]]) -> Any:
        self.bodies.append(body)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        await asyncio.sleep(0.002)
        self._now -= 1
        asked = [method["method"] for method in body.get("steering", {}).get("methods", ())]
        alone = "prompt" in body
        if self.refuses and self.refuses in asked or alone and "var" in asked:
            error = {"message": f"{asked[0]} cannot be done here", "param": "steering"}
            return JSONResponse({"error": error}, 400)
        answer = respond(body)
        if asked and self.echoes:
            answer["steering"] = self._echo(body["steering"]["methods"])
        return answer

    def _echo(self, methods: list[dict[str, Any]]) -> dict[str, Any]:
        applied = [dict(method) for method in methods]
        for method in applied:
            if method.get("heads") == "auto":
                method["heads"] = [[1, 0], [1, 3], [2, 8]]
        edited = 0 if all(method["method"] == "locore" for method in methods) else 40
        return {"fingerprint": "f", "methods": applied, "positions_edited": edited}

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        messages = body["messages"]
        if body.get("continue_final_message"):
            words = messages[-1]["content"].split(" ")
            pieces = [f" {word}" if number else word for number, word in enumerate(words)]
            scored = [{"5": {"logprob": -0.5, "decoded_token": piece}} for piece in pieces]
            choices = [{"message": {"content": " x"}, "finish_reason": "length"}]
            return {"choices": choices, "prompt_logprobs": [None, *scored]}
        question = messages[-1]["content"][-1]["text"]
        if not question.startswith("Is there"):
            text = self.caption(body)
            return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        margin = self.margin(body)
        yes = 1 / (1 + math.exp(-margin))
        top = [("Yes", yes), ("No", 1 - yes)]
        listed = [{"token": token, "logprob": math.log(p)} for token, p in top]
        choice: dict[str, Any] = {"message": {"content": "Yes." if margin > 0 else "No."}}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": "Yes", "top_logprobs": listed}]}
        return {"choices": [choice]}

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["echo"] and body["max_tokens"] == 0
        return {
            "choices": [{"text": body["prompt"], "logprobs": {"token_logprobs": [None, -1, -3]}}]
        }


@contextmanager
def running(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serve it on a free port, from a thread, while the context lasts."""
    port = free_port()
    config = uvicorn.Config(endpoint.app(), host="127.0.0.1", port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive(), "the endpoint did not start"
            time.sleep(0.01)
        endpoint.url = f"http://127.0.0.1:{port}"
        yield endpoint
    finally:
        server.should_exit = True
        thread.join()
