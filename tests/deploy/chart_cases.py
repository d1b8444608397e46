"""Values that the chart is tested with, and ways to what it renders."""

from __future__ import annotations

from typing import Any

from tests.deploy.chart import VALUES, Document, named_values, render

FULL_MODEL: Document = {
    "name": "all",
    "repository": "registry.example.com/headway",
    "tag": "1",
    "modelURL": "/models/it",
    "servedModelName": "it",
    "replicaCount": 0,
    "requestCPU": "500m",
    "requestMemory": "1Gi",
    "limitCPU": 2,
    "limitMemory": "2Gi",
    "modelClaim": "weights",
    "hf_token": {"secretName": "hub", "secretKey": "token"},
    "vllmConfig": {"gpuMemoryUtilization": 0.85, "extraArgs": ["--enforce-eager"]},
    "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}],
    "nodeSelector": {"disk": "fast"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "podAnnotations": {"a": "b"},
    "steering": {
        "presets": {"quiet": {"methods": [{"method": "vhr", "description": 'a "quoted" <text>'}]}},
        "profiles": {"demo": "/models/demo.safetensors"},
        "maxSgrsRequests": 0,
        "maxVectorMemory": 0,
        "maxSteeredRequests": 64,
        "maxSteeredPerKey": 16,
        "maxSgrsPerKey": 2,
        "maxRequestBody": 32,
        "residualEdits": True,
        "adminKeySecret": {"secretName": "admin", "secretKey": "keys"},
        "registry": {"existingClaim": "registry"},
    },
}
BARE_MODEL: Document = {
    key: FULL_MODEL[key]
    for key in ("repository", "tag", "modelURL", "replicaCount", "requestCPU", "requestMemory")
} | {"name": "bare"}
CLAIMED_MODEL = BARE_MODEL | {"name": "own", "pvcStorage": "5Gi", "requestGPU": 2}


def release(*models: Document, **others: Any) -> Document:
    """Overrides of values with models."""
    engine = {"modelSpec": list(models), **others.pop("engine", {})}
    return {"servingEngineSpec": engine, **others}


EVERYTHING = release(
    FULL_MODEL,
    BARE_MODEL,
    CLAIMED_MODEL,
    engine={"labels": {"team": "a"}, "runtimeClassName": "nvidia"},
    image={"pullSecrets": [{"name": "registry"}]},
    serviceAccount={"annotations": {"a": "b"}},
    networkPolicy={"from": [{"namespaceSelector": {}}], "egress": []},
    monitoring={"serviceMonitor": True, "rules": True, "labels": {"release": "prometheus"}},
)
CASES: dict[str, Document] = {
    **{name: named_values(name) for name in VALUES},
    "nothing": {},
    "everything": EVERYTHING,
    "hpa": {**EVERYTHING, "autoscaling": {"kind": "hpa"}},
    "keda": {**EVERYTHING, "autoscaling": {"kind": "keda"}},
    "little": release(
        BARE_MODEL,
        serviceAccount={"create": False, "name": "mine"},
        networkPolicy={"enabled": False},
        podDisruptionBudget={"enabled": False},
    ),
}


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def workloads(overrides: Document) -> dict[str, Document]:
    """Workloads by the name of their model."""
    found = of_kind(render(overrides), "Deployment", "StatefulSet")
    return {each["metadata"]["labels"]["headway/model"]: each for each in found}


def container(workload: Document) -> Document:
    (only,) = workload["spec"]["template"]["spec"]["containers"]
    found: Document = only
    return found
