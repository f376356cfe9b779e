"""What dies is replaced, and what it held goes on elsewhere: here, and with real processes that are killed on Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import agents_for_tests as agents
import numpy as np
import pytest
import ray
from agents_for_tests import RUN_SECRET, is_alive, make_task, small_gateway

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.running import AgentConfig
from agent_lightning.core import actors as cluster
from agent_lightning.core.types import Ending, Outcome
from agent_lightning.credit.failures import Retries
from agent_lightning.learners.base import WeightBucket, Weights
from agent_lightning.rollouts.supervise import MOST_DEATHS, Workers, watch
from agent_lightning.rollouts.worker import RolloutWorker
from agent_lightning.serving.engine import Completion
from agent_lightning.serving.policy import PolicyBoard
from agent_lightning.testing.model import ToyEngine, ToyLanguage

Make = Callable[..., Any]
RESAMPLED = frozenset({Outcome.WORKER_LOST.value})


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    for module in (sys.modules[__name__], agents):
        ray.cloudpickle.register_pickle_by_value(module)  # pytest's sys.path is not that of the actors
    cluster.init_ray(num_cpus=2)
    yield
    ray.shutdown()
    for module in (sys.modules[__name__], agents):
        ray.cloudpickle.unregister_pickle_by_value(module)


class Frail:
    """A worker that leases one rollout and dies of it, as often as it is told; the next ones finish theirs."""

    deaths = 0

    def __init__(self, buffer: Buffer, name: str) -> None:
        self._buffer, self._name = buffer, name
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        while not self._stopping.is_set():
            for lease in await self._buffer.lease(1, 0.05, deadline=1000.0, worker=self._name):
                if Frail.deaths > 0:
                    Frail.deaths -= 1
                    raise ConnectionError("its process is gone\nand more\nValueError: it was too small")
                await self._buffer.finish(lease.key, Ending(outcome=Outcome.AGENT_ERROR, error=self._name))

    async def stop(self) -> None:
        self._stopping.set()

    async def is_alive(self) -> bool:
        return True


def kill(worker: object) -> None:
    """Nothing hangs in these."""


@asynccontextmanager
async def kept(workers: Workers) -> AsyncIterator[None]:
    running = asyncio.create_task(workers.run())
    try:
        yield
    finally:
        await workers.stop()
        await running


async def test_a_worker_that_dies_is_replaced_and_its_rollout_runs_again_at_once() -> None:
    buffer = Buffer(run_secret=RUN_SECRET, retries=Retries(max_attempts=3))
    Frail.deaths = 2
    await buffer.admit(make_task(), split="train", num_rollouts=2)
    async with kept(Workers(lambda name: Frail(buffer, name), number=1, buffer=buffer, kill=kill, pause_s=0.0)) as _:
        async with asyncio.timeout(10):
            (group,) = await take_groups(buffer, 1, split="train")
    assert [(t.key.attempt, t.error) for t in group.trajectories] == [(2, "worker-0.2"), (0, "worker-0.2")]


async def test_a_worker_that_keeps_dying_is_reported_in_one_line() -> None:
    buffer = Buffer(run_secret=RUN_SECRET, retries=Retries(max_attempts=99))
    Frail.deaths = MOST_DEATHS
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    async with kept(Workers(lambda name: Frail(buffer, name), number=1, buffer=buffer, kill=kill, pause_s=0.0)) as _:
        async with asyncio.timeout(10):
            trouble = await watch(buffer, lambda stats: None)
    cause = "ConnectionError: its process is gone: ValueError: it was too small"
    assert trouble == f"a rollout worker died {MOST_DEATHS} times in a row: {cause}"


# With processes.


def workers_on_ray(buffer: Buffer, url: str, spec: AgentConfig, **settings: Any) -> Workers:
    def make(name: str) -> RolloutWorker:
        return cluster.spawn(RolloutWorker, buffer=buffer, agent=spec, policy_url=url, model="m", worker=name)

    return Workers(make, number=1, buffer=buffer, kill=cluster.kill, pause_s=0.0, **settings)


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_kill_9_of_a_worker_costs_an_attempt_and_no_rollout(tmp_path: Path) -> None:
    buffer = cluster.spawn(Buffer, run_secret=RUN_SECRET, retries=Retries(max_attempts=2))
    spec = AgentConfig(target=f"{agents.__file__}:kills_its_worker_once", mode="process", timeout_s=120.0)
    pids = tmp_path / "pids"
    async with small_gateway(buffer) as url, asyncio.timeout(100), kept(workers_on_ray(buffer, url, spec)):
        await buffer.admit(make_task(pids=str(pids)), split="train", num_rollouts=1)
        (group,) = await take_groups(buffer, 1, split="train")
        (rollout,) = group.trajectories
        assert (rollout.key.attempt, rollout.outcome, rollout.reward) == (1, Outcome.FINISHED, 1.0)
        while any(is_alive(int(pid)) for pid in pids.read_text().split()):  # what it had started, the daemon too
            await asyncio.sleep(0.05)


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_a_worker_whose_agent_blocks_it_is_replaced() -> None:
    buffer = cluster.spawn(Buffer, run_secret=RUN_SECRET, retries=Retries(max_attempts=1))
    spec = AgentConfig(target=f"{agents.__file__}:blocks_the_event_loop", timeout_s=100.0)
    async with (
        asyncio.timeout(100),
        kept(workers_on_ray(buffer, "http://127.0.0.1:9", spec, unresponsive_timeout_s=3.0)),
    ):
        await buffer.admit(make_task(), split="train", num_rollouts=1)
        (group,) = await take_groups(buffer, 1, split="train")
    assert (group.trajectories[0].outcome, group.trajectories[0].error) == (Outcome.WORKER_LOST, "its worker died")


class Replica:
    """A toy engine in a process of its own, which follows the board."""

    def __init__(self, board: PolicyBoard) -> None:
        self._board, self._engine = board, ToyEngine(ToyLanguage(("no", "yes")))
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> int:
        await self._engine.join(self._board)
        self._following = asyncio.create_task(self._engine.follow())
        return os.getpid()

    async def version(self) -> int:
        """Of an answer."""
        question = [{"role": "user", "content": "?"}]
        completion = await self._engine.generate({"messages": question, "model": "policy"})
        assert isinstance(completion, Completion)
        return completion.policy_version


def weights(version: int) -> Weights:
    table = np.zeros((1024, 2), np.float32)
    entry = {"name": "table", "dtype": "float32", "shape": [1024, 2], "offset": 0}
    bucket = WeightBucket(parameters=(entry,), data=np.frombuffer(table.tobytes(), np.uint8))
    return Weights(version=version, buckets=(bucket,))


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_kill_9_of_a_policy_replica_holds_no_publish_and_the_next_one_has_its_weights_before_it_answers() -> None:
    board = cluster.spawn(PolicyBoard, heartbeat_timeout=3.0)
    first, second = (cluster.spawn(Replica, board) for _ in range(2))
    pid, _ = await asyncio.gather(first.start(), second.start())
    assert await board.publish(weights(1), timeout=60.0) == 2
    os.kill(pid, signal.SIGKILL)
    started = time.monotonic()
    assert await board.publish(weights(2), timeout=60.0) == 1
    assert time.monotonic() - started < 20.0
    third = cluster.spawn(Replica, board)
    await third.start()
    assert await asyncio.gather(second.version(), third.version()) == [2, 2]
