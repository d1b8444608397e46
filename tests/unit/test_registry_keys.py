"""Admin keys: which changes need one, where it may stand, and that nothing shows it."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from pathlib import Path

import pytest

from headway.server.commands import serve
from headway.server.http.admin import KEY_HEADER, KEY_VARIABLE, AdminKeys
from tests.registry import heads
from tests.registry_app import KEY, Server, files, refused

pytestmark = pytest.mark.unit

HEADS = {"profile": heads()}
ABSENT = "sha256:" + "0" * 64


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "registry", AdminKeys(["right", "newer"]))


CHANGES = [
    ("PUT", "profiles/p"),
    ("DELETE", "profiles/p"),
    ("PUT", f"artifacts/{ABSENT}"),
    ("PUT", "presets/p"),
    ("DELETE", "presets/p"),
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_changes_need_a_key(tmp_path: Path, server: Server, method: str, path: str) -> None:
    closed = Server(tmp_path / "closed", AdminKeys())
    refused(await closed.call(method, path), 403, "E_FORBIDDEN", "--steering-api-key")
    wrong: tuple[dict[str, str], ...] = (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic right"},
        {"Authorization": "Bearer "},
        {KEY_HEADER: "wrong"},
        {KEY_HEADER: ""},
        {KEY_HEADER: "r\xedght"},
    )
    for headers in wrong:
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        refused(await server.call(method, path, headers=raw), 401, "E_UNAUTHORIZED", KEY_HEADER)
    assert files(server) == []


async def test_either_header_and_every_key_will_do(server: Server) -> None:
    for headers in (
        KEY,
        {"authorization": "bearer newer"},
        {KEY_HEADER: "right"},
        {"Authorization": "Bearer the-api-key-of-vllm", KEY_HEADER: "newer"},
    ):
        await server.ok("PUT", "profiles/p", json=HEADS, headers=headers)


async def test_a_retired_key_is_wrong(server: Server) -> None:
    server.registry.keys = AdminKeys(["newer"])
    refused(await server.call("DELETE", "profiles/p"), 401, "E_UNAUTHORIZED")
    answer = await server.call("DELETE", "profiles/p", headers={KEY_HEADER: "newer"})
    refused(answer, 404, "E_PROFILE_NOT_FOUND")


async def test_looking_needs_no_key(server: Server) -> None:
    assert (await server.call("GET", "profiles", headers={})).json() == {"data": []}
    assert server.registry.is_writable
    server.registry.keys = AdminKeys()
    assert not server.registry.is_writable


def test_keys_leave_the_arguments(caplog: pytest.LogCaptureFixture) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import log_non_default_args

    parser = serve.build_parser(ServeSubcommand())
    options = ["--steering-api-key", "secret-one", "--steering-api-key=secret-two"]
    args = parser.parse_args(["serve", "m", *options])
    environment = {KEY_VARIABLE: "old"}
    serve.move_keys(args, environment)
    assert environment == {KEY_VARIABLE: "secret-one,secret-two"}
    assert "secret" not in repr(args)
    caplog.set_level(logging.INFO, "vllm")
    log_non_default_args(args)
    assert "non-default args" in caplog.text and "secret" not in caplog.text
    keys = AdminKeys.of(environment)
    assert keys and "secret" not in repr(vars(keys))
    for key in ("secret-one", "secret-two"):
        keys.check({KEY_HEADER: key})
    serve.move_keys(Namespace(steering_api_key=[], steering_api_key_file=None), environment)
    assert environment == {KEY_VARIABLE: "secret-one,secret-two"}, "kept where no option is given"
    assert not AdminKeys.of({}) and not AdminKeys.of({KEY_VARIABLE: " ,"})
    assert KEY_VARIABLE not in os.environ


@pytest.mark.parametrize("key", ["", "a,b", "a b", "ä", "a\n"])
def test_a_key_can_be_sent(key: str) -> None:
    with pytest.raises(ValueError, match="--steering-api-key: a key is made of"):
        serve.move_keys(Namespace(steering_api_key=[key], steering_api_key_file=None), {})
