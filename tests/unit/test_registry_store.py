"""The registry on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from headway.server.registry.files import (
    LEFTOVER_SECONDS,
    TEMPORARY_PREFIX,
    FolderLock,
    Upload,
    write_new,
)
from headway.server.registry.names import is_name, parse_reference
from headway.server.registry.store import Store
from headway.steering.vectors import METADATA_KEY
from tests.registry import (
    GEOMETRY,
    OTHER_MODEL,
    digest_of,
    heads,
    put_bytes,
    put_heads,
    put_vectors,
    refused,
    vector_bytes,
    vectors,
)

pytestmark = pytest.mark.unit

BAD_NAMES = ["", ".", "..", "../x", "a/b", "a b", "a@1", "-a", "a" * 65, "a\n", "ä", ".lock"]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "registry")


def files(store: Store) -> list[str]:
    """All files of a registry but for the lock."""
    paths = (path for path in store.root.rglob("*") if path.is_file() and path.name != ".lock")
    return sorted(str(path.relative_to(store.root)) for path in paths)


# Names


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_is_safe_as_the_name_of_a_file(store: Store, name: str) -> None:
    assert not is_name(name)
    with refused("E_BAD_PARAM"):
        put_heads(store, name)
    with refused("E_BAD_PARAM"):
        store.put_preset(name, {})
    assert files(store) == []


@pytest.mark.parametrize("text", ["a@", "a@0", "a@01", "a@-1", "a@1@2", "a@x", "@1", "a@٣"])
def test_what_is_no_reference(text: str) -> None:
    assert parse_reference(text) is None


# Artefacts


def test_an_artefact_is_kept_under_its_digest(store: Store, tmp_path: Path) -> None:
    content = vector_bytes(tmp_path)
    digest = put_bytes(store, content)
    path = store.artifact(digest)
    assert path is not None and path.read_bytes() == content
    assert put_bytes(store, content) == digest, "putting it again changes nothing"
    assert files(store) == [f"artifacts/{digest}.safetensors"]
    assert store.artifact("0" * 64) is None


def with_header(tensors: dict[str, np.ndarray], **header: Any) -> bytes:
    text = json.dumps({**vectors().header.model_dump(mode="json"), **header})
    return save(tensors, metadata={METADATA_KEY: text})


def drawn(*shape: int, value: float = 1.0) -> dict[str, np.ndarray]:
    return {"directions": np.full(shape, value, np.float32)}


@pytest.mark.parametrize(
    ("content", "reason", "words"),
    [
        (b"", "E_BAD_PARAM", "cannot be read"),
        (b"no safetensors", "E_BAD_PARAM", "cannot be read"),
        (save(drawn(2, 1, 64)), "E_BAD_PARAM", "without the metadata"),
        (with_header(drawn(2, 1, 63)), "E_BAD_PARAM", "has shape"),
        (
            with_header({"directions": np.full((2, 1, 64), np.nan, np.float32)}),
            "E_BAD_PARAM",
            "fin",
        ),
        (with_header({"directions": np.ones((2, 1, 64))}), "E_BAD_PARAM", "float64"),
        (with_header(drawn(2, 1, 64), layers=[1, 9]), "E_BAD_PARAM", "layer 9"),
        (with_header(drawn(2, 1, 64), fingerprint="0" * 16), "E_PROFILE_MISMATCH", "another model"),
        # The fingerprint of this model over the sizes of another.
        (
            with_header(drawn(2, 1, 64), num_layers=100, layers=[1, 99]),
            "E_PROFILE_MISMATCH",
            "with 100 layers",
        ),
        (with_header(drawn(2, 1, 32), hidden_size=32), "E_PROFILE_MISMATCH", "hidden size 32"),
    ],
)
def test_what_is_no_vector_profile_of_this_model_is_refused(
    store: Store, content: bytes, reason: str, words: str
) -> None:
    with refused(reason, words):
        put_bytes(store, content)
    assert files(store) == []


def test_an_artefact_is_what_its_name_says(store: Store, tmp_path: Path) -> None:
    content = vector_bytes(tmp_path)
    with refused("E_BAD_PARAM", f"the content is sha256:{digest_of(content)}"):
        put_bytes(store, content, digest="0" * 64)
    assert files(store) == []


def test_an_artefact_of_another_model_is_refused(store: Store, tmp_path: Path) -> None:
    with refused("E_PROFILE_MISMATCH", "made for another model"):
        put_bytes(store, vector_bytes(tmp_path, geometry=OTHER_MODEL))
    assert files(store) == []


def test_an_upload_has_a_limit(tmp_path: Path) -> None:
    upload = Upload(tmp_path, 10, "artifact")
    upload.write(b"12345")
    upload.write(b"67890")
    with refused("E_TOO_LARGE", "10 bytes"):
        upload.write(b"1")
    upload.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_is_removed_an_hour_later(store: Store, tmp_path: Path) -> None:
    digest = put_bytes(store, vector_bytes(tmp_path))
    for _ in range(2):
        store.upload().write(b"half")  # and the process is gone
    old, young = sorted((store.root / "artifacts").glob(f"{TEMPORARY_PREFIX}*"))
    hour_ago = time.time() - LEFTOVER_SECONDS - 1
    os.utime(old, (hour_ago, hour_ago))
    os.utime(store.artifact(digest) or "", (hour_ago, hour_ago))
    assert Store(store.root).remove_leftovers() == 1
    assert not old.exists() and young.exists() and store.artifact(digest) is not None


# Versions of profiles


def test_a_put_makes_the_next_version(store: Store) -> None:
    assert put_heads(store, description="first") == (1, True)
    assert put_heads(store, description="second") == (2, True)
    assert put_heads(store, description="second") == (2, False), "the same is no new version"
    assert put_heads(store, description="first") == (3, True)
    assert store.versions("p") == (1, 2, 3)
    assert store.names() == ("p",)
    document = store.document("p", 1)
    assert document is not None and document.description == "first"
    assert document.created.endswith("+00:00")


def test_a_version_is_never_overwritten(tmp_path: Path) -> None:
    write_new(tmp_path / "1.json", b"first")
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "1.json", b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


@pytest.mark.parametrize(
    ("content", "reason", "words"),
    [
        ([], "E_BAD_PARAM", "should be an object"),
        ({}, "E_BAD_PARAM", "exactly one"),
        ({"profile": heads(), "artifact": "sha256:" + "0" * 64}, "E_BAD_PARAM", "exactly one"),
        ({"profile": heads(), "colour": 1}, "E_BAD_PARAM", "profile.colour: unknown key"),
        ({"profile": heads(), "created": "x"}, "E_BAD_PARAM", "profile.created: unknown key"),
        ({"profile": heads(), "description": "x" * 1025}, "E_BAD_PARAM", "description"),
        ({"profile": {**heads(), "alpha": -1}}, "E_BAD_PARAM", "profile.profile.alpha"),
        ({"profile": {"kind": "hats"}}, "E_BAD_PARAM", "profile.profile.kind"),
        ({"profile": {"kind": "sinks"}}, "E_UNSUPPORTED", "--steering-profile"),
        ({"profile": heads(OTHER_MODEL)}, "E_PROFILE_MISMATCH", "another model"),
        ({"artifact": "0" * 64}, "E_BAD_PARAM", "profile.artifact"),
        ({"artifact": "sha256:" + "0" * 64}, "E_BAD_PARAM", "there is no artefact"),
    ],
)
def test_a_profile_that_cannot_be_used_is_refused(
    store: Store, content: Any, reason: str, words: str
) -> None:
    with refused(reason, words):
        store.put_profile("p", content, GEOMETRY)
    assert store.names() == () and files(store) == []


def test_a_number_is_never_reused(store: Store) -> None:
    for text in "ab":
        put_heads(store, description=text)
    store.delete_profile("p", (2,))
    assert put_heads(store, description="b") == (3, True)
    store.delete_profile("p", store.versions("p"))
    assert store.names() == () and store.versions("p") == ()
    assert Store(store.root).put_profile("p", {"profile": heads()}, GEOMETRY) == (4, True)


def test_threads_get_versions_of_their_own(store: Store) -> None:
    stores = [store, Store(store.root)]

    def put(index: int) -> tuple[int, bool]:
        return put_heads(stores[index % 2], description=str(index))

    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(put, range(16)))
    assert sorted(made) == [(number, True) for number in range(1, 17)]
    for index, (number, _) in enumerate(made):
        document = store.document("p", number)
        assert document is not None and document.description == str(index)


PUT_TEN = """
import sys
from pathlib import Path
root, name, artifact, checkout = sys.argv[1:]
sys.path.append(checkout)
from headway.server.registry.store import Store
from tests.registry import GEOMETRY
store = Store(Path(root))
print("ready", flush=True)
sys.stdin.readline()
for index in range(10):
    content = {"artifact": artifact, "description": f"{name} {index}"}
    print(store.put_profile("p", content, GEOMETRY)[0])
"""


def test_processes_get_versions_of_their_own(store: Store, tmp_path: Path) -> None:
    artifact = f"sha256:{put_bytes(store, vector_bytes(tmp_path))}"
    checkout = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", PUT_TEN, store.root, name, artifact, checkout],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    numbers = [int(line) for process in processes for line in process.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 21)) == list(store.versions("p"))


def test_the_lock_can_be_taken_again_by_its_holder(tmp_path: Path) -> None:
    lock, other = (FolderLock(tmp_path / ".lock") for _ in range(2))
    order = []

    def wait() -> None:
        with other:
            order.append("other")

    with ThreadPoolExecutor(1) as threads:
        with lock, lock:
            waiting = threads.submit(wait)
            time.sleep(0.05)
            order.append("holder")
        waiting.result(5)
    assert order == ["holder", "other"]


def test_an_artefact_goes_with_the_last_version_that_names_it(store: Store, tmp_path: Path) -> None:
    shared = put_vectors(store, tmp_path, "a", seed=1)
    put_vectors(store, tmp_path, "b", seed=1)
    only = put_vectors(store, tmp_path, "b", seed=2)
    unnamed = put_bytes(store, vector_bytes(tmp_path, seed=3))
    assert store.delete_profile("b", (1, 2)) == (only,)
    assert store.artifact(only) is None
    assert store.artifact(shared) is not None
    assert store.delete_profile("a", (1,)) == (shared,)
    assert store.artifact(unnamed) is not None, "put, and not yet named"
