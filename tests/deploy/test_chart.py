"""What the chart renders, that Kubernetes would take it, and that the code has what it names."""

import json
import subprocess
from shutil import which
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import ValidationError

from headway.server.http.admin import FILE_VARIABLE
from headway.steering import parse_spec
from tests.deploy.chart import (
    CHART,
    DEPLOY,
    VALUES,
    Document,
    manifest,
    named_values,
    render,
    render_files,
    values_of,
)
from tests.deploy.chart_cases import (
    BARE_MODEL,
    CASES,
    EVERYTHING,
    container,
    of_kind,
    release,
    workloads,
)
from tests.deploy.gotemplate import TemplateError

pytestmark = pytest.mark.unit

KUBERNETES = ("1.29", "1.37")
"""The oldest that Chart.yaml allows, and the newest whose schemas there are."""

CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds of other projects, of which there are no schemas here."""


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_every_object(case: str, version: str) -> None:
    documents = render(CASES[case])
    names = [(each["kind"], each["metadata"]["name"]) for each in documents]
    assert len(names) == len(set(names))
    for document in documents:
        if document["kind"] not in CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)


def test_validation_would_find_a_misspelt_key() -> None:
    document = of_kind(render(CASES["cpu"]), "Service")[0]
    document["spec"]["portz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"unknown": 1},
        {"servingEngineSpec": {"modelSpec": [{**BARE_MODEL, "hf_token": "hf_literal"}]}},
        {"servingEngineSpec": {"modelSpec": [{**BARE_MODEL, "tag": "latest"}]}},
        {"servingEngineSpec": {"modelSpec": [{**BARE_MODEL, "replicaCount": "2"}]}},
        {"servingEngineSpec": {"securityContext": {"runAsUser": 0}}},
        {"autoscaling": {"kind": "vpa"}},
        {
            "servingEngineSpec": {
                "modelSpec": [
                    {**BARE_MODEL, "steering": {"registry": {"accessMode": "ReadOnlyMany"}}}
                ]
            }
        },
    ],
)
def test_the_schema_refuses(wrong: Document) -> None:
    with pytest.raises(ValidationError):
        values_of(wrong)


@pytest.mark.parametrize("case", CASES)
def test_pods_are_locked_down(case: str) -> None:
    for workload in workloads(CASES[case]).values():
        pod = workload["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(workload)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("case", CASES)
def test_volumes_and_mounts_belong_together(case: str) -> None:
    for workload in workloads(CASES[case]).values():
        spec = workload["spec"]
        volumes = {each["name"] for each in spec["template"]["spec"]["volumes"]}
        claims = {each["metadata"]["name"] for each in spec.get("volumeClaimTemplates", [])}
        mounts = {each["name"]: each["mountPath"] for each in container(workload)["volumeMounts"]}
        assert volumes | claims == set(mounts)
        assert not volumes & claims
        written = {"/models", "/var/lib/headway", "/cache", "/tmp", "/dev/shm"}
        assert written <= set(mounts.values())


@pytest.mark.parametrize("case", CASES)
def test_selectors_select_the_pods(case: str) -> None:
    documents = render(CASES[case])
    labels = [
        each["spec"]["template"]["metadata"]["labels"] for each in workloads(CASES[case]).values()
    ]
    for document in of_kind(documents, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = document["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        wanted = selector.get("matchLabels", selector)
        found = [each for each in labels if wanted.items() <= each.items()]
        assert len(found) == (len(labels) if document["kind"] == "NetworkPolicy" else 1)


def test_a_kill_comes_after_everything_that_may_take_time() -> None:
    engine = yaml.safe_load((CHART / "values.yaml").read_text())["servingEngineSpec"]
    assert engine["terminationSeconds"] > engine["preStopSeconds"] + engine["drainSeconds"]
    (patient,) = workloads(release(BARE_MODEL, engine={"drainSeconds": 300})).values()
    assert patient["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 310


def test_keys_are_only_referred_to() -> None:
    workload = workloads(EVERYTHING)["all"]
    environment = {each["name"]: each for each in container(workload)["env"]}
    assert environment[FILE_VARIABLE]["value"] == "/etc/headway/keys/keys"
    mounts = {each["name"]: each["mountPath"] for each in container(workload)["volumeMounts"]}
    assert mounts["admin-keys"] == "/etc/headway/keys", "a folder: a file would not be rotated"
    (volume,) = [
        each
        for each in workload["spec"]["template"]["spec"]["volumes"]
        if each["name"] == "admin-keys"
    ]
    assert volume["secret"]["secretName"] == "admin"
    assert volume["secret"]["items"] == [{"key": "keys", "path": "keys"}]
    token = {"name": "hub", "key": "token", "optional": True}  # "gated models only", says the guide
    assert environment["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == token
    assert "VLLM_API_KEY" not in environment
    for name in VALUES:
        documents = render(named_values(name))
        assert not of_kind(documents, "Secret")
        (workload,) = workloads(named_values(name)).values()
        for each in container(workload)["env"]:
            if each["name"] == FILE_VARIABLE:
                continue
            assert ("KEY" in each["name"] or "TOKEN" in each["name"]) <= ("valueFrom" in each)


def test_zero_is_not_left_out() -> None:
    args = container(workloads(EVERYTHING)["all"])["args"]
    assert {"--max-sgrs-requests=0", "--max-vector-memory=0"} <= set(args)
    assert workloads(EVERYTHING)["all"]["spec"]["replicas"] == 0
    bare = container(workloads(EVERYTHING)["bare"])["args"]
    assert bare == ["/models/it", "--port=8000", "--shutdown-timeout=60"]


def test_a_claim_of_its_own_makes_a_stateful_set() -> None:
    found = workloads(EVERYTHING)
    assert [found[name]["kind"] for name in ("all", "bare", "own")] == [
        "Deployment",
        "Deployment",
        "StatefulSet",
    ]
    gpus = container(found["own"])["resources"]
    assert gpus["requests"]["nvidia.com/gpu"] == gpus["limits"]["nvidia.com/gpu"] == 2


def with_registry(mode: str, **model: Any) -> Document:
    registry = {"storage": "1Gi", "accessMode": mode}
    return release({**BARE_MODEL, "replicaCount": 1, "steering": {"registry": registry}, **model})


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteOncePod"])
def test_a_disk_of_one_node_is_never_wanted_by_two_pods(mode: str) -> None:
    (workload,) = workloads(with_registry(mode)).values()
    assert workload["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    (shared,) = workloads(with_registry("ReadWriteMany", replicaCount=2)).values()
    assert "strategy" not in shared["spec"]
    scaled = {**with_registry(mode), "autoscaling": {"kind": "keda"}}
    for several in (with_registry(mode, replicaCount=2), scaled):
        with pytest.raises(TemplateError, match="accessMode must be ReadWriteMany"):
            render(several)


def test_an_account_that_nobody_makes_is_not_named() -> None:
    for account, name in (
        ({"create": False}, "default"),
        ({"create": False, "name": "mine"}, "mine"),
        ({}, "headway"),
    ):
        values = release(BARE_MODEL, serviceAccount=account)
        (workload,) = workloads(values).values()
        assert workload["spec"]["template"]["spec"]["serviceAccountName"] == name
        made = [each["metadata"]["name"] for each in of_kind(render(values), "ServiceAccount")]
        assert made == ([name] if account == {} else [])


def test_the_autoscaler_owns_the_number_of_pods() -> None:
    for kind in ("hpa", "keda"):
        for workload in workloads(CASES[kind]).values():
            assert "replicas" not in workload["spec"]
        scalers = of_kind(render(CASES[kind]), "HorizontalPodAutoscaler", "ScaledObject")
        targets = {
            (each["spec"]["scaleTargetRef"]["kind"], each["metadata"]["name"]) for each in scalers
        }
        assert targets == {
            (each["kind"], each["metadata"]["name"]) for each in workloads(CASES[kind]).values()
        }


@pytest.mark.parametrize("case", CASES)
def test_presets_are_specifications_that_headway_reads(case: str) -> None:
    found = 0
    for document in of_kind(render(CASES[case]), "ConfigMap"):
        (workload,) = [
            each
            for each in workloads(CASES[case]).values()
            if each["metadata"]["name"] == document["metadata"]["name"].partition("-presets-")[0]
        ]
        for file, text in document["data"].items():
            name = file.removesuffix(".json")
            option = f"--steering-preset={name}=/etc/headway/presets/{file}"
            assert option in container(workload)["args"]
            if case in VALUES:
                parse_spec({"methods": json.loads(text)["methods"]}, file)
            found += 1
    assert found == (case not in ("nothing", "little"))


def test_a_changed_preset_is_a_new_rollout_and_leaves_the_old_one_its_own() -> None:
    before, after = named_values("cpu"), named_values("cpu")
    presets = after["servingEngineSpec"]["modelSpec"][0]["steering"]["presets"]
    presets["louder"]["methods"][0]["alpha"] = 3.0
    names = []
    for values in (before, after):
        (workload,) = workloads(values).values()
        (found,) = of_kind(render(values), "ConfigMap")
        assert found["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        volumes = workload["spec"]["template"]["spec"]["volumes"]
        (mounted,) = [each["configMap"]["name"] for each in volumes if "configMap" in each]
        assert mounted == found["metadata"]["name"]
        names.append(mounted)
    assert names[0] != names[1]


def test_notes_name_the_service() -> None:
    notes = render_files(CASES["cpu"])["NOTES.txt"]
    service = of_kind(render(CASES["cpu"]), "Service")[0]["metadata"]["name"]
    assert f"http://{service}.headway.svc:80" in notes
    assert "no API key" not in notes
    assert "no API key" in render_files(CASES["little"])["NOTES.txt"]
    assert "There is no model" in render_files({})["NOTES.txt"]


# The plain manifests


@pytest.mark.parametrize("name", VALUES)
def test_manifests_are_the_chart_rendered(name: str) -> None:
    committed = (DEPLOY / "manifests" / name / "headway.yaml").read_text()
    assert committed == manifest(name), "python -m tests.deploy.chart writes them anew"


@pytest.mark.skipif(which("kubectl") is None, reason="no kubectl")
@pytest.mark.parametrize("name", VALUES)
def test_kustomize_takes_the_manifests(name: str) -> None:
    command = ["kubectl", "kustomize", str(DEPLOY / "manifests" / name)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = list(yaml.safe_load_all((DEPLOY / "manifests" / name / "headway.yaml").read_text()))
    for document in expected:
        document["metadata"]["namespace"] = "headway"

    def in_order(documents: list[Document]) -> list[Document]:
        return sorted(documents, key=lambda each: (each["kind"], each["metadata"]["name"]))

    assert in_order(list(yaml.safe_load_all(output))) == in_order(expected)


@pytest.mark.skipif(which("helm") is None, reason="no helm")
@pytest.mark.parametrize("name", VALUES)
def test_helm_renders_the_same(name: str) -> None:
    command = ["helm", "template", "headway", str(CHART), "--namespace", "headway"]
    command += ["--values", str(DEPLOY / "values" / f"{name}.yaml")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [each for each in yaml.safe_load_all(output) if each]
    ordered = sorted(found, key=lambda each: (each["kind"], each["metadata"]["name"]))
    assert ordered == render(named_values(name))


@pytest.mark.parametrize("name", ["multi-node", "router"])
def test_examples_are_objects_that_kubernetes_takes(name: str) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "examples" / f"{name}.yaml").read_text()))
    for document in documents:
        if document["kind"] == "LeaderWorkerSet":
            group = document["spec"]["leaderWorkerTemplate"]
            for role in ("leaderTemplate", "workerTemplate"):
                pod = {"apiVersion": "v1", "kind": "Pod", **group[role]}
                kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)
        else:
            kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)
