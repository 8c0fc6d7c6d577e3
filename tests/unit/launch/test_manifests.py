"""The Kubernetes manifests and Dockerfiles against published schemas and the options of `distbench`."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from dockerfile_parse.parser import DockerfileParser

from distbench.case.suite import load_suite
from distbench.cli.main import _parser
from distbench.cli.options import case_flags
from distbench.errors import Unsupported
from distbench.launcher.preflight import check_devices
from distbench.report.environment import IMAGE
from tests.hosts import ROOT

FOLDER = ROOT / "launch" / "kubernetes"
DOCKERFILES = ROOT / "launch" / "docker"
VERSION = kubernetes_validate.latest_version()
PYTORCHJOB = json.loads((ROOT / "tests" / "data" / "pytorchjob.schema.json").read_text())
BUILT_ON = {
    "cpu": "python:3.12-slim",
    "cuda": "pytorch/pytorch:2.9.0-cuda12.8-cudnn9-runtime",
    "rocm": "lmsysorg/sglang:v0.5.12-rocm720-mi30x",
}
# Variables that the operator sets in the container named pytorch.
OPERATORS = {"MASTER_ADDR", "RANK"}


def documents(name: str) -> list[dict[str, Any]]:
    # Converted through JSON, so that objects shared by a YAML anchor become separate.
    return [json.loads(json.dumps(one)) for one in yaml.safe_load_all((FOLDER / name).read_text())]


def document(name: str, kind: str) -> dict[str, Any]:
    (only,) = (one for one in documents(name) if one["kind"] == kind)
    return only


def indexed_pod() -> tuple[int, dict[str, Any]]:
    """Number of pods of the job, and their template."""
    job = document("indexed-job.yaml", "Job")
    return job["spec"]["completions"], job["spec"]["template"]


def operators_pods() -> list[tuple[int, dict[str, Any]]]:
    """For each kind of pod: the number of pods of all kinds, and the template."""
    job = document("pytorchjob.yaml", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"].values()
    return [(sum(one["replicas"] for one in replicas), one["template"]) for one in replicas]


def container(template: dict[str, Any]) -> dict[str, Any]:
    (only,) = template["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def pods() -> list[tuple[int, dict[str, Any]]]:
    return [indexed_pod(), *operators_pods()]


def validate_pytorchjob(job: dict[str, Any]) -> None:
    jsonschema.validate(job, PYTORCHJOB, jsonschema.Draft7Validator)


def test_kubernetes_manifests_follow_the_published_schemas() -> None:
    own = [one for name in ("indexed-job.yaml", "pytorchjob.yaml") for one in documents(name)]
    assert [one["kind"] for one in own].count("PyTorchJob") == 1
    for one in own:
        if one["kind"] != "PyTorchJob":
            kubernetes_validate.validate(one, VERSION, strict=True)


def test_pytorchjob_manifest_and_its_pods_follow_their_schemas() -> None:
    jsonschema.Draft7Validator.check_schema(PYTORCHJOB)
    validate_pytorchjob(document("pytorchjob.yaml", "PyTorchJob"))
    for number, (_, template) in enumerate(operators_pods()):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod{number}"}, **template}
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize(("key", "value"), [("compeltions", 4), ("completionMode", ["Indexed"]), ("parallelism", "4")])
def test_kubernetes_validator_rejects_an_invalid_manifest(key: str, value: object) -> None:
    job = document("indexed-job.yaml", "Job")
    job["spec"][key] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSION, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kind", "PytorchJob"),
        ("apiVersion", "kubeflow.org/v2"),
        ("spec/nprocPerNode", 8),
        ("spec/runPolicy/cleanPodPolcy", "None"),
        ("spec/runPolicy/cleanPodPolicy", "Never"),
        ("spec/runPolicy/backoffLimit", "0"),
        ("spec/pytorchReplicaSpecs/Master/replicas", 2),
        ("spec/pytorchReplicaSpecs/Worker/restartPolicy", "never"),
        ("spec/pytorchReplicaSpecs/Workers", {}),
        ("spec/pytorchReplicaSpecs/Master/template/spec/containers/0/name", "distbench"),
    ],
)
def test_pytorchjob_validator_rejects_an_invalid_manifest(path: str, value: object) -> None:
    job = document("pytorchjob.yaml", "PyTorchJob")
    *folders, last = path.split("/")
    place: Any = job
    for name in folders:
        place = place[int(name)] if name.isdigit() else place[name]
    place[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate_pytorchjob(job)


def test_failed_pod_is_neither_restarted_nor_ends_other_pods() -> None:
    job, pytorch = document("indexed-job.yaml", "Job"), document("pytorchjob.yaml", "PyTorchJob")
    assert job["spec"]["backoffLimitPerIndex"] == 0
    assert not {"backoffLimit", "maxFailedIndexes"} & job["spec"].keys()
    assert pytorch["spec"]["runPolicy"] == {"backoffLimit": 0, "cleanPodPolicy": "None"}
    replicas = pytorch["spec"]["pytorchReplicaSpecs"].values()
    policies = [job["spec"]["template"]["spec"]["restartPolicy"], *(one["restartPolicy"] for one in replicas)]
    assert policies == ["Never"] * 3


def test_command_of_every_pod_is_parsed_by_distbench() -> None:
    for count, template in pods():
        pod = container(template)
        options = parse(pod["command"])
        assert options.nnodes == count
        assert pod["resources"]["limits"] in (
            {"amd.com/gpu": f"{options.nproc}"},
            {"nvidia.com/gpu": f"{options.nproc}"},
        )
        mounted = {mount["mountPath"] for mount in pod["volumeMounts"]}
        assert {"/dev/shm", options.out} == mounted  # noqa: S108 - a mount of the pod


def test_results_of_a_pod_are_on_a_persistent_volume() -> None:
    for name, templates in (("indexed-job.yaml", [indexed_pod()]), ("pytorchjob.yaml", operators_pods())):
        claim = document(name, "PersistentVolumeClaim")
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
        for _, template in templates:
            pod = container(template)
            out = parse(pod["command"]).out
            (volume,) = (mount["name"] for mount in pod["volumeMounts"] if mount["mountPath"] == out)
            kept = {one["name"]: one for one in template["spec"]["volumes"]}[volume]
            assert kept["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}


def parse(command: list[str]) -> Any:
    """Options of a command with the variables of pod 1."""
    assert command[0] == "distbench"
    return _parser().parse_args([re.sub(r"\$\((RANK|JOB_COMPLETION_INDEX)\)", "1", word) for word in command[1:]])


def test_variables_in_a_pods_command_are_set_in_the_pod() -> None:
    _, template = indexed_pod()
    assert named(template) == {variable["name"] for variable in container(template)["env"]} - {"DISTBENCH_SECRET"}
    for _, template in operators_pods():
        assert named(template) == OPERATORS
        assert {variable["name"] for variable in container(template)["env"]} == {"DISTBENCH_SECRET"}


def test_pods_read_the_secret_whose_creation_the_manifest_documents() -> None:
    for name, templates in (("indexed-job.yaml", [indexed_pod()]), ("pytorchjob.yaml", operators_pods())):
        assert "\n#   kubectl create secret generic distbench --from-literal=secret=" in (FOLDER / name).read_text()
        for _, template in templates:
            variables = {variable["name"]: variable for variable in container(template)["env"]}
            source = variables["DISTBENCH_SECRET"]["valueFrom"]["secretKeyRef"]
            assert source == {"name": "distbench", "key": "secret"}


def named(template: dict[str, Any]) -> set[str]:
    return set(re.findall(r"\$\((\w+)\)", " ".join(container(template)["command"])))


def test_rendezvous_address_of_indexed_job_pods_is_that_of_the_service() -> None:
    service, job = (document("indexed-job.yaml", kind) for kind in ("Service", "Job"))
    name = job["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    (port,) = service["spec"]["ports"]
    command = container(indexed_pod()[1])["command"]
    assert f"--rdzv-endpoint={name}-0.{service['metadata']['name']}:{port['port']}" in command
    assert "--node-rank=$(JOB_COMPLETION_INDEX)" in command


def test_rendezvous_address_of_pytorchjob_pods_is_that_of_the_operator() -> None:
    job = document("pytorchjob.yaml", "PyTorchJob")
    for _, template in operators_pods():
        command = container(template)["command"]
        assert {"--rdzv-endpoint=$(MASTER_ADDR):29500", "--node-rank=$(RANK)"} <= set(command)
        assert f"--nproc={job['spec']['nprocPerNode']}" in command


def instructions(flavour: str) -> list[tuple[str, str]]:
    parser = DockerfileParser(fileobj=io.BytesIO((DOCKERFILES / f"{flavour}.Dockerfile").read_bytes()))
    return [(one["instruction"], one["value"]) for one in parser.structure if one["instruction"] != "COMMENT"]


def values(flavour: str, instruction: str) -> list[str]:
    return [value for name, value in instructions(flavour) if name == instruction]


def gpu_commands() -> list[list[str]]:
    """Commands of pods and images that request GPUs."""
    in_pods = [container(template)["command"] for _, template in pods()]
    return in_pods + [json.loads(values(flavour, "CMD")[-1]) for flavour in ("cuda", "rocm")]


@pytest.mark.parametrize("command", gpu_commands())
def test_every_case_of_a_gpu_pod_or_image_requires_a_device(command: list[str]) -> None:
    options = parse(command)
    ranks = options.nproc or 8
    cases = [entry.case for entry in load_suite(options.suite, ranks, case_flags(options)).entries]
    assert {case.device for case in cases} == {"cuda"}
    assert len(check_devices(cases, ranks, available=ranks)) == ranks
    with pytest.raises(Unsupported, match="8 ranks on this node, torch sees 7"):
        check_devices(cases, ranks, available=ranks - 1)


def test_each_flavour_has_a_dockerfile() -> None:
    assert {path.name for path in DOCKERFILES.iterdir()} == {f"{flavour}.Dockerfile" for flavour in BUILT_ON}


@pytest.mark.parametrize("flavour", BUILT_ON)
def test_image_installs_this_checkout_on_a_base_with_a_version_tag(flavour: str) -> None:
    (base,) = values(flavour, "FROM")
    arguments = dict(value.split("=", 1) for value in values(flavour, "ARG") if "=" in value)
    assert (arguments["BASE"] if base == "${BASE}" else base) == BUILT_ON[flavour]
    (named,) = values(flavour, "ENV")
    assert named == f'{IMAGE}="distbench on {base}"'
    copied = [part for value in values(flavour, "COPY") for part in value.split()[:-1]]
    assert set(copied) == {"pyproject.toml", "README.md", "LICENSE", "distbench", "launch"}
    assert all((ROOT / name).exists() for name in copied)
    (installed,) = values(flavour, "RUN")
    assert re.fullmatch(r"(python -m )?pip install --no-cache-dir .*?\"?\.(\[cpu\]\")?", installed)
    assert values(flavour, "ENTRYPOINT") == ["[]"]
    device = [] if flavour == "cpu" else ["--device", "cuda"]
    assert [json.loads(value) for value in values(flavour, "CMD")] == [["distbench", "suite", "smoke", *device]]


def test_only_the_cpu_image_installs_torch() -> None:
    brought = {flavour for flavour in BUILT_ON if any("torch" in value for value in values(flavour, "RUN"))}
    assert brought == {"cpu"}
