"""JSON of any depth in a spec, a preset, a profile or an artefact is an error of the client's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headway.server.http.admin import AdminKeys
from headway.steering import SteeringError
from headway.steering.vectors import VectorProfile
from tests.registry import GEOMETRY, digest_of
from tests.registry_app import Server
from tests.vectors import drawn_profile

pytestmark = pytest.mark.unit

DEPTHS = (*range(20, 1060, 40), 5_000, 60_000)
"""Among them those at which a parser, or what works on its result, gives up in some place."""


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


SPECS = {
    "methods": '{{"methods": {}}}',
    "option": '{{"methods": [{{"method": "vhr", "heads": {}}}]}}',
    "report": '{{"report": {}, "methods": []}}',
    "unknown key": '{{"unknown": {}}}',
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield Server(tmp_path / "registry", AdminKeys(["right"]))


@pytest.mark.parametrize("where", SPECS)
async def test_deep_specs_are_refused(server: Server, where: str) -> None:
    for depth in DEPTHS:
        for brackets in (("[", "]"), ('{"a":', "}")):
            opening, closing = brackets
            text = opening * depth + "1" + closing * depth
            spec = SPECS[where].format(text)
            headers = {"Content-Type": "application/json"}
            body = f'{{"model": "base", "steering": {spec}}}'
            answer = await server.call("POST", "compile", content=body, headers=headers)
            assert 400 <= answer.status_code < 500, (depth, answer.text)


@pytest.mark.parametrize("kind", ["presets", "profiles"])
async def test_deep_documents_are_refused(server: Server, kind: str) -> None:
    key = {"presets": "methods", "profiles": "profile"}[kind]
    for depth in DEPTHS:
        body = f'{{"{key}": {nested(depth)}}}'
        answer = await server.call("PUT", f"{kind}/p", content=body)
        assert 400 <= answer.status_code < 500, (depth, answer.text)


def with_training(folder: Path, training: str) -> bytes:
    """A vector profile whose header has this JSON for what it says of its making."""
    path = folder / "profile.safetensors"
    drawn_profile(GEOMETRY, "caa", (1,), num_clusters=1, seed=1).save(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + size])
    inner = json.loads(outer["__metadata__"]["headway"])
    text = json.dumps({**inner, "training": {"a": 1}}).replace('{"a": 1}', f'{{"a": {training}}}')
    outer["__metadata__"]["headway"] = text
    header = json.dumps(outer).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


async def test_deep_headers_are_refused_or_shown(server: Server, tmp_path: Path) -> None:
    """Where a profile is taken, whatever it says can be shown too."""
    taken = 0
    for depth in DEPTHS:
        content = with_training(tmp_path, nested(depth))
        digest = f"sha256:{digest_of(content)}"
        put: Any = await server.call("PUT", f"artifacts/{digest}", content=content)
        assert put.status_code == 201 or 400 <= put.status_code < 500, (depth, put.text)
        path = tmp_path / "as-a-file.safetensors"
        path.write_bytes(content)
        if put.status_code != 201:
            with pytest.raises(SteeringError):
                VectorProfile.load(path)
            continue
        taken += 1
        await server.ok("PUT", "profiles/p", json={"artifact": digest})
        for shown in ("profiles", "profiles/p"):
            assert (await server.call("GET", shown)).status_code == 200, depth
    assert 0 < taken < len(DEPTHS)
