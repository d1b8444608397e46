"""Renders the chart as `helm template` does, with the renderer of this folder."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

from tests.deploy.gotemplate import Templates

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "headway"
VALUES = ("cpu", "gpu")
NAMESPACE = "headway"

Document = dict[str, Any]

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's, which is many times as fast, where PyYAML has it."""


def values_of(overrides: Mapping[str, Any]) -> Document:
    """The chart's values, overridden as by Helm, and checked against its schema."""
    merged = merge(yaml.load((CHART / "values.yaml").read_text(), LOADER), overrides)
    schema = json.loads((CHART / "values.schema.json").read_text())
    Draft7Validator.check_schema(schema)
    Draft7Validator(schema).validate(merged)
    return merged


def named_values(name: str) -> Document:
    """The overrides in a file of deploy/values."""
    content: Document = yaml.safe_load((DEPLOY / "values" / f"{name}.yaml").read_text())
    return content


def merge(base: Any, over: Any) -> Any:
    """Maps key by key; anything else is replaced."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return copy.deepcopy(over)
    merged = {key: copy.deepcopy(value) for key, value in base.items()}
    for key, value in over.items():
        merged[key] = merge(merged.get(key), value)
    return merged


def render(overrides: Mapping[str, Any], release: str = "headway") -> list[Document]:
    """All objects of a release, in the order of their names."""
    return copy.deepcopy(_rendered(json.dumps(overrides), release))


@functools.cache
def _rendered(overrides: str, release: str) -> list[Document]:
    texts = render_files(json.loads(overrides), release)
    texts.pop("NOTES.txt")
    documents = [
        document for text in texts.values() for document in yaml.load_all(text, LOADER) if document
    ]
    return sorted(documents, key=lambda document: (document["kind"], document["metadata"]["name"]))


def render_files(overrides: Mapping[str, Any], release: str = "headway") -> dict[str, str]:
    """The text of each template of the chart."""
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    dot = {
        "Values": values_of(overrides),
        "Chart": {"Name": about["name"], "Version": about["version"]},
        "Release": {"Name": release, "Namespace": NAMESPACE, "Service": "Helm"},
        "Files": {"Get": lambda name: (CHART / name).read_text()},
    }
    dot["Chart"]["AppVersion"] = about["appVersion"]
    templates = Templates()
    files = sorted((CHART / "templates").iterdir())
    parsed = {file.name: templates.add(file.read_text()) for file in files}
    parsed.pop("_helpers.tpl")
    return {name: templates.render(nodes, dot) for name, nodes in parsed.items()}


def manifest(name: str) -> str:
    """The plain manifest of deploy/manifests for a file of values."""
    documents = render(named_values(name))
    for document in documents:
        labels = [document["metadata"]["labels"]]
        if "template" in document.get("spec", {}):
            labels.append(document["spec"]["template"]["metadata"]["labels"])
        for each in labels:  # Helm neither made nor manages these
            del each["helm.sh/chart"], each["app.kubernetes.io/managed-by"]
        document["metadata"].get("annotations", {}).pop("helm.sh/resource-policy", None)
        if not document["metadata"].get("annotations", True):
            del document["metadata"]["annotations"]
    head = f"# Made from deploy/helm/headway and deploy/values/{name}.yaml (docs/deploy.md).\n"
    dumped: str = yaml.safe_dump_all(documents, sort_keys=False, width=120)
    return head + dumped


if __name__ == "__main__":
    for each in VALUES:
        (DEPLOY / "manifests" / each / "headway.yaml").write_text(manifest(each))
