"""Reports that are kept, and where the steering of a request is looked up."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from headway.server.http import steering_routes
from headway.server.http.carriage import Carriage
from headway.server.http.presets import Preset
from headway.server.http.state import ReportStore
from tests.unit.test_http_exchange import FIELD, STEERED, make_state
from tests.unit.test_http_routes import make_app

pytestmark = pytest.mark.unit


def test_reports_are_bounded_in_bytes() -> None:
    store = ReportStore(max_bytes=20)
    for name in "ab":
        store.put(name, {"x": "1"})  # 9 bytes
    store.put("a", {"x": "22"})  # in the place of the other, which no longer counts
    assert store.get("a") and store.get("b")
    store.put("c", {"x": "3"})
    assert store.get("b") is None and store.get("a") and store.get("c")
    store.put("c", {"x": "4" * 20})
    assert store.get("c") is None and store.get("a"), "one too large alone takes nobody's place"
    store.put("d", {"x": "5"})
    assert store.get("a") and store.get("d")


class Watched(dict[str, Preset]):
    """Presets that may not be walked."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("to look at all presets reads all their files")

    def items(self) -> Any:
        iter(self)


def test_only_the_preset_that_is_named_is_looked_at() -> None:
    state = make_state()
    compiled = state.resolve(FIELD, "base", None)
    assert compiled is not None
    state.presets = Watched({"quiet": Preset("quiet", STEERED["methods"], compiled.program)})
    assert state.resolve(FIELD, "base", None) is not None
    named = state.resolve([Carriage({"preset": "quiet"}, "steering")], "base", None)
    assert named is not None
    assert named.program.fingerprint == compiled.program.fingerprint
    with pytest.raises(AssertionError, match="all presets"):
        state._methods_of("unknown")  # the message tells which there are


@pytest.mark.parametrize(
    ("value", "param", "model", "aside"),
    [
        (STEERED, "steering", "base", False),
        (json.dumps(STEERED), "vllm_xargs.steering", "base", False),
        ({"preset": "quiet"}, "steering", "base", True),
        ('{"\\u0070reset": "quiet"}', "vllm_xargs.steering", "base", True),
        ({"methods": [{"method": "vhr", "profile": "p"}]}, "steering", "base", True),
        (None, "", "base:quiet", True),
        (None, "", "base", False),
    ],
    ids=["inline", "inline text", "preset", "preset text", "profile", "alias", "unsteered"],
)
async def test_what_may_read_files_is_resolved_aside(
    value: Any, param: str, model: str, aside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, threads = make_state(), []
    carriages = [Carriage(value, param)] if param else None

    def resolve(*args: Any) -> None:
        assert args == (carriages, model, None)
        threads.append(threading.current_thread())

    monkeypatch.setattr(state, "resolve", resolve)
    await state.resolve_aside(carriages, model, None)
    assert [thread is not threading.main_thread() for thread in threads] == [aside]


async def test_files_are_read_by_one_at_a_time() -> None:
    """Else every request for a cold profile would read it."""
    state, running, most = make_state(), 0, 0

    def read() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1

    await asyncio.gather(*(state.in_thread(read) for _ in range(4)))
    assert most == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/steering/compile"])
async def test_a_request_for_a_preset_does_not_hold_up_the_server(path: str) -> None:
    app = make_app()
    app.include_router(steering_routes.router)
    state, threads = app.state.headway, []
    compiled = state.resolve(FIELD, "base", None)

    class Noted(dict[str, Preset]):
        def get(self, *args: Any) -> Any:
            threads.append(threading.current_thread())
            return super().get(*args)

    state.presets = Noted(quiet=Preset("quiet", STEERED["methods"], compiled.program))
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post(path, json={**body, "steering": {"preset": "quiet"}})
    assert answer.status_code == 200
    assert threads and threading.main_thread() not in threads
