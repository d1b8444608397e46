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

    def headway_load_artifacts(self, wires: list[dict[str, Any]], holder: str = "") -> list[str]:
        """Keep artefacts for residual edits (see `encode_artifact`); returns their digests.

        holder: who wants them; they are kept until everyone who loaded them has unloaded them.
        Raises ValueError or KeyError, keeping none, if one is damaged or has more directions than
        there is room for.
        """
        return self.model_runner.steering.artifacts.load(
            [decode_artifact(wire) for wire in wires], holder
        )

    def headway_unload_artifacts(self, digests: list[str], holder: str = "") -> int:
        """Forget artefacts; requests that use them go on. Returns how many the holder had."""
        return self.model_runner.steering.artifacts.unload(digests, holder)

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
