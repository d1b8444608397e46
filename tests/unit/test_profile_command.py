"""`headway profile`: what it shows, imports, and sends to a server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from headway.server import cli
from headway.server.commands import profile as command
from headway.server.commands.model import read_model, steerable_geometry
from headway.steering import ModelGeometry
from headway.steering.heads import HeadProfile
from headway.steering.sinks import DimMeasurement, SinkProfile
from headway.steering.vectors import VectorHeader, VectorProfile

pytestmark = pytest.mark.unit

HIDDEN, LAYERS = 8, 4
GEOMETRY = ModelGeometry(LAYERS, 4, 2, 2, HIDDEN, architecture="LlamaForCausalLM")
ADMIN, API = "key-for-changes", "key-of-vllm"


def vectors(path: Path, kind: str = "caa", **header: Any) -> Path:
    """A vector profile of layers 1 and 3, or of heads of theirs; norms 2 and 4 (times cluster)."""
    tensors = {"directions": np.zeros((2, 1, HIDDEN), np.float32)}
    if kind == "gact":
        tensors = {name: np.zeros((2, 2, HIDDEN), np.float32) for name in ("directions",)}
        tensors["probe_weights"] = np.zeros((2, 2, HIDDEN), np.float32)
        tensors["probe_bias"] = np.zeros((2, 2), np.float32)
        tensors["directions"][:, 1, 0] = 7
    if kind == "act":
        tensors = {"shifts": np.zeros((2, 2), np.float32)}
    first = next(iter(tensors.values()))
    first.reshape(2, -1)[:, 1] = 2, 4
    what: dict[str, Any] = {"heads": ((1, 0), (3, 2))} if kind == "act" else {"layers": (1, 3)}
    made = VectorHeader(
        kind=kind,
        version=1,
        fingerprint=GEOMETRY.fingerprint,
        architecture=GEOMETRY.architecture,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        **what,
        **header,
    )
    VectorProfile(made, tensors).save(path)
    return path


def heads(path: Path) -> Path:
    HeadProfile.of(
        GEOMETRY,
        num_heads=4,
        heads=((1, 2),),
        layers=(1,),
        alpha=2.0,
        num_images=1,
        questions=("?",),
        vhd=((0.123456,) * 4,) * LAYERS,
    ).save(path)
    return path


def sinks(path: Path) -> Path:
    phi = (1.0,) * LAYERS
    SinkProfile.of(
        GEOMETRY,
        dims=(5,),
        tau=2.0,
        num_prompts=1,
        num_tokens=2,
        sink_tokens=1,
        measurements=(DimMeasurement(dim=5, phi_first=phi, phi_other=phi, sink_tokens=1),),
    ).save(path)
    return path


# show


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main(["profile", "show", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"digest: sha256:{sha256(path.read_bytes()).hexdigest()}"
    assert f"fingerprint: {GEOMETRY.fingerprint}" in lines
    assert f"num_layers: {LAYERS}" in lines
    return lines


def test_vectors_of_layers_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = {"pairs": 3, "note": "\x1b[2J"}
    lines = shown(vectors(tmp_path / "v.safetensors", training=training), capsys)
    assert "kind: caa" in lines
    assert "layers: 1, 3" in lines
    assert "site: block_output" in lines
    assert "training.pairs: 3" in lines
    assert r"training.note: \u001b[2J" in lines  # no terminal is told what to do
    assert "directions: float32 [2, 1, 8]" in lines
    assert lines[-3:] == [" layer  norm", "     1  2", "     3  4"]
    assert not any(line.startswith(("heads", "feedback", "licence")) for line in lines)


def test_every_direction_of_a_layer_has_its_norm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(vectors(tmp_path / "v.safetensors", "gact"), capsys)
    assert "probe_bias: float32 [2, 2]" in lines
    assert lines[-2:] == ["     1  2  7", "     3  4  7"]


def test_shifts_of_heads_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(vectors(tmp_path / "v.safetensors", "act"), capsys)
    assert "shifts: float32 [2, 2]" in lines
    assert lines[-2:] == ["     1     0  2", "     3     2  4"]


def test_profiles_in_json_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(heads(tmp_path / "h.json"), capsys)
    assert "kind: heads" in lines
    assert "heads: [[1, 2]]" in lines
    assert "vhd: 4 x 4 values" in lines
    lines = shown(sinks(tmp_path / "s.json"), capsys)
    assert "dims: [5]" in lines


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (list(range(0, 120, 2)), "60 values"),
        ([[1.23456789] * 9] * 30, "30 x 9 values"),
    ],
)
def test_long_values_are_shortened(value: list[Any], words: str) -> None:
    from headway.server.commands.profile_text import _words

    assert _words(value) == words


def test_layers_without_a_gap_are_a_range() -> None:
    from headway.server.commands.profile_text import layer_words

    assert layer_words((4, 5, 6)) == "4 .. 6"
    assert layer_words((4, 6, 7)) == "4, 6, 7"
    assert layer_words((4, 5)) == "4, 5"


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.json", "text.json", "text.safetensors"])
def test_what_is_no_profile_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name.startswith("text"):
        path.write_text("text")
    assert cli.main(["profile", "show", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"headway profile: error: {path}: ")
    assert "cannot be read" in error


# import


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of known sizes instead of one that is read from disk."""
    monkeypatch.setattr(command, "read_model", lambda name: name)
    monkeypatch.setattr(command, "steerable_geometry", lambda config: GEOMETRY)


def control_vector(path: Path, *layers: int, size: int = HIDDEN) -> Path:
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(layers))
    for layer in layers:
        writer.add_tensor(f"direction.{layer}", np.full(size, layer, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def import_(path: Path, output: Path, *options: str) -> int:
    return cli.main(
        ["profile", "import", str(path), "--model", "m", "--output", str(output), *options]
    )


def test_an_import_writes_a_profile_and_shows_it(
    model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "happy.safetensors"
    path = control_vector(tmp_path / "happy.gguf", 1, 3)
    assert import_(path, output, "--licence", "MIT") == 0
    lines = capsys.readouterr().out.splitlines()
    profile = VectorProfile.load(output)
    assert lines[0] == f"digest: sha256:{profile.digest}"
    assert "training.source_format: repeng" in lines
    assert lines[-1] == f"profile: {output}"
    assert profile.header.command == "headway profile import happy.gguf"
    assert str(tmp_path) not in profile.header.model_dump_json()
    assert profile.header.licence == "MIT"
    assert profile.header.layers == (1, 3)
    profile.check_model(GEOMETRY)


def test_the_same_file_gives_the_same_profile(model: None, tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    torch.save({2: torch.ones(HIDDEN)}, path)
    for name, options in (("a", ()), ("b", ("--format", "steering-vectors"))):
        assert import_(path, tmp_path / f"{name}.safetensors", *options) == 0
    digests = {VectorProfile.load(path).digest for path in tmp_path.glob("*.safetensors")}
    assert len(digests) == 1


def test_imports_that_are_refused(
    model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = control_vector(tmp_path / "v.gguf", 1)
    output = tmp_path / "out.safetensors"

    def refusal(path: Path, output: Path = output, *options: str) -> str:
        assert import_(path, output, *options) == 2
        assert not output.exists()
        return capsys.readouterr().err

    small = control_vector(tmp_path / "small.gguf", 1, size=6)
    assert f"{small}: the direction of layer 1 has the shape [6], the model's hidden size is 8" in (
        refusal(small)
    )
    deep = control_vector(tmp_path / "deep.gguf", 1, 4)
    assert "layer 4, the model has the layers 0 .. 3" in refusal(deep)
    assert "ends in .safetensors" in refusal(good, tmp_path / "out.json")
    assert "the folder does not exist" in refusal(good, tmp_path / "no" / "out.safetensors")
    assert "gone.gguf" in refusal(tmp_path / "gone.gguf")
    assert "is no file of plain tensors" in refusal(good, output, "--format", "steering-vectors")


def test_the_way_to_convert_a_pickle_keeps_its_lines(
    model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "v.pt"
    torch.save(HeadProfile, path)
    assert import_(path, tmp_path / "out.safetensors") == 2
    assert "\n    v = torch.load('v.pt', weights_only=False)\n" in capsys.readouterr().err


@pytest.mark.slow
def test_the_sizes_of_a_model_are_read_from_its_configuration(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    path, output = control_vector(tmp_path / "v.gguf", 1, size=64), tmp_path / "v.safetensors"
    options = ["--model", str(folder), "--output", str(output)]
    assert cli.main(["profile", "import", str(path), *options]) == 0
    VectorProfile.load(output).check_model(steerable_geometry(read_model(str(folder))))


# put, list, delete


@dataclass
class Remote:
    """A server that answers as it is told, and what it was asked.

    answers: (method, path) -> status and body; artefacts that were put are there afterwards.
    """

    url: str
    answers: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    artifacts: set[str] = field(default_factory=set)

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Any:
        self.asked.append((method, path))
        self.headers.append(headers)
        self.bodies.append(body)
        if (method, path) in self.answers:
            return self.answers[method, path]
        if path.startswith("/v1/steering/artifacts/"):
            known = path in self.artifacts
            if method == "PUT":
                self.artifacts.add(path)
            return (200 if known or method == "PUT" else 404), {}
        name = path.removeprefix("/v1/steering/profiles/")
        if name != path and method == "PUT":
            return 201, {"name": name, "version": 3}
        if name != path and method == "DELETE":
            return 200, {"deleted": ["mine@1", "mine@3"], "artifacts_deleted": []}
        return 404, {"detail": "Not Found"}


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, answer = found.answer(self.command, self.path, headers, body)
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Remote(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HEADWAY_STEERING_API_KEY", ADMIN)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def run(remote: Remote, *arguments: str) -> int:
    return cli.main(["profile", *arguments, "--url", remote.url])


def test_vectors_are_put_as_an_artefact_and_a_profile(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = vectors(tmp_path / "v.safetensors")
    digest = sha256(path.read_bytes()).hexdigest()
    artifact = f"/v1/steering/artifacts/sha256:{digest}"
    assert run(remote, "put", "prefer-cpp", str(path), "--description", "C++, please") == 0
    assert remote.asked == [
        ("HEAD", artifact),
        ("PUT", artifact),
        ("PUT", "/v1/steering/profiles/prefer-cpp"),
    ]
    assert remote.bodies[1] == path.read_bytes()
    assert json.loads(remote.bodies[2]) == {
        "artifact": f"sha256:{digest}",
        "description": "C++, please",
    }
    assert all(headers["x-steering-api-key"] == ADMIN for headers in remote.headers)
    assert not any("authorization" in headers for headers in remote.headers)
    assert capsys.readouterr().out.splitlines() == [
        f"artefact: sha256:{digest}, {path.stat().st_size} bytes",
        "profile: prefer-cpp@3",
    ]


def test_an_artefact_that_is_there_is_not_sent_again(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = vectors(tmp_path / "v.safetensors")
    assert run(remote, "put", "a", str(path)) == run(remote, "put", "b", str(path)) == 0
    assert [method for method, _ in remote.asked[3:]] == ["HEAD", "PUT"]
    assert json.loads(remote.bodies[-1]).keys() == {"artifact"}
    assert "there already" in capsys.readouterr().out


def test_a_key_of_several_is_enough(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_STEERING_API_KEY", "new, old")  # as servers may have it
    assert run(remote, "delete", "mine") == 0
    assert remote.headers[0]["x-steering-api-key"] == "new"


def test_the_same_content_makes_no_version(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.answers["PUT", "/v1/steering/profiles/mine"] = 200, {"version": 2}
    assert run(remote, "put", "mine", str(heads(tmp_path / "h.json"))) == 0
    assert capsys.readouterr().out == "profile: mine@2, there already\n"


def test_heads_are_put_as_they_are(remote: Remote, tmp_path: Path) -> None:
    path = heads(tmp_path / "h.json")
    assert run(remote, "put", "mine", str(path)) == 0
    assert remote.asked == [("PUT", "/v1/steering/profiles/mine")]
    assert json.loads(remote.bodies[0]) == {"profile": json.loads(path.read_text())}


def test_sinks_are_for_the_start_of_a_server(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sinks(tmp_path / "s.json")
    assert run(remote, "put", "mine", str(path)) == 2
    assert remote.asked == []
    assert f"headway serve --steering-profile mine={path}" in capsys.readouterr().err


def test_keys_come_from_the_environment(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", API)
    monkeypatch.setenv("OTHER", "another-key\n")
    path = str(heads(tmp_path / "h.json"))
    assert run(remote, "put", "mine", path) == 0
    assert run(remote, "put", "mine", path, "--key-env", "OTHER", "--api-key-env", "OTHER") == 0
    sent = [(each["x-steering-api-key"], each["authorization"]) for each in remote.headers]
    assert sent == [(ADMIN, f"Bearer {API}"), ("another-key", "Bearer another-key")]


@pytest.mark.parametrize("key", [None, " ", "kéy", "a\nb"])
def test_a_key_that_cannot_be_used_is_not_shown(
    key: str | None,
    remote: Remote,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HEADWAY_STEERING_API_KEY")
    if key is not None:
        monkeypatch.setenv("HEADWAY_STEERING_API_KEY", key)
    assert run(remote, "delete", "mine") == 2
    error = capsys.readouterr().err
    assert "the environment variable HEADWAY_STEERING_API_KEY" in error
    assert not key or not key.strip() or key not in error
    assert remote.asked == []


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            403,
            {"error": {"message": "wrong key", "param": None, "reason": "E_FORBIDDEN"}},
            "answered 403: wrong key (E_FORBIDDEN)",
        ),
        (
            400,
            {"error": {"message": "too deep", "param": "profile.layers", "reason": "E_X"}},
            "answered 400: too deep (profile.layers, E_X)",
        ),
        (401, {"error": "Unauthorized"}, "answered 401: Unauthorized"),
        (404, {"detail": "Not Found"}, "answered 404: Not Found"),
        (502, b"<html>", "answered 502: Bad Gateway"),
        (307, b"", "answered 307: Temporary Redirect"),
        (200, b"<html>", "the answer is not JSON: '<html>'"),
        (200, {"name": "mine"}, 'the answer names no version: {"name": "mine"}'),
        (200, ["mine"], "the answer names no version"),
    ],
)
def test_what_a_server_refuses_is_said_in_its_words(
    status: int,
    body: Any,
    words: str,
    remote: Remote,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remote.answers["PUT", "/v1/steering/profiles/mine"] = status, body
    assert run(remote, "put", "mine", str(heads(tmp_path / "h.json"))) == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert "profile:" not in printed.out
    assert [path for _, path in remote.asked] == ["/v1/steering/profiles/mine"]  # no redirect


def test_a_refused_artefact_ends_it(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = vectors(tmp_path / "v.safetensors")
    artifact = f"/v1/steering/artifacts/sha256:{sha256(path.read_bytes()).hexdigest()}"
    refusal = {"error": {"message": "has 9 bytes too many", "reason": "E_TOO_LARGE"}}
    remote.answers["PUT", artifact] = 413, refusal
    assert run(remote, "put", "mine", str(path)) == 1
    assert remote.asked == [("HEAD", artifact), ("PUT", artifact)]
    assert "answered 413: has 9 bytes too many (E_TOO_LARGE)" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["list"], ["delete", "mine"]])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "localhost:8000", "http://["])
def test_a_server_that_does_not_answer(
    arguments: list[str], url: str, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.url = url
    assert run(remote, *arguments) == 1
    error = capsys.readouterr().err
    assert url in error
    assert len(error.splitlines()) == 1


def test_profiles_are_listed_without_a_key_for_changes(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HEADWAY_STEERING_API_KEY")
    monkeypatch.setenv("VLLM_API_KEY", API)
    listed = [
        {"name": "a", "version": 2, "reference": "a@2", "kind": "caa", "from": "registry"}
        | {"layers": [1, 2, 3], "fits": True, "description": None},
        {"name": "beta", "version": None, "reference": "beta", "kind": "heads", "from": "start"}
        | {"layers": [1, 3], "fits": True, "description": "mine\x1b"},
        {"name": "c", "reference": "c@1", "kind": "caa", "from": "registry", "fits": False},
        {"name": "d", "from": "registry", "fits": False, "error": "is damaged"},
    ]
    remote.answers["GET", "/v1/steering/profiles"] = 200, {"data": listed}
    assert run(remote, "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "a@2   caa    from registry  layers 1 .. 3",
        r"beta  heads  from start     layers 1, 3    mine\u001b",
        "c@1   caa    from registry                 (of another model)",
        "d     ?      from registry                 is damaged",
    ]
    assert remote.headers[0]["authorization"] == f"Bearer {API}"
    assert "x-steering-api-key" not in remote.headers[0]
    remote.answers["GET", "/v1/steering/profiles"] = 200, {"data": []}
    assert run(remote, "list") == 0
    assert capsys.readouterr().out == ""
    remote.answers["GET", "/v1/steering/profiles"] = 200, {"other": 1}
    assert run(remote, "list") == 1
    assert "lists no profiles" in capsys.readouterr().err


@pytest.mark.parametrize("reference", ["mine", "mine@3"])
def test_a_profile_or_a_version_is_deleted(
    reference: str, remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.url += "/v1/"  # as clients of the OpenAI API have it
    assert run(remote, "delete", reference) == 0
    assert remote.asked == [("DELETE", f"/v1/steering/profiles/{reference}")]
    assert remote.headers[0]["x-steering-api-key"] == ADMIN
    assert capsys.readouterr().out == "deleted: mine@1, mine@3\n"
    remote.answers["DELETE", f"/v1/steering/profiles/{reference}"] = 200, {}
    assert run(remote, "delete", reference) == 1
    assert "names no versions" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["delete"], ["put"]])
@pytest.mark.parametrize("name", ["..", "a/b", "", "a?b", "mine@x", "a" * 65])
def test_names_that_no_profile_can_have(
    name: str, arguments: list[str], remote: Remote, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(remote, *arguments, name, *(["v.json"] if arguments == ["put"] else []))
    assert ended.value.code == 2
    assert "made of letters, digits, '.', '_' and '-'" in capsys.readouterr().err
    assert remote.asked == []


@pytest.mark.slow
def test_the_routes_of_a_server_take_it_all(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against the registry's own routes instead of answers made up here."""
    import uvicorn
    from fastapi import FastAPI

    from headway.server.http.admin import AdminKeys
    from headway.server.http.errors import steering_error_handler
    from headway.server.http.registry_routes import router
    from headway.server.registry.registry import Registry
    from headway.server.registry.store import Store
    from headway.steering import SteeringError

    app = FastAPI()
    app.include_router(router)
    app.add_exception_handler(SteeringError, steering_error_handler)
    registry = Registry(GEOMETRY, Store(tmp_path / "registry"), AdminKeys([ADMIN]))
    app.state.headway = SimpleNamespace(registry=registry)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        remote.url = f"http://127.0.0.1:{port}"
        first, other = (
            vectors(tmp_path / "v.safetensors"),
            vectors(tmp_path / "o.safetensors", "act"),
        )
        assert run(remote, "put", "mine", str(first), "--description", "once") == 0
        assert run(remote, "put", "mine", str(first), "--description", "once") == 0
        assert run(remote, "put", "mine", str(other)) == 0
        assert run(remote, "put", "heads", str(heads(tmp_path / "h.json"))) == 0
        printed = [line for line in capsys.readouterr().out.splitlines() if "profile" in line]
        assert printed == [
            "profile: mine@1",
            "profile: mine@1, there already",
            "profile: mine@2",
            "profile: heads@1",
        ]
        assert run(remote, "list") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [["heads@1", "heads"], ["mine@2", "act"]]
        assert run(remote, "delete", "mine@1") == 0
        assert capsys.readouterr().out == "deleted: mine@1\n"
        assert run(remote, "delete", "mine@1") == 1
        assert "E_PROFILE_NOT_FOUND" in capsys.readouterr().err
    finally:
        server.should_exit = True
        thread.join()
