"""Feedback on served requests: what it is about, what is refused, and the versions it makes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headway.server.engine.report import EngineReport
from headway.server.http import metrics
from headway.server.http.admin import AdminKeys
from headway.server.http.exchange import Exchange
from headway.server.http.requests import SteerableChatCompletionRequest
from headway.server.http.state import ResolvedSteering
from headway.server.registry import feedback as feedback_module
from headway.server.registry.readings import ProfileReading, ReadingStore
from headway.steering import parse_spec
from headway.steering.program import Readout
from headway.steering.refinement import Feedback, ProbeReading, refined
from headway.steering.vectors import FeedbackRule, VectorProfile
from headway.steering.wire import decode_program, encode_program
from tests.registry import GEOMETRY, heads
from tests.registry_app import Server, files, refused
from tests.vectors import drawn_profile

pytestmark = pytest.mark.unit

RULE = FeedbackRule(batch=2, learning_rate=0.5)
GACT = {"method": "gact", "profile": "p"}
SIZE = GEOMETRY.hidden_size


class Workers:
    """Workers that hold one report."""

    report: EngineReport | None = None

    async def pop_report(self, report_id: str) -> EngineReport | None:
        return self.report


def new_server(root: Path, given: Any = None) -> Server:
    server = Server(root, AdminKeys(["right"]), given)
    text = SimpleNamespace(model_type="llama")
    server.state.vllm_config.model_config = SimpleNamespace(
        hf_text_config=text, get_total_num_hidden_layers=lambda: GEOMETRY.num_layers
    )
    workers: Any = Workers()
    server.state.client = workers
    return server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield new_server(tmp_path / "registry")
    metrics.PROFILE_INFO.clear()


async def put(server: Server, profile: VectorProfile, name: str = "p", **content: Any) -> str:
    """Make a version of a profile; returns its reference."""
    path = server.registry.store.root.parent / "put.safetensors"
    profile.save(path)
    digest = await server.put_vectors(path.read_bytes())
    shown = await server.ok("PUT", f"profiles/{name}", json={"artifact": digest, **content})
    reference: str = shown["reference"]
    return reference


def gact_profile(rule: FeedbackRule | None = RULE, **options: Any) -> VectorProfile:
    return drawn_profile(GEOMETRY, feedback=rule, **options)


def row_of(seed: int, layer: int) -> np.ndarray:
    """What a probe read of a request: a row of rms 1."""
    row = np.random.default_rng([seed, layer]).standard_normal(SIZE)
    return (row / np.sqrt(np.mean(row**2))).astype(np.float32)


async def serve(
    server: Server, request_id: str, *methods: dict[str, Any], seed: int = 0, **report: Any
) -> dict[str, Any]:
    """A request is answered; returns the `steering` of the answer."""
    spec = {"methods": list(methods or [GACT])}
    program = server.resolve(**spec)
    artifacts = {each.digest: each for each in program.artifacts}
    probes = []
    for edit in program.residual_edits:
        artifact, row = artifacts[edit.artifact], row_of(seed, edit.layer)
        cluster = int((artifact.probe_weights @ row + artifact.probe_bias).argmax())
        probes.append([edit.point, cluster, row.tobytes()])
    workers: Any = server.state.client
    counts = {"sequences": 1, "positions_computed": 9, "positions_edited": 9, **report}
    workers.report = EngineReport(probes=probes, **counts)
    metadata = SimpleNamespace(request_id=request_id, final_usage_info=None)
    raw: Any = SimpleNamespace(state=SimpleNamespace(request_metadata=metadata), app=None)
    message = {"role": "user", "content": "hi"}
    body = SteerableChatCompletionRequest(messages=[message], model="base")
    steering = ResolvedSteering(parse_spec(spec), program, "base")
    exchange = Exchange(server.state, steering, body, raw)
    exchange.open()
    try:
        echo = await exchange.complete()
    finally:
        exchange.close("ok")
    assert echo is not None
    return echo


async def give(server: Server, request_id: str, name: str = "p", **verdict: Any) -> Any:
    body = {"request_id": request_id, **verdict}
    return await server.call("POST", f"profiles/{name}/feedback", json=body)


async def given(server: Server, request_id: str, **verdict: Any) -> dict[str, Any]:
    answer = await give(server, request_id, **verdict)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def loaded(server: Server, reference: str) -> VectorProfile:
    found = server.registry.profiles.find(reference)
    assert found is not None and isinstance(found.profile, VectorProfile)
    return found.profile


def reading_of(profile: VectorProfile, seed: int) -> ProbeReading:
    """What `serve` had its probes read."""
    layers = profile.header.layers
    rows = np.stack([row_of(seed, layer) for layer in layers])
    picked = (
        int((artifact.probe_weights @ row + artifact.probe_bias).argmax())
        for artifact, row in zip(profile.artifacts.values(), rows, strict=True)
    )
    return ProbeReading(layers, rows, tuple(picked))


# What is read


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, {1: 4, 2: 6}),
        ({"scope": "all", "layers": [2]}, {2: 6}),
        ({"cluster": 1}, None),
        ({"strength": 0.0}, None),
        ({"scope": "output"}, None),
        ({"profile": "fixed"}, None),
        ({"profile": "one"}, None),
    ],
)
async def test_only_what_may_be_refined_is_read(
    server: Server, options: dict[str, Any], layers: dict[int, int] | None
) -> None:
    await put(server, gact_profile())
    await put(server, gact_profile(None), "fixed")
    await put(server, gact_profile(num_clusters=1), "one")
    program = server.resolve(methods=[{**GACT, **options}])
    [applied] = program.applied
    assert (Readout.PROBES in program.readouts) == (layers is not None)
    if layers is not None:
        assert applied.probes.profile == "p@1" and applied.probes.points == layers
        assert decode_program(encode_program(program), GEOMETRY).readouts == (Readout.PROBES,)
    same = server.resolve(methods=[{**GACT, **options, "profile": options.get("profile", "p@1")}])
    assert same.fingerprint == program.fingerprint
    assert [str(each) for each in program.features] in ([], ["residual_edit"])


async def test_the_report_shows_what_the_probes_picked(server: Server) -> None:
    await put(server, gact_profile())
    await put(server, drawn_profile(GEOMETRY, "caa", layers=(3,)), "calm")
    caa = {"method": "caa", "profile": "calm"}
    echo = await serve(server, "a", {**GACT, "layers": [1]}, caa, {**GACT, "layers": [2]})
    picked = dict(zip((1, 2), reading_of(loaded(server, "p@1"), 0).clusters, strict=True))
    assert [each.get("clusters") for each in echo["methods"]] == [
        {"1": picked[1]},
        None,
        {"2": picked[2]},
    ]
    assert (await server.ok("GET", "reports/a"))["methods"] == echo["methods"]
    assert "clusters" not in (await serve(server, "b", {**GACT, "cluster": 2}))["methods"][0]


async def test_of_several_prompts_nothing_is_read(server: Server) -> None:
    await put(server, gact_profile())
    echo = await serve(server, "a", sequences=2)
    assert "clusters" not in echo["methods"][0] and len(server.state.readings) == 0


def test_what_was_read_is_bounded() -> None:
    store = ReadingStore(capacity=3, max_bytes=10 * SIZE * 4)

    def reading(layers: int, name: str = "p@1") -> list[ProfileReading]:
        rows = np.zeros((layers, SIZE), np.float32)
        return [ProfileReading(name, ProbeReading(tuple(range(layers)), rows, (0,) * layers))]

    for name in "abcd":
        store.put(name, reading(1))
    assert [store.get(name) is not None for name in "abcd"] == [False, True, True, True]
    store.put("e", reading(9))
    assert len(store) == 2 and store.get("c") is None
    store.put("e", reading(1))
    store.put("f", reading(1))
    assert len(store) == 3
    store.put("g", reading(11))
    assert len(store) == 0
    store.put("h", [])
    store.put("i", reading(1, "sha256:" + "0" * 64))
    store.put("j", reading(1, "given"))
    assert len(store) == 0


async def test_a_row_that_is_not_finite_teaches_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(server, gact_profile())
    monkeypatch.setattr(f"{__name__}.row_of", lambda seed, layer: np.full(SIZE, np.nan, np.float32))
    assert "clusters" not in (await serve(server, "a"))["methods"][0]
    refused(await give(server, "a", label=0), 400, "E_BAD_PARAM", "nothing is kept")


# Versions


async def test_a_batch_of_feedback_makes_a_version(server: Server, tmp_path: Path) -> None:
    profile = gact_profile(command="headway calibrate gact", training={"folds": 5})
    await put(server, profile, description="C++")
    echo = await serve(server, "a", seed=1)
    await serve(server, "b", seed=2)
    waiting = {"profile": "p", "pending": 1, "batch": 2, "version": None}
    assert await given(server, "a", label=2) == waiting
    assert (await server.ok("GET", "profiles/p"))["versions"] == [1]
    made = await given(server, "b", preferred=False)
    assert made == {"profile": "p", "pending": 0, "batch": 2, "version": "p@2"}

    served = loaded(server, "p@1")
    readings = reading_of(served, 1), reading_of(served, 2)
    facts = {"refined_from": "p@1", "feedback": 2, "learning_rate": 0.5}
    feedback = [Feedback(readings[0], label=2), Feedback(readings[1], preferred=False)]
    expected = refined(served, feedback, 0.5, facts)
    assert loaded(server, "p@2").digest == expected.save(tmp_path / "expected.safetensors")
    shown = await server.ok("GET", "profiles/p")
    assert (shown["versions"], shown["description"]) == ([1, 2], "C++")
    assert shown["header"]["training"] == {"folds": 5, **facts}
    assert shown["header"]["command"] == "headway calibrate gact"
    assert not [name for name in files(server) if name.startswith(".")]

    # Whoever named the version gets it as ever, whoever named the profile gets the new one.
    old, new = (server.resolve(methods=[{**GACT, "profile": each}]) for each in ("p@1", "p"))
    assert old.applied[0].details["digest"] == echo["methods"][0]["digest"]
    assert old.fingerprint == echo["fingerprint"] != new.fingerprint
    assert new.applied[0].details["profile"] == "p@2"
    assert (await serve(server, "c"))["methods"][0]["profile"] == "p@2"


async def test_feedback_refines_the_newest_version(server: Server) -> None:
    """Another server made a version meanwhile: the steps go on from that one."""
    first = gact_profile()
    await put(server, first)
    for name in "abcd":
        await serve(server, name, seed=ord(name))
    await given(server, "a", label=0)
    other = new_server(server.registry.store.root)
    for name in "bc":
        await serve(other, name, seed=ord(name))
        await given(other, name, label=1)
    assert (await given(server, "d", label=2))["version"] == "p@3"
    newest = loaded(server, "p@3")
    assert newest.header.training["refined_from"] == "p@2"
    a, d = (reading_of(first, ord(name)) for name in "ad")
    expected = refined(loaded(server, "p@2"), [Feedback(a, label=0), Feedback(d, label=2)], 0.5)
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(newest.tensors[name], tensor)


async def test_two_posts_at_once_count_twice(server: Server) -> None:
    await put(server, gact_profile(FeedbackRule(batch=5)))
    names = [str(number) for number in range(12)]
    for name in names:
        await serve(server, name)
    answers = await asyncio.gather(*(given(server, name, preferred=True) for name in names))
    made = sorted(each["version"] for each in answers if each["version"])
    assert made == ["p@2", "p@3"]
    assert sorted(each["pending"] for each in answers) == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    again = await asyncio.gather(*(give(server, "0", label=0) for _ in range(3)))
    assert {each.status_code for each in again} == {409}


async def test_the_same_request_at_once_counts_once(server: Server) -> None:
    await put(server, gact_profile())
    await serve(server, "a")
    answers = await asyncio.gather(*(give(server, "a", label=0) for _ in range(4)))
    assert sorted(each.status_code for each in answers) == [200, 409, 409, 409]


async def test_a_request_of_two_profiles_is_for_each(server: Server) -> None:
    await put(server, gact_profile())
    await put(server, gact_profile(layers=(3,), seed=4), "q")
    await serve(server, "a", GACT, {**GACT, "profile": "q"})
    assert (await given(server, "a", label=0))["profile"] == "p"
    assert (await give(server, "a", "q", label=0)).json()["pending"] == 1


async def test_what_fails_takes_no_feedback(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put(server, gact_profile(FeedbackRule(batch=1)))
    await serve(server, "a")

    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server.registry.store, "put_artifact", fail)
    refused(await give(server, "a", label=0), 500, "E_STEERING_FAILED", "No space left")
    assert not [name for name in files(server) if name.startswith(".")]
    monkeypatch.undo()
    assert (await given(server, "a", label=0))["version"] == "p@2"


# Refusals


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"request_id": "a"}, "feedback", "exactly one"),
        ({"request_id": "a", "label": 0, "preferred": True}, "feedback", "exactly one"),
        ({"label": 0}, "feedback.request_id", "required"),
        ({"request_id": 1, "label": 0}, "feedback.request_id", "string"),
        ({"request_id": "", "label": 0}, "feedback.request_id", "at least 1"),
        ({"request_id": "a", "label": 0.5}, "feedback.label", "integer"),
        ({"request_id": "a", "label": True}, "feedback.label", "integer"),
        ({"request_id": "a", "preferred": 1}, "feedback.preferred", "boolean"),
        ({"request_id": "a", "label": 3}, "feedback.label", "0 .. 2"),
        ({"request_id": "a", "label": -1}, "feedback.label", "0 .. 2"),
        ({"request_id": "a", "label": 0, "score": 1}, "feedback.score", "unknown key"),
        ([], "feedback", "object"),
    ],
)
async def test_a_bad_body_is_refused(server: Server, body: Any, param: str, words: str) -> None:
    await put(server, gact_profile())
    await serve(server, "a")
    answer = await server.call("POST", "profiles/p/feedback", json=body)
    refused(answer, 400, "E_BAD_PARAM", words)
    assert answer.json()["error"]["param"] == param
    assert (await given(server, "a", label=0))["pending"] == 1


async def test_feedback_needs_a_key(tmp_path: Path) -> None:
    for keys, status, reason in ((["right"], 401, "E_UNAUTHORIZED"), ([], 403, "E_FORBIDDEN")):
        server = Server(tmp_path / "registry", AdminKeys(keys))
        answer = await server.call("POST", "profiles/p/feedback", json={}, headers={})
        refused(answer, status, reason)


async def test_only_profiles_with_versions_take_feedback(tmp_path: Path) -> None:
    profile = gact_profile()
    server = new_server(tmp_path / "registry", {"start": profile})
    await put(server, profile)
    digest = server.resolve(methods=[GACT]).applied[0].details["digest"]
    await serve(server, "a", {**GACT, "profile": digest})
    await serve(server, "b", {**GACT, "profile": "start"})
    refused(await give(server, "b", "start", label=0), 409, "E_IN_USE", "given at the start")
    refused(await give(server, "a", digest, label=0), 400, "E_BAD_PARAM", "by its name")
    refused(await give(server, "a", "p@1", label=0), 400, "E_BAD_PARAM", "give feedback to p")
    refused(await give(server, "a", "a%20b", label=0), 400, "E_BAD_PARAM", "no name")
    refused(await give(server, "a", "q", label=0), 404, "E_PROFILE_NOT_FOUND", "are: p, start")
    refused(await give(server, "a", label=0), 400, "E_BAD_PARAM", "not steered by that profile")


async def test_a_profile_may_forbid_feedback(server: Server) -> None:
    await put(server, gact_profile(None))
    await put(server, gact_profile(num_clusters=1), "one")
    await server.ok("PUT", "profiles/heads", json={"profile": heads()})
    await serve(server, "a")
    for name in ("p", "heads"):
        refused(await give(server, "a", name, label=0), 400, "E_UNSUPPORTED", "does not allow")
    refused(await give(server, "a", "one", label=0), 400, "E_UNSUPPORTED", "one direction")


async def test_a_request_must_have_been_steered_by_the_profile(server: Server) -> None:
    await put(server, gact_profile())
    await put(server, gact_profile(seed=3), "q")
    refused(await give(server, "x", label=0), 404, "E_REQUEST_NOT_FOUND", "no steered request x")
    await serve(server, "a", {**GACT, "profile": "q"})
    await serve(server, "b", {**GACT, "cluster": 1})
    for name in "ab":
        refused(await give(server, name, label=0), 400, "E_BAD_PARAM", "probes of p")
    await serve(server, "c", {**GACT, "profile": "p@1"})
    assert (await given(server, "c", preferred=True))["pending"] == 1
    refused(await give(server, "c", label=1), 409, "E_ALREADY_GIVEN", "already")


async def test_a_profile_that_was_replaced_takes_no_older_feedback(server: Server) -> None:
    await put(server, gact_profile())
    for name in "ab":
        await serve(server, name)
    await given(server, "a", label=0)
    await put(server, gact_profile(seed=9))
    answer = await give(server, "b", label=0)
    refused(answer, 400, "E_PROFILE_MISMATCH", "p@1, which steered the request, has other")
    await serve(server, "c")
    assert (await given(server, "c", label=0))["pending"] == 1  # what waited for p@1 is gone
    await put(server, gact_profile(seed=9, strength=2.0))  # the same directions
    await server.ok("DELETE", "profiles/p@2")
    await serve(server, "d", {**GACT, "profile": "p@3"})
    assert (await given(server, "d", label=0))["version"] == "p@4"
    refused(await give(server, "b", label=0), 400, "E_PROFILE_MISMATCH")
    await server.ok("DELETE", "profiles/p@1")
    refused(await give(server, "b", label=0), 400, "E_PROFILE_MISMATCH", "was deleted")


async def test_waiting_feedback_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_module, "MAX_PENDING_BYTES", 2 * SIZE * 4)
    await put(server, gact_profile(FeedbackRule(batch=9)))
    for name in "ab":
        await serve(server, name)
    await given(server, "a", label=0)
    refused(await give(server, "b", label=0), 429, "E_CAPACITY", "bytes at most")
    monkeypatch.undo()
    assert (await given(server, "b", label=0))["pending"] == 2


async def test_on_gpu_there_is_no_feedback(server: Server) -> None:
    server.state.vllm_config.use_v2_model_runner = True
    refused(await give(server, "a", label=0), 400, "E_UNSUPPORTED", "GPU")
