"""The Grafana dashboard: what it asks for exists, and it is laid out without overlaps."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.deploy.chart import DEPLOY
from tests.deploy.exported import Query, exported, of_headway

pytestmark = pytest.mark.unit

DASHBOARD = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


def readable(query: str) -> str:
    """A query with lengths of time in the place of Grafana's own variables."""
    return re.sub(r"\$__\w+", "5m", query)


def test_every_series_and_label_exists() -> None:
    known = exported()
    for query in QUERIES:
        Query(readable(query)).check(known)


def test_every_metric_of_headway_is_shown() -> None:
    shown = set().union(*(Query(readable(query)).names for query in QUERIES))
    developers = {"headway_attention_rows_total", "headway_step_seconds_count"}
    missing = of_headway().keys() - shown - developers
    assert missing == {"headway_step_seconds_sum"}, "which a quantile does not need"


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
