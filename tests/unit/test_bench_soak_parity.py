"""How `headway bench soak` compares answers with those of stock vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from headway.benchmarks import soak_parity
from headway.benchmarks.quality.client import EndpointError
from headway.benchmarks.soak_asks import CHAT, COMPLETIONS
from headway.benchmarks.soak_load import Sample
from headway.benchmarks.soak_parity import Kept, Parity, Tokens, compare, compare_all

pytestmark = pytest.mark.unit


def tokens(*ids: int, finish: str = "length", best: float = -0.5, second: float = -3.0) -> Tokens:
    """Each token at `best`, token 9 at `second` everywhere."""
    names = tuple(f"token_id:{number}" for number in ids)
    tops = tuple({name: best, "token_id:9": second} for name in names)
    return Tokens(names, (best,) * len(ids), tops, finish)


@pytest.mark.parametrize(
    ("ours", "stock", "greedy", "kept"),
    [
        (tokens(1, 2, 3), tokens(1, 2, 3), True, Kept.EQUAL),
        (tokens(1, 2, best=-0.5001), tokens(1, 2), True, Kept.EQUAL),
        (tokens(1, 2, best=-0.6), tokens(1, 2), True, Kept.DIFFERS),
        (tokens(1, 9, 4), tokens(1, 2, 3), True, Kept.DIFFERS),
        (tokens(1, 9, 4), tokens(1, 2, 3, second=-0.5004), True, Kept.TIE),
        (tokens(1, 9, 4), tokens(1, 2, 3, second=-0.5004), False, Kept.DIFFERS),
        (tokens(1, 8, 4), tokens(1, 2, 3), True, Kept.DIFFERS),
        (tokens(1, 2), tokens(1, 2, 3), True, Kept.DIFFERS),
        (tokens(1, 2, finish="stop"), tokens(1, 2), True, Kept.DIFFERS),
    ],
)
def test_answers_are_equal_tied_or_different(
    ours: Tokens, stock: Tokens, greedy: bool, kept: Kept
) -> None:
    found, what = compare(ours, stock, greedy, 1e-3)
    assert found is kept
    assert bool(what) == (kept is not Kept.EQUAL)


def answer(path: str, ids: list[int]) -> dict[str, Any]:
    """As vLLM has it with `return_tokens_as_token_ids`."""
    names = [f"token_id:{number}" for number in ids]
    if path == CHAT:
        rows = [
            {"token": n, "logprob": -0.5, "top_logprobs": [{"token": n, "logprob": -0.5}]}
            for n in names
        ]
        logprobs: dict[str, Any] = {"content": rows}
    else:
        tops = [{name: -0.5} for name in names]
        logprobs = {"tokens": names, "token_logprobs": [-0.5] * len(ids), "top_logprobs": tops}
    return {"choices": [{"finish_reason": "length", "logprobs": logprobs}]}


async def compared(
    monkeypatch: pytest.MonkeyPatch, samples: list[Sample], stock: Callable[[dict], list[int]]
) -> tuple[Parity, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []

    async def respond(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append(body)
        return httpx.Response(200, json=answer(request.url.path, stock(body)))

    class Client(httpx.AsyncClient):
        def __init__(self, **options: Any) -> None:
            options.pop("limits")
            super().__init__(**options, transport=httpx.MockTransport(respond))

    monkeypatch.setattr(soak_parity.httpx, "AsyncClient", Client)
    return await compare_all("http://stock", "stock-name", samples, 1e-3), seen


def sample(seed: int | None, ids: list[int], path: str = CHAT, **body: Any) -> Sample:
    options = {"temperature": 0.0} if seed is None else {"temperature": 0.9, "seed": seed}
    return Sample(path, {"model": "ours", **options, **body}, answer(path, ids))


async def test_stock_is_asked_the_same_without_steering(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample(None, [1, 2], steering={"methods": []}), sample(5, [1, 2], COMPLETIONS)]
    parity, seen = await compared(monkeypatch, samples, lambda body: [1, 2])
    assert parity.kept == [Kept.EQUAL, Kept.EQUAL] and parity.largest == 0.0
    assert seen == [
        {"model": "stock-name", "temperature": 0.0},
        {"model": "stock-name", "temperature": 0.9, "seed": 5},
    ]


async def test_an_answer_that_stock_gives_in_other_company_is_a_tie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def stock(body: dict[str, Any]) -> list[int]:
        if body.get("seed") != 7:
            return [1]
        asked.append(7)
        return [4] if len(asked) >= 3 else [3]

    samples = [sample(7, [4]), *(sample(seed, [1]) for seed in range(20, 40))]
    parity, seen = await compared(monkeypatch, samples, stock)
    assert parity.kept[0] is Kept.TIE and parity.count(Kept.EQUAL) == 20
    assert len(seen) == 21 + (1 + 3) + (1 + 7)
    assert "beside 7" in parity.details[0]


async def test_an_answer_that_stock_never_gives_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    parity, _ = await compared(monkeypatch, [sample(7, [4]), sample(8, [1])], lambda body: [1])
    assert parity.kept == [Kept.DIFFERS, Kept.EQUAL]
    assert "token_id:4" in parity.details[0]


async def test_stock_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client(httpx.AsyncClient):
        def __init__(self, **options: Any) -> None:
            transport = httpx.MockTransport(lambda request: httpx.Response(400, text="no"))
            super().__init__(base_url="http://stock", transport=transport)

    monkeypatch.setattr(soak_parity.httpx, "AsyncClient", Client)
    with pytest.raises(EndpointError, match="400 no"):
        await compare_all("http://stock", "m", [sample(1, [1])], 1e-3)
