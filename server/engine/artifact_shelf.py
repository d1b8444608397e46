"""The artefacts that a worker keeps for residual edits, and who wants them kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from headway.steering.artifacts import ResidualArtifact

RESIDENT = "resident"
"""Holds what the engine was started with, for good."""


class ArtifactShelf:
    """Artefacts by digest, each with those who loaded it: a front end can only let go of its own.

    max_clusters: most directions of an artefact, None for any number.
    """

    def __init__(self, max_clusters: int | None = None) -> None:
        self._max_clusters = max_clusters
        self._artifacts: dict[str, ResidualArtifact] = {}
        self._holders: dict[str, set[str]] = {}

    @property
    def artifacts(self) -> Mapping[str, ResidualArtifact]:
        """Digest -> artefact, of all that are kept."""
        return self._artifacts

    def load(self, artifacts: Sequence[ResidualArtifact], holder: str = "") -> list[str]:
        """Keep artefacts for a holder and return their digests.

        Raises ValueError, keeping none, for one with too many directions.
        """
        for artifact in artifacts:
            most = self._max_clusters
            if most is not None and artifact.num_clusters > most:
                raise ValueError(f"{artifact.num_clusters} directions; at most {most} fit")
        for artifact in artifacts:
            self._artifacts.setdefault(artifact.digest, artifact)
            self._holders.setdefault(artifact.digest, set()).add(holder)
        return [artifact.digest for artifact in artifacts]

    def unload(self, digests: Iterable[str], holder: str = "") -> int:
        """Let go of artefacts; what nobody holds is forgotten. Returns how many the holder had."""
        count = 0
        for digest in digests:
            holders = self._holders.get(digest, set())
            count += holder in holders
            holders.discard(holder)
            if not holders:
                self._holders.pop(digest, None)
                self._artifacts.pop(digest, None)
        return count
