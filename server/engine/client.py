"""The front end's view of the steering state in the workers, over vLLM's `collective_rpc`."""

from __future__ import annotations

from typing import Any

from headway.server.engine.report import EngineReport


class SteeringClient:
    """Asks the workers for reports and statistics.

    engine_client: vLLM's `EngineClient` (AsyncLLM).
    """

    def __init__(self, engine_client: Any) -> None:
        self.engine_client = engine_client

    async def pop_report(self, report_id: str) -> EngineReport | None:
        """The report of a request, which the workers then forget; None if they never saw it."""
        answers = await self.engine_client.collective_rpc("headway_pop_report", args=(report_id,))
        return first_report(answers)

    async def statistics(self) -> list[dict[str, Any]]:
        """Per-worker statistics (see `SteeringRpc.headway_statistics`)."""
        answers = await self.engine_client.collective_rpc("headway_statistics")
        return [answer for answer in _flatten(answers) if answer]


def first_report(answers: Any) -> EngineReport | None:
    """One report from the answers of all workers.

    Tensor-parallel ranks count the same request alike, so the first answer stands for all, but
    a failure on any rank is a failure of the request.
    """
    reports = [EngineReport(**answer) for answer in _flatten(answers) if answer]
    if not reports:
        return None
    failed = [report for report in reports if report.failed_stage]
    return failed[0] if failed else reports[0]


def _flatten(answers: Any) -> list[Any]:
    # Data-parallel engines answer with one list each.
    return [
        item for answer in answers for item in (answer if isinstance(answer, list) else [answer])
    ]
