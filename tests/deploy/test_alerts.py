"""The alert rules: what they ask for exists, each says what to do, and the chart has the same."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml

from tests.deploy.chart import CHART, DEPLOY, NAMESPACE, ROOT, render
from tests.deploy.chart_cases import EVERYTHING, of_kind
from tests.deploy.exported import Query, exported

pytestmark = pytest.mark.unit

FILE = DEPLOY / "monitoring" / "alerts.yaml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]
]
NAMES = [rule["alert"] for rule in RULES]
CASES = Path(__file__).with_name("alerts_cases.yaml")
JOB = 'job="headway"'


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_asks_for_what_exists(rule: dict[str, Any]) -> None:
    query = Query(rule["expr"])
    query.check(exported())
    assert all(matchers.get("job") == "headway" for _, matchers in query.selectors)


@pytest.mark.parametrize(
    "wrong",
    [
        'headway_unsteered{job="headway"}',
        'headway_slots{status="used"}',
        'headway_slots{state="taken"}',
        'headway_refused_total{reason="E_CAPACITI"}',
        "sum by (methods) (headway_requests_total)",
        "vllm:num_requests_queued",
        "vllm:num_requests_waiting / on (method) vllm:num_requests_running",
    ],
)
def test_the_check_finds_what_does_not_exist(wrong: str) -> None:
    with pytest.raises(AssertionError):
        Query(wrong).check(exported())


def test_the_check_finds_what_is_no_query() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        Query("sum by (job (up)")


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "runbook"}
    assert notes["runbook"] == f"docs/deploy.md, {rule['alert']}"


def test_the_runbook_has_every_alert_and_no_other() -> None:
    found = re.findall(
        r"^- \*\*(Headway\w+)\*\*", (ROOT / "docs/deploy.md").read_text(), re.MULTILINE
    )
    assert found == NAMES


def test_an_answer_that_was_not_steered_wakes_somebody_at_once() -> None:
    (rule,) = [rule for rule in RULES if rule["expr"].startswith("headway_unsteered_total")]
    assert (rule["for"], rule["labels"]["severity"]) == ("0s", "critical")


def test_the_chart_has_the_same_rules_for_its_namespace() -> None:
    (found,) = of_kind(render(EVERYTHING), "PrometheusRule")
    own = FILE.read_text().replace(JOB, f'{JOB},namespace="{NAMESPACE}"')
    assert found["spec"] == yaml.safe_load(own)
    assert FILE.samefile(CHART / "alerts.yaml")
    for rule in found["spec"]["groups"][0]["rules"]:
        for _, matchers in Query(rule["expr"]).selectors:
            assert matchers["namespace"] == NAMESPACE
    (monitor,) = of_kind(render(EVERYTHING), "ServiceMonitor")
    for service in of_kind(render(EVERYTHING), "Service"):
        assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "headway"


def test_every_alert_is_tried_both_ways() -> None:
    cases = [
        case
        for test in yaml.safe_load(CASES.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    for fires in (True, False):
        tried = {case["alertname"] for case in cases if bool(case.get("exp_alerts")) is fires}
        assert tried == set(NAMES)


@pytest.mark.skipif(which("promtool") is None, reason="no promtool")
@pytest.mark.parametrize("command", [("check", "rules", FILE), ("test", "rules", CASES)])
def test_prometheus_fires_the_alerts_when_they_should(command: tuple[Any, ...]) -> None:
    done = subprocess.run(["promtool", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
