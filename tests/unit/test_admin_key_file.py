"""Admin keys in a file: rotated while the server runs, withdrawn with it, shown nowhere."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from headway.server.commands import serve
from headway.server.http.admin import (
    FILE_OPTION,
    FILE_VARIABLE,
    KEY_HEADER,
    KEY_VARIABLE,
    AdminKeys,
    KeyFile,
)
from headway.steering import Reason, SteeringError
from tests.registry import heads
from tests.registry_app import Server, refused

pytestmark = pytest.mark.unit


def written(path: Path, text: str) -> Path:
    """The file, replaced by another, as Kubernetes and careful people do it."""
    temporary = path.with_name("next")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path


def opens(keys: AdminKeys, key: str) -> bool:
    try:
        keys.check({KEY_HEADER: key})
    except SteeringError as error:
        assert error.reason in (Reason.UNAUTHORIZED, Reason.FORBIDDEN)
        return False
    return True


def test_keys_change_with_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", "first\n\n  second \nthird,fourth\r\n")
    keys = AdminKeys(["fixed"], KeyFile(path))
    assert all(opens(keys, key) for key in ("fixed", "first", "second", "third", "fourth"))
    assert not opens(keys, "") and not opens(keys, "wrong")
    written(path, "second\nnewest\n")
    assert all(opens(keys, key) for key in ("fixed", "second", "newest"))
    assert not any(opens(keys, key) for key in ("first", "third"))


def test_a_swapped_link_counts_as_a_change(tmp_path: Path) -> None:
    """How Kubernetes rotates a mounted Secret: the folder behind the link is another one."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(f"{name}-key\n")
        os.utime(tmp_path / name / "keys", ns=(1, 1))  # same size, same time
    (tmp_path / "data").symlink_to("old")
    keys = AdminKeys((), KeyFile(tmp_path / "data" / "keys"))
    assert opens(keys, "old-key") and not opens(keys, "new-key")
    (tmp_path / "next").symlink_to("new")
    os.replace(tmp_path / "next", tmp_path / "data")
    assert opens(keys, "new-key") and not opens(keys, "old-key")


def test_an_unchanged_file_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = AdminKeys((), KeyFile(written(tmp_path / "keys", "first\n")))
    assert opens(keys, "first")
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read again"))
    assert opens(keys, "first") and not opens(keys, "wrong")


@pytest.mark.parametrize("bad", [None, "with space in it\n", "ä-key\n", "first\nsecret two\n"])
def test_a_file_that_cannot_be_read_opens_nothing(
    tmp_path: Path, bad: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "keys", "first\n")
    keys = AdminKeys((), KeyFile(path))
    assert keys and opens(keys, "first")
    path.unlink() if bad is None else written(path, bad)
    assert not keys and not opens(keys, "first")
    assert FILE_OPTION in caplog.text
    assert not any(key in caplog.text for key in ("space in", "ä-key", "secret two"))
    written(path, "second\n")
    assert opens(keys, "second")


async def test_a_server_takes_the_new_key_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", "first\n")
    server = Server(tmp_path / "registry", AdminKeys((), KeyFile(path)))
    body = {"profile": heads()}

    async def put(key: str) -> Any:
        return await server.call("PUT", "profiles/p", json=body, headers={KEY_HEADER: key})

    assert (await put("first")).status_code == 201
    written(path, "second\n")
    refused(await put("first"), 401, "E_UNAUTHORIZED", KEY_HEADER)
    assert (await put("second")).status_code == 200
    written(path, "")
    refused(await put("second"), 403, "E_FORBIDDEN", "--steering-api-key")


def arguments(path: Any = None, *keys: str) -> Namespace:
    return Namespace(steering_api_key=list(keys), steering_api_key_file=path)


def test_serve_hands_on_the_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = written(tmp_path / "keys", "first\n")
    environment: dict[str, str] = {}
    serve.move_keys(arguments(str(path), "fixed"), environment)
    assert environment == {KEY_VARIABLE: "fixed", FILE_VARIABLE: str(path)}
    keys = AdminKeys.of(environment)
    assert opens(keys, "first") and opens(keys, "fixed")
    assert "first" not in repr(vars(keys)) + repr(vars(keys._file)) + caplog.text


@pytest.mark.parametrize("text", [None, "", "\n", "two words\n"])
def test_serve_refuses_a_file_without_keys(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    for args, environment in (
        (arguments(str(path)), {}),
        (arguments(), {FILE_VARIABLE: str(path)}),
    ):
        with pytest.raises(ValueError, match=FILE_OPTION) as caught:
            serve.move_keys(args, environment)
        assert "two words" not in str(caught.value)
