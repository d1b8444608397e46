"""What the front end can ask a worker over vLLM's `collective_rpc`."""

from __future__ import annotations

from typing import Any

from headway.steering.artifacts import decode_artifact


class SteeringRpc:
    """Mixed into the worker; `self.model_runner.steering` is its `SteeringState`."""

    model_runner: Any

    def headway_pop_report(self, report_id: str) -> dict[str, Any] | None:
        """The `EngineReport` of a request as plain values; it is forgotten by asking for it."""
        report = self.model_runner.steering.pop_report(report_id)
        return report and report.as_dict()

    def headway_load_artifact(self, wire: dict[str, Any]) -> str:
        """Keep an artefact for residual edits (see `encode_artifact`); returns its digest.

        Raises ValueError or KeyError if it is damaged, or has more directions than there is room.
        """
        artifact = decode_artifact(wire)
        most = self.model_runner.steering.tables.max_clusters
        if most is not None and artifact.num_clusters > most:
            raise ValueError(f"{artifact.num_clusters} directions; at most {most} fit")
        self.model_runner.steering.artifacts[artifact.digest] = artifact
        return artifact.digest

    def headway_unload_artifact(self, digest: str) -> bool:
        """Forget an artefact; requests that use it go on. Tells whether it was there."""
        return self.model_runner.steering.artifacts.pop(digest, None) is not None

    def headway_statistics(self) -> dict[str, Any]:
        """Slots in use and free, and the histogram of steering time per step."""
        state = self.model_runner.steering
        return {
            "slots": {
                "used": state.num_placed,
                "free": state.tables.max_num_seqs - state.num_placed,
            },
            "step_seconds": state.step_seconds.as_dict(),
        }
