"""The front end's view of the steering state in the workers.

vLLM symbols relied on: `AsyncLLM.errored`; `AsyncLLM.engine_core` and its
`call_utility_all_async`, with the utility `collective_rpc` of the engine core.
`AsyncLLM.collective_rpc` would return the answer of the first data-parallel engine only, and a
request may run on any of them.
"""

from __future__ import annotations

import asyncio
from functools import reduce
from typing import Any

from headway.server.engine.report import EngineReport, merge_heads, merge_probes, merge_readings

LIVENESS_SECONDS = 0.5
"""How often a call that waits looks whether there is still somebody to answer it."""


class EngineGoneError(RuntimeError):
    """The engine died, or was shut down, before it answered."""


class SteeringClient:
    """Asks the workers for reports and statistics, and has them load artefacts.

    engine_client: vLLM's `EngineClient` (AsyncLLM).
    """

    def __init__(self, engine_client: Any) -> None:
        self.engine_client = engine_client

    @property
    def is_alive(self) -> bool:
        """Whether the engine is there."""
        return not self.engine_client.errored

    async def pop_report(self, report_id: str) -> EngineReport | None:
        """The report of a request, which the workers then forget; None if they never saw it.

        Sequences of one request (n > 1) may have run on several data-parallel engines.
        """
        engines = await self._ask("headway_pop_report", report_id)
        reports = [report for workers in engines if (report := engine_report(workers))]
        return reduce(EngineReport.merge, reports) if reports else None

    async def load_artifacts(self, wires: list[dict[str, Any]], holder: str) -> None:
        """Have all workers keep artefacts; raises what they raise."""
        await self._ask("headway_load_artifacts", wires, holder)

    async def unload_artifacts(self, digests: list[str], holder: str) -> None:
        """Have all workers let go of artefacts."""
        await self._ask("headway_unload_artifacts", digests, holder)

    async def statistics(self) -> list[list[dict[str, Any]]]:
        """Statistics of the workers of each engine (see `SteeringRpc.headway_statistics`)."""
        return await self._ask("headway_statistics")

    async def _ask(self, method: str, *args: Any) -> list[list[Any]]:
        """One list per engine with the answer of each of its workers.

        Raises what a worker raises, and EngineGoneError: vLLM leaves calls without an answer that
        were on their way when the engine died.
        """
        core = self.engine_client.engine_core
        call = core.call_utility_all_async("collective_rpc", method, None, args, None)
        asking: asyncio.Future[list[list[Any]]] = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({asking}, timeout=LIVENESS_SECONDS))[0]:
                if not self.is_alive:
                    raise EngineGoneError(f"no answer to {method}: the engine is gone")
            return asking.result()
        finally:
            asking.cancel()


def engine_report(workers: list[dict[str, Any] | None]) -> EngineReport | None:
    """One report from the answers of all workers of an engine.

    Ranks count the positions of a request alike, so the first answer stands for all, but a
    failure on any rank is a failure of the request, and each reads the masses of its own heads.
    """
    reports = [EngineReport(**answer) for answer in workers if answer]
    failed = [report for report in reports if report.failed_stage]
    chosen = next(iter(failed or reports), None)
    if chosen is not None:
        chosen.readings = merge_readings([report.readings for report in reports])
        chosen.heads = merge_heads(report.heads for report in reports)
        chosen.probes = merge_probes(report.probes for report in reports)
    return chosen
