"""The series that a server exports, with their labels, as the code has them; what a query asks for.

Of vLLM the sources are read: nothing is imported, no engine made.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import promql_parser
from prometheus_client import Counter, Gauge, Histogram

from headway.server.http import metrics

SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
"""What the names of a metric's samples end with, by its type."""

OF_TARGETS = frozenset({"namespace", "pod", "service", "job", "instance"})
"""Labels that Prometheus gives whatever it scrapes, in Kubernetes or out of it."""


def source_of_vllm(*paths: str) -> str:
    """Source text of vLLM, without importing it."""
    spec = find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return "".join((Path(spec.origin).parent / path).read_text() for path in paths)


def exported() -> dict[str, frozenset[str]]:
    """Labels by the name of a series, those of the target among them."""
    return {"up": OF_TARGETS, **of_vllm(), **of_headway()}


def of_headway() -> dict[str, frozenset[str]]:
    """The series of `metrics`."""
    found = {}
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            (family,) = metric.describe()
            found |= _series(family.name, family.type, metric._labelnames)
    return found


def of_vllm() -> dict[str, frozenset[str]]:
    """The series that vLLM makes for each engine of a model."""
    tree = ast.parse(source_of_vllm("v1/metrics/loggers.py"))
    common = next(
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "labelnames"
    )
    labels = ast.literal_eval(common)
    assert labels == ["model_name", "engine"]
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        named = {each.arg: ast.unparse(each.value) for each in node.keywords}
        kind = node.func.attr.removeprefix("_").removesuffix("_cls")
        # Those with more labels of their own (by reason, by source) are not asked for here.
        if kind in SUFFIXES and named.get("labelnames") == "labelnames":
            name = ast.literal_eval(named["name"])
            found |= _series(
                name.removesuffix("_total") if kind == "counter" else name, kind, labels
            )
    return found


def _series(name: str, kind: str, labels: list[str] | tuple[str, ...]) -> dict[str, frozenset[str]]:
    own = OF_TARGETS | set(labels)
    return {
        name + suffix: frozenset(own | {"le"} if suffix == "_bucket" else own)
        for suffix in SUFFIXES[kind]
    }


class Query:
    """What a query asks for. Raises ValueError where it is no PromQL.

    selectors: (name, matchers: label -> value) of each; labels: that it matches or groups by.
    """

    def __init__(self, text: str) -> None:
        self.selectors: list[tuple[str, dict[str, str]]] = []
        self.labels: set[str] = set()
        promql_parser.walk(promql_parser.parse(text), self._visit)

    def _visit(self, node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            matchers = {each.name: each.value for each in node.matchers.matchers}
            self.selectors.append((node.name or "", matchers))
            self.labels |= matchers.keys()
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            self.labels |= set(node.modifier.labels)
        elif isinstance(node, promql_parser.BinaryExpr) and node.modifier is not None:
            matching = node.modifier.matching
            self.labels |= set(matching.labels if matching is not None else ())

    @property
    def names(self) -> set[str]:
        """Names of series."""
        return {name for name, _ in self.selectors}

    def check(self, known: Mapping[str, frozenset[str]]) -> None:
        """Fail unless every series exists, and has the labels that it is matched or grouped by."""
        assert self.names <= known.keys(), self.names - known.keys()
        for name, matchers in self.selectors:
            assert matchers.keys() <= known[name], (name, matchers)
        anywhere = frozenset().union(*(known[name] for name in self.names))
        assert self.labels <= anywhere, self.labels - anywhere
        self._check_values()

    def _check_values(self) -> None:
        for name, matchers in self.selectors:
            if name not in of_headway():
                continue
            for label, value in matchers.items():
                if label in VALUES and "$" not in value:
                    assert value in VALUES[label], (name, label, value)


VALUES = {
    "reason": {str(reason) for reason in metrics.Reason},
    "stage": set(metrics.FAILURE_STAGES),
    "outcome": set(metrics.OUTCOMES),
    "method": set(metrics.METHODS),
    "phase": {"prompt", "output"},
    "state": {"used", "free"},
}
"""What the labels of Headway's metrics can be."""
