"""The service on Ray Serve: gateway replicas in front of policy replicas, deployed once for a run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

from agent_lightning.core import ray_private
from agent_lightning.core.errors import EngineError, UserError
from agent_lightning.core.threads import start_thread
from agent_lightning.core.types import OnWeightUpdate
from agent_lightning.rollouts.health import is_healthy
from agent_lightning.serving.engine import Completion, Part, Refusal
from agent_lightning.serving.gateway import Engine, Gateway, GatewayConfig, Recorder
from agent_lightning.serving.policy import PolicyBoard


@dataclass(slots=True, kw_only=True)
class ServingConfig:
    """How the policy is served."""

    model_path: str
    model_name: str = "policy"
    device: Literal["cpu", "cuda"] = "cpu"
    replicas: int = 1
    tensor_parallel_size: int = 1
    bundles: tuple[Mapping[str, float], ...] = ({"CPU": 1},)
    """What one replica takes: the first holds the replica itself and its first engine worker."""
    gateways: int | None = None
    """None: one on each node."""
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "float32"
    max_model_len: int = 1024
    max_num_seqs: int = 256
    on_weight_update: OnWeightUpdate = "wait"
    kv_cache_gib: int = 1
    """On a CPU: memory of each replica's KV cache."""
    gpu_memory_utilization: float = 0.85
    tool_parser: str | None = "hermes"
    seed: int = 0
    engine: dict[str, Any] = field(default_factory=dict)
    """vLLM engine arguments, untouched, for experts."""


class _HandleEngine:
    """The gateway's engine: a handle to the policy replicas. A call whose replica dies goes to another, or to the one
    that takes its place, unless the agent has seen a part of the answer."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # Over gRPC and not as calls of actors, whose answers take the way of Ray's objects.
        self._handle = handle.options(_by_reference=False)

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        for left in range(_REPLICAS_TRIED - 1, -1, -1):
            response = self._handle.generate.remote(request)
            try:
                completion: Completion | Refusal = await response
                return completion
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:  # any failure of a replica reaches the agent as an error of its protocol
                if not left or not isinstance(error, ray.exceptions.RayActorError):
                    return _failure(error)
            await asyncio.sleep(_UNTIL_MISSED)
        raise AssertionError("unreachable: the last try returns")

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        seen = False
        for left in range(_REPLICAS_TRIED - 1, -1, -1):
            parts = self._handle.options(stream=True).stream.remote(request)
            try:
                async for part in parts:
                    seen = True
                    yield part
                return
            except Exception as error:  # as above
                if seen or not left or not isinstance(error, ray.exceptions.RayActorError):
                    yield _failure(error)
                    return
            finally:
                parts.cancel()
            await asyncio.sleep(_UNTIL_MISSED)


_REPLICAS_TRIED = 3
_UNTIL_MISSED = 0.5
"""Seconds until Serve is likely to know that a replica is gone."""


def _failure(error: Exception) -> Refusal:
    message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return Refusal(status=500, message=message, code="engine_error", type="server_error")


class PolicyReplica(Engine, Protocol):
    """What answers in a replica of the policy, and follows the board."""

    async def start(self) -> None:
        """Take the current weights, and follow the board from then on."""
        ...

    async def check_health(self) -> None:
        """Raises where it is dead: Serve then replaces the replica."""
        ...


MakeReplica = Callable[[PolicyBoard], PolicyReplica]


def _vllm(settings: Mapping[str, Any], on_weight_update: OnWeightUpdate, board: PolicyBoard) -> PolicyReplica:
    """vLLM is imported in the replica, so the driver is spared its ten seconds."""
    from agent_lightning.serving.replica import PolicyServer

    return PolicyServer(settings, on_weight_update, board)


class PolicyDeployment:
    """The shell around a `PolicyReplica` that Serve runs."""

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


class GatewayDeployment:
    """The shell around `Gateway` that Serve runs."""

    def __init__(self, policy: DeploymentHandle[Any], recorder: Recorder, config: GatewayConfig) -> None:
        self._gateway = Gateway(engine=_HandleEngine(policy), recorder=recorder, config=config)

    async def __call__(self, request: Request) -> Response:
        return await self._gateway.handle(request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A running service."""

    url: str
    """Where this driver asks, without a trailing slash: the gateways' proxy, or its own node's gateway."""
    app: str
    gateway: str
    """The gateway's deployment."""

    def scale_gateways(self, number: int) -> None:
        """To as many as there are nodes, which Serve gives one each. Raises EngineError."""
        try:
            ray_private.set_replicas(self.app, self.gateway, number)
        except (ValueError, ray.exceptions.RayError) as error:
            raise EngineError(f"Ray Serve does not give the nodes their gateways: {type(error).__name__}") from error

    def stop(self) -> None:
        serve.delete(self.app)


def start(
    *,
    name: str,
    config: ServingConfig,
    gateway: GatewayConfig,
    recorder: Recorder,
    board: PolicyBoard,
    replica: MakeReplica | None = None,
) -> Service:
    """Deploy the service and wait until it answers; `replica` makes another policy than vLLM's. Raises EngineError,
    UserError."""
    make = replica or partial(_vllm, _llm_settings(config), config.on_weight_update)
    policy = serve.deployment(PolicyDeployment).options(**_policy_options(config)).bind(make, board)
    nodes = sum(node["Alive"] for node in ray.nodes())
    app = (
        serve.deployment(GatewayDeployment)
        .options(
            name=f"{name}-gateway",
            num_replicas=config.gateways or nodes,
            **({"max_replicas_per_node": 1} if config.gateways is None else {}),
            max_ongoing_requests=10_000,
            ray_actor_options={"num_cpus": 0},
        )
        .bind(policy, recorder, gateway)
    )
    proxy = start_thread(partial(_start_proxy, config.host, config.port), "proxy")
    try:
        _wait_for_controller(proxy)
        # The replicas start while the proxy does: Serve's own `start` would have them wait for it.
        serve.run(app, name=name, route_prefix=f"/{name}", external_scaler_enabled=True, logging_config=_QUIET)
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        if proxy.done():
            proxy.result()  # the first to fail says why
        raise EngineError(f"the policy's engine did not start: {_cause(name, error)}") from error
    finally:
        wait((proxy,))
    proxy.result()
    return Service(url=_root(name), app=name, gateway=f"{name}-gateway")


_QUIET = {"enable_access_log": False}
"""A line for each call, in two places, would say nothing that the spans do not."""


def _root(app: str) -> str:
    """Where Serve was first told to have its proxy listen, or else this node's gateway. Raises EngineError."""
    host, port = ray_private.proxy_address()
    head = ray_private.head_node()
    if host == "0.0.0.0":
        return f"http://{head['NodeManagerAddress']}:{port}/{app}"
    if head["NodeID"] == ray.get_runtime_context().get_node_id():
        return f"http://{host}:{port}/{app}"
    return asyncio.run(gateway_here(app, 60.0))


async def gateway_here(app: str, timeout: float) -> str:
    """Root of a gateway on this node that answers, past the proxy: an agent asks it without one. Raises EngineError
    after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        for url in await asyncio.to_thread(_gateways_here, app):
            if await is_healthy(url):
                return url
        if time.monotonic() > deadline:
            raise EngineError(f"no gateway answered at {ray.util.get_node_ip_address()} within {timeout:.0f} s")
        await asyncio.sleep(0.5)


def _gateways_here(app: str) -> list[str]:
    """Roots of those that Serve knows of; of several nodes at one address those of all."""
    here = ray.util.get_node_ip_address()
    try:
        host = ray_private.proxy_address()[0].replace("0.0.0.0", "127.0.0.1")
        addresses = ray_private.ingress_addresses(app)
    except (ValueError, RayServeException, ray.exceptions.RayError):  # it comes again
        return []
    return [f"http://{host}:{port}/{app}" for ip, port in addresses if ip == here]


def _start_proxy(host: str, port: int) -> None:
    """Start Serve and its HTTP proxy, or find them. Raises UserError."""
    options = {"host": host, "port": port, "request_timeout_s": None}
    try:
        try:
            serve.start(proxy_location="HeadOnly", http_options=options)
        except ray.exceptions.ActorAlreadyExistsError:  # another run has started it between the look and the start
            serve.start(proxy_location="HeadOnly", http_options=options)
    except (RuntimeError, TimeoutError, ray.exceptions.RayError, RayServeException) as error:
        raise UserError(
            f"Ray Serve's proxy did not start on {host}:{port} ({type(error).__name__}); where the machine is busy, "
            "stop what else runs on it and try again, else choose another serving.port"
        ) from error


def _wait_for_controller(proxy: Future[None]) -> None:
    """Until Serve's controller is there, or `serve.start` is over. Raises what that raised."""
    while not proxy.done():
        try:
            ray_private.serve_controller()
            return
        except ValueError:  # not yet
            time.sleep(0.1)
    proxy.result()


def _llm_settings(config: ServingConfig) -> dict[str, Any]:
    """The fields of Ray's LLMConfig, as plain values: its class brings vLLM with it."""
    on_cpu = config.device == "cpu"
    engine: dict[str, Any] = {
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel_size,
        "seed": config.seed,
        "weight_transfer_config": {"backend": "ray_object_store"},
        # Log-probabilities after temperature and top-p: those of the distribution that was sampled.
        "logprobs_mode": "processed_logprobs",
        # Of a response_format: a policy that likes spaces would write them between two fields to the end.
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "enable_log_requests": False,
        "disable_log_stats": True,
    }
    if config.tool_parser:
        engine |= {"enable_auto_tool_choice": True, "tool_call_parser": config.tool_parser}
    if on_cpu:
        engine |= {"enforce_eager": True}
    else:
        engine |= {"gpu_memory_utilization": config.gpu_memory_utilization}
    return {
        "model_loading_config": {"model_id": config.model_name, "model_source": config.model_path},
        "accelerator_config": {"kind": "cpu" if on_cpu else "gpu"},
        "placement_group_config": {"bundles": [dict(bundle) for bundle in config.bundles]},
        "engine_kwargs": engine | config.engine,
        "log_engine_metrics": False,
        "runtime_env": {"env_vars": _environment(config)},
    }


def _environment(config: ServingConfig) -> dict[str, str]:
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if config.device == "cpu":
        environment |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": str(config.kv_cache_gib)}
        # The cores are shared with the learner and the agents: pinning the engine to some would starve them.
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    elif config.bundles[0]["GPU"] < 1:
        environment |= {"VLLM_RAY_PER_WORKER_GPUS": str(config.bundles[0]["GPU"])}
    return environment


def _policy_options(config: ServingConfig) -> dict[str, Any]:
    return {
        "name": f"policy-{config.model_name}",
        "num_replicas": config.replicas,
        "max_ongoing_requests": 10_000,
        "health_check_period_s": 10,
        "placement_group_bundles": [dict(bundle) for bundle in config.bundles],
        "placement_group_strategy": "PACK",
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": _environment(config)}},
    }


def _cause(name: str, error: Exception) -> str:
    """The engine's own last words, where Serve kept them; Serve's message only says which deployment failed."""
    application = serve.status().applications.get(name)
    texts = [d.message for d in application.deployments.values() if d.message] if application else []
    lines: list[str] = [line.strip() for text in texts for line in text.splitlines() if "Error" in line]
    return (lines or [str(error).splitlines()[0]])[-1][:500]
