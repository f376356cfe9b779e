"""Injected faults at any part of the toy world: the counts agree, groups stay complete, no span is lost."""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from typing import Any

import pytest
from faults import Agent, Search
from injector import Faults, InjectedError, Link, Rates

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.config.learning import FailuresConfig
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Task
from agent_lightning.credit.failures import Retries
from agent_lightning.testing.world import ToyWorld

pytestmark = pytest.mark.chaos
WORDS = ("red", "green", "blue")


class Part:
    """Keeps the arguments of its calls."""

    def __init__(self) -> None:
        self.received: list[float] = []

    async def add(self, now: float) -> float:
        self.received.append(now)
        await asyncio.sleep(0.01)
        return now

    def plain(self, now: float) -> float:
        return now


async def outcome(call: Any) -> object:
    try:
        async with asyncio.timeout(0.2):
            return await call
    except (OSError, TimeoutError) as error:
        return type(error)


@pytest.mark.parametrize(
    ("fault", "answer", "received"),
    [
        ("error", InjectedError, []),
        ("drop", InjectedError, [1.0]),
        ("hang", TimeoutError, []),
        ("slow", 1.0, [1.0]),
        ("duplicate", 1.0, [1.0, 1.0]),
        ("reorder", 1.0, [1.0]),
        ("disk_full", OSError, []),
        ("clock_jump", 3601.0, [3601.0]),
        ("kill", InjectedError, []),
    ],
)
async def test_each_fault_does_what_its_description_gives(fault: str, answer: object, received: list[float]) -> None:
    part, faults = Part(), Faults(seed=1)
    link = faults.between(part, "part", Rates(**{fault: 1.0}))
    assert await outcome(link.add(1.0)) == answer
    assert part.received == received
    assert faults.counts == {f"part.add: {fault}": 1}


async def test_a_full_disk_is_the_error_of_a_full_disk() -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        Faults(seed=1).between(Part(), "part", Rates(disk_full=1.0)).plain(1.0)
    assert raised.value.errno == errno.ENOSPC


async def test_calls_overtake_each_other() -> None:
    part = Part()
    link = Faults(seed=3).between(part, "part", Rates(reorder=0.5, slow_s=5.0))
    await asyncio.gather(*(link.add(float(number)) for number in range(20)))
    assert sorted(part.received) == list(range(20)) != part.received


async def test_the_same_seed_has_the_same_faults() -> None:
    async def play(seed: int) -> list[object]:
        link = Faults(seed).between(Part(), "part", Rates(error=0.3, drop=0.2, slow=0.2))
        return [await outcome(link.add(float(number))) for number in range(50)]

    assert await play(5) == await play(5) != await play(6)


async def test_a_cut_link_answers_no_call_until_it_is_mended() -> None:
    faults = Faults(seed=1)
    part = faults.between(Part(), "part", Rates())
    link = faults.links["part"]
    assert isinstance(link, Link)
    calling = asyncio.ensure_future(outcome(part.add(1.0)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    link.cut()
    assert [await calling, await outcome(part.add(2.0))] == [InjectedError, InjectedError]
    link.mend(Part())
    assert await outcome(part.add(3.0)) == 3.0


async def test_a_lease_that_a_dead_worker_still_waits_for_gives_it_nothing() -> None:
    buffer, faults = Buffer(run_secret=b"s"), Faults(seed=1)
    worker = faults.between(buffer, "worker", Rates())
    calling = asyncio.ensure_future(outcome(worker.lease(1, 5.0, worker="worker-0.0")))
    await asyncio.sleep(0.02)
    faults.links["worker"].cut()
    assert await calling is InjectedError
    await buffer.release("worker-0.0")
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=1)
    await asyncio.sleep(0.02)
    assert len(await buffer.lease(1, 0.1, worker="worker-0.1")) == 1


TROUBLE = {
    "calls fail": {"engine": Rates(error=0.15)},
    "answers are lost": {"recorder": Rates(drop=0.05, duplicate=0.1)},
    "all of it": {
        "engine": Rates(error=0.05, slow=0.2, reorder=0.1),
        "recorder": Rates(error=0.03, drop=0.03, duplicate=0.1, reorder=0.1),
        "finish": Rates(duplicate=0.2, slow=0.2),
    },
}


@pytest.mark.parametrize("trouble", TROUBLE)
async def test_whatever_fails_the_counts_agree_and_no_acknowledged_span_is_lost_or_doubled(trouble: str) -> None:
    faults = Faults(seed=11)
    agent = Agent(Search(0.0), deadline_s=5.0)
    tasks = [Task(task_id=str(n), payload={"question": f"q{n}", "answer": WORDS[n % 3]}) for n in range(6)]
    async with ToyWorld(
        agent=AgentConfig(target=agent, timeout_s=30.0),
        concurrency=16,
        tasks=tasks,
        words=WORDS,
        num_workers=2,
        retries=Retries(max_attempts=4, failures=FailuresConfig(agent_error="resample")),
        link=faults.linking(TROUBLE[trouble]),
    ) as world:
        training = asyncio.create_task(world.train(steps=2))
        while (await world.buffer.stats()).ended < 20:
            await asyncio.sleep(0.01)
        faults.links["worker-0.0"].cut()  # a worker dies with its rollouts
        state = await training
        stats = await world.buffer.stats()
    assert faults.counts.total() > 10
    assert world.workers.replaced >= 1
    groups = [group for group in world.observer.groups if group.group_id.startswith("train")]
    ended = [trajectory for group in groups for trajectory in group.trajectories]
    assert {len(group.trajectories) for group in groups} == {8}
    assert state.admitted == state.trained + sum(state.dropped.values()) == len(ended) == 96
    assert stats.admitted == stats.trained + sum(stats.dropped.values())
    calls = Counter(call.call_id for trajectory in ended for call in trajectory.calls)
    assert max(calls.values()) == 1
    final = {f"/{t.key.rollout_id}/attempt/{t.key.attempt}/": {call.call_id for call in t.calls} for t in ended}
    known = [(reply, ids) for url, reply in agent.answered for at, ids in final.items() if at in url]
    assert len(known) > 200
    assert all(reply in ids for reply, ids in known)
