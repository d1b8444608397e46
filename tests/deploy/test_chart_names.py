"""What the chart and the probe name exists in the code: options, routes, metrics."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from headway.server.http import metrics
from tests.deploy.chart import DEPLOY, ROOT, render
from tests.deploy.chart_cases import CASES, container, of_kind, workloads

pytestmark = pytest.mark.unit


def source_of_vllm(*paths: str) -> str:
    """Source text of vLLM, without importing it."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return "".join((Path(spec.origin).parent / path).read_text() for path in paths)


def test_options_exist() -> None:
    sources = source_of_vllm("engine/arg_utils.py", "entrypoints/launchers/cli_args.py")
    sources += "".join(
        (ROOT / "server" / path).read_text()
        for path in ("commands/serve.py", "commands/model.py", "http/admin.py")
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


def exported() -> set[str]:
    """The names of samples that vLLM and Headway export."""
    names = set(re.findall(r'name="(vllm:[a-z_]+)"', source_of_vllm("v1/metrics/loggers.py")))
    for metric in vars(metrics).values():
        if isinstance(metric, (metrics.Counter, metrics.Gauge)):
            for family in metric.describe():
                names.add(family.name + ("_total" if family.type == "counter" else ""))
    return names


def test_metrics_exist() -> None:
    rendered = json.dumps([render(CASES[case]) for case in ("hpa", "keda")])
    adapter = (DEPLOY / "examples" / "prometheus-adapter.yaml").read_text()
    rules = yaml.safe_load(adapter)["rules"]["custom"]
    made = {rule["name"]["as"] for rule in rules}
    series = re.findall(r"(?:vllm:|headway_)[a-z_]+(?=\{)", rendered + adapter)
    assert set(series) and set(series) <= exported(), set(series) - exported()
    asked = {
        metric["pods"]["metric"]["name"]
        for scaler in of_kind(render(CASES["hpa"]), "HorizontalPodAutoscaler")
        for metric in scaler["spec"]["metrics"]
    }
    assert asked == made


def test_the_states_of_slots_exist() -> None:
    source = (ROOT / "server" / "http" / "metrics.py").read_text()
    assert 'for state in ("used", "free")' in source


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
