"""What we use of Ray beyond its documentation is still as core/ray_private.py has it.

Each test fails with one line that names what the installed version of Ray has changed.
"""

from __future__ import annotations

import inspect
import mmap
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray

from agent_lightning.core import ray_private
from agent_lightning.core.processes import guard

RAY = Path(ray.__file__).parent
READERS = ("_private", "dashboard", "serve/_private", "tune")
"""The parts of Ray's Python code that read the environment variables that we set."""
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
CHANGED = f"Ray {ray.__version__} has changed what core/ray_private.py uses of {ray_private.RAY_VERSION}: "


@cache
def ray_code() -> str:
    return "".join(file.read_text() for part in READERS for file in (RAY / part).rglob("*.py"))


@cache
def raylet() -> mmap.mmap:
    """Ray's C++ program, which holds the name of each of its settings."""
    with (RAY / "core/src/ray/raylet/raylet").open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def test_the_pinned_ray_is_the_one_whose_code_was_read() -> None:
    (pin,) = [need for need in PROJECT["optional-dependencies"]["gpu"] if need.startswith("ray[")]
    assert pin.partition("==")[2] == ray_private.RAY_VERSION == ray.__version__, CHANGED + "read its code again"


@pytest.mark.parametrize(
    "variable",
    [
        *ray_private.NODE_ENVIRONMENT,
        *ray_private.SERVE_ENVIRONMENT,
        *ray_private.SERVE_PORTS,
        *(name for name in ray_private.SERVE_FILES if name.startswith("RAY_")),
        *ray_private.TUNE_ENVIRONMENT,
        *("RAY_ENABLE_AUTO_CONNECT", "RAY_AUTH_MODE"),
    ],
)
def test_ray_reads_our_environment_variables(variable: str) -> None:
    setting = variable.removeprefix("RAY_")  # the variable of a C++ setting is RAY_ and its name, in lower case
    known = raylet().find(setting.encode()) >= 0 if setting.islower() else f'"{variable}"' in ray_code()
    assert known, CHANGED + f"it does not read {variable}"


def parameters(function: Callable[..., Any]) -> list[str]:
    # Ray adds this one to the methods of a class that this process has made an actor of, if it traces.
    return [name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx"]


def test_serve_has_the_calls_of_its_controller() -> None:
    from ray.serve._private.common import DeploymentID
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve._private.controller import ServeController
    from ray.serve.context import _get_global_client
    from ray.serve.schema import Target, TargetGroup

    assert all((SERVE_CONTROLLER_NAME, SERVE_NAMESPACE, _get_global_client))
    assert parameters(DeploymentID) == ["name", "app_name"], CHANGED + "DeploymentID"
    targets = parameters(ServeController.get_target_groups)
    assert targets == ["self", "app_name", "from_proxy_manager"], CHANGED + "ServeController.get_target_groups"
    replicas = parameters(ServeController.update_deployment_replicas)
    assert replicas == ["self", "deployment_id", "target_num_replicas"], CHANGED + "update_deployment_replicas"
    assert Target.model_fields.keys() >= {"ip", "port"}, CHANGED + "Target"
    assert "targets" in TargetGroup.model_fields, CHANGED + "TargetGroup"


def test_serve_handles_can_call_over_grpc() -> None:
    from ray.serve._private.handle_options import DynamicHandleOptions

    assert set(parameters(DynamicHandleOptions)) >= ray_private.OVER_GRPC.keys(), CHANGED + "the options of a handle"


@pytest.mark.stack
def test_the_llm_server_has_the_methods_that_we_override() -> None:
    from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackCtx
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve.llm.deployment import LLMServer

    engine = parameters(VLLMEngine._start_async_llm_engine)
    expected = ["self", "vllm_engine_args", "vllm_engine_config", "placement_group"]
    assert engine == expected, CHANGED + "VLLMEngine._start_async_llm_engine"
    assert inspect.iscoroutinefunction(LLMServer._start_engine), CHANGED + "LLMServer._start_engine"
    assert "engine_cls" in parameters(LLMServer.sync_init), CHANGED + "LLMServer.sync_init"
    assert parameters(CallbackBase.on_before_node_init) == ["self"], CHANGED + "CallbackBase.on_before_node_init"
    assert "run_init_node" in parameters(CallbackCtx), CHANGED + "CallbackCtx"


@pytest.mark.stack
def test_vllm_has_what_tells_how_far_its_requests_are() -> None:
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.engine.parallel_sampling import ParentRequest

    uses = {
        VLLMEngine: ("_engine_client",),
        AsyncLLM: ("output_processor", "engine_core", "errored", "dead_error"),
        AsyncMPClient: ("outputs_queue",),
        OutputProcessor: ("request_states",),
        RequestState: ("external_req_id", "parent_req", "request_index", "detokenizer"),
        IncrementalDetokenizer: ("num_output_tokens",),
        ParentRequest: ("def n",),
    }
    for kind, names in uses.items():
        code = inspect.getsource(kind)
        assert all(name in code for name in names), CHANGED + f"{kind.__name__} of vLLM"


@pytest.mark.skipif(
    not hasattr(os, "sched_getscheduler") or os.sched_getscheduler(0) != os.SCHED_OTHER, reason="another policy is set"
)
def test_batch_scheduling_ends_with_its_block() -> None:
    with ray_private.batch_scheduling():
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_variable_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before, passed_on = dict(os.environ), dict(ray_private.PASSED_ON)
    ray_private.PASSED_ON.clear()
    for name in (*ray_private.SERVE_ENVIRONMENT, *ray_private.SERVE_PORTS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "7")
    try:
        ray_private.prepare_environment()
        assert os.environ["RAY_SERVE_HAPROXY_NBTHREAD"] == "7"
        assert ray_private.PASSED_ON["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert "RAY_SERVE_HAPROXY_NBTHREAD" not in ray_private.PASSED_ON
    finally:
        os.environ.clear()
        os.environ.update(before)
        ray_private.PASSED_ON.clear()
        ray_private.PASSED_ON.update(passed_on)


@pytest.mark.parametrize(
    ("given", "variable", "joined"),
    [
        (None, "", None),
        ("local", "10.0.0.1:6379", None),
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "10.0.0.1:6379", "auto"),
    ],
)
def test_a_cluster_is_joined_only_at_an_address(
    given: str | None, variable: str, joined: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ray_private.cluster_address(given) == joined


def test_the_folder_of_rays_token_is_its_owners(tmp_path: Path) -> None:
    code = "from agent_lightning.core.ray_private import prepare_environment; prepare_environment()"
    (tmp_path / ".ray").mkdir(mode=0o755)
    for _ in range(2):  # a folder that exists, and one that does not
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "HOME": str(tmp_path)}, check=True)
        assert (tmp_path / ".ray").stat().st_mode & 0o777 == 0o700
        (tmp_path / ".ray").rmdir()


def test_the_files_of_a_cluster_are_private_and_go_with_it_but_for_its_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ray_private.SERVE_FILES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_SERVE_HAPROXY_SOCKET_PATH", "/mine")
    monkeypatch.setenv("AGL_CLUSTER", "outer")
    before = dict(os.environ)
    with ray_private.private_folder({"AGL_CLUSTER": "1.x"}) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == str(folder / "haproxy.cfg")
        assert (os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"], os.environ["AGL_CLUSTER"]) == ("/mine", "1.x")
    assert dict(os.environ) == before
    logs = folder / "ray" / "session_2026-11-30" / "logs"
    (logs / "serve").mkdir(parents=True)
    (logs / "worker-1.err").write_text("why")
    (logs / "worker-1.out").touch()
    (folder / "ray" / "session_latest").symlink_to(logs.parent)
    waiting = guard("AGL_CLUSTER", "1.x", folder=folder, logs=tmp_path / "run")
    assert folder.exists()
    waiting.communicate(timeout=30)  # closes its stdin
    assert not folder.exists()
    assert [file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()] == [
        Path("run/session_2026-11-30/worker-1.err")
    ]
