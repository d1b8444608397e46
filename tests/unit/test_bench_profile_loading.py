"""`headway bench profile-loading` against a small server that streams and answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from headway.benchmarks import profile_loading
from headway.benchmarks.profile_loading import Measurement, Stream, Use, report, table
from headway.benchmarks.quality.client import EndpointError, UnsteeredAnswer
from headway.benchmarks.serve_matrix import drawn_profile
from headway.benchmarks.statistics import Verdict, bootstrap_median, verdict
from headway.server.launch import LaunchError
from tests.engine.harness import GEOMETRY

pytestmark = pytest.mark.unit

STEP = 0.02


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time passes by waiting alone, and at once: what is measured on it is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def skip(timeout):
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = skip

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Iterator[Clock]:
    loop = Clock()
    monkeypatch.setattr(profile_loading, "time", SimpleNamespace(perf_counter=loop.time))
    yield loop
    loop.close()


def served(loading: float = 0.0, steering: object = None, status: int = 200):
    """An endpoint whose stream has a token every `STEP` seconds and stops while one loads."""
    state = {"loading": loading}

    class Tokens(httpx.AsyncByteStream):
        async def __aiter__(self):
            while True:
                await asyncio.sleep(STEP)
                yield b'data: {"choices": [{"text": "a"}]}\n\n'

    async def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body.get("stream"):
            return httpx.Response(status, stream=Tokens())
        # As a worker that is busy: nobody gets a token.
        asyncio.get_running_loop().now += state.pop("loading", 0.0)
        await asyncio.sleep(STEP)
        return httpx.Response(200, json={"steering": steering})

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://test")


async def used(times: int, **server) -> list[Use]:
    async with served(**server) as http:
        stream = Stream(http, "m")
        try:
            return [await profile_loading._use(http, "m", "p@1", stream) for _ in range(times)]
        finally:
            await stream.close()


def test_the_first_use_is_later_by_the_time_of_loading_and_stalls_the_stream(clock):
    answers = used(2, loading=0.3, steering={"methods": [{"profile": "p@1"}]})
    first, second = clock.run_until_complete(answers)
    measured = Measurement([1.0], [first], [second])
    assert measured.loading()[0] == pytest.approx(0.3)
    assert second.step == pytest.approx(STEP)
    assert measured.stalls()[0] == pytest.approx(0.3 / STEP, abs=1.01)  # of a step in progress


@pytest.mark.parametrize("steering", [None, {"methods": [{"profile": "p@2"}]}])
def test_an_answer_that_another_profile_steered_ends_the_run(clock, steering):
    with pytest.raises(UnsteeredAnswer, match=r"p@1"):
        clock.run_until_complete(used(1, steering=steering))


def test_a_stream_that_is_refused_ends_the_run(clock):
    with pytest.raises(EndpointError, match="HTTP 500"):
        clock.run_until_complete(used(1, status=500))


def uses(*seconds: float) -> list[Use]:
    return [Use(each, pause=each, step=0.1) for each in seconds]


def test_report_and_table_say_which_bars_hold():
    measured = Measurement([0.5] * 6, uses(0.4, 0.5, 0.45, 0.4, 0.42, 0.42), uses(*[0.1] * 6))
    result = report(measured)
    loading, stall, upload = result["comparisons"]
    assert loading["value"] == pytest.approx(0.32) and loading["verdict"] == "fails"
    assert stall["value"] == pytest.approx(3.2) and stall["verdict"] == "fails"
    assert stall["largest"] == pytest.approx(4.0)
    assert upload["bar"] is None and upload["verdict"] is None
    quick = report(Measurement([0.5] * 6, uses(*[0.12] * 6), uses(*[0.1] * 6)))
    assert [row["verdict"] for row in quick["comparisons"][:2]] == ["holds", "holds"]
    # Once is too often: the bar is for the largest stall, not for their median.
    once = report(Measurement([0.5] * 6, uses(0.21, *[0.12] * 5), uses(*[0.1] * 6)))
    assert [row["verdict"] for row in once["comparisons"][:2]] == ["holds", "fails"]
    assert once["comparisons"][1]["value"] == pytest.approx(0.2)
    assert "MALLOC_TRIM_THRESHOLD_" in result["server_settings"]
    assert "loading, on first use, s" in table(result) and "fails" in table(result)
    json.dumps(result)


def test_the_registry_and_the_keys_are_those_of_the_bench(monkeypatch, tmp_path):
    started = []

    @contextmanager
    def running(program, *_):
        started.append(dict(program.environment))
        raise LaunchError("enough")
        yield

    monkeypatch.setattr(profile_loading.launch, "running", running)
    monkeypatch.setattr(profile_loading, "steerable_geometry", lambda _: GEOMETRY)
    monkeypatch.setattr(profile_loading, "read_model", lambda _: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ["--model", str(tmp_path), "--output", str(tmp_path / "out.json")]
    assert profile_loading.main(arguments) == 1
    # Of a program: it wins over what the caller exports.
    (own,) = started
    assert own["HEADWAY_STEERING_API_KEY"] and own["HEADWAY_HOME"] and own["VLLM_API_KEY"] == ""


def test_every_round_has_other_vectors_of_the_size_that_the_bar_is_for():
    one, other = (drawn_profile(GEOMETRY, each, GEOMETRY.num_layers) for each in (1, 2))
    shape = GEOMETRY.num_layers, 4, GEOMETRY.hidden_size
    assert one.tensors["directions"].shape == shape
    assert not np.array_equal(one.tensors["directions"], other.tensors["directions"])


def test_a_median_needs_two_values_and_an_interval_six():
    with pytest.raises(ValueError, match="two rounds"):
        bootstrap_median([1.0])
    few = bootstrap_median([1.0, 2.0, 3.0, 4.0, 9.0])
    assert few.value == 3.0 and np.isnan(few.low) and np.isnan(few.high)
    assert verdict(few, 100.0, at_most=True) == Verdict.UNKNOWN
    found = bootstrap_median([1.0, 2.0, 3.0, 3.0, 4.0, 9.0])
    assert 1.0 <= found.low < found.value == 3.0 < found.high <= 9.0
