"""The Grafana dashboard: what it asks for exists, and it is laid out without overlaps."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from headway.server.http import metrics
from headway.steering import Reason
from tests.deploy.chart import DEPLOY
from tests.deploy.test_chart_names import exported

pytestmark = pytest.mark.unit

DASHBOARD = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def series() -> set[str]:
    """Names of series that the queries name."""
    return {name for query in QUERIES for name in re.findall(r"(?:vllm:|headway_)[a-z_]+", query)}


def test_every_series_is_exported() -> None:
    (steps,) = metrics.WorkerStatistics().collect()
    names = exported() | {steps.name}
    # prometheus_client adds what tells the samples of a counter and of a histogram.
    known = names | {f"{name}_total" for name in names} | {f"{name}_bucket" for name in names}
    assert series() and series() <= known, series() - known


def test_every_metric_of_headway_is_shown() -> None:
    shown = " ".join(QUERIES)
    for metric in vars(metrics).values():
        if isinstance(metric, (metrics.Counter, metrics.Gauge)):
            (family,) = metric.describe()
            if family.name not in ("headway_attention_rows",):  # of interest to developers
                assert family.name in shown, family.name


def test_reasons_and_labels_exist() -> None:
    for reason in re.findall(r'reason="(\w+)"', " ".join(QUERIES)):
        assert reason in {str(each.value) for each in Reason}
    labels = {
        "headway_requests_total": {"method", "outcome"},
        "headway_tokens_total": {"method", "phase"},
        "headway_refused_total": {"reason"},
    }
    for name, wanted in labels.items():
        (query,) = [each for each in QUERIES if each.startswith("sum by") and name in each]
        (grouped,) = re.findall(r"sum by \(([^)]*)\)", query)
        assert set(grouped.split(", ")) == wanted


def test_queries_have_balanced_brackets() -> None:
    for query in QUERIES:
        bare = re.sub(r'"[^"]*"', "", query)
        for opening, closing in ("()", "{}", "[]"):
            assert bare.count(opening) == bare.count(closing), query


def test_panels_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place: dict[str, Any] = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken.get((x, y)))
                taken[x, y] = panel["title"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
