"""What clients see when something in a server fails, vanishes, fills up or dies.

The table of docs/deploy.md ("When something fails"), row by row. One server has faults built in
from outside (`fault_plugin.py`); the last test that uses it drains it. A second one is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from headway.steering.vectors import VectorProfile
from tests.engine.harness import GEOMETRY
from tests.server import fault_plugin
from tests.server.calls import (
    CHAT,
    COMPLETIONS,
    QUIET,
    chat_body,
    events,
    post,
    text_of,
    wait_for,
)
from tests.server.conftest import FLAGS, MODEL, Server, running_server
from tests.server.test_registry import KEY, PROFILES, drawn, put, steered
from tests.vectors import drawn_profile

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SHORT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process fewer: it starts faster
LONG = {"max_tokens": 400, "ignore_eos": True}
SGRS = [{"method": "sgrs"}]


@pytest.fixture(scope="module")
def switches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of the plugin, and what the server needs in its environment."""
    folder = tmp_path_factory.mktemp("faults")
    return folder / "switches", fault_plugin.installed(folder)


@pytest.fixture(scope="module")
def faulty(
    tmp_path_factory: pytest.TempPathFactory, switches: tuple[Path, dict[str, str]]
) -> Iterator[Server]:
    """The server with faults; it has been ended when the last test is through."""
    from headway.server.models.smollm2 import ensure_smollm2

    flags = (*FLAGS, "--shutdown-timeout", "60")
    settings = {**SHORT, **switches[1]}
    yield from running_server(tmp_path_factory.mktemp("faulty"), ensure_smollm2(), flags, settings)


@pytest.fixture(scope="module")
def texts(faulty: Server) -> dict[str, str]:
    """What the server answers while nothing is wrong, each request alone."""
    return {name: text_of(post(faulty, CHAT, body)) for name, body in NEIGHBOURS.items()}


@contextmanager
def switched_on(switches: tuple[Path, dict[str, str]], fault: str) -> Iterator[None]:
    path = switches[0] / fault
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def methods(*items: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return chat_body(steering={"methods": list(items)}, **fields)


def failing(scale: float, **fields: Any) -> dict[str, Any]:
    """A request whose steering the plugin lets fail."""
    return methods({"method": "head_scale", "scales": [[3, 1, scale]]}, **fields)


NEIGHBOURS = {"unsteered": chat_body(), "steered": methods(*QUIET)}


def total(server: Server, name: str) -> float:
    """The sum over all series of a metric."""
    lines = server.http.get("/metrics/").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def failures(server: Server, stage: str) -> float:
    return server.metric("headway_failures_total", stage=stage)


def check_error(error: dict[str, Any], stage: str) -> None:
    assert (error["reason"], error["code"], error["type"]) == (
        "E_STEERING_FAILED",
        500,
        "InternalServerError",
    )
    assert f"stage {stage}" in error["message"]
    assert fault_plugin.SECRET not in error["message"]


def is_idle(server: Server) -> bool:
    """Whether nothing of past requests is left in front end, engine and workers."""
    return (
        server.metric("headway_active_requests") == 0
        and total(server, "vllm:num_requests_running") == 0
        and total(server, "vllm:kv_cache_usage_perc") == 0
        and server.metric("headway_slots", state="used") == 0
        and server.metric("headway_slots", state="free") == 32
    )


def check_answers(server: Server, texts: dict[str, str], *names: str) -> None:
    """The server answers as ever."""
    for name in names or NEIGHBOURS:
        assert text_of(post(server, CHAT, NEIGHBOURS[name])) == texts[name], name


def check_healthy(server: Server, texts: dict[str, str]) -> None:
    """It does, and nothing leaked."""
    check_answers(server, texts)
    assert wait_for(lambda: is_idle(server)), server.http.get("/metrics/").text


FAULTS = {
    "compile": (fault_plugin.COMPILE_RAISES, "compile"),
    "hook": (fault_plugin.KERNEL_RAISES, "edit"),
    "NaN": (fault_plugin.BECOMES_NAN, "nonfinite"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_ends_its_request_and_no_other(
    faulty: Server, texts: dict[str, str], fault: str
) -> None:
    scale, stage = FAULTS[fault]
    before, lost = failures(faulty, stage), faulty.metric("headway_unsteered_total")
    names = ["unsteered", "steered", "unsteered"]
    async with httpx.AsyncClient(base_url=faulty.url, timeout=120) as client:
        bodies = [NEIGHBOURS[names[0]], failing(scale), *(NEIGHBOURS[each] for each in names[1:])]
        answers = await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))
    failed = answers.pop(1)
    assert failed.status_code == 500, failed.text
    check_error(failed.json()["error"], stage)
    for name, answer in zip(names, answers, strict=True):
        assert text_of(answer.json()) == texts[name]
    assert failures(faulty, stage) == before + 1
    assert faulty.metric("headway_unsteered_total") == lost
    check_healthy(faulty, texts)


@pytest.mark.parametrize("fault", ["hook", "NaN"])
def test_a_stream_ends_with_the_error(faulty: Server, fault: str) -> None:
    scale, stage = FAULTS[fault]
    *told, error, done = events(faulty, CHAT, failing(scale))
    assert done == "[DONE]"
    check_error(json.loads(error)["error"], stage)
    content = [json.loads(each)["choices"][0]["delta"].get("content") for each in told]
    assert not any(content)  # not one token of the step that failed


def test_vectors_that_cannot_be_loaded(
    faulty: Server, texts: dict[str, str], switches: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    put(faulty, tmp_path, "colour", drawn(1))
    before = failures(faulty, "load")
    with switched_on(switches, fault_plugin.UPLOAD):
        response = faulty.http.post(CHAT, json=steered("colour"))
        assert response.status_code == 500, response.text
        check_error(response.json()["error"], "load")
        check_answers(faulty, texts)
    assert failures(faulty, "load") == before + 1
    assert "steering" in post(faulty, CHAT, steered("colour"))


def test_a_report_that_does_not_come(
    faulty: Server, texts: dict[str, str], switches: tuple[Path, dict[str, str]]
) -> None:
    """Nobody knows whether the answer is the one that was asked for, so nobody gets it."""
    before = failures(faulty, "report"), faulty.metric("headway_unsteered_total")
    with switched_on(switches, fault_plugin.REPORT):
        response = faulty.http.post(CHAT, json=NEIGHBOURS["steered"])
        assert response.status_code == 500, response.text
        check_error(response.json()["error"], "report")
        *_, error, done = events(faulty, CHAT, NEIGHBOURS["steered"])
        check_error(json.loads(error)["error"], "report")
        check_answers(faulty, texts, "unsteered")
    after = failures(faulty, "report"), faulty.metric("headway_unsteered_total")
    assert after == (before[0] + 2, before[1] + 2)
    check_answers(faulty, texts)


def test_a_full_disk(faulty: Server, switches: tuple[Path, dict[str, str]]) -> None:
    path, body = "/v1/steering/presets/hushed", {"methods": QUIET}
    before = failures(faulty, "registry")
    with switched_on(switches, fault_plugin.DISK):
        response = faulty.http.put(path, json=body, headers=KEY)
        error = response.json()["error"]
        assert (response.status_code, error["reason"]) == (500, "E_STEERING_FAILED")
        assert "No space left on device" in error["message"]
        assert fault_plugin.SECRET not in response.text
    assert failures(faulty, "registry") == before + 1
    assert faulty.http.put(path, json=body, headers=KEY).status_code == 201
    assert faulty.http.delete(path, headers=KEY).status_code == 200


def test_a_profile_whose_file_vanished(faulty: Server, tmp_path: Path) -> None:
    put(faulty, tmp_path, "brief", drawn(2))
    shown = faulty.http.get(f"{PROFILES}/brief").json()
    assert "steering" in post(faulty, CHAT, steered("brief"))
    [file] = (faulty.log.parent / "home").glob(f"**/{digest_of(drawn(2), tmp_path)}.safetensors")
    file.unlink()
    response = faulty.http.post(CHAT, json=steered("brief"))
    assert (response.status_code, response.json()["error"]["reason"]) == (
        404,
        "E_PROFILE_NOT_FOUND",
    )
    assert faulty.http.get(PROFILES).status_code == 200 and shown


def digest_of(profile: VectorProfile, folder: Path) -> str:
    return profile.save(folder / "again.safetensors")


def test_a_profile_that_overflows(faulty: Server, texts: dict[str, str], tmp_path: Path) -> None:
    """Nothing is injected: vectors as large as float32 goes are finite, their sum is not.

    The block that held NaN is the first to be used again, by a request that fills less of it.
    """
    short = {"model": MODEL, "prompt": "One, two,", "max_tokens": 4, "temperature": 0}
    want = text_of(post(faulty, COMPLETIONS, {**short, "cache_salt": "before"}))
    profile = drawn_profile(GEOMETRY, "caa", tuple(range(30)))
    huge = (profile.tensors["directions"] * np.float32(3e38)).astype(np.float32)
    put(faulty, tmp_path, "huge", VectorProfile(profile.header, {"directions": huge}))
    body = methods({"method": "caa", "profile": "huge"}, max_tokens=8)
    before = failures(faulty, "nonfinite")
    response = faulty.http.post(CHAT, json=body)
    assert response.status_code == 500, response.text
    check_error(response.json()["error"], "nonfinite")
    assert failures(faulty, "nonfinite") == before + 1
    assert text_of(post(faulty, COMPLETIONS, {**short, "cache_salt": "behind"})) == want
    check_healthy(faulty, texts)


@asynccontextmanager
async def asked(
    server: Server, body: dict[str, Any], receive_bytes: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which a stream was asked for; cut, without a word, in the end.

    receive_bytes: of the socket's buffer, None for the usual.
    """
    host, port = server.url.removeprefix("http://").split(":")
    raw = socket.socket()
    if receive_bytes is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1024)
    content = json.dumps({**body, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def tokens_in(stream: bytes) -> int:
    return stream.count(b'"content":"') - stream.count(b'"content":""')


async def test_fifty_clients_that_vanish(faulty: Server, texts: dict[str, str]) -> None:
    """Some before their first token, some behind it; some wait, for there are 32 places."""
    kinds = [chat_body(**LONG), methods(*QUIET, **LONG), methods(*SGRS, **LONG)]

    async def vanish(index: int) -> int:
        """Leave behind so many tokens, or at once; returns how many there were."""
        wanted, told = index % 5, b""
        async with asked(faulty, kinds[index % 3]) as (reader, _):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(60 if wanted else 0.3):
                    while not wanted or tokens_in(told) < wanted:
                        told += await reader.read(1 << 16)
        return tokens_in(told)

    told = await asyncio.gather(*map(vanish, range(50)))
    assert min(told) == 0 and max(told) > 1, told
    await asyncio.to_thread(check_healthy, faulty, texts)


async def test_a_client_that_does_not_read(faulty: Server, texts: dict[str, str]) -> None:
    """Its request goes on to its end, which `max_tokens` bounds, and holds nobody up.

    The buffers between it and the server may hold all of it; tests/unit/test_http_routes.py has one
    for whom they hold nothing.
    """
    body = methods(*QUIET, logprobs=True, top_logprobs=20, max_tokens=100, ignore_eos=True)
    async with asked(faulty, body, receive_bytes=4096) as (reader, _):
        await reader.readline()
        started = time.monotonic()
        for name, neighbour in NEIGHBOURS.items():
            answer = await asyncio.to_thread(post, faulty, CHAT, neighbour)
            assert text_of(answer) == texts[name]
        assert time.monotonic() - started < 90
        running = "vllm:num_requests_running"
        assert await asyncio.to_thread(wait_for, lambda: total(faulty, running) == 0, 60)
    await asyncio.to_thread(check_healthy, faulty, texts)


async def test_a_server_that_is_told_to_end(faulty: Server) -> None:
    """Last of all: what runs comes to its end, steering and report included, and the rest waits."""
    withheld = faulty.log.read_text().count("no steering report")
    async with httpx.AsyncClient(base_url=faulty.url, timeout=120) as client:
        bodies = [
            methods(*QUIET, max_tokens=100, ignore_eos=True),
            methods(*SGRS, max_tokens=40, ignore_eos=True),
            chat_body(max_tokens=100, ignore_eos=True),
        ]
        running = [asyncio.create_task(client.post(CHAT, json=body)) for body in bodies]
        streaming = asyncio.create_task(
            asyncio.to_thread(events, faulty, CHAT, methods(*QUIET, max_tokens=80, ignore_eos=True))
        )
        await asyncio.sleep(2.0)
        faulty.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in (*running, streaming)), "all too quick to tell"
        late = await client.post(CHAT, json=chat_body())
        assert late.status_code == 503, late.text
        error = late.json()["error"]
        assert (error["reason"], error["type"]) == ("E_UNAVAILABLE", "ServiceUnavailableError")
        assert late.headers["retry-after"] == "1" and late.headers["connection"] == "close"
        ready = await client.get("/v1/steering/capabilities")
        assert ready.status_code == 503
        assert (await client.get("/health")).status_code == 200
        quiet, gated, plain = await asyncio.gather(*running)
    for answer in (quiet, gated, plain):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert quiet.json()["steering"]["positions_edited"] >= 100
    assert gated.json()["steering"]["methods"][0]["draws"] >= 40
    last, done = (await streaming)[-2:]
    assert "steering" in json.loads(last) and done == "[DONE]"
    assert await asyncio.to_thread(faulty.process.wait, 60) == 0
    assert faulty.log.read_text().count("no steering report") == withheld


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose engine is going to be killed."""
    from headway.server.models.smollm2 import ensure_smollm2

    folder = tmp_path_factory.mktemp("doomed")
    yield from running_server(folder, ensure_smollm2(), FLAGS, SHORT)


async def test_an_engine_that_dies(doomed: Server) -> None:
    """Nobody waits for ever, nobody is sent there any more, and whoever started it is told."""
    readiness: list[int] = []

    async def probe(client: httpx.AsyncClient) -> None:
        while doomed.process.poll() is None:
            for path in ("/health", "/v1/steering/capabilities"):
                try:
                    readiness.append((await client.get(path, timeout=5)).status_code)
                except httpx.TransportError:
                    readiness.append(0)
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(base_url=doomed.url, timeout=60) as client:
        bodies = [chat_body(**LONG), methods(*QUIET, **LONG)]
        running = [asyncio.create_task(client.post(CHAT, json=body)) for body in bodies]
        stream = methods(*QUIET, **LONG)
        streaming = asyncio.create_task(asyncio.to_thread(events, doomed, CHAT, stream))
        await asyncio.sleep(2.0)
        assert not any(task.done() for task in (*running, streaming)), "all too quick to tell"
        engine = max(
            psutil.Process(doomed.process.pid).children(recursive=True),
            key=lambda child: child.memory_info().rss,
        )
        probing = asyncio.create_task(probe(client))
        engine.kill()
        killed = time.monotonic()
        for answer in await asyncio.wait_for(asyncio.gather(*running), 30):
            assert answer.status_code >= 500, answer.text
            assert answer.json()["error"]["type"]
        told = await asyncio.wait_for(streaming, 30)
        assert any("error" in json.loads(each) for each in told if each != "[DONE]")
        code = await asyncio.to_thread(doomed.process.wait, 30)
        await probing
    assert code == 1
    assert time.monotonic() - killed < 25
    refused = [status != 200 for status in readiness]
    assert any(refused) and all(refused[refused.index(True) :])
