"""What the chart and the probe name exists in the code: options, routes, metrics."""

import json
import re

import pytest
import yaml

from headway.server.http import metrics
from tests.deploy.chart import DEPLOY, ROOT, render
from tests.deploy.chart_cases import CASES, container, of_kind, workloads
from tests.deploy.exported import VALUES, exported, source_of_vllm

pytestmark = pytest.mark.unit


def test_options_exist() -> None:
    sources = source_of_vllm("engine/arg_utils.py", "entrypoints/launchers/cli_args.py")
    sources += "".join(
        (ROOT / "server" / path).read_text()
        for path in (
            *("commands/serve.py", "commands/model.py", "commands/limit_options.py"),
            "http/admin.py",
        )
    )
    known = set(re.findall(r'"(--[a-z][a-z-]+)"', sources))
    used = {
        argument.partition("=")[0]
        for case in CASES.values()
        for workload in workloads(case).values()
        for argument in container(workload)["args"][1:]
    }
    # vLLM makes the options of its front end from the fields of a dataclass.
    fields = re.findall(r"^    ([a-z_]+): ", sources, re.MULTILINE)
    known |= {"--" + name.replace("_", "-") for name in fields}
    assert used and used <= known, used - known


def test_metrics_exist() -> None:
    rendered = json.dumps([render(CASES[case]) for case in ("hpa", "keda")])
    adapter = (DEPLOY / "examples" / "prometheus-adapter.yaml").read_text()
    rules = yaml.safe_load(adapter)["rules"]["custom"]
    made = {rule["name"]["as"] for rule in rules}
    series = set(re.findall(r"(?:vllm:|headway_)[a-z_]+(?=\{)", rendered + adapter))
    assert series and series <= exported().keys(), series - exported().keys()
    asked = {
        metric["pods"]["metric"]["name"]
        for scaler in of_kind(render(CASES["hpa"]), "HorizontalPodAutoscaler")
        for metric in scaler["spec"]["metrics"]
    }
    assert asked == made


def test_the_states_of_slots_exist() -> None:
    worker = {"slots": {"used": 1, "free": 2}, "step_seconds": {"counts": [0] * 12, "sum": 0.0}}
    metrics.WorkerStatistics().update([[worker]])
    (family,) = metrics.SLOTS.collect()
    assert {sample.labels["state"] for sample in family.samples} == VALUES["state"]


def test_the_stages_of_failures_are_known() -> None:
    """The series of another one would begin with its first failure, which no alert would see."""
    source = "".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    called = r'(?:guard\(|steering_failure\(\s*|stage=|_fail\([^")]*?, )"([a-z_]+)"'
    named = r'(?:stage, why = |\bSTAGE = )"([a-z_]+)"'
    used = set(re.findall(called, source)) | set(re.findall(named, source))
    assert used == set(metrics.FAILURE_STAGES)


def test_paths_exist() -> None:
    routes = source_of_vllm(
        "entrypoints/serve/instrumentator/health.py",
        "entrypoints/serve/instrumentator/metrics.py",
        "entrypoints/openai/models/api_router.py",
    )
    steering = (ROOT / "server" / "http" / "steering_routes.py").read_text()
    (prefix,) = re.findall(r'APIRouter\(prefix="([^"]+)"\)', steering)
    known = set(re.findall(r'(?:\.get|Mount)\(\s*"([^"]+)"', routes))
    known |= {prefix + path for path in re.findall(r'router\.get\("([^"]+)"', steering)}
    probe = (DEPLOY / "containers" / "ready.py").read_text()
    (paths,) = re.findall(r"^PATHS = \((.*)\)$", probe, re.MULTILINE)
    used = set(re.findall(r'"([^"]+)"', paths))
    for case in CASES.values():
        for workload in workloads(case).values():
            used.add(container(workload)["livenessProbe"]["httpGet"]["path"])
        for monitor in of_kind(render(case), "ServiceMonitor"):
            used |= {each["path"] for each in monitor["spec"]["endpoints"]}
    assert {"/health", "/v1/models", "/v1/steering/capabilities", "/metrics"} == used
    assert used <= known, used - known
