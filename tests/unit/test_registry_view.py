"""What requests see of the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headway.server.registry.cache import VectorCache, size_of
from headway.server.registry.store import Store
from headway.server.registry.view import RegistryProfiles
from headway.steering.profiles import NamedProfiles
from tests.registry import (
    GEOMETRY,
    OTHER_MODEL,
    heads,
    put_heads,
    put_vectors,
    refused,
    vector_bytes,
    vectors,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "registry")


def view(store: Store, **options: Any) -> RegistryProfiles:
    return RegistryProfiles(NamedProfiles({}), store, GEOMETRY, **options)


def test_a_profile_is_found_by_name_version_and_digest(store: Store, tmp_path: Path) -> None:
    found = []
    profiles = view(store, on_found=lambda *version: found.append(version))
    assert profiles.find("p") is None and profiles.names() == ()
    digests = [put_vectors(store, tmp_path, "p", seed) for seed in (1, 2)]
    for text, reference, digest in (
        ("p", "p@2", digests[1]),
        ("p@2", "p@2", digests[1]),
        ("p@1", "p@1", digests[0]),
        (f"sha256:{digests[0]}", f"sha256:{digests[0]}", digests[0]),
    ):
        answer = profiles.find(text)
        assert answer is not None and answer.reference == reference == profiles.exact(text)
        assert answer.profile.digest == digest  # type: ignore[attr-defined]
    assert found == [("p", 2), ("p", 2), ("p", 1)]
    for text in ("p@3", "q", "../p", "p@x", "sha256:" + "0" * 64, "sha256:0"):
        assert profiles.find(text) is None and profiles.exact(text) is None
    assert profiles.names() == ("p",)


def test_what_another_store_does_is_seen_at_once(store: Store, tmp_path: Path) -> None:
    profiles, other = view(store), Store(store.root)
    digest = put_vectors(other, tmp_path, "p", 1)
    put_vectors(other, tmp_path, "p", 2)
    assert profiles.find("p@1") and profiles.find("p@2") and profiles.names() == ("p",)
    other.delete_profile("p", (1,))
    assert profiles.find("p@1") is None and profiles.find(f"sha256:{digest}") is None
    other.delete_profile("p", (2,))
    assert profiles.find("p") is None and profiles.names() == ()


def test_a_name_given_at_the_start_stands_for_that_alone(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "given.safetensors"
    vectors(9).save(path)
    given = vectors(9).load(path)
    put_vectors(store, tmp_path, "p")
    profiles = RegistryProfiles(NamedProfiles({"p": given}), store, GEOMETRY)
    answer = profiles.find("p")
    assert answer is not None and (answer.reference, answer.profile) == ("p", given)
    assert profiles.find("p@1") is None
    by_digest = profiles.find(f"sha256:{given.digest}")
    assert by_digest is not None and by_digest.profile is given
    assert profiles.names() == ("p",)


def test_profiles_of_another_model_are_found_but_not_named(store: Store) -> None:
    store.put_profile("theirs", {"profile": heads(OTHER_MODEL)}, OTHER_MODEL)
    put_heads(store, "ours")
    profiles = view(store)
    assert profiles.names() == ("ours",)
    found = profiles.find("theirs")
    assert found is not None
    with refused("E_PROFILE_MISMATCH"):
        found.profile.check_model(GEOMETRY)


def test_tensors_are_kept_up_to_a_limit(store: Store, tmp_path: Path) -> None:
    digests = [put_vectors(store, tmp_path, "p", seed) for seed in range(3)]
    size = size_of(vectors())
    profiles = view(store, max_bytes=2 * size)
    first = profiles.find("p@1")
    assert first is not None
    assert profiles.find("p@2") and profiles.find("p@1") and profiles.find("p@3")
    assert [digest in profiles.vectors for digest in digests] == [True, False, True]
    assert profiles.vectors.size == 2 * size
    again = profiles.find("p@1")
    assert again is not None and again.profile is first.profile
    none = VectorCache(size - 1)
    path = store.artifact(digests[0])
    assert path is not None and none.load(digests[0], path) and none.size == 0


def test_an_artefact_changed_on_disk_is_not_served(store: Store, tmp_path: Path) -> None:
    digest = put_vectors(store, tmp_path, "p", 1)
    path = store.artifact(digest)
    assert path is not None
    path.write_bytes(vector_bytes(tmp_path, 2))
    with refused("E_STEERING_FAILED", "changed on disk"):
        view(store).find("p")


def test_a_damaged_version_is_told_and_can_be_deleted(store: Store, tmp_path: Path) -> None:
    put_heads(store)
    kept = put_vectors(store, tmp_path, "q")
    (store.root / "profiles" / "p" / "1.json").write_text("{")
    profiles = view(store)
    with refused("E_BAD_PARAM", "p@1: is damaged"):
        profiles.find("p")
    assert profiles.names() == ("q",)
    assert put_heads(store) == (2, True)
    assert store.delete_profile("p", (1, 2)) == ()
    assert store.artifact(kept) is not None


def test_an_artefact_whose_file_is_gone_is_not_found(store: Store, tmp_path: Path) -> None:
    """Deleted behind the server's back, read before or not."""
    digest = put_vectors(store, tmp_path, "p", 1)
    seen, unseen = view(store), view(store)
    assert seen.find("p") is not None
    path = store.artifact(digest)
    assert path is not None
    path.unlink()
    for profiles in (seen, unseen):
        for reference in ("p", "p@1", f"sha256:{digest}"):
            assert profiles.find(reference) is None


def test_an_artefact_that_goes_between_the_look_and_the_load_is_not_found(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = put_vectors(store, tmp_path, "p", 1)
    path = store.artifact(digest)
    assert path is not None
    profiles, load = view(store), VectorCache.load

    def vanishing(self: VectorCache, digest: str, path: Path) -> Any:
        path.unlink()
        return load(self, digest, path)

    monkeypatch.setattr(VectorCache, "load", vanishing)
    assert profiles.find("p") is None


def test_an_artefact_that_is_there_and_damaged_is_an_error(store: Store, tmp_path: Path) -> None:
    digest = put_vectors(store, tmp_path, "p", 1)
    path = store.artifact(digest)
    assert path is not None
    path.write_bytes(b"no vectors")
    with refused("E_BAD_PARAM"):
        view(store).find(f"sha256:{digest}")
