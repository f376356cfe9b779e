"""The same classes behave alike as objects of this process and as Ray actors."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import agents_for_tests as agents
import pytest
import ray
import ray.exceptions
from agents_for_tests import RUN_SECRET, make_call, make_task, small_gateway

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.actors import init_ray, kill, spawn
from agent_lightning.core.errors import UnknownRollout
from agent_lightning.core.types import Ending, Outcome, RolloutKey
from agent_lightning.credit.failures import Retries
from agent_lightning.rollouts.worker import RolloutWorker

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    this_module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(this_module)  # pytest's sys.path is not that of the actors
    init_ray(num_cpus=2)
    yield
    ray.cloudpickle.unregister_pickle_by_value(this_module)
    ray.shutdown()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.stack)])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an object of a class in this process, or in an actor."""
    if request.param == "local":
        return lambda cls, **settings: cls(**settings)
    request.getfixturevalue("ray_here")
    return spawn


class Scheduled:
    async def policy(self) -> int:
        return os.sched_getscheduler(0)


@pytest.mark.stack
@pytest.mark.skipif(
    sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER, reason="the usual policy of Linux is changed"
)
async def test_actors_run_under_batch_scheduling_and_this_process_does_not(ray_here: None) -> None:
    assert await spawn(Scheduled).policy() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


class Sleeper:
    """Remembers how its naps ended."""

    def __init__(self, *, fails: bool = False) -> None:
        if fails:
            raise ValueError("cannot be made")
        self._started = 0
        self._ended = ""

    async def nap(self, seconds: float) -> str:
        self._started += 1
        try:
            await asyncio.sleep(seconds)
            self._ended = "in time"
        except asyncio.CancelledError:
            self._ended = "cancelled"
            raise
        return self._ended

    async def started(self) -> int:
        return self._started

    async def ended(self) -> str:
        return self._ended

    async def pid(self) -> int:
        return os.getpid()

    async def gpus(self) -> list[str]:
        return [str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids()["GPU"]]


async def test_a_buffer_from_admission_to_training(make: Make) -> None:
    buffer = make(Buffer, run_secret=RUN_SECRET)
    assert await buffer.admit(make_task(), split="train", num_rollouts=2) == "train-0"
    first, second = await buffer.lease(8, timeout=1.0)
    assert await buffer.record(make_call(first.key, "a")) == 31
    taking = asyncio.create_task(take_groups(buffer, 1, split="train"))
    await buffer.finish(first.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
    await buffer.finish(second.key, Ending(outcome=Outcome.TIMEOUT))
    (group,) = await taking
    assert [t.outcome for t in group.trajectories] == [Outcome.FINISHED, Outcome.TIMEOUT]
    assert not group.trajectories[0].calls[0].response_T.flags.writeable
    await buffer.advance(trained=1, dropped={"timeout": 1})
    stats = await buffer.stats()
    assert (stats.admitted, stats.trained, stats.dropped) == (2, 1, {"timeout": 1})


async def test_exceptions_keep_their_type_and_message(make: Make) -> None:
    buffer = make(Buffer, run_secret=RUN_SECRET)
    with pytest.raises(UnknownRollout) as caught:
        await buffer.record(make_call(RolloutKey(split="train", group=0, index=0), "a"))
    assert str(caught.value) == "rollout train-0-0 attempt 0 is not open"


async def test_cancelling_the_caller_cancels_the_method(make: Make) -> None:
    sleeper = make(Sleeper)
    napping = asyncio.create_task(sleeper.nap(60.0))
    async with asyncio.timeout(20):
        while await sleeper.started() == 0:
            await asyncio.sleep(0.01)
        napping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await napping
        while await sleeper.ended() == "":
            await asyncio.sleep(0.01)
    assert await sleeper.ended() == "cancelled"


async def test_a_cancelled_take_loses_nothing(make: Make) -> None:
    buffer = make(Buffer, run_secret=RUN_SECRET)
    taking = asyncio.create_task(take_groups(buffer, 1, split="train"))
    await asyncio.sleep(0.2)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, timeout=1.0)
    await buffer.finish(lease.key, Ending(outcome=Outcome.AGENT_ERROR))
    assert len(await asyncio.wait_for(take_groups(buffer, 1, split="train"), 10)) == 1


async def test_workers_run_agents_and_classify_what_they_do(make: Make) -> None:
    buffer = make(Buffer, run_secret=RUN_SECRET)
    spec = AgentConfig(target=f"{agents.__file__}:does", timeout_s=1.0)
    ends = {
        "return": Outcome.FINISHED,
        "raise": Outcome.AGENT_ERROR,
        "hang": Outcome.TIMEOUT,
        "nan": Outcome.BAD_REWARD,
    }
    async with small_gateway(buffer) as url, asyncio.timeout(60), asyncio.TaskGroup() as group:
        workers = [make(RolloutWorker, buffer=buffer, agent=spec, policy_url=url, model="m") for _ in range(2)]
        for worker in workers:
            group.create_task(worker.run())
        for do in ends:
            await buffer.admit(make_task(do=do), split="train", num_rollouts=2)
        groups = await take_groups(buffer, len(ends), split="train")
        for worker in workers:
            await worker.stop()
    assert {g.task.payload["do"]: {t.outcome for t in g.trajectories} for g in groups} == {
        do: {outcome} for do, outcome in ends.items()
    }
    assert (await buffer.stats()).calls == 8


async def test_cancelling_a_worker_ends_its_agents(make: Make) -> None:
    buffer = make(Buffer, run_secret=RUN_SECRET)
    spec = AgentConfig(target=f"{agents.__file__}:score_hangs")
    worker = make(RolloutWorker, buffer=buffer, agent=spec, policy_url="http://127.0.0.1:9", model="m")
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    running = asyncio.create_task(worker.run())
    async with asyncio.timeout(20):
        while (await buffer.stats()).running == 0:
            await asyncio.sleep(0.01)
        running.cancel()
        (group,) = await take_groups(buffer, 1, split="train")
    assert group.trajectories[0].outcome is Outcome.CANCELLED


async def test_a_killed_worker_costs_an_attempt_and_no_rollout(make: Make) -> None:
    buffer = make(Buffer, run_secret=RUN_SECRET, retries=Retries(max_attempts=2), grace=0.0)
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    await buffer.lease(1, timeout=1.0, deadline=0.5)  # its worker is never heard of again
    assert await buffer.expire(time.time() + 1.0) == 1
    (again,) = await buffer.lease(1, timeout=1.0)
    assert again.key.attempt == 1


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_a_pickled_proxy_calls_the_same_actor() -> None:
    sleeper = spawn(Sleeper, options={"name": "sleeper"})
    assert await pickle.loads(pickle.dumps(sleeper)).pid() == await sleeper.pid() != os.getpid()


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_an_actor_holds_no_gpu_and_no_cpu() -> None:
    sleepers = [spawn(Sleeper) for _ in range(3)]  # more than there are CPUs
    assert [await sleeper.gpus() for sleeper in sleepers] == [[], [], []]


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_many_calls_wait_at_a_time() -> None:
    sleeper = spawn(Sleeper)
    await sleeper.pid()
    before = time.monotonic()
    await asyncio.gather(*(sleeper.nap(0.5) for _ in range(200)))
    assert time.monotonic() - before < 5.0


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_a_killed_actor_is_an_error_for_whoever_calls_it() -> None:
    sleeper = spawn(Sleeper)
    napping = asyncio.create_task(sleeper.nap(60.0))
    while await sleeper.started() == 0:
        await asyncio.sleep(0.01)
    kill(sleeper)
    with pytest.raises(ray.exceptions.RayActorError):
        await napping


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_an_error_of_the_constructor_is_raised_by_the_first_call() -> None:
    with pytest.raises(ray.exceptions.ActorDiedError, match="cannot be made"):
        await spawn(Sleeper, fails=True).pid()


def test_only_proxies_can_be_killed() -> None:
    with pytest.raises(TypeError, match="not a proxy"):
        kill(Sleeper())


class KillableBuffer(Buffer):
    async def pid(self) -> int:
        return os.getpid()


@pytest.mark.stack
@pytest.mark.usefixtures("ray_here")
async def test_a_killed_buffer_is_restarted_without_its_clients_noticing(tmp_path: Path) -> None:
    """Calls that wait for an answer, and calls made while the buffer is gone, each take effect once."""
    buffer = spawn(KillableBuffer, restarts=True, run_secret=RUN_SECRET, journal=tmp_path)
    taking = asyncio.create_task(take_groups(buffer, 3, split="train"))
    leasing = asyncio.create_task(buffer.lease(6, timeout=60.0))
    os.kill(await buffer.pid(), signal.SIGKILL)
    async with asyncio.timeout(100):
        groups = await asyncio.gather(*(buffer.admit(make_task(), split="train", num_rollouts=2) for _ in range(3)))
        assert sorted(groups) == ["train-0", "train-1", "train-2"]
        leases = await leasing
        while len(leases) < 6:
            leases += await buffer.lease(6, timeout=1.0)
        calls = [make_call(lease.key, f"{lease.key.rollout_id}-{n}") for lease in leases for n in range(5)]
        recording = asyncio.gather(*map(buffer.record, calls))
        os.kill(await buffer.pid(), signal.SIGKILL)
        await recording
        for lease in leases:
            await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
        taken = await taking
    assert sorted(len(rollout.calls) for group in taken for rollout in group.trajectories) == [5] * 6
    stats = await buffer.stats()
    assert (stats.admitted, stats.taken, stats.calls) == (6, 6, 30)
    kill(buffer)
