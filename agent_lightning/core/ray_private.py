"""Everything of Ray and Ray Serve that their documentation does not promise: environment variables and private calls.

It holds for Ray 2.60.0 and vLLM 0.29. tests/core/test_ray_private.py names what another version breaks. Functions
import Ray themselves: this module costs nothing, and Ray's LLM server, which brings vLLM, is loaded in replicas only.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from agent_lightning.core.text import one_line

RAY_VERSION: Final = "2.60.0"

NODE_ENVIRONMENT: Final[Mapping[str, str]] = {
    # With the default, the log monitor lists the folder of all logs ten times a second, instead of twice.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    # How often the dashboard's agent measures every process; Ray's default is 5 seconds.
    "REPORTER_UPDATE_INTERVAL_MS": "30000",
    # How often each of Ray's processes sends its metrics to that agent; Ray's default is 10 seconds.
    "RAY_metrics_report_interval_ms": "30000",
    # How often a raylet looks for a full disk, objects to free or to fetch again, idle workers, and changes of its
    # resources. Ray's defaults are 100 ms, and 200 ms for idle workers.
    "RAY_local_fs_monitor_interval_ms": "1000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_kill_idle_workers_interval_ms": "1000",
    "RAY_raylet_report_resources_period_milliseconds": "500",
}
"""Makes the processes that Ray runs on each node beside the workers cheap, as a node of two cores has little to spare.
Read by `ray start`."""

SERVE_ENVIRONMENT: Final[Mapping[str, str]] = {
    # Measured on 2 cores: several times the requests per second of Serve's default proxy.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Balance by the path up to the attempt: one gateway gets all requests of an attempt, so that it knows the attempt's
    # first answers and the calls in flight.
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "uri depth 5",
    # One thread of HAProxy forwards more than a node's gateway, which is Python, can answer.
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # A gateway listens on the proxy's host. If that is 127.0.0.1, the proxy cannot reach the gateways of other nodes,
    # takes them to be down, and would probe each of them four times a second. It probes gateways that are up rarely,
    # and waits as long for the answer of a busy one; failed calls take a gateway out at once.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_DOWNINTER": "2s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "15s",
    # With metrics on, Python reads a line of HAProxy's log for each request.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # HAProxy would log each URL, and the secret in it, to whatever listens on UDP port 514. Nothing can listen here.
    "RAY_SERVE_HAPROXY_LOG_TARGET": "/dev/null",
    # Serve exports its own counts ten times a second from each process; Ray reads them every ten seconds.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    # Serve's controller copies its state of every replica in each turn, by default ten times a second.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # Serve keeps a gateway that is to end for half a minute, for load balancers other than its own.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # On a busy laptop a proxy takes longer to start than Serve's few seconds, after which Serve would kill it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",
    # Ray runs its workers at nice 15: a browser beside them would slow them down many times over.
    "RAY_worker_niceness": "0",
}
"""Read when Ray and Serve start, so it must be set before."""

SERVE_PORTS: Final = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
"""Fixed ports by default: a second run on the machine could not start its proxy, and the fallback proxies of one run
would answer for another."""

OVER_GRPC: Final[Mapping[str, bool]] = {"_by_reference": False}
"""Options of a Serve handle that make its calls over gRPC: as calls of actors, the answers would be stored as Ray
objects."""

SERVE_FILES: Final[Mapping[str, str]] = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "VLLM_RPC_BASE_PATH": "",
}
"""Variables that name files, and their place in the private folder of a cluster. By default they are in /tmp for
everybody: anyone could end the proxy through its admin socket, and they stay when a run has ended."""

TUNE_ENVIRONMENT: Final[Mapping[str, str]] = {
    # Each trial has its own files: Tune's loggers would write the same values again.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Tune's own table, in place of which `agl sweep` prints ours.
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Read when a sweep starts."""

PASSED_ON: Final[dict[str, str]] = {}
"""The variables that `prepare_environment` has set, or was told to pass on, for the `runtime_env` of a cluster that is
joined: its processes do not inherit them."""

_FREE_PORTS: Final = range(20_000, 30_000)
"""Ports that Linux and macOS do not give to outgoing connections, nor Ray and Serve's replicas to themselves."""


def prepare_environment(passed_on: Iterable[str] = ()) -> None:
    """Set the variables that Ray's processes inherit; a variable that is set already stays. Those named in `passed_on`
    also reach the processes of a cluster that is joined."""
    with suppress(OSError):  # Ray writes its token there, readable by everybody
        (folder := Path.home() / ".ray").mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    # A thread that still starts something when Ray ends must not start another Ray. Read when Ray is imported.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    ports = {name: str(free_port("0.0.0.0")) for name in SERVE_PORTS}
    for name, value in {**SERVE_ENVIRONMENT, "TOKENIZERS_PARALLELISM": "false", **ports}.items():
        if name not in os.environ:
            os.environ[name] = PASSED_ON[name] = value
    PASSED_ON.update({name: os.environ[name] for name in passed_on if name in os.environ})


@contextmanager
def private_folder(environment: Mapping[str, str]) -> Iterator[Path]:
    """A new folder that only this account can read, for the files of a cluster that is started in the block. Processes
    that start in the block inherit variables that name it, unless they are set already, and those of `environment`.
    Raises OSError."""
    folder, before = Path(tempfile.mkdtemp(prefix="agl-", dir=os.environ.get("RAY_TMPDIR") or "/tmp")), dict(os.environ)
    files = {name: str(folder / file) for name, file in SERVE_FILES.items()}
    os.environ.update({**files, **before, **environment})
    try:
        yield folder
    finally:
        for name in (files.keys() | environment.keys()) - before.keys():
            del os.environ[name]
        os.environ.update({name: before[name] for name in environment.keys() & before.keys()})


def proxy_error() -> str:
    """HAProxy's own words for why it did not start; "" if it gives none, or if another run has started the cluster."""
    import ray

    folder = Path(ray.get_runtime_context().get_temp_dir()).parent
    texts = [log.read_text(errors="replace") for log in folder.glob("*/admin.sock.*.stderr.log")]
    lines = [line.partition(" : ")[2] for text in texts for line in text.split("\n") if line.startswith("[ALERT]")]
    return next((one_line(line.rpartition("] ")[2]) for line in lines if "logger" not in line), "")


def use_token() -> None:
    """Show this account's token to a cluster that is joined; call it before Ray is imported, which reads it once. `ray
    start` makes a cluster require the token if the account has one, but does not make clients show it."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or path.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def cluster_address(address: str | None) -> str | None:
    """The address of the cluster to join, by default RAY_ADDRESS (set in submitted jobs); None: start a cluster."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def is_head(address: str) -> bool:
    """Whether a head of Ray answers at host:port. Ray itself would try for minutes, and then abort the process."""
    import grpc

    # Every gRPC server of Ray's has gRPC's health service. A server that refuses us is one too.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10.0)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return True


def free_port(host: str) -> int:
    """A port that is free now, and likely to be free when it is used, seconds later. Raises OSError."""
    for port in random.SystemRandom().sample(_FREE_PORTS, 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port
    raise OSError(f"no free port at {host}")


@contextmanager
def batch_scheduling() -> Iterator[None]:
    """Start processes under Linux's SCHED_BATCH in the block, as `chrt --batch 0` does; their children inherit it. A
    process that wakes up then does not preempt a running one, so that the processes of a run, which pass messages on,
    handle several messages at once. Does nothing on other systems, and if a policy has been chosen already."""
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    with suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def serve_controller() -> Any:
    """The handle of Serve's controller. Raises ValueError if Serve does not run."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)


def proxy_address() -> tuple[str, int]:
    """Host and port of Serve's proxy, as the run that started Serve chose them. Raises RayServeException if Serve does
    not run."""
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    return options.host, options.port


def ingress_addresses(app: str) -> list[tuple[str, int]]:
    """IP and port of each replica of an application's first deployment, past the proxy. Raises ValueError, RayError."""
    import ray

    groups = ray.get(serve_controller().get_target_groups.remote(app, True), timeout=10.0)
    return [(target.ip, target.port) for group in groups for target in group.targets]


def set_replicas(app: str, deployment: str, number: int) -> None:
    """Change how many replicas a deployment has, while it serves. Raises ValueError, RayError."""
    import ray
    from ray.serve._private.common import DeploymentID

    name = DeploymentID(name=deployment, app_name=app)
    ray.get(serve_controller().update_deployment_replicas.remote(name, number), timeout=60.0)


def head_node() -> Mapping[str, Any]:
    """Ray's description of the node on which the cluster was started, with keys such as "NodeID"."""
    import ray

    return next(node for node in ray.nodes() if node["Alive"] and "node:__internal_head__" in node["Resources"])


def llm_server(settings: Mapping[str, Any]) -> Any:
    """An LLMServer of Ray Serve LLM that runs in this process; `settings` are the fields of its LLMConfig. It leaves
    out what a run does not need: the usage report, which starts an actor and waits for it before the first call; the
    download step, which is one more worker process with vLLM in it, as vLLM downloads by itself; and on a CPU with one
    worker the worker process, which costs one more import of vLLM and a message to and fro for each step."""
    from ray.llm._internal.common.callbacks.base import CallbackBase
    from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
    from ray.serve.llm import LLMConfig
    from ray.serve.llm.deployment import LLMServer

    class OneProcessEngine(VLLMEngine):
        def _start_async_llm_engine(self, vllm_engine_args: Any, vllm_engine_config: Any, placement_group: Any) -> Any:
            vllm_engine_config.parallel_config.distributed_executor_backend = "uni"
            return super()._start_async_llm_engine(vllm_engine_args, vllm_engine_config, placement_group)

    class NoDownload(CallbackBase):
        async def on_before_node_init(self) -> None:
            self.ctx.run_init_node = False

    class Server(LLMServer):
        async def _start_engine(self) -> None:
            await self.engine.start()

    config = LLMConfig(**settings)
    config.callback_config.callback_class = NoDownload
    alone = config.accelerator_config.kind == "cpu" and len(settings["placement_group_config"]["bundles"]) == 1
    return Server.sync_init(config, engine_cls=OneProcessEngine if alone else VLLMEngine)


async def ask_llm(server: Any, request: Mapping[str, Any]) -> Any:
    """The server's stream of replies to a request: one reply, or batches of server-sent events. Raises ValidationError
    or ValueError for a request that cannot be read."""
    chat, completion = _llm_requests()
    if "prompt" in request:
        return await server.completions(completion(**request))
    return await server.chat(chat(**request))


@cache
def _llm_requests() -> tuple[type[Any], type[Any]]:
    """The classes of chat and completion requests, which ask vLLM for a reply that is clipped to the room that the
    prompt leaves, as OpenAI's API clips it; vLLM would refuse a request whose `max_tokens` does not fit."""
    from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest, CompletionRequest

    class Chat(ChatCompletionRequest):
        def build_tok_params(self, model_config: Any) -> Any:
            return replace(super().build_tok_params(model_config), max_output_tokens=1)

    class Completion(CompletionRequest):
        def build_tok_params(self, model_config: Any) -> Any:
            return replace(super().build_tok_params(model_config), max_output_tokens=1)

    return Chat, Completion


async def count_sampled(server: Any) -> list[tuple[str, int, int]]:
    """How far a paused LLM server is with each choice that it has not completed: the request's id, the choice's index,
    and the number of its tokens. Raises EngineDeadError."""
    from vllm.v1.engine import EngineCoreOutputs

    client, counts = server.engine._engine_client, []
    states, outputs = client.output_processor.request_states, client.engine_core.outputs_queue
    if states:
        outputs.put_nowait(EngineCoreOutputs())  # once this is taken, all that the engine sampled before is counted
    while states and not outputs.empty():
        if client.errored:
            raise client.dead_error
        await asyncio.sleep(0)
    for state in states.values():
        _, name, *prompt = state.external_req_id.split("-")  # chatcmpl-NAME, or cmpl-NAME-PROMPT
        first = int(prompt[0]) * (state.parent_req.n if state.parent_req else 1) if prompt else 0
        counts.append((name, first + state.request_index, state.detokenizer.num_output_tokens()))
    return counts


def llm_error(reply: object) -> tuple[str, int, str] | None:
    """Message, HTTP status and field of a reply of the LLM server that is an error; None for any other reply."""
    from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse

    if not isinstance(reply, ErrorResponse):
        return None
    return reply.error.message, int(reply.error.code or 500), reply.error.param or ""
