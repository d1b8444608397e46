"""The routes over the registry."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from headway.server.http import metrics, registry_routes
from headway.server.http.admin import AdminKeys
from headway.server.http.presets import parse_preset
from headway.server.registry.store import Store
from headway.steering import SteeringError
from headway.steering.vectors import MAX_VECTORS_BYTES
from tests.registry import OTHER_MODEL, digest_of, heads, put_heads, vector_bytes, vectors
from tests.registry_app import KEY, Server, files, refused

pytestmark = pytest.mark.unit

HEADS = {"profile": heads(), "description": "two heads"}
VHR = {"methods": [{"method": "vhr", "profile": "p", "alpha": 2.0}]}
ABSENT = "sha256:" + "0" * 64


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield Server(tmp_path / "registry", AdminKeys(["right"]))
    metrics.PROFILE_INFO.clear()


def shown_versions() -> set[tuple[str, str]]:
    [family] = metrics.PROFILE_INFO.collect()
    return {(each.labels["name"], each.labels["version"]) for each in family.samples}


# Artefacts


async def test_an_artefact_comes_back_as_it_was_put(server: Server, tmp_path: Path) -> None:
    content = vector_bytes(tmp_path)
    path = f"artifacts/sha256:{digest_of(content)}"
    first = await server.call("PUT", path, content=content)
    assert first.status_code == 201 and first.json()["bytes"] == len(content)
    assert (await server.call("PUT", path, content=content)).status_code == 200
    answer = await server.call("GET", path)
    assert answer.content == content
    assert answer.headers["content-type"] == "application/octet-stream"
    tag = answer.headers["etag"]
    assert tag == f'"sha256:{digest_of(content)}"'
    head = await server.call("HEAD", path)
    assert head.status_code == 200 and head.headers["content-length"] == str(len(content))
    assert head.content == b"" and head.headers["etag"] == tag
    again = await server.call("GET", path, headers={"If-None-Match": tag})
    assert again.status_code == 304
    refused(await server.call("GET", f"artifacts/{ABSENT}"), 404, "E_PROFILE_NOT_FOUND")
    assert (await server.call("HEAD", f"artifacts/{ABSENT}")).status_code == 404


@pytest.mark.parametrize("digest", ["sha256:0", "0" * 64, "sha256:" + "A" * 64, "md5:" + "0" * 64])
@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_a_bad_digest_is_refused(server: Server, method: str, digest: str) -> None:
    refused(await server.call(method, f"artifacts/{digest}"), 400, "E_BAD_PARAM", "is no digest")


async def test_a_bad_artefact_leaves_nothing(server: Server, tmp_path: Path) -> None:
    other = vector_bytes(tmp_path, geometry=OTHER_MODEL)
    for content, digest, status, reason in (
        (b"nonsense", digest_of(b"nonsense"), 400, "E_BAD_PARAM"),
        (vector_bytes(tmp_path), "0" * 64, 400, "E_BAD_PARAM"),
        (other, digest_of(other), 400, "E_PROFILE_MISMATCH"),
    ):
        answer = await server.call("PUT", f"artifacts/sha256:{digest}", content=content)
        refused(answer, status, reason)
    assert files(server) == []


async def test_an_artefact_has_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"artifacts/{ABSENT}"
    declared = {**KEY, "Content-Length": str(MAX_VECTORS_BYTES + 1)}
    answer = await server.call("PUT", path, content=b"", headers=declared)
    refused(answer, 413, "E_TOO_LARGE", str(MAX_VECTORS_BYTES))
    monkeypatch.setattr("headway.server.registry.store.MAX_VECTORS_BYTES", 100)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"0123456789"

    refused(await server.call("PUT", path, content=chunks()), 413, "E_TOO_LARGE", "100 bytes")
    assert files(server) == []


async def test_an_upload_that_breaks_off_leaves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry_routes, "WRITE_BYTES", 1)
    content = vector_bytes(tmp_path)
    during = []

    async def broken() -> AsyncIterator[bytes]:
        yield content[:100]
        yield content[100:200]
        during.extend(files(server))
        raise ConnectionError("the client is gone")

    with pytest.raises(ConnectionError):
        await server.call("PUT", f"artifacts/sha256:{digest_of(content)}", content=broken())
    assert len(during) == 1 and files(server) == []


async def test_a_full_disk_is_an_error_that_says_so(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("headway.server.registry.store.write_new", fail)
    answer = await server.call("PUT", "profiles/p", json=HEADS)
    refused(answer, 500, "E_STEERING_FAILED", "No space left")
    assert str(server.registry.store.root) not in answer.text
    monkeypatch.undo()
    assert (await server.ok("PUT", "profiles/p", json=HEADS))["version"] == 2


# Profiles


async def test_a_profile_is_put_shown_and_deleted(server: Server, tmp_path: Path) -> None:
    digest = await server.put_vectors(vector_bytes(tmp_path, command="headway calibrate caa"))
    content = {"artifact": digest, "description": "calm"}
    first = await server.call("PUT", "profiles/calm", json=content)
    assert first.status_code == 201
    assert first.json()["reference"] == "calm@1"
    assert (await server.call("PUT", "profiles/calm", json=content)).status_code == 200
    second = await server.ok("PUT", "profiles/calm", json={"artifact": digest})
    assert second["version"] == 2

    [listed] = (await server.ok("GET", "profiles"))["data"]
    assert listed["version"] == 2 and listed["kind"] == "caa" and listed["layers"] == [1, 3]
    shown = await server.ok("GET", "profiles/calm@1")
    assert shown["description"] == "calm" and shown["versions"] == [1, 2] and shown["fits"]
    assert shown["artifact"] == digest and shown["created"] and shown["from"] == "registry"
    header = shown["header"]
    assert (header["licence"], header["command"]) == ("MIT", "headway calibrate caa")
    assert (await server.ok("GET", "profiles/calm"))["version"] == 2

    gone = await server.ok("DELETE", "profiles/calm@2")
    assert gone == {"deleted": ["calm@2"], "artifacts_deleted": []}
    gone = await server.ok("DELETE", "profiles/calm")
    assert gone == {"deleted": ["calm@1"], "artifacts_deleted": [digest]}
    for method in ("GET", "DELETE"):
        refused(await server.call(method, "profiles/calm"), 404, "E_PROFILE_NOT_FOUND", "calm")


@pytest.mark.parametrize("name", ["a@1", "-a", ".lock", "a b", "%2e%2e", "a" * 65, "a%0a"])
async def test_a_bad_name_is_refused(server: Server, name: str) -> None:
    for kind, body in (("profiles", HEADS), ("presets", VHR)):
        refused(await server.call("PUT", f"{kind}/{name}", json=body), 400, "E_BAD_PARAM", "name")
    if name != "a@1":
        for method in ("GET", "DELETE"):
            refused(await server.call(method, f"profiles/{name}"), 400, "E_BAD_PARAM", "name")
    refused(await server.call("DELETE", f"presets/{name}"), 400, "E_BAD_PARAM", "name")


async def test_a_bad_body_is_refused(server: Server) -> None:
    for path in ("profiles/p", "presets/p"):
        refused(await server.call("PUT", path, content=b"{"), 400, "E_BAD_PARAM", "no JSON")
        large = b'"' + b"x" * 1024 * 1024 + b'"'
        refused(await server.call("PUT", path, content=large), 413, "E_TOO_LARGE")
        refused(await server.call("PUT", path, json=[]), 400, "E_BAD_PARAM")
    sinks = {"profile": {"kind": "sinks"}}
    refused(await server.call("PUT", "profiles/p", json=sinks), 400, "E_UNSUPPORTED")
    other = {"profile": heads(OTHER_MODEL)}
    refused(await server.call("PUT", "profiles/p", json=other), 400, "E_PROFILE_MISMATCH")
    assert files(server) == []


async def test_a_profile_in_use_stays(server: Server, tmp_path: Path) -> None:
    content = vector_bytes(tmp_path)
    digest = await server.put_vectors(content)
    await server.ok("PUT", "profiles/p", json={"artifact": digest})
    server.registry.in_use = lambda used: used == digest_of(content)
    for name in ("p", "p@1"):
        refused(await server.call("DELETE", f"profiles/{name}"), 409, "E_IN_USE", "p@1")
    server.registry.in_use = lambda used: False
    await server.ok("DELETE", "profiles/p")


async def test_what_was_given_at_the_start_stays(tmp_path: Path) -> None:
    path = tmp_path / "preset.json"
    path.write_text('{"methods": [{"method": "caa", "profile": "p"}]}')
    server = Server(tmp_path / "r", AdminKeys(["right"]), {"p": vectors()}, (f"given={path}",))
    for method in ("PUT", "DELETE"):
        for name in ("profiles/p", "presets/given"):
            answer = await server.call(method, name, json=HEADS if "p" in name else VHR)
            refused(answer, 409, "E_IN_USE", "given at the start")
    [listed] = (await server.ok("GET", "profiles"))["data"]
    assert (listed["from"], listed["version"], listed["fits"]) == ("start", None, True)
    assert (await server.ok("GET", "profiles/p"))["header"]["licence"] == "MIT"
    refused(await server.call("GET", "profiles/p@1"), 404, "E_PROFILE_NOT_FOUND")


async def test_a_profile_of_another_model_is_listed_and_refused(
    server: Server, tmp_path: Path
) -> None:
    server.registry.store.put_profile("theirs", {"profile": heads(OTHER_MODEL)}, OTHER_MODEL)
    [listed] = (await server.ok("GET", "profiles"))["data"]
    assert listed["fits"] is False and not (await server.ok("GET", "profiles/theirs"))["fits"]
    with pytest.raises(SteeringError, match="made for another model"):
        server.resolve(methods=[{"method": "vhr", "profile": "theirs"}])


async def test_the_versions_that_requests_found_are_counted(server: Server) -> None:
    for text in "ab":
        await server.ok("PUT", "profiles/p", json={**HEADS, "description": text})
    assert shown_versions() == set()
    server.resolve(methods=[{"method": "vhr", "profile": "p"}])
    server.resolve(methods=[{"method": "vhr", "profile": "p@1"}])
    assert shown_versions() == {("p", "1"), ("p", "2")}
    await server.ok("DELETE", "profiles/p@2")
    assert shown_versions() == {("p", "1")}


def test_the_versions_shown_have_a_limit() -> None:
    found = metrics.FoundVersions(capacity=2)
    for version in (1, 2, 1, 3):
        found.note("p", version)
    assert shown_versions() == {("p", "1"), ("p", "3")}
    found.forget("p", 1)
    found.forget("p", 3)
    found.forget("p", 9)
    assert shown_versions() == set()


# Presets


async def test_a_preset_is_usable_at_once_and_so_is_its_alias(server: Server) -> None:
    await server.ok("PUT", "profiles/p", json=HEADS)
    put = await server.call("PUT", "presets/quiet", json={**VHR, "description": "hush"})
    assert put.status_code == 201 and put.json()["description"] == "hush"
    assert (await server.call("PUT", "presets/quiet", json=VHR)).status_code == 200
    program = server.resolve(methods=VHR["methods"])
    assert put.json()["fingerprint"] == program.fingerprint
    assert server.resolve(preset="quiet").fingerprint == program.fingerprint
    assert server.resolve(model="base:quiet").fingerprint == program.fingerprint
    [shown] = (await server.ok("GET", "presets"))["data"]
    assert (shown["name"], shown["methods"]) == ("quiet", VHR["methods"])
    assert (await server.ok("GET", "/v1/models"))["ids"] == ["base", "base:quiet"]

    assert await server.ok("DELETE", "presets/quiet") == {"deleted": "quiet"}
    assert (await server.ok("GET", "/v1/models"))["ids"] == ["base"]
    with pytest.raises(SteeringError, match="there is no preset"):
        server.resolve(preset="quiet")
    refused(await server.call("DELETE", "presets/quiet"), 404, "E_PRESET_NOT_FOUND")


async def test_a_preset_that_goes_while_others_are_listed_is_left_out(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = [{"method": "vhr", "heads": [[0, 0]]}]
    for name in ("going", "staying"):
        await server.ok("PUT", f"presets/{name}", json={"methods": methods})
    store = server.registry.store
    assert list(server.registry.presets) == ["going", "staying"]
    look = store.preset_stamp

    def look_then_delete(name: str) -> Any:
        found = look(name)
        store.delete_preset("going")
        return found

    monkeypatch.setattr(store, "preset_stamp", look_then_delete)
    shown = await server.ok("GET", "presets")
    assert [preset["name"] for preset in shown["data"]] == ["staying"]
    await server.ok("PUT", "presets/going", json={"methods": methods})
    with pytest.raises(SteeringError, match="the presets are: staying"):
        server.resolve(preset="unknown")  # which looks at all presets


@pytest.mark.parametrize(
    ("content", "reason", "param"),
    [
        ({"methods": []}, "E_BAD_PARAM", "preset.methods"),
        ({"methods": [{"method": "nope"}]}, "E_UNKNOWN_METHOD", "preset.methods[0].method"),
        (VHR, "E_PROFILE_NOT_FOUND", "preset.methods[0].profile"),
        ({**VHR, "colour": 1}, "E_BAD_PARAM", "preset"),
    ],
)
async def test_a_preset_that_does_not_compile_is_refused(
    server: Server, content: Any, reason: str, param: str
) -> None:
    answer = await server.call("PUT", "presets/bad", json=content)
    refused(answer, 404 if reason.endswith("NOT_FOUND") else 400, reason)
    assert answer.json()["error"]["param"] == param
    assert files(server) == []


async def test_a_profile_that_a_preset_names_stays(server: Server, tmp_path: Path) -> None:
    await server.ok("PUT", "profiles/p", json=HEADS)
    await server.ok("PUT", "profiles/p", json={"profile": heads(alpha=3.0)})
    await server.ok("PUT", "presets/quiet", json=VHR)
    refused(await server.call("DELETE", "profiles/p"), 409, "E_IN_USE", "preset quiet names p;")
    await server.ok("DELETE", "profiles/p@1")  # the name still means something
    refused(await server.call("DELETE", "profiles/p@2"), 409, "E_IN_USE", "preset quiet names p;")
    digest = await server.put_vectors(vector_bytes(tmp_path))
    await server.ok("PUT", "profiles/calm", json={"artifact": digest})
    for reference in (digest, "calm@1"):
        methods = [{"method": "caa", "profile": reference}]
        await server.ok("PUT", "presets/calm", json={"methods": methods})
        answer = await server.call("DELETE", "profiles/calm")
        refused(answer, 409, "E_IN_USE", f"preset calm names {reference};")
    await server.ok("DELETE", "presets/calm")
    await server.ok("DELETE", "profiles/calm")


async def test_a_preset_follows_the_profile_that_it_names(server: Server) -> None:
    await server.ok("PUT", "profiles/p", json=HEADS)
    before = await server.ok("PUT", "presets/quiet", json=VHR)
    await server.ok("PUT", "profiles/p", json={**HEADS, "description": "again"})
    [after] = (await server.ok("GET", "presets"))["data"]
    shown = [each["applied"][0]["profile"] for each in (before, after)]
    assert shown == ["p@1", "p@2"]


async def test_a_preset_of_the_start_is_shown_as_its_profile_is_now(tmp_path: Path) -> None:
    put_heads(Store(tmp_path / "r"))
    path = tmp_path / "preset.json"
    path.write_text('{"methods": [{"method": "vhr", "profile": "p"}], "description": "kept"}')
    server = Server(tmp_path / "r", AdminKeys(["right"]), presets=(f"given={path}",))
    await server.ok("PUT", "profiles/p", json={"profile": {**heads(), "heads": [[0, 1]]}})
    [shown] = (await server.ok("GET", "presets"))["data"]
    assert shown["applied"][0]["profile"] == "p@2" and shown["description"] == "kept"
    assert shown["fingerprint"] == server.resolve(preset="given").fingerprint
    server.registry.store.delete_profile("p", (1, 2))  # as another server may
    assert list(server.state.presets) == ["given"]
    with pytest.raises(SteeringError, match="there is no profile"):
        server.resolve(preset="given")


async def test_a_profile_put_while_a_preset_compiles_is_seen(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.ok("PUT", "profiles/p", json=HEADS)
    await server.ok("PUT", "presets/quiet", json=VHR)

    def compile_then_put(*args: Any) -> Any:
        made = parse_preset(*args)
        put_heads(server.registry.store, description="meanwhile")
        return made

    monkeypatch.setattr("headway.server.registry.presets.parse_preset", compile_then_put)
    assert server.state.presets["quiet"].program.applied[0].details["profile"] == "p@1"
    assert server.state.presets["quiet"].program.applied[0].details["profile"] == "p@2"


async def test_a_preset_that_fails_does_not_take_the_others_down(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    methods = [{"method": "vhr", "heads": [[0, 0]]}]
    for name in ("bad", "good"):
        await server.ok("PUT", f"presets/{name}", json={"methods": methods})

    def fail(name: str, *args: Any) -> Any:
        if name == "bad":
            raise IndexError("nobody foresaw this")
        return parse_preset(name, *args)

    monkeypatch.setattr("headway.server.registry.presets.parse_preset", fail)
    shown = await server.ok("GET", "presets")
    assert [preset["name"] for preset in shown["data"]] == ["good"]
    assert (await server.ok("GET", "/v1/models"))["ids"] == ["base", "base:good"]
    assert server.resolve(preset="good").fingerprint
    assert "the preset bad failed" in caplog.text and "nobody foresaw this" in caplog.text


async def test_a_description_that_no_answer_could_hold_is_refused(server: Server) -> None:
    methods = '[{"method": "vhr", "heads": [[0, 0]]}]'
    for text in ('"\\ud800"', f'"{"x" * 1025}"', "1"):
        body = f'{{"methods": {methods}, "description": {text}}}'.encode()
        answer = await server.call("PUT", "presets/bad", content=body)
        refused(answer, 400, "E_BAD_PARAM")
        assert answer.json()["error"]["param"] == "preset.description"
    assert files(server) == [] and (await server.ok("GET", "presets"))["data"] == []


async def test_presets_of_another_model_are_left_out(server: Server) -> None:
    store = server.registry.store
    store.put_preset("theirs", {"methods": [{"method": "head_ablation", "heads": [[4, 0]]}]})
    store.put_profile("theirs", {"profile": heads(OTHER_MODEL)}, OTHER_MODEL)
    store.put_preset("named", {"methods": [{"method": "vhr", "profile": "theirs"}]})
    (store.root / "presets" / "damaged.json").write_text("{")
    assert list(server.state.presets) == [] and len(server.state.presets) == 0
    answer = await server.call("DELETE", "profiles/theirs")
    refused(answer, 409, "E_IN_USE", "preset named names theirs;")
