"""The requests of `headway bench serve`, sent and timed by the client of vLLM's own benchmark.

vLLM symbols relied on: `vllm.benchmarks.lib.endpoint_request_func`, its `RequestFuncInput`,
`RequestFuncOutput`, `async_request_openai_completions` and `async_request_openai_chat_completions`.

A run of a cell has two bursts of the same requests. The first has a new `cache_salt`, so that
nothing comes from the prefix cache, and asks for one token: it gives the time to first token. The
second finds the prompts in the cache, where the first has put them, and asks for all tokens: it
gives everything else, which is so of decoding at that context. Prompts with pictures are shorter
than a cache block and computed again. The client takes no notice of what an answer says of its
steering; after both bursts the reports of all requests are read from the server, by the ids that
the requests were given.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from headway.benchmarks.image_questions import SPLIT
from headway.benchmarks.quality.client import EndpointError, UnsteeredAnswer
from headway.benchmarks.quality.neutral_text import PARAGRAPHS
from headway.benchmarks.quality.scenes import question, scene
from headway.benchmarks.serve_matrix import IMAGE, STREAMS, Cell
from headway.benchmarks.serve_servers import Server

PATHS = {"text": "/v1/completions", "image": "/v1/chat/completions"}
ID_PREFIXES = {"text": "cmpl-", "image": "chatcmpl-"}
"""What vLLM puts before the id of a request to make that of its answer."""
CACHE_HITS = "vllm:prefix_cache_hits_total"
CHECK_SECONDS = 60.0


@dataclass
class Run:
    """What users saw of one run of a cell. Times in seconds.

    seconds: from sending the burst that has all tokens to the end of its last stream. ttft: of each
    request, its prompt not cached; tpot: its time per token after the first; itl: between two
    chunks, of all requests; e2e: from sending it to its last token; warm_ttft: to the first of the
    same burst. cached: the share of the prompt tokens of that burst that came from the prefix
    cache. foreign_share, idle_share: CPU that others, and the servers that were waiting, used
    meanwhile, as a share of one core.
    """

    tokens: int
    seconds: float
    ttft: list[float]
    tpot: list[float]
    itl: list[float]
    e2e: list[float]
    warm_ttft: list[float]
    cached: float = 1.0
    foreign_share: float = field(default=0.0, kw_only=True)
    idle_share: float = field(default=0.0, kw_only=True)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all requests together."""
        return self.tokens / self.seconds

    @property
    def cold_e2e(self) -> list[float]:
        """To the last token of each request, its prompt not cached: `ttft`, and what follows it."""
        times = zip(self.ttft, self.e2e, self.warm_ttft, strict=True)
        return [ttft + e2e - warm for ttft, e2e, warm in times]


class Load:
    """The requests of a cell, to its server.

    specs: the `steering` objects of its configurations, () for unsteered requests; contents: one
    prompt after the other, as fields of a `RequestFuncInput`.
    """

    def __init__(
        self,
        cell: Cell,
        server: Server,
        specs: Sequence[dict[str, Any]],
        contents: Iterator[dict[str, Any]],
        output_tokens: int,
    ) -> None:
        self.cell = cell
        self.server = server
        self.specs = specs
        self.contents = contents
        self.output_tokens = output_tokens

    def run(self) -> Run:
        """Send the requests twice. Raises EndpointError, and UnsteeredAnswer, see `check`."""
        prompts = [next(self.contents) for _ in range(self.cell.batch)]
        salt = uuid4().hex
        cold = self._requests(prompts, salt, 1)
        full = self._requests(prompts, salt, self.output_tokens)
        first, _ = self._burst(cold, 1)
        hits = self._cache_hits()
        outputs, seconds = self._burst(full, self.output_tokens)
        cached = (self._cache_hits() - hits) / (self.cell.batch * self.cell.prompt_tokens)
        self.check([each.request_id for each in cold], 1)
        self.check([each.request_id for each in full], self.output_tokens)
        after = self.output_tokens - 1
        return Run(
            tokens=self.cell.batch * self.output_tokens,
            seconds=seconds,
            ttft=[output.ttft for output in first],
            tpot=[(output.latency - output.ttft) / after for output in outputs],
            # Chat begins with a chunk that has the role and no token, and comes with the first.
            itl=[gap for output in outputs for gap in output.itl[-after:]],
            e2e=[output.latency for output in outputs],
            warm_ttft=[output.ttft for output in outputs],
            cached=cached,
        )

    def check(self, request_ids: Sequence[str], tokens: int) -> None:
        """Raise UnsteeredAnswer unless the requests that should be steered, and they alone, were.

        The server answers no request whose edits are incomplete; here it must also vouch for each,
        in as many configurations as the cell has.
        """
        fingerprints = set()
        with httpx.Client(base_url=self.server.url, timeout=CHECK_SECONDS) as http:
            for index, request_id in enumerate(request_ids):
                name = ID_PREFIXES[self.cell.modality] + request_id
                answer = http.get(f"/v1/steering/reports/{name}")
                if index >= self.cell.steered:
                    if answer.status_code != httpx.codes.NOT_FOUND:
                        raise self._unsteered(index, "asks for nothing and has a report")
                    continue
                if answer.status_code != httpx.codes.OK:
                    raise self._unsteered(index, f"has no report: {answer.text}")
                report = answer.json()
                if reason := shortcoming(report, self._spec(index), tokens):
                    raise self._unsteered(index, reason)
                fingerprints.add(report["fingerprint"])
        if len(fingerprints) != self.cell.configurations:
            found = f"{len(fingerprints)} configurations, not {self.cell.configurations}"
            raise UnsteeredAnswer(f"{self.cell.name}: {found}")

    def _unsteered(self, index: int, reason: str) -> UnsteeredAnswer:
        return UnsteeredAnswer(f"{self.cell.name}: request {index} {reason}")

    def _spec(self, index: int) -> dict[str, Any]:
        return self.specs[index % len(self.specs)]

    def _requests(self, prompts: Sequence[dict[str, Any]], salt: str, tokens: int) -> list[Any]:
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput

        requests = []
        for index, prompt in enumerate(prompts):
            body: dict[str, Any] = {"temperature": 0.0, "cache_salt": salt}
            if index < self.cell.steered:
                body["steering"] = self._spec(index)
            requests.append(
                RequestFuncInput(
                    **prompt,
                    api_url=self.server.url + PATHS[self.cell.modality],
                    prompt_len=self.cell.prompt_tokens,
                    output_len=tokens,
                    model=self.server.model,
                    extra_body=body,
                    ignore_eos=True,
                    request_id=uuid4().hex,
                )
            )
        return requests

    def _burst(self, requests: Sequence[Any], tokens: int) -> tuple[list[Any], float]:
        """The outputs of requests made at the same time, and seconds until the last ended."""
        outputs, seconds = asyncio.run(send(requests, self.cell.modality))
        for output in outputs:
            if not output.success:
                raise EndpointError(f"{self.cell.name}: {output.error}")
            if (output.output_tokens, output.prompt_len) != (tokens, self.cell.prompt_tokens):
                got = f"{output.output_tokens} tokens came for {output.prompt_len}"
                raise EndpointError(
                    f"{self.cell.name}: {got}, not {tokens} for {self.cell.prompt_tokens}"
                )
        return outputs, seconds

    def _cache_hits(self) -> float:
        lines = httpx.get(f"{self.server.url}/metrics", timeout=CHECK_SECONDS).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(CACHE_HITS))


async def send(requests: Sequence[Any], modality: str) -> tuple[list[Any], float]:
    """The `RequestFuncOutput` of each `RequestFuncInput`, all sent at once, and the seconds."""
    import aiohttp
    from vllm.benchmarks.lib import endpoint_request_func as client

    ask = client.async_request_openai_completions
    if modality == IMAGE:
        ask = client.async_request_openai_chat_completions
    # A connection for every request, whatever waits.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        connector=connector, timeout=client.AIOHTTP_TIMEOUT
    ) as session:
        started = time.perf_counter()
        outputs = await asyncio.gather(*(ask(request, session) for request in requests))
        return list(outputs), time.perf_counter() - started


def shortcoming(report: dict[str, Any], spec: dict[str, Any], tokens: int) -> str | None:
    """What a report lacks of a request with this spec that has so many tokens, or None.

    One token is predicted at the last position of the prompt: what only edits positions of the
    output, or cached ones, edits nothing for it.
    """
    asked = [method["method"] for method in spec["methods"]]
    applied = [method["method"] for method in report["methods"]]
    if applied != asked or report["identity"]:
        return f"asks for {asked} and got {applied or 'nothing'}"
    draws = [method["draws"] for method in report["methods"] if "draws" in method]
    if draws:
        enough = min(draws) >= tokens
        return None if enough else f"has {min(draws)} candidates judged for {tokens} tokens"
    if tokens > 1 and not report["positions_edited"]:
        return "had no position edited"
    return None


def texts(model: Path, num_tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    """Prose of this many tokens, as many different prompts as may be asked at once, in turn.

    Each begins elsewhere in the same text, so that no two share a block of the prefix cache.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    order = random.Random(seed).sample(PARAGRAPHS, len(PARAGRAPHS))
    prose = [
        token for each in order for token in tokenizer.encode(each, add_special_tokens=False).ids
    ]
    step = len(prose) // STREAMS
    repeated = prose * (2 + num_tokens // len(prose))
    while True:
        for start in range(0, step * STREAMS, step):
            yield {"prompt": repeated[start : start + num_tokens]}


def pictures(seed: int) -> Iterator[dict[str, Any]]:
    """One question about ever new pictures, so that neither encoder nor prefix cache knows them."""
    text = {"type": "text", "text": question("chair")}
    for number in count(seed):
        buffer = io.BytesIO()
        scene(SPLIT, number).image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, text]
        yield {"prompt": "", "chat_messages": [{"role": "user", "content": content}]}
