"""What a worker has to tell about steered requests, kept until it is asked for."""

from __future__ import annotations

from collections import OrderedDict

import torch

from headway.server.engine.head_choice import heads_of
from headway.server.engine.probe_readings import ProbeReadings
from headway.server.engine.readings import RequestReadings
from headway.server.engine.report import EngineReport
from headway.server.engine.sampling_gate import Gates
from headway.server.engine.step_plan import Planner

MAX_REPORTS = 4096
"""Reports kept for requests whose front end never asked for them (a client that went away)."""


class KeptReports(OrderedDict[str, EngineReport]):
    """The report of every request by its id, the oldest first, and what goes into it at the end.

    readings: masses of key classes; probes: what probes read; chosen: layer -> scale of the local
    heads, where heads were chosen. gates: of the sequences that have one.
    """

    def __init__(self, planner: Planner, gates: Gates) -> None:
        super().__init__()
        self.readings: dict[str, RequestReadings] = {}
        self.probes: dict[str, ProbeReadings] = {}
        self.chosen: dict[str, dict[int, torch.Tensor]] = {}
        self._planner, self._gates = planner, gates

    def of(self, report_id: str) -> EngineReport:
        """The report with this id, a new one where there is none."""
        report = self.setdefault(report_id, EngineReport())
        while len(self) > MAX_REPORTS:
            forgotten, _ = self.popitem(last=False)
            self.chosen.pop(forgotten, None)
            self.probes.pop(forgotten, None)
            self._gates.pop_report(forgotten)
            if (readings := self.readings.pop(forgotten, None)) is not None:
                self._planner.release(readings)
        return report

    def take(self, report_id: str) -> EngineReport | None:
        """A report with all that belongs to it, forgotten by asking for it."""
        report = self.pop(report_id, None)
        readings = self.readings.pop(report_id, None)
        probes = self.probes.pop(report_id, None)
        scales = self.chosen.pop(report_id, None)
        if report is None:
            return None
        heads = self._planner.tables.heads
        report.saliency = self._gates.pop_report(report_id)
        if readings is not None:
            report.readings = readings.as_dict(heads)
        if probes is not None:
            report.probes = probes.as_list()
        if scales is not None:
            report.heads = heads_of(scales, heads)
        return report
