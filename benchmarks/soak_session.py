"""One soak of a server that is up: what is shared is put, traffic is sent, and it is undone."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
from tqdm import tqdm

from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.soak_asks import CHAT, STEERING_ROUTES, Ask, Place
from headway.benchmarks.soak_checks import MIN_SECONDS, Soak
from headway.benchmarks.soak_largest import largest
from headway.benchmarks.soak_load import Driver
from headway.benchmarks.soak_profiles import PRESETS, delete_shared, put_shared
from headway.benchmarks.soak_specs import SPECS
from headway.benchmarks.soak_watch import Memory, read, sample_forever, settled
from headway.steering import ModelGeometry

SAMPLE_SECONDS = 1.0
"""Between two looks at the memory."""
LAST = [{"method": "head_scale", "scales": [[0, 0, 1.5]]}]
"""How the request is steered that comes last."""


@dataclass(frozen=True)
class Target:
    """A server that is up. pid: of its first process, None where that is not known."""

    url: str
    pid: int | None
    key: str
    api_key: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """Those of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


async def run_soak(target: Target, dtype: str, seconds: float, concurrency: int, seed: int) -> Soak:
    """Send traffic to a server for so long, and wait until it is quiet.

    Before a soak that is long enough to judge memory, the largest requests are sent at once.

    That the server is gone by then is part of what was seen. Raises EndpointError, also where it
    runs in another dtype; httpx.HTTPError before the traffic.
    """
    async with Driver(target.url, target.key, target.headers) as driver:
        place, left_out = await prepare(driver, dtype)
        before = await read(driver.http)
        if seconds >= MIN_SECONDS:
            for step in largest(place, seed, concurrency):
                await asyncio.gather(*map(driver.ask, step))
        memory = None if target.pid is None else Memory(target.pid)
        samples: list[tuple[float, float]] = []
        async with _watching(memory, samples, driver, seconds):
            await driver.run(place, seed, seconds, concurrency)
            took = time.perf_counter() - driver.started
        for ask in delete_shared():
            await driver.ask(ask)
        gone = None
        try:
            after = await settled(driver.http, _last(place))
        except httpx.HTTPError as error:
            after = dict.fromkeys(before)
            gone = f"it does not answer at the end: {type(error).__name__}: {error}"
    return Soak(
        took,
        driver.outcomes,
        before,
        after,
        samples,
        None if memory is None else memory.kind,
        driver.samples,
        left_out,
        gone=gone,
    )


async def prepare(driver: Driver, dtype: str) -> tuple[Place, dict[str, str]]:
    """Put what is shared; what is known of the server, and what methods it cannot do, and why.

    Raises EndpointError where it has another dtype, or does not take the shared profiles.
    """
    shown = await _get(driver.http, f"{STEERING_ROUTES}/capabilities")
    if shown["engine"]["dtype"] != dtype:
        raise EndpointError(f"the server runs in {shown['engine']['dtype']}, not {dtype}")
    sizes = dict(shown["model"])
    fingerprint = sizes.pop("fingerprint")
    geometry = ModelGeometry(**sizes | {"sink_dims": tuple(sizes["sink_dims"])})
    if geometry.fingerprint != fingerprint:
        raise EndpointError("the server has another version: its sizes have another fingerprint")
    for ask in put_shared(geometry):
        outcome = await driver.ask(ask)
        if outcome.problem is not None:
            raise EndpointError(f"{outcome.problem}: {outcome.detail}")
    left_out = {}
    for name, build in SPECS.items():
        methods = [build(random.Random(0), geometry, "")]
        reason = await _refusal(driver.http, {"steering": {"methods": methods}})
        if reason is not None:
            left_out[name] = reason
    there = frozenset(SPECS) - left_out.keys()
    presets = tuple(
        name for name, methods in PRESETS.items() if there.issuperset(m["method"] for m in methods)
    )
    length = shown["engine"]["max_model_len"]
    return Place(shown["models"][0], geometry, length, there, presets), left_out


async def _get(http: httpx.AsyncClient, path: str) -> Any:
    response = await http.get(path)
    if response.status_code != httpx.codes.OK:
        raise EndpointError(f"{path}: {response.status_code} {response.text[:300]}")
    return response.json()


async def _refusal(http: httpx.AsyncClient, body: dict[str, Any]) -> str | None:
    """Why the compile route refuses a body, None if it does not."""
    response = await http.post(f"{STEERING_ROUTES}/compile", json=body)
    if response.status_code == httpx.codes.OK:
        return None
    return str(response.json()["error"]["message"])


def _last(place: Place) -> Ask:
    """The steered request that comes last."""
    body = {
        "model": place.model,
        "messages": [{"role": "user", "content": "Goodbye."}],
        "max_tokens": 2,
        "steering": {"methods": LAST},
    }
    return Ask("last", CHAT, body, steered=True)


@asynccontextmanager
async def _watching(
    memory: Memory | None, samples: list[tuple[float, float]], driver: Driver, seconds: float
) -> AsyncIterator[None]:
    """Look at the memory, and show how far the soak is."""
    tasks = [asyncio.create_task(_progress(seconds, driver))]
    if memory is not None:
        tasks.append(asyncio.create_task(sample_forever(memory, SAMPLE_SECONDS, samples)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _progress(seconds: float, driver: Driver) -> None:
    with tqdm(total=round(seconds), desc="soaking", unit="s", leave=False) as bar:
        while True:
            await asyncio.sleep(1.0)
            bar.n = min(round(seconds), round(time.perf_counter() - driver.started))
            bar.set_postfix(requests=len(driver.outcomes), problems=driver.problems)
