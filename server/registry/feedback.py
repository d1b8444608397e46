"""Feedback on served requests, collected until it makes new versions of the profiles.

A request that a profile steered leaves what its probes read (`ReadingStore`). Feedback on it is a
gradient step on those probes (`headway.steering.refinement`); when as many pieces are there as the
profile's `FeedbackRule` asks for, they are taken together from the newest version on, and what
comes out is the next version. Whoever names the profile is steered by that one from then on; older
versions stay, so that `name@version` behaves as ever.

What was read and what was collected is in the memory of the server process that served the request.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from headway.server.registry.documents import Record
from headway.server.registry.names import DIGEST_PREFIX, check_name, parse_digest, parse_reference
from headway.server.registry.readings import (
    MAX_READ_REQUESTS,
    ProfileReading,
    ReadingStore,
    ReadRequest,
)
from headway.server.registry.registry import Registry
from headway.steering import Reason, SteeringError
from headway.steering.refinement import Feedback, ProbeReading, refined, same_clusters
from headway.steering.validation import StrictModel, validate
from headway.steering.vectors import FeedbackRule, VectorProfile

logger = logging.getLogger(__name__)

MAX_PENDING_BYTES = 256 * 1024 * 1024
"""Most memory of feedback that waits for its batch to be full, over all profiles."""

COPY_BYTES = 1024 * 1024


class Verdict(StrictModel):
    """The body of a piece of feedback: exactly one of `label` and `preferred`.

    label: the cluster that every layer should have picked; preferred: whether those that they
    picked were right.
    """

    request_id: Annotated[str, Field(min_length=1, max_length=256)]
    label: int | None = None
    preferred: bool | None = None

    @classmethod
    def parse(cls, value: Any, param: str) -> Verdict:
        """Validate a JSON value. Raises SteeringError(E_BAD_PARAM or E_TOO_LARGE)."""
        verdict = validate(cls, value, param)
        if (verdict.label is None) == (verdict.preferred is None):
            message = "give exactly one of `label` and `preferred`"
            raise SteeringError(Reason.BAD_PARAM, message, param)
        return verdict

    def on(self, reading: ProbeReading) -> Feedback:
        """It as a step on the probes that read this."""
        return Feedback(reading, self.label, self.preferred is not False)


@dataclass
class _Pending:
    """Feedback for the probes of a profile and of all versions with the same directions."""

    profile: VectorProfile
    feedback: list[Feedback] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(each.reading.rows.nbytes for each in self.feedback)


class FeedbackCollector:
    """Feedback by the name of its profile. Methods block on the disk, and on the store's lock.

    is_known: whether there is a report of a request, whatever steered it.
    """

    def __init__(
        self, registry: Registry, readings: ReadingStore, is_known: Callable[[str], bool]
    ) -> None:
        self._registry = registry
        self._readings = readings
        self._is_known = is_known
        self._pending: dict[str, _Pending] = {}

    def give(self, name: str, verdict: Verdict, param: str = "feedback") -> dict[str, Any]:
        """Take a piece of feedback; the one that fills a batch makes the next version.

        Returns `profile`, `pending` (how many pieces wait), `batch`, and `version`: `name@version`
        of the one that was made, else None.

        Raises SteeringError, having taken nothing: E_BAD_PARAM, E_PROFILE_NOT_FOUND, E_IN_USE for a
        profile that was given at the start, E_UNSUPPORTED for one that takes no feedback,
        E_REQUEST_NOT_FOUND, E_ALREADY_GIVEN, E_PROFILE_MISMATCH where the profile was replaced by
        one with other directions, E_CAPACITY; and OSError.
        """
        self._check_name(name)
        with self._registry.store.lock:
            record, newest, rule = self._newest(name)
            read = self._read(name, verdict, param)
            if verdict.label is not None and not 0 <= verdict.label < newest.num_clusters:
                allowed = f"0 .. {newest.num_clusters - 1}"
                message = f"cluster {verdict.label} does not exist; the profile has {allowed}"
                raise SteeringError(Reason.BAD_PARAM, message, f"{param}.label")
            own = [each for each in read.readings if each.name == name]
            for reference in sorted({each.reference for each in own}):
                self._check_served(reference, newest, record.reference, param)
            pieces = self._waiting(name, newest)
            count, pieces = len(pieces) + 1, [*pieces, verdict.on(_joined(own))]
            version = None
            if count >= rule.batch:
                version = self._refine(record, newest, pieces, rule.learning_rate)
                self._pending.pop(name, None)
                count = 0
            else:
                self._keep(name, newest, pieces)
            read.given.add(name)
        return {"profile": name, "pending": count, "batch": rule.batch, "version": version}

    def _check_name(self, name: str) -> None:
        if parse_digest(name) is not None:
            message = "an artefact never changes; give feedback to a profile by its name"
            raise SteeringError(Reason.BAD_PARAM, message, "name")
        asked = parse_reference(name)
        if asked is not None and asked.version is not None:
            message = f"a version never changes; give feedback to {asked.name}"
            raise SteeringError(Reason.BAD_PARAM, message, "name")
        check_name(name, "name")
        self._registry.refuse_given_profile(name)

    def _newest(self, name: str) -> tuple[Record, VectorProfile, FeedbackRule]:
        """The version that feedback is for."""
        profiles = self._registry.profiles
        record = profiles.record(name)
        profile = None if record is None else profiles.load(record)
        if record is None or profile is None:
            known = ", ".join(profiles.names()) or "none"
            message = f"there is no profile {name}; the profiles are: {known}"
            raise SteeringError(Reason.PROFILE_NOT_FOUND, message, "name")
        rule = profile.header.feedback if isinstance(profile, VectorProfile) else None
        if not isinstance(profile, VectorProfile) or rule is None:
            message = f"{record.reference} does not allow feedback"
            raise SteeringError(Reason.UNSUPPORTED, message, "name")
        if not profile.takes_feedback:
            message = f"{record.reference} has one direction a layer: there is nothing to pick"
            raise SteeringError(Reason.UNSUPPORTED, message, "name")
        profile.check_model(self._registry.geometry, "name")
        return record, profile, rule

    def _read(self, name: str, verdict: Verdict, param: str) -> ReadRequest:
        """What was read of the request that feedback is on."""
        where, shown = f"{param}.request_id", verdict.request_id[:80]
        read = self._readings.get(verdict.request_id)
        if read is None and not self._is_known(verdict.request_id):
            message = (
                f"there is no steered request {shown}, or its answer is not complete, or too long "
                f"ago: at most {MAX_READ_REQUESTS} are kept"
            )
            raise SteeringError(Reason.REQUEST_NOT_FOUND, message, where)
        if read is None or name not in {each.name for each in read.readings}:
            message = (
                f"of the request {shown} nothing is kept that the probes of {name} read: it was "
                "not steered by that profile with the cluster left to its probes"
            )
            raise SteeringError(Reason.BAD_PARAM, message, where)
        if name in read.given:
            message = f"{name} has had feedback on the request {shown} already"
            raise SteeringError(Reason.ALREADY_GIVEN, message, where)
        return read

    def _check_served(
        self, reference: str, newest: VectorProfile, newest_reference: str, param: str
    ) -> None:
        """Refuse feedback on a version that differs from the newest one in more than probes."""
        profiles = self._registry.profiles
        record = profiles.record(reference)
        served = None if record is None else profiles.load(record)
        if isinstance(served, VectorProfile) and same_clusters(served, newest):
            return
        why = "was deleted" if served is None else f"has other directions than {newest_reference}"
        message = f"{reference}, which steered the request, {why}"
        raise SteeringError(Reason.PROFILE_MISMATCH, message, f"{param}.request_id")

    def _waiting(self, name: str, newest: VectorProfile) -> list[Feedback]:
        """What waits for a profile; not what was for one that was replaced since."""
        pending = self._pending.get(name)
        if pending is None or not same_clusters(pending.profile, newest):
            return []
        return pending.feedback

    def _keep(self, name: str, newest: VectorProfile, feedback: list[Feedback]) -> None:
        made = _Pending(newest, feedback)
        others = (each.num_bytes for key, each in self._pending.items() if key != name)
        if made.num_bytes + sum(others) > MAX_PENDING_BYTES:
            message = f"feedback that waits for its batch takes {MAX_PENDING_BYTES} bytes at most"
            raise SteeringError(Reason.CAPACITY, message, "name")
        self._pending[name] = made

    def _refine(
        self, record: Record, profile: VectorProfile, feedback: list[Feedback], rate: float
    ) -> str:
        """Make the next version from the newest one; returns its reference."""
        registry, store = self._registry, self._registry.store
        facts = {
            "refined_from": record.reference,
            "feedback": len(feedback),
            "learning_rate": rate,
        }
        made = refined(profile, feedback, rate, facts)
        upload = store.upload()
        try:
            with tempfile.TemporaryDirectory(prefix="headway-") as folder:
                path = Path(folder) / "refined.safetensors"
                digest = made.save(path)
                with path.open("rb") as file:
                    while chunk := file.read(COPY_BYTES):
                        upload.write(chunk)
            store.put_artifact(digest, upload, registry.geometry)
        finally:
            upload.discard()
        content: dict[str, Any] = {"artifact": f"{DIGEST_PREFIX}{digest}"}
        if record.document.description is not None:
            content["description"] = record.document.description
        version, _ = registry.put_profile(record.name, content)
        logger.info("%d pieces of feedback made %s", len(feedback), version.reference)
        return version.reference


def _joined(readings: list[ProfileReading]) -> ProbeReading:
    """What several methods with one profile read, each at layers of its own."""
    return ProbeReading(
        tuple(layer for each in readings for layer in each.reading.layers),
        np.concatenate([each.reading.rows for each in readings]),
        tuple(cluster for each in readings for cluster in each.reading.clusters),
    )
