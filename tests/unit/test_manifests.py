"""The Kubernetes manifests against the published schemas, and against what `distbench` accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from distbench.cli import _parser
from tests.hosts import ROOT

FOLDER = ROOT / "launch" / "kubernetes"
VERSION = kubernetes_validate.latest_version()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def pods() -> list[tuple[int, dict[str, Any]]]:
    """Return the number of pods and the template of each kind of pod."""
    _, job = documents("indexed-job.yaml")
    (pytorch,) = documents("pytorchjob.yaml")
    found = [(job["spec"]["completions"], job["spec"]["template"])]
    replicas = pytorch["spec"]["pytorchReplicaSpecs"]
    count = sum(one["replicas"] for one in replicas.values())
    return found + [(count, one["template"]) for one in replicas.values()]


def test_the_job_and_its_service_are_valid() -> None:
    for document in documents("indexed-job.yaml"):
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_the_pods_of_the_training_operator_are_valid() -> None:
    for number, (_, template) in enumerate(pods()):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"pod{number}"}, **template}
        kubernetes_validate.validate(pod, VERSION, strict=True)


@pytest.mark.parametrize(("key", "value"), [("compeltions", 4), ("completionMode", ["Indexed"]), ("parallelism", "4")])
def test_the_validator_sees_a_mistake(key: str, value: object) -> None:
    _, job = documents("indexed-job.yaml")
    job["spec"][key] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, VERSION, strict=True)


def test_every_pod_runs_a_command_that_distbench_knows() -> None:
    for count, template in pods():
        (container,) = template["spec"]["containers"]
        program, *arguments = container["command"]
        assert program == "distbench"
        placed = [argument.replace("$(JOB_COMPLETION_INDEX)", "1").replace("$(RANK)", "1") for argument in arguments]
        options = _parser().parse_args(placed)
        assert options.nnodes == count
        assert str(options.nproc) in container["resources"]["limits"].values()
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/dev/shm", options.out} == mounted  # noqa: S108 - a mount of the pod


def test_the_pods_of_the_job_meet_where_the_service_says() -> None:
    service, job = documents("indexed-job.yaml")
    name = job["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    (port,) = service["spec"]["ports"]
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"--rdzv-endpoint={name}-0.{service['metadata']['name']}:{port['port']}" in command


def test_each_dockerfile_starts_the_same_command() -> None:
    files = sorted((ROOT / "launch" / "docker").glob("*.Dockerfile"))
    assert [path.name.split(".")[0] for path in files] == ["cpu", "cuda", "rocm"]
    last = {_last_line(path) for path in files}
    assert last == {'CMD ["distbench", "suite", "smoke"]'}


def _last_line(path: Path) -> str:
    return path.read_text().splitlines()[-1]
