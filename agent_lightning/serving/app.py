"""The service on Ray Serve: gateway replicas in front of policy replicas, deployed once for a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from agent_lightning.config.running import Device, ModelConfig, ServingConfig
from agent_lightning.core import ray_private
from agent_lightning.core.errors import EngineError, UserError
from agent_lightning.core.processes import cpu_environment
from agent_lightning.core.text import error_line
from agent_lightning.core.threads import start_thread
from agent_lightning.rollouts.supervise import is_healthy
from agent_lightning.serving.bodies import prepare_process
from agent_lightning.serving.calls import Recorder
from agent_lightning.serving.engine import Completion, Part, Refusal, engine_error
from agent_lightning.serving.gateway import Engine, Gateway, GatewayConfig, application
from agent_lightning.serving.policy import PolicyBoard

MODEL_NAME: Final = "policy"
"""The name under which agents and engines know the model."""
_REPLICAS_TRIED: Final = 3
_RETRY_DELAY_S: Final = 0.5
"""Seconds after which Serve is likely to know that a replica is dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """How the policy is served: the sections of the config, and what only the run knows."""

    model: ModelConfig
    """The path is a folder that every node has, or a hub id, which each node resolves by itself."""
    revision: str | None = None
    """Commit of a model on the hub."""
    serving: ServingConfig = ServingConfig()
    """The port is free, or one that Ray Serve uses already."""
    device: Device = "cpu"
    bundles: tuple[Mapping[str, float], ...] = ({"CPU": 1},)
    """Resources of a replica; the first bundle holds the replica itself and its first engine worker."""
    seed: int = 0
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Further vLLM engine arguments, for experts; they override the others."""


class HandleEngine:
    """The gateway's engine: Serve's handle of the policy replicas. If a replica dies, its call is sent to another
    replica, unless the agent has seen a part of the answer."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle.options(**ray_private.OVER_GRPC)

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        for tries_left in range(_REPLICAS_TRIED - 1, -1, -1):
            response = self._handle.generate.remote(request)
            try:
                completion: Completion | Refusal = await response
                return completion
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:  # any failure of a replica reaches the agent as an error of its protocol
                if not tries_left or not isinstance(error, ray.exceptions.RayActorError):
                    return engine_error("the policy's engine failed", detail=error_line(error))
            await asyncio.sleep(_RETRY_DELAY_S)
        raise AssertionError("unreachable: the last try returns")

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        seen = False
        for tries_left in range(_REPLICAS_TRIED - 1, -1, -1):
            parts = self._handle.options(stream=True).stream.remote(request)
            try:
                async for part in parts:
                    seen = True
                    yield part
                return
            except Exception as error:  # as above
                if seen or not tries_left or not isinstance(error, ray.exceptions.RayActorError):
                    yield engine_error("the policy's engine failed", detail=error_line(error))
                    return
            finally:
                parts.cancel()
            await asyncio.sleep(_RETRY_DELAY_S)


class PolicyReplica(Engine, Protocol):
    """The engine in a replica of the policy, which follows the board."""

    async def start(self) -> None:
        """Install the current weights, and follow the board from then on."""

    async def check_health(self) -> None:
        """Raises if the engine is dead; Serve then replaces the replica."""


MakeReplica = Callable[[PolicyBoard], PolicyReplica]


def _vllm(settings: Mapping[str, Any], serving: ServingConfig, board: PolicyBoard) -> PolicyReplica:
    """A replica with vLLM, which is imported here, in the replica's process: the import takes ten seconds."""
    from agent_lightning.serving.replica import PolicyServer

    return PolicyServer(settings, serving, board)


class PolicyDeployment:
    """A `PolicyReplica` as a Serve deployment."""

    async def __init__(self, make: MakeReplica, board: PolicyBoard) -> None:  # type: ignore[misc]
        self._server = make(board)
        await self._server.start()

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        return await self._server.generate(request)

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        async for part in self._server.stream(request):
            yield part

    async def check_health(self) -> None:
        await self._server.check_health()


@serve.ingress()
class GatewayDeployment:
    """A `Gateway` as a Serve deployment."""

    def __init__(self, policy: DeploymentHandle[Any], recorder: Recorder, config: GatewayConfig) -> None:
        prepare_process()
        self._gateway = Gateway(engine=HandleEngine(policy), recorder=recorder, config=config)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return application(self._gateway)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running service."""

    url: str
    """Root URL for this driver, without a trailing slash: the gateways' proxy, or its own node's gateway."""
    app: str
    gateway: str
    """Name of the gateway's deployment."""

    def scale_gateways(self, number: int) -> None:
        """Run this many gateways, at most one on each node. Raises EngineError."""
        try:
            ray_private.set_replicas(self.app, self.gateway, number)
        except (ValueError, ray.exceptions.RayError) as error:
            raise EngineError(f"Ray Serve does not give the nodes their gateways: {type(error).__name__}") from error

    def stop(self) -> None:
        """End the gateways and the policy replicas."""
        serve.delete(self.app)


def start(
    *,
    name: str,
    config: Deployment,
    gateway: GatewayConfig,
    recorder: Recorder,
    board: PolicyBoard,
    replica: MakeReplica | None = None,
    alone: bool = True,
) -> Service:
    """Deploy the service and wait until it answers. `replica` makes the policy's replicas; the default is vLLM. Raises
    UserError if the port cannot be used, EngineError if a replica does not start. `alone` says that nothing else uses
    Ray Serve: the gateway then answers every path, so that a client that has lost its base URL is told so in its own
    format; Serve's proxy would answer with a text of its own."""
    make = replica or partial(_vllm, _llm_settings(config), config.serving)
    policy = serve.deployment(PolicyDeployment).options(
        name=f"policy-{MODEL_NAME}",
        num_replicas=config.serving.replicas,
        max_ongoing_requests=10_000,
        health_check_period_s=10,
        placement_group_bundles=[dict(bundle) for bundle in config.bundles],
        placement_group_strategy="PACK",
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": _environment(config)}},
    )
    number = config.serving.gateways
    gateways = serve.deployment(GatewayDeployment).options(
        name=f"{name}-gateway",
        num_replicas=number or sum(node["Alive"] for node in ray.nodes()),
        **({"max_replicas_per_node": 1} if number is None else {}),
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
    )
    app = gateways.bind(policy.bind(make, board), recorder, gateway)
    quiet = {"enable_access_log": False}  # an access log would repeat what the spans say, in two places
    proxy = start_thread(partial(_start_proxy, config.serving.host, config.serving.port), "proxy")
    try:
        _wait_for_controller(proxy)
        # The replicas start while the proxy does: Serve's own `start` would have them wait for it.
        prefix = "/" if alone else f"/{name}"
        serve.run(app, name=name, route_prefix=prefix, external_scaler_enabled=True, logging_config=quiet)
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        if proxy.done():
            proxy.result()  # the first to fail says why
        raise EngineError(f"the policy's engine did not start: {_cause(name, error)}") from error
    finally:
        wait((proxy,))
    proxy.result()
    return Service(url=_root(name), app=name, gateway=f"{name}-gateway")


def _root(app: str) -> str:
    """Root URL of Serve's proxy if this node can reach it, else of this node's gateway. Raises EngineError."""
    host, port = ray_private.proxy_address()
    head = ray_private.head_node()
    if host == "0.0.0.0":
        return f"http://{head['NodeManagerAddress']}:{port}/{app}"
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        return f"http://{host}:{port}/{app}"
    return asyncio.run(find_local_gateway(app, 60.0))


async def find_local_gateway(app: str, timeout: float) -> str:
    """Root URL of a gateway on this node that answers: agents need no proxy. Raises EngineError after `timeout` s."""
    deadline, here = time.monotonic() + timeout, ray.util.get_node_ip_address()
    while True:
        with suppress(ValueError, RayServeException, ray.exceptions.RayError):  # Serve does not know them yet
            host, _ = await asyncio.to_thread(ray_private.proxy_address)
            for address, port in await asyncio.to_thread(ray_private.ingress_addresses, app):
                url = f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}/{app}"
                if address == here and await is_healthy(url):  # in tests, several nodes may share an address
                    return url
        if time.monotonic() > deadline:
            raise EngineError(f"no gateway answered at {here} within {timeout:.0f} s")
        await asyncio.sleep(0.5)


def _start_proxy(host: str, port: int) -> None:
    """Start Serve and its HTTP proxy, if they do not run yet. Raises UserError."""
    options = {"host": host, "port": port, "request_timeout_s": None}
    try:
        try:
            serve.start(proxy_location="HeadOnly", http_options=options)
        except ray.exceptions.ActorAlreadyExistsError:  # another run has just started it
            serve.start(proxy_location="HeadOnly", http_options=options)
    except (RuntimeError, TimeoutError, ray.exceptions.RayError, RayServeException) as error:
        cause = ray_private.proxy_error()
        advice = "if the machine is busy, stop what else runs on it and try again, else choose another serving.port"
        if "FD limit" in cause or "file descriptors" in cause:
            advice = "it needs more open files: `ulimit -n 16384` in the shell, or LimitNOFILE, nofile in its service"
        raise UserError(
            f"Ray Serve's proxy did not start on {host}:{port} ({cause or type(error).__name__}); {advice}"
        ) from error


def _wait_for_controller(proxy: Future[None]) -> None:
    """Return when Serve's controller runs, or when `_start_proxy` has ended. Raises what `_start_proxy` has raised."""
    while not proxy.done():
        try:
            ray_private.serve_controller()
            return
        except ValueError:  # not yet
            time.sleep(0.1)
    proxy.result()


def _llm_settings(config: Deployment) -> dict[str, Any]:
    """The fields of Ray's LLMConfig, as plain values: importing its class imports vLLM."""
    on_cpu = config.device == "cpu"
    engine: dict[str, Any] = {
        "dtype": config.model.dtype,
        "max_model_len": config.model.max_len,
        "max_num_seqs": config.serving.max_num_seqs,
        "tensor_parallel_size": config.serving.tensor_parallel_size,
        "seed": config.seed,
        "weight_transfer_config": {"backend": "ray_object_store"},
        # Log-probabilities after temperature and top-p, of the distribution that is sampled.
        "logprobs_mode": "processed_logprobs",
        # Else the model's generation_config.json would set what a call leaves unset. Its end tokens are kept.
        "generation_config": "vllm",
        # With a response_format, a policy that likes spaces would write spaces between two fields until its limit.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if config.revision is not None:
        engine |= {"revision": config.revision, "tokenizer_revision": config.revision}
    if config.model.tool_parser:
        engine |= {"enable_auto_tool_choice": True, "tool_call_parser": config.model.tool_parser}
    engine |= {"enforce_eager": True} if on_cpu else {"gpu_memory_utilization": config.serving.gpu_memory_utilization}
    return {
        "model_loading_config": {"model_id": MODEL_NAME, "model_source": config.model.path},
        "accelerator_config": {"kind": "cpu" if on_cpu else "gpu"},
        "placement_group_config": {"bundles": [dict(bundle) for bundle in config.bundles]},
        "engine_kwargs": engine | dict(config.engine),
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": _environment(config)},
    }


def _environment(config: Deployment) -> dict[str, str]:
    # Serve's controller, which starts the replicas, has none of the run's environment.
    environment = {**ray_private.PASSED_ON, "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if config.device == "cpu":
        environment |= cpu_environment(config.serving.threads)
        environment |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": str(config.serving.kv_cache_gib)}
        # The learner and the agents need the cores too: engine threads pinned to some cores would starve them.
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    elif config.bundles[0]["GPU"] < 1:
        environment |= {"VLLM_RAY_PER_WORKER_GPUS": str(config.bundles[0]["GPU"])}
    return environment


def _cause(name: str, error: Exception) -> str:
    """The engine's last error if Serve has kept it: Serve's own message only names the deployment that failed."""
    application = serve.status().applications.get(name)
    deployments = application.deployments.values() if application else ()
    messages = "\n".join(status.message for status in deployments)
    lines = [line.strip() for line in messages.splitlines() if "Error" in line]
    return (lines or [error_line(error)])[-1][:500]
