"""Plain classes on Ray: the only module that knows ray.remote.

buffer = Buffer(run_secret=secret)         # here
buffer = spawn(Buffer, run_secret=secret)  # in an actor; whatever uses it is the same source
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar, cast

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

T = TypeVar("T")

_DEFAULTS: Mapping[str, object] = {"num_cpus": 0, "num_gpus": 0, "max_concurrency": 1000}
"""Ours wait most of the time: they take no CPU from the learner, never a GPU, and interleave like coroutines."""

_END_ORPHANS = "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper"
"""Ray's: what a process that was killed had started, agents above all, ends within seconds, daemons too."""


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


def init_ray(address: str | None = None, num_cpus: int | None = None, *, dashboard: bool = False) -> bool:
    """Join the cluster at `address` (or in RAY_ADDRESS, as in a submitted job), else start one on this machine.

    `num_cpus` and `dashboard` are of the cluster that is started. Does nothing where Ray already runs here.
    Returns whether it started one, which then ends with `shutdown_ray`.
    """
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address in (None, "local"):
        os.environ.setdefault(_END_ORPHANS, "true")
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level="ERROR",
        )
        return True
    ray.init(address=address, log_to_driver=False)
    return False


def shutdown_ray() -> None:
    """Leave the cluster; one that `init_ray` started ends, with every process in it."""
    ray.shutdown()
