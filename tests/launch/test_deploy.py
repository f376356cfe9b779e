"""The files for clusters agree with Ray's own schema, with KubeRay's fields, and with the versions of pyproject.toml.

No cloud and no Kubernetes is involved: whether the image can be built and the pods are admitted is not checked.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.scripts.scripts import start

from agent_lightning import __version__
from agent_lightning.config.load import load
from agent_lightning.core.ray_private import NODE_ENVIRONMENT
from agent_lightning.launch import backend, placement

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = f"agent-lightning-ray:{PROJECT['version']}"


def read(name: str) -> dict[str, Any]:
    content = yaml.safe_load((DEPLOY / name).read_text())
    assert isinstance(content, dict)
    return content


def pinned_ray() -> str:
    (ray_pin,) = [pin for pin in PROJECT["optional-dependencies"]["gpu"] if pin.startswith("ray[")]
    return str(ray_pin).partition("==")[2]


def cluster_spec(name: str) -> dict[str, Any]:
    spec = read(name)["spec"]
    return dict(spec.get("rayClusterSpec", spec))


POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {"type": "object", "required": ["name", "image"]},
                },
                "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
            },
        }
    },
}
START = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "additionalProperties": False,
    "properties": {
        "rayVersion": {"type": "string"},
        "headGroupSpec": {
            "type": "object",
            "required": ["rayStartParams", "template"],
            "additionalProperties": False,
            "properties": {"rayStartParams": START, "template": POD},
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                "additionalProperties": False,
                "properties": {
                    "groupName": {"type": "string"},
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": START,
                    "template": POD,
                },
            },
        },
    },
}
"""The fields of KubeRay's ray.io/v1 that our files use, as its API types declare them."""
JOB = {
    "type": "object",
    "required": ["entrypoint", "rayClusterSpec"],
    "additionalProperties": False,
    "properties": {
        "entrypoint": {"type": "string"},
        "runtimeEnvYAML": {"type": "string"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "rayClusterSpec": CLUSTER,
    },
}


def test_ray_up_takes_our_cluster_file() -> None:
    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    content = read("../ray_cluster.yaml")
    jsonschema.validate(content, json.loads(schema.read_text()))
    assert content["head_node_type"] in content["available_node_types"]
    assert content["docker"]["image"] == IMAGE


def test_every_node_is_started_with_options_that_ray_has_and_without_its_log_monitor() -> None:
    up = read("../ray_cluster.yaml")
    lines = [shlex.split(line) for line in up["head_start_ray_commands"] + up["worker_start_ray_commands"]]
    starts = [words[5:] for words in lines if words[:5] == ["chrt", "--batch", "0", "ray", "start"]]
    for name in ("kuberay_cluster.yaml", "kuberay_job.yaml"):
        spec = cluster_spec(name)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            # KubeRay turns "true" into an option without a value, and leaves out "false".
            assert not {"true", "false"} & set(group["rayStartParams"].values())
            starts.append([f"--{key}={value}" for key, value in group["rayStartParams"].items()])
    assert [start.make_context("start", words).params["include_log_monitor"] for words in starts] == [False] * 8


@pytest.mark.parametrize(
    ("name", "kind", "schema"), [("kuberay_cluster.yaml", "RayCluster", CLUSTER), ("kuberay_job.yaml", "RayJob", JOB)]
)
def test_kuberay_knows_every_field(name: str, kind: str, schema: dict[str, Any]) -> None:
    content = read(name)
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(content["spec"], schema)


@pytest.mark.parametrize("name", ["kuberay_cluster.yaml", "kuberay_job.yaml"])
def test_kuberay_has_our_image_and_mounts_what_it_declares(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["rayVersion"] == pinned_ray() == ray.__version__
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        assert {container["image"] for container in pod["containers"]} == {IMAGE}
        mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}


def test_the_job_runs_an_experiment_that_its_cluster_can_hold() -> None:
    job = read("kuberay_job.yaml")["spec"]
    _, _, *overrides = job["entrypoint"].split()
    nodes = [
        {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        for group in job["rayClusterSpec"]["workerGroupSpecs"]
        for limits in [group["template"]["spec"]["containers"][0]["resources"]["limits"]] * group["minReplicas"]
    ]
    assert placement.missing(backend.choose(load(overrides)).groups(), nodes) == []


def test_the_image_has_the_versions_and_the_settings_of_the_project() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.search(r"^ARG RAY_VERSION=(\S+)$", text, re.MULTILINE)[1] == pinned_ray()  # type: ignore[index]
    assert f"-t {IMAGE}" in text
    assert PROJECT["version"] == __version__
    (environment,) = re.findall(r"^ENV ((?:.+\\\n)*.+)$", text, re.MULTILINE)
    assert environment.replace("\\\n", "").split() == [f"{key}={value}" for key, value in NODE_ENVIRONMENT.items()]
    for copied in re.findall(r"^COPY --chown=ray (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())


def test_a_job_is_given_the_time_that_a_checkpoint_takes() -> None:
    content = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())
    assert int(content["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 300
    assert content["working_dir"] == "."
