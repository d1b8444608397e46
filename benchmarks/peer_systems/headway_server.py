"""Headway itself: `headway serve`, asked over HTTP for the same steering as its peers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from headway.benchmarks.engine import SERVER_SETTINGS
from headway.benchmarks.peer_systems.loads import Sizes, steering
from headway.benchmarks.peer_systems.protocol import Answer, Request
from headway.benchmarks.quality.client import TIMEOUT_SECONDS, EndpointError, UnsteeredAnswer
from headway.server.importers.imported import ImportedVectors, make_profile
from headway.server.launch import serve
from headway.steering import ModelGeometry

NAME = "Headway"
PROFILE = "peers"
TOP_LOGPROBS = 5


@contextmanager
def headway(
    model: Path, dtype: str, concurrency: int, longest: int, folder: Path, log: Path
) -> Iterator[HeadwayServer]:
    """A server of the model with the profile of the vectors that are added.

    longest: the most tokens of a prompt and its answer. Raises LaunchError.
    """
    geometry = read_geometry(model)
    profile = folder / "peers.safetensors"
    save_profile(geometry, profile)
    flags = ["--dtype", dtype, "--enforce-eager", "--max-num-seqs", str(concurrency)]
    flags += ["--max-model-len", str(longest), "--max-sgrs-requests", str(concurrency)]
    # All prompts of a batch in one step, as transformers computes them.
    flags += ["--max-num-batched-tokens", str(concurrency * longest)]
    flags += ["--enable-prompt-tokens-details", "--steering-profile", f"{PROFILE}={profile}"]
    with serve(model, flags, folder, log, SERVER_SETTINGS) as url:
        yield HeadwayServer(url, str(model))


def read_geometry(model: Path) -> ModelGeometry:
    """The sizes of a checkpoint as the server reads them."""
    from headway.server.commands.model import quiet_stdout, read_model, steerable_geometry

    with quiet_stdout():
        return steerable_geometry(read_model(str(model)))


def save_profile(geometry: ModelGeometry, path: Path) -> None:
    """Write the direction of `loads.py` as a profile of the method `caa`."""
    sizes = Sizes(geometry.num_layers, geometry.num_heads, geometry.hidden_size)
    added = steering("caa", sizes, 0)
    direction = np.asarray(added["vector"], np.float32)
    found = ImportedVectors("drawn", {added["layer"]: direction})
    make_profile(found, replace(geometry, profiles=None)).save(path)


class HeadwayServer:
    """A server that answers batches. Every steered answer is checked to say so."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model

    def answer(
        self, requests: Sequence[Request], output_tokens: int, salt: str | None = None
    ) -> list[Answer]:
        """See `protocol.System`; salt: keeps out of the prefix cache what others have put there.

        Raises EndpointError, with the server's message, and UnsteeredAnswer.
        """
        bodies = [self._body(each, output_tokens, salt) for each in requests]
        return asyncio.run(self._ask(bodies))

    def _body(self, request: Request, output_tokens: int, salt: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": request["tokens"],
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": TOP_LOGPROBS,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if salt is not None:
            body["cache_salt"] = salt
        if request["steering"] is not None:
            body["steering"] = {"methods": [method_of(request["steering"])]}
        return body

    async def _ask(self, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_SECONDS) as http:
            return await asyncio.gather(*(self._one(http, body) for body in bodies))

    async def _one(self, http: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
        try:
            response = await http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise EndpointError(f"{type(error).__name__}: {error}") from error
        if response.status_code != httpx.codes.OK:
            raise EndpointError(f"HTTP {response.status_code}: {response.text}")
        return parsed(response.json(), body)


def method_of(asked: dict[str, Any]) -> dict[str, Any]:
    """The method of a `steering` object that does what `loads.py` describes."""
    method = {key: value for key, value in asked.items() if key != "options"}
    match asked["method"]:
        case "emphasis":
            method["spans"] = [{"tokens": method.pop("span")}]
        case "caa":
            del method["vector"]
            method |= {"profile": PROFILE, "layers": [method.pop("layer")], "scope": "all"}
    return method | asked.get("options", {})


def parsed(data: dict[str, Any], body: dict[str, Any]) -> Answer:
    """The answer of a response. Raises EndpointError for too few tokens, and UnsteeredAnswer."""
    choice = data["choices"][0]
    tokens = choice["token_ids"]
    if len(tokens) != body["max_tokens"]:
        raise EndpointError(f"{len(tokens)} tokens came, not {body['max_tokens']}")
    applied = data.get("steering")
    if (applied is not None) != ("steering" in body):
        raise UnsteeredAnswer(f"asked for {body.get('steering')}, applied {applied}")
    first = choice["logprobs"]["top_logprobs"][0]
    answer: Answer = {
        "token_ids": tokens,
        "first": {name.removeprefix("token_id:"): value for name, value in first.items()},
    }
    details = data["usage"].get("prompt_tokens_details") or {}
    answer["cached_tokens"] = details.get("cached_tokens") or 0
    if applied and "draws" in applied["methods"][0]:
        answer["draws"] = applied["methods"][0]["draws"]
        answer["layers"] = applied["methods"][0]["layers"]
    return answer
