"""`headway bench peers` without an engine and without pip: hooks, properties, refusals, report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headway.benchmarks import peers
from headway.benchmarks.engine import KEEP_MEMORY
from headway.benchmarks.peer_systems import (
    environments,
    headway_server,
    properties,
    published_sgrs,
    transformers_hooks,
)
from headway.benchmarks.peer_systems.environments import Ran, Unavailable, python_of
from headway.benchmarks.peer_systems.headway_server import HeadwayServer, method_of, parsed
from headway.benchmarks.peer_systems.loads import (
    METHODS,
    NO_LAYER,
    Sizes,
    impossible,
    steering,
    without_strength,
)
from headway.benchmarks.peer_systems.properties import (
    FAILS,
    HOLDS,
    NOT_APPLICABLE,
    NOT_TESTED,
    Trial,
    request,
)
from headway.benchmarks.peer_systems.protocol import START, Answer, Peer, Request, reply
from headway.benchmarks.peer_systems.report import Measurement, report, table
from headway.benchmarks.peer_systems.transformers_hooks import LogitEdits, steered
from headway.benchmarks.peer_systems.transformers_model import generate, padded
from headway.benchmarks.peer_systems.worker_process import (
    PACKAGE,
    PeerError,
    Refused,
    WorkerProcess,
)
from headway.benchmarks.quality.client import EndpointError, UnsteeredAnswer
from headway.steering import ModelGeometry, SteeringError, compile_spec, parse_spec
from headway.steering.profiles import FoundProfile
from headway.steering.vectors import VectorProfile

pytestmark = pytest.mark.unit

SIZES = Sizes(num_layers=2, num_heads=4, hidden_size=32)
HEAD_SIZE, GROUP = 8, 2
PROMPT = [5, 9, 2, 7, 1, 8, 3, 4]
OUTPUT = [6, 2, 9, 5]
LOCORE = {"method": "locore", "beta": 0.7, "window": 2, "layers": [1]}
EMPHASIS = {"method": "emphasis", "alpha": 0.05, "span": [2, 5]}
SCALE = {"method": "head_scale", "scales": [[0, 1, 3.0], [1, 2, 0.0]]}
ADD = {"method": "caa", "layer": 0, "vector": [0.1 * i for i in range(32)], "strength": 0.5}
STEERINGS = (SCALE, ADD, LOCORE, EMPHASIS)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=SIZES.hidden_size,
        intermediate_size=48,
        num_hidden_layers=SIZES.num_layers,
        num_attention_heads=SIZES.num_heads,
        num_key_value_heads=SIZES.num_heads // GROUP,
        initializer_range=0.5,  # so large that attention is not uniform
        eos_token_id=None,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def dense(model: Any, tokens: Sequence[int], asked: dict[str, Any] | None) -> torch.Tensor:
    """The last logits: Llama's layers written out, steered by the formula."""
    length = len(tokens)
    x = model.model.embed_tokens(torch.tensor(tokens))
    half = torch.arange(HEAD_SIZE // 2)
    angles = torch.arange(length)[:, None] * 10000.0 ** (-2 * half / HEAD_SIZE)
    cos, sin = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]

    def rotated(y: torch.Tensor) -> torch.Tensor:
        left, right = y.chunk(2, dim=-1)
        return y * cos + torch.cat([-right, left], dim=-1) * sin

    for index, layer in enumerate(model.model.layers):
        y, attention = layer.input_layernorm(x), layer.self_attn
        q, k, v = (
            project(y).view(length, -1, HEAD_SIZE)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotated(q), rotated(k)
        z = torch.zeros(length, SIZES.num_heads, HEAD_SIZE)
        factors = torch.tensor(
            [[factor(asked, index, i, j) for j in range(length)] for i in range(length)]
        )
        for head in range(SIZES.num_heads):
            logits = q[:, head] @ k[:, head // GROUP].T / math.sqrt(HEAD_SIZE)
            weights = torch.exp(logits).tril() * factors
            z[:, head] = weights / weights.sum(1, keepdim=True) @ v[:, head // GROUP]
        if asked and asked["method"] == "head_scale":
            for at, head, scale in asked["scales"]:
                if at == index:
                    z[:, head] *= scale
        x = x + attention.o_proj(z.flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        if asked and asked["method"] == "caa" and asked["layer"] == index:
            x = x + asked["strength"] * torch.tensor(asked["vector"])
    return model.lm_head(model.model.norm(x))[-1]


def factor(asked: Any, layer: int, i: int, j: int) -> float:
    """What a weight of attention is multiplied by before rows are normalised."""
    first_output = len(PROMPT)
    method = asked["method"] if asked else None
    if method == "locore":
        near = i >= first_output and j >= first_output and 1 <= i - j <= asked["window"]
        return 1 + asked["beta"] if near and layer in asked["layers"] else 1.0
    if method == "emphasis":
        start, end = asked["span"]
        return asked["alpha"] if j < first_output and not start <= j < end else 1.0
    return 1.0


def generated(model: Any, asked: dict[str, Any] | None) -> list[int]:
    """Greedy tokens by the dense computation."""
    tokens = list(PROMPT)
    for _ in range(5):
        tokens.append(int(dense(model, tokens, asked).argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("asked", [None, *STEERINGS], ids=lambda a: a["method"] if a else "none")
def test_hooks_compute_the_formulas(model: Any, asked: dict[str, Any] | None) -> None:
    with steered(model, [request(PROMPT, asked)]):
        logits = model(torch.tensor([PROMPT + OUTPUT])).logits[0, -1]
    expected = dense(model, PROMPT + OUTPUT, asked)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    if asked:  # else the comparison would say nothing
        assert not torch.allclose(expected, dense(model, PROMPT + OUTPUT, None), atol=1e-3)


def test_rows_of_a_batch_are_steered_apart_with_a_cache_and_padding(model: Any) -> None:
    asked = [None, *STEERINGS]
    batch = [request(PROMPT, each) for each in asked] + [request(PROMPT + [3, 3, 3])]
    with steered(model, batch):
        answers = generate(model, batch, 5)
    assert [each["token_ids"] for each in answers[:-1]] == [
        generated(model, each) for each in asked
    ]
    first = torch.log_softmax(dense(model, PROMPT, EMPHASIS), 0)
    assert {
        int(token): pytest.approx(value, abs=1e-3) for token, value in answers[4]["first"].items()
    } == {int(token): float(first[token]) for token in first.topk(5).indices}


def test_nothing_is_left_on_the_model(model: Any) -> None:
    def logits() -> torch.Tensor:
        return model(torch.tensor([PROMPT])).logits

    before, attention = logits(), model.config._attn_implementation
    with steered(model, [request(PROMPT, each) for each in STEERINGS[:1]]):
        assert not torch.equal(logits(), before)
    with pytest.raises(RuntimeError, match="stop"), steered(model, [request(PROMPT, EMPHASIS)]):
        raise RuntimeError("stop")
    assert torch.equal(logits(), before) and model.config._attn_implementation == attention


def test_the_bias_of_a_row_follows_its_own_padding() -> None:
    edits = LogitEdits(
        [request([1, 2], EMPHASIS | {"span": [0, 1]}), request([1, 2, 3, 4], LOCORE)]
    )
    row = edits.bias(0, 1, 5)
    assert row is not None
    low = math.log(EMPHASIS["alpha"])
    assert row[0, 0, 0].tolist() == pytest.approx([low, low, 0.0, low, 0.0])
    assert not row[1].any()
    row = edits.bias(1, 1, 7)
    assert row is not None
    near = math.log1p(LOCORE["beta"])
    assert row[1, 0, 0].tolist() == pytest.approx([0, 0, 0, 0, near, near, 0])


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = padded([[4, 5], [6]])
    assert ids.tolist() == [[4, 5], [0, 6]] and mask.tolist() == [[1, 1], [0, 1]]


# What is asked


def geometry(profile: VectorProfile | None = None) -> ModelGeometry:
    class Named:
        def find(self, reference: str) -> FoundProfile | None:
            assert profile is not None
            return FoundProfile(reference, profile) if reference == headway_server.PROFILE else None

        def names(self) -> tuple[str, ...]:
            return (headway_server.PROFILE,)

    return ModelGeometry(
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_size=64,
        hidden_size=576,
        architecture="LlamaForCausalLM",
        profiles=Named() if profile else None,
    )


@pytest.fixture(scope="module")
def steerable(tmp_path_factory: pytest.TempPathFactory) -> ModelGeometry:
    path = tmp_path_factory.mktemp("profile") / "peers.safetensors"
    headway_server.save_profile(geometry(), path)
    return geometry(VectorProfile.load(path))


SMOLLM2 = Sizes(30, 9, 576)


@pytest.mark.parametrize("method", METHODS)
def test_headway_takes_what_is_asked_and_refuses_what_cannot_be(
    steerable: ModelGeometry, method: str
) -> None:
    def program(asked: dict[str, Any]) -> Any:
        return compile_spec(parse_spec({"methods": [method_of(asked)]}), steerable)

    programs = [program(steering(method, SMOLLM2, index)) for index in range(8)]
    different = {each.fingerprint for each in programs}
    assert len(different) == (1 if method == "sgrs" else 8)
    nothing = program(without_strength(steering(method, SMOLLM2, 0)))
    assert not (nothing.head_edits or nothing.residual_edits or nothing.sampling_gate) or (
        nothing.fingerprint not in different
    )
    for wrong in impossible(steering(method, SMOLLM2, 0)):
        with pytest.raises(SteeringError):
            program(wrong)


def test_headway_adds_the_vector_that_its_peers_add(steerable: ModelGeometry) -> None:
    asked = steering("caa", SMOLLM2, 3)
    program = compile_spec(parse_spec({"methods": [method_of(asked)]}), steerable)
    [edit] = program.residual_edits
    assert (edit.layer, edit.strength) == (asked["layer"], asked["strength"])
    profile = steerable.profiles.find("peers").profile  # type: ignore[union-attr]
    np.testing.assert_array_equal(profile.tensors["directions"][0, 0], np.float32(asked["vector"]))


def test_heads_are_half_of_the_default_layers_of_vhr() -> None:
    scales = steering("head_scale", SMOLLM2, 0)["scales"]
    layers = sorted({layer for layer, _, _ in scales})
    assert layers[0] == 1 and layers[-1] == 29 and len(scales) == 4 * len(layers)
    assert scales != steering("head_scale", SMOLLM2, 1)["scales"]


def test_answers_of_headway_must_say_whether_they_were_steered() -> None:
    choice = {"token_ids": [1, 2], "logprobs": {"top_logprobs": [{"token_id:1": -0.5}, {}]}}
    data = {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 128}}}
    answer = parsed(data, {"max_tokens": 2})
    assert answer == {"token_ids": [1, 2], "first": {"1": -0.5}, "cached_tokens": 128}
    with pytest.raises(UnsteeredAnswer):
        parsed(data, {"max_tokens": 2, "steering": {}})
    with pytest.raises(EndpointError, match="2 tokens came, not 3"):
        parsed(data, {"max_tokens": 3})
    applied = {**data, "steering": {"methods": [{"draws": 3, "layers": [6]}]}}
    assert parsed(applied, {"max_tokens": 2, "steering": {}})["draws"] == 3
    with pytest.raises(UnsteeredAnswer):
        parsed(applied, {"max_tokens": 2})


# Properties


class Pretended:
    """Answers with made-up tokens; leaks: steering reaches the other requests of a batch."""

    def __init__(self, **faults: bool) -> None:
        self.faults = faults

    def answer(self, requests: Sequence[Request], output_tokens: int) -> list[Answer]:
        strengths = [self.strength(each["steering"]) for each in requests]
        if self.faults.get("leaks"):
            strengths = [max(strengths)] * len(strengths)
        return [
            {
                "token_ids": [int(strength * 10)] * output_tokens,
                "first": {"1": -1.0 if self.faults.get("late") else -1.0 - strength},
            }
            for strength in strengths
        ]

    def strength(self, asked: dict[str, Any] | None) -> float:
        if asked is None:
            return 0.0
        if not self.faults.get("lenient"):
            if "options" in asked:
                raise Refused("no such option")
            if asked["layer"] == NO_LAYER:
                raise Refused("no such layer")
        return float(asked["strength"]) + self.faults.get("biased", 0)


def trial(system: Any, **options: Any) -> Trial:
    asked = [ADD | {"strength": 1.0 + index} for index in range(4)]
    return Trial(system, [[1]] * 4, [1] * 3, asked, **options)


def test_a_sound_system_has_all_properties() -> None:
    results = trial(Pretended()).results()
    assert list(results) == list(properties.PROPERTIES)
    assert results.pop("prefix_cache") == NOT_APPLICABLE  # it has none
    assert set(results.values()) == {HOLDS}


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("leaks", "batch_mates"),
        ("biased", "zero_strength"),
        ("lenient", "bad_spec"),
        ("late", "first_token"),
    ],
)
def test_each_fault_is_found(fault: str, name: str) -> None:
    results = trial(Pretended(**{fault: True})).results()
    assert [each for each, found in results.items() if found == FAILS] == [name]


def test_what_cannot_be_tried_is_not_applicable() -> None:
    results = trial(Pretended(), shared=True, checked=False).results()
    assert results["batch_mates"] == results["bad_spec"] == NOT_APPLICABLE
    late = Trial(Pretended(), [[1]] * 4, [1], [LOCORE] * 4)
    assert late.first_token() == NOT_APPLICABLE


class PretendedServer(HeadwayServer):
    """Keeps the strength that a salt was first served with, if it shares its cache wrongly."""

    def __init__(self, shares: bool, caches: bool = True) -> None:
        self.shares, self.caches = shares, caches
        self.kept: dict[str | None, float] = {}

    def answer(
        self, requests: Sequence[Request], output_tokens: int, salt: str | None = None
    ) -> list[Answer]:
        asked = requests[0]["steering"]
        strength = asked["strength"] if asked else 0.0
        cached = salt in self.kept
        kept = self.kept.setdefault(salt, strength)
        tokens = [int(kept if self.shares else strength)] * output_tokens
        return [{"token_ids": tokens, "first": {"1": -1.0}, "cached_tokens": cached * self.caches}]


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (PretendedServer(shares=False), HOLDS),
        (PretendedServer(shares=True), FAILS),
        (PretendedServer(shares=False, caches=False), NOT_TESTED),
    ],
)
def test_blocks_of_steered_prompts_must_not_be_shared(server: HeadwayServer, expected: str) -> None:
    tried = trial(server)
    assert tried.prefix_cache() == expected
    assert bool(tried.reasons) == (expected == NOT_TESTED)


# Environments

PEER = Peer(
    "some library", "some", "Some", ("caa",), package="some-library", version="1.2", also=("x<2",)
)
NO_VERSION = "WARNING: /a/path\nERROR: Ignored: Requires-Python >=3.12\nERROR: No match for it\n"


class Installer:
    """Fails at the commands that have a word, and remembers all."""

    def __init__(self, fails_at: str = "nothing") -> None:
        self.fails_at = fails_at
        self.commands: list[Sequence[str]] = []

    def __call__(self, command: Sequence[str]) -> Ran:
        self.commands.append(command)
        return Ran(1, NO_VERSION) if self.fails_at in command else Ran(0, "")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWAY_HOME", str(tmp_path))

    def create(folder: Path, with_pip: bool) -> None:
        (folder / "bin").mkdir()
        (folder / "bin" / "python").symlink_to(sys.executable)

    monkeypatch.setattr(environments.venv, "create", create)
    return tmp_path


def test_a_peer_without_requirements_runs_in_our_environment(home: Path) -> None:
    installer = Installer()
    assert python_of(transformers_hooks.PEER, installer) == Path(sys.executable)
    assert not installer.commands and not list(home.iterdir())


def test_an_environment_is_made_once(home: Path) -> None:
    installer = Installer()
    python = python_of(PEER, installer)
    assert python.exists() and python == python_of(PEER, installer)
    download, install = installer.commands
    assert {"download", "--no-deps", "some-library==1.2"} <= set(download)
    wanted = [f"torch=={torch.__version__}", "some-library==1.2", "x<2"]
    assert set(wanted) < set(install) and "install" in install
    assert python.parents[1].parent == home / "peers"


@pytest.mark.parametrize("step", ["download", "install"])
def test_a_peer_that_cannot_be_installed_is_listed_with_reason_and_command(
    home: Path, step: str
) -> None:
    measurement = Measurement()
    chosen = [(PEER, PEER.methods), (transformers_hooks.PEER, ("locore",))]
    ready = peers.available(chosen, measurement, lambda peer: python_of(peer, Installer(step)))
    assert [peer for peer, _, _ in ready] == [transformers_hooks.PEER]
    [row] = measurement.unavailable
    assert row.pop("command").startswith(f"pip {step} --quiet")
    assert row == {
        "system": "some library",
        "method": "caa",
        "reason": "Ignored: Requires-Python >=3.12; No match for it",
    }
    assert not list((home / "peers").glob("some*")) or step == "download"


def test_a_peer_that_cannot_be_driven_is_looked_up_and_not_installed(home: Path) -> None:
    driven_by_nobody = Peer("a", "a", "", ("caa",), "a", "1", unavailable="has no such edit")
    installer = Installer()
    with pytest.raises(Unavailable, match="has no such edit") as error:
        python_of(driven_by_nobody, installer)
    assert error.value.command == "pip download --quiet --no-deps a==1"
    assert len(installer.commands) == 1


# Processes

SYSTEM = """\
import os
class Doubles:
    def __init__(self, model, dtype):
        # Must not be taken for an answer.
        print(model, dtype, os.environ["MALLOC_TRIM_THRESHOLD_"])
    def answer(self, requests, output_tokens):
        if requests[0]["steering"]:
            raise KeyError("layer 99")
        if not requests[0]["tokens"]:
            raise SystemExit(3)
        return [{"token_ids": [2 * t for t in each["tokens"]], "first": {}} for each in requests]
"""


def test_a_peer_answers_where_headway_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "peer_systems"
    package.mkdir()
    (package / "doubles.py").write_text(SYSTEM)
    for name in ("__init__.py", "protocol.py"):
        (package / name).write_text((PACKAGE / name).read_text())
    monkeypatch.setattr("headway.benchmarks.peer_systems.worker_process.PACKAGE", package)
    # -S: without site-packages, so that nothing of ours can be imported.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    peer = Peer("doubles", "doubles", "Doubles", ("caa",))
    worker = WorkerProcess(peer, python, Path("a-model"), "float32", tmp_path / "log")
    try:
        assert worker.answer([request([3, 4])], 2) == [{"token_ids": [6, 8], "first": {}}]
        assert 0 < worker.seconds < 10
        with pytest.raises(Refused, match="KeyError: 'layer 99'"):
            worker.answer([request([3], ADD)], 2)
        assert worker.answer([request([5])], 1)[0]["token_ids"] == [10]
        with pytest.raises(PeerError, match="process of doubles ended"):
            worker.answer([request([])], 1)
    finally:
        worker.close()
    said = f"a-model float32 {KEEP_MEMORY['MALLOC_TRIM_THRESHOLD_']}"
    assert said in (tmp_path / "log").read_text()


def test_peers_import_nothing_that_their_environments_lack() -> None:
    modules = [peer.module for peer in peers.PEERS if peer.package or not peer.checked]
    modules.remove(published_sgrs.PEER.module)  # runs in ours
    code = START.replace('load("protocol").serve(getattr(load(module), system))', "")
    code += f"[load(name) for name in {modules}]\n"
    code += "print(sorted(each for each in sys.modules if each.split('.')[0] == 'headway'))"
    command = [sys.executable, "-P", "-c", code, str(PACKAGE), "", ""]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = set(json.loads(loaded.replace("'", '"')))
    package = "headway.benchmarks.peer_systems"
    ours = {f"{package}.{name}" for name in (*modules, "protocol", "transformers_model")}
    assert found == ours | {"headway", "headway.benchmarks", package}


def test_an_error_of_a_peer_is_its_answer() -> None:
    message = {"requests": [request([1], ADD | {"layer": NO_LAYER})], "output_tokens": 1}
    assert reply(Pretended(), message) == {"error": "Refused: no such layer"}
    assert reply(Pretended(), {"requests": [request([1])], "output_tokens": 2})["answers"] == [
        {"token_ids": [0, 0], "first": {"1": -1.0}}
    ]


# The report


def measured() -> Measurement:
    held = dict.fromkeys(properties.PROPERTIES, HOLDS)
    keys = [("Headway", "caa"), ("repeng", "caa")]
    measurement = Measurement(
        speeds={keys[0]: [80.0, 90.0], keys[1]: [20.0, 10.0]},
        properties={keys[0]: held, keys[1]: held | {"batch_mates": NOT_APPLICABLE}},
        notes={keys[0]: "over HTTP", keys[1]: "a note"},
    )
    lens = next(peer for peer in peers.PEERS if peer.name == "vllm-lens")
    measurement.lost(lens, ("caa",), "needs a newer Python", "pip download vllm-lens")
    return measurement


def test_the_report_has_ratios_of_rounds_and_headway_without_one() -> None:
    result = report(measured(), peers.PEERS, "tiny", "float32", 8, 2)
    assert list(result) == [
        "benchmark", "date", "environment", "model", "dtype", "rounds", "server_settings",
        "peer_settings", "warnings", "rows", "unavailable",
    ]  # fmt: skip
    ours, theirs = result["rows"]
    assert list(ours) == list(theirs) == [
        "system", "version", "method", "concurrency", "tokens_per_second",
        "headway_tokens_per_second", "ratio", "low", "high", "runs", "properties", "notes",
    ]  # fmt: skip
    assert ours["ratio"] is ours["low"] is ours["high"] is None
    assert (theirs["system"], theirs["version"]) == ("repeng", "0.4.0")
    assert theirs["tokens_per_second"] == 15.0 and theirs["headway_tokens_per_second"] == 85.0
    assert theirs["ratio"] == pytest.approx(6.0)  # geometric mean of 4 and 9
    assert theirs["low"] < 4.0 < 9.0 < theirs["high"]  # of two rounds it is very wide
    assert (result["rounds"], theirs["runs"], ours["runs"]) == (2, [20.0, 10.0], [80.0, 90.0])
    for settings in (result["server_settings"], result["peer_settings"]):
        assert "MALLOC_TRIM_THRESHOLD_" in settings
    assert json.loads(json.dumps(result)) == result


def test_the_table_shows_everything() -> None:
    text = table(report(measured(), peers.PEERS, "tiny", "float32", 8, 2))
    assert (
        "caa         repeng                   15.00          6.00 " in text and "2 rounds" in text
    )
    assert "repeng, caa: a note" in text and "not applicable" in text
    assert "unavailable: vllm-lens, caa: needs a newer Python" in text
    assert "    tried: pip download vllm-lens" in text


def test_a_lost_peer_has_no_row() -> None:
    measurement = measured()
    repeng = next(peer for peer in peers.PEERS if peer.name == "repeng")
    measurement.lost(repeng, ("caa",), "ended", "the worker")
    result = report(measurement, peers.PEERS, "tiny", "float32", 8, 2)
    assert [row["system"] for row in result["rows"]] == ["Headway"]
    assert [row["system"] for row in result["unavailable"]] == ["vllm-lens", "repeng"]


def test_what_was_tried_and_never_measured_has_no_row() -> None:
    measurement = measured()
    measurement.speeds["Headway", "locore"] = []  # its only peer was lost before the first round
    result = report(measurement, peers.PEERS, "tiny", "float32", 8, 2)
    assert [row["method"] for row in result["rows"]] == ["caa", "caa"] and table(result)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> peers.Bench:
    """Of one request at a time."""
    monkeypatch.setattr(peers, "read_geometry", lambda model: geometry())
    drawn = [[1 + index] * 300 for index in range(8)]
    monkeypatch.setattr(peers, "prompts", lambda model, number, seed: drawn)
    return peers.Bench(Path("m"), "float32", 1, 0)


def test_the_properties_of_one_request_at_a_time_have_batch_mates(bench: peers.Bench) -> None:
    assert len(bench.requests("caa")) == 1
    tried = bench.trial(Pretended(), "caa")
    assert len(tried.prompts) == properties.TRIED and set(tried.results().values()) <= {
        HOLDS,
        NOT_APPLICABLE,
    }


@pytest.mark.parametrize("error", [PeerError("it ended"), Refused("not that")])
def test_a_peer_that_fails_while_it_is_measured_is_lost_alone(
    bench: peers.Bench, error: Exception
) -> None:
    class System:
        seconds = 2.0

        def __init__(self, fails_at: int) -> None:
            self.left = fails_at

        def answer(self, *_: Any, **__: Any) -> list[Answer]:
            self.left -= 1
            if not self.left:
                raise error
            return []

    named = {peer.name: peer for peer in peers.PEERS}
    systems = {"repeng": System(-1), "steering-vectors": System(2)}
    keys = [("Headway", "caa"), *((name, "caa") for name in systems)]
    measurement = Measurement(speeds={key: [] for key in keys})
    running: Any = {(n, "caa"): peers.Contender(named[n], s) for n, s in systems.items()}
    bench._measure(System(-1), running, measurement, 3)
    assert {key: len(speeds) for key, speeds in measurement.speeds.items()} == {
        ("Headway", "caa"): 3,
        ("repeng", "caa"): 3,
    }
    (row,) = measurement.unavailable
    assert (row["system"], row["reason"]) == ("steering-vectors", str(error))


def test_the_published_procedure_costs_its_candidates() -> None:
    class Timed:
        def timed(self, *judged: Any) -> tuple[float, float]:
            assert judged == ([1, 2, 7, 8], 9, [6], 2)
            return 0.1, 3.0

    answers: list[Answer] = [
        {"token_ids": [7, 8, 9, 9], "first": {}, "draws": 5, "layers": [6]},
        {"token_ids": [7, 8, 9, 9], "first": {}, "draws": 7, "layers": [6]},
    ]
    system = object.__new__(published_sgrs.PublishedSGRS)
    system.published = Timed()  # type: ignore[assignment]
    assert system.seconds_per_token([1, 2], answers) == pytest.approx(3.0 * 12 / 8)


# The command


def test_peers_are_chosen_by_name_and_method() -> None:
    def names(text: str) -> set[str]:
        return {
            f"{peer.name} {each}"
            for peer, found in peers.selected(peers.PEERS, text)
            for each in found
        }

    assert names("locore") == {"transformers, hooks locore"}
    assert names("RepEng") == {"repeng caa"}
    assert len(names("")) == sum(len(peer.methods) for peer in peers.PEERS)
    with pytest.raises(ValueError, match='nothing has "vhr"'):
        peers.selected(peers.PEERS, "vhr")


def test_nothing_is_timed_under_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert peers.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_options() -> None:
    args = peers.build_parser().parse_args([])
    assert (args.concurrency, args.rounds, args.only) == (8, None, "")
    for wrong in (["--concurrency", "0"], ["--rounds", "1"]):
        with pytest.raises(SystemExit):
            peers.build_parser().parse_args(wrong)


def test_agreement_counts_equal_answers() -> None:
    one: list[Answer] = [{"token_ids": [1], "first": {}}, {"token_ids": [2], "first": {}}]
    other: list[Answer] = [{"token_ids": [1], "first": {}}, {"token_ids": [3], "first": {}}]
    assert peers.agreeing(one, other) == 1
