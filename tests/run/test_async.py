"""Rollouts and training overlap by at most `loop.max_lag` updates; at 0 a run has its old figures, bit for bit."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import Agent, agent, make_world
from toy_figures import CASES, figures

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.taken import Deadlines
from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import LoopConfig, RetryConfig
from agent_lightning.core.errors import UnknownRollout
from agent_lightning.core.types import Batch, Ending, Group, ModelCall, Outcome, RolloutKey, Task
from agent_lightning.credit.assign import CreditRules
from agent_lightning.credit.failures import Retries
from agent_lightning.learners.base import Update, Weights
from agent_lightning.run.loop import Loop
from agent_lightning.run.report import lag_text
from agent_lightning.run.sampler import Evaluation
from agent_lightning.run.state import Plan, State, check_conservation
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.testing.world import QuietObserver, ToyWorld

__all__ = ["agent"]  # the fixture
STORED = json.loads((Path(__file__).parent / "toy_figures.json").read_text())


@pytest.mark.parametrize("case", CASES)
async def test_without_lag_a_run_has_the_figures_of_before_bit_for_bit(case: str) -> None:
    run, stored = json.loads(json.dumps(await figures(case))), STORED[case]
    for record, before in zip(run["records"], stored["records"], strict=True):
        assert record.items() >= before.items()  # metrics that are newer than the stored figures
    assert {**run, "records": 0} == {**stored, "records": 0}


# The bound: how many updates old a trained token may be.


@settings(max_examples=300, deadline=None)
@given(
    max_lag=st.integers(0, 4), size=st.integers(1, 4), seed=st.integers(0, 2**32), slow=st.floats(0.0, 0.9)
)  # fmt: skip
def test_deadlines_let_groups_overtake_and_hold_the_bound(max_lag: int, size: int, seed: int, slow: float) -> None:
    """A model of the loop: groups are admitted, become complete in any order, and are chosen; a step may have no
    update."""
    source, version, number = random.Random(seed), 0, 0
    queue: dict[str, int] = {}  # group -> version when it was admitted
    complete: set[str] = set()
    for _ in range(30):
        while len(queue) < size * (max_lag + 1):
            queue[f"g{number}"] = version
            number += 1
        slack = {group: admitted + max_lag - version for group, admitted in queue.items()}
        deadlines = Deadlines(slack=slack, groups_per_step=size)
        while not (chosen := deadlines.choose(complete, size)):
            running = [group for group in queue if group not in complete]  # never empty: then the oldest are chosen
            quick = [group for group in running if hash((seed, group)) % 100 >= 100 * slow]
            complete.add(source.choice(quick or running))
        assert len(chosen) == size
        for group in chosen:
            assert version - queue.pop(group) <= max_lag
            complete.remove(group)
        version += source.random() < 0.9


@dataclass
class Engine:
    """Board, learner and observer of a run whose rollouts are played by `play`; it checks the books as it goes."""

    max_lag: int
    buffer: Buffer = field(default_factory=lambda: Buffer(run_secret=b"s", retries=RETRIES))
    version: int = 0
    trained: list[str] = field(default_factory=list)  # ids of rollouts, in the order of their steps
    lags: list[int] = field(default_factory=list)

    async def publish(self, weights: Weights | None = None, timeout: float = 0.0) -> Any:
        """As board with weights, as learner without."""
        await asyncio.sleep(0)
        if weights is not None:
            self.version = weights.version
        return Weights(version=self.version + 1, buckets=())

    async def update(self, batches: Sequence[Batch], *, epochs: int) -> Update:
        for _ in range(20):
            await asyncio.sleep(0)
            await self.check()
        return Update(metrics={})

    def waiting_for(self, text: str) -> None: ...
    def record_evaluation(self, step: int, evaluation: Evaluation) -> None: ...
    def record_step(self, step: int, record: Mapping[str, float]) -> None: ...
    def checkpoint_folder(self, state: State, *, force: bool) -> None: ...

    def record_rollouts(self, step: int, version: int, groups: Sequence[Group], logprobs: Any = None) -> None:
        for rollout in (rollout for group in groups for rollout in group.trajectories):
            if rollout.key.split == "train":
                self.trained.append(rollout.key.rollout_id)
                self.lags += [version - of_token for call in rollout.calls for of_token in call.version_T.tolist()]
            else:
                assert {call.policy_version for call in rollout.calls} <= {self.version}  # one version answers it

    async def check(self) -> None:
        stats = await self.buffer.stats()
        open_ = stats.waiting + stats.running + stats.complete + stats.taken
        assert stats.admitted == open_ + stats.trained + sum(stats.dropped.values())

    async def play(self, worker: str, source: random.Random) -> None:
        """A worker that leases rollouts for ever: they finish, fail, are retried, straggle, or die with it."""
        for life in itertools.count():
            name, dies = f"{worker}.{life}", False
            while not dies:
                for lease in await self.buffer.lease(1, 1.0, worker=name):
                    try:
                        for _ in range(source.choice((1, 2, 5, 200))):  # the last one is a straggler
                            await asyncio.sleep(0)
                        await self.buffer.record(self.call(lease.key, source))
                        dies = source.random() < 0.15 and lease.key.index > 0
                        outcome = source.choice((Outcome.FINISHED, Outcome.FINISHED, *FAILURES))
                        if lease.key.index == 0:  # a step in which all rollouts fail would end the run
                            outcome = Outcome.FINISHED
                        reward = float(source.random() < 0.5) if outcome is Outcome.FINISHED else None
                        if not dies:
                            await self.buffer.finish(lease.key, Ending(outcome=outcome, reward=reward))
                    except UnknownRollout:
                        pass  # it was cancelled
                    await self.check()
            await self.buffer.release(name)

    def call(self, key: RolloutKey, source: random.Random) -> ModelCall:
        token_T, logprob_T = np.array([3, 4], np.int32), np.array([-0.5, -0.1], np.float32)
        return ModelCall(
            key=key, call_id=f"{key.rollout_id}/{key.attempt}/{source.random()}", agent="agent", prompt_T=token_T,
            response_T=token_T, logprob_T=logprob_T, policy_version=self.version, finish_reason="stop", started_at=0.0,
            ended_at=1.0,
        )  # fmt: skip

    def loop(self, steps: int, **algorithm: int) -> Loop:
        plan = Plan(
            steps=steps, algorithm=AlgorithmConfig(rollouts_per_task=2, **algorithm), eval_every=2, pad_token=0,
            loop=LoopConfig(max_lag=self.max_lag), rules=CreditRules(), row_multiple=1,
        )  # fmt: skip
        parts: Any = {"board": self, "learner": self, "observer": self}
        tasks = [Task(task_id=f"t{n}", payload={}) for n in range(5)]
        state = State(cursor=TaskCursor(seed=0))
        return Loop(plan=plan, state=state, buffer=self.buffer, train_tasks=tasks, val_tasks=tasks[:2], **parts)


RETRIES = Retries(max_attempts=3, limits=RetryConfig(backoff_s=0.0, budget=float("inf")))
FAILURES = (Outcome.AGENT_ERROR, Outcome.ENGINE_ERROR, Outcome.TIMEOUT)


@settings(max_examples=60, deadline=None)
@given(max_lag=st.integers(0, 3), size=st.integers(1, 3), rounds=st.integers(0, 1), seed=st.integers(0, 2**32))
def test_no_trained_token_is_older_than_the_bound(max_lag: int, size: int, rounds: int, seed: int) -> None:
    async def run() -> None:
        engine, steps = Engine(max_lag), 5
        loop = engine.loop(steps, tasks_per_step=size, dynamic_sampling_rounds=rounds)
        workers = [asyncio.create_task(engine.play(f"w{n}", random.Random(seed + n))) for n in range(4)]
        running = asyncio.create_task(loop.run())
        try:
            async with asyncio.timeout(10):
                await asyncio.wait((running, *workers), return_when=asyncio.FIRST_COMPLETED)
                await running
        finally:
            for task in (running, *workers):
                task.cancel()
        await engine.check()
        stats, state = await engine.buffer.stats(), loop.state
        assert max(engine.lags, default=0) <= max_lag
        assert len(engine.trained) == len(set(engine.trained)) == stats.admitted == state.admitted
        assert stats.waiting == stats.running == stats.complete == stats.taken == len(state.in_flight) == 0
        assert state.step == steps
        assert state.admitted == state.trained + sum(state.dropped.values())

    asyncio.run(run())


# Stop, kill and resume with rollouts in flight.


@dataclass(kw_only=True)
class StepObserver(QuietObserver):
    """Keeps the training groups of each step, of which a resumed run may make some again."""

    steps: dict[int, tuple[int, Sequence[Group]]] = field(default_factory=dict)

    def record_rollouts(self, step: int, version: int, groups: Sequence[Group], logprobs: Any = None) -> None:
        if groups[0].trajectories[0].key.split == "train":
            self.steps[step] = version, groups


async def enter(world: ToyWorld, max_lag: int, observer: StepObserver, stack: AsyncExitStack) -> ToyWorld:
    world.overlap, world.seeded = LoopConfig(max_lag=max_lag), False
    await stack.enter_async_context(world)
    observer.checkpoints, observer.every = world.checkpoints, world.checkpoint_every
    world.observer = world.loop.observer = observer
    return world


async def check_run(world: ToyWorld, observer: StepObserver, max_lag: int, steps: int) -> None:
    state, stats = world.loop.state, await world.buffer.stats()
    check_conservation(state)
    assert (state.step, sorted(observer.steps)) == (steps, list(range(1, steps + 1)))
    assert (state.admitted, state.trained) == (stats.admitted, stats.trained)
    assert stats.waiting == stats.running == stats.complete == stats.taken == 0
    rollouts = [t for _, groups in observer.steps.values() for group in groups for t in group.trajectories]
    assert len({t.key.rollout_id for t in rollouts}) == len(rollouts) == steps * 3 * 4
    calls = [call.call_id for t in rollouts for call in t.calls]
    assert len(set(calls)) == len(calls) == 2 * len(rollouts)
    for version, groups in observer.steps.values():
        trained = [call for group in groups for t in group.trajectories for call in t.calls]
        lags = [version - of_token for call in trained for of_token in call.version_T.tolist()]
        assert 0 <= min(lags) <= max(lags) <= max_lag


@pytest.mark.parametrize(("max_lag", "every"), [(1, 1), (1, 3), (4, 2)])
async def test_a_run_killed_anywhere_goes_on_with_what_was_in_flight(
    agent: Agent, tmp_path: Path, max_lag: int, every: int
) -> None:
    steps, source, observer = 6, random.Random(max_lag + every), StepObserver()
    folder, resume, done, life = tmp_path / "0", False, False, 0
    while not done:
        life += 1
        agent.ended, agent.snapshot_taken = [], asyncio.Event()
        agent.snapshot_after, agent.snapshot = source.randrange(3, 30), (folder, tmp_path / f"{life}")
        async with asyncio.timeout(30), AsyncExitStack() as stack:
            world = make_world(agent, folder, every=every, resume=resume)
            await enter(world, max_lag, observer, stack)
            training = asyncio.create_task(world.train(steps=steps))
            killed = asyncio.create_task(agent.snapshot_taken.wait())
            await asyncio.wait((training, killed), return_when=asyncio.FIRST_COMPLETED)
            done = training.done() and not training.cancelled()
            if done:
                training.result()
                await check_run(world, observer, max_lag, steps)
            training.cancel()
            killed.cancel()
            await asyncio.wait((training, killed))
        folder, resume = tmp_path / f"{life}", True
    assert life > 2


@pytest.mark.parametrize("journal", [True, False])
async def test_a_stopped_run_redoes_the_tasks_that_were_in_flight(agent: Agent, tmp_path: Path, journal: bool) -> None:
    observer = StepObserver()
    for steps, resume in ((50, False), (6, True)):
        async with asyncio.timeout(30), AsyncExitStack() as stack:
            world = make_world(agent, tmp_path, every=1, resume=resume)
            world.journal = world.journal if journal else None
            await enter(world, 2, observer, stack)
            training = asyncio.create_task(world.train(steps=steps))
            if not resume:
                while world.loop.state.step < 3:
                    await asyncio.sleep(0.001)
                world.stop()
            state = await training
            check_conservation(state)
            assert not state.in_flight
            if not resume:
                assert state.dropped["run_stopped"] == 4 * len(state.redo) > 0
                redo = state.redo
            else:
                drawn = {group.task.task_id for _, groups in observer.steps.values() for group in groups}
                assert set(redo) <= drawn
                assert not state.redo
    assert sorted(observer.steps) == list(range(1, 7))


async def test_without_a_journal_what_was_in_flight_is_counted_and_made_anew(agent: Agent, tmp_path: Path) -> None:
    observer = StepObserver()
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        world = make_world(agent, tmp_path, every=1)
        world.journal = None
        await enter(world, 1, observer, stack)
        training = asyncio.create_task(world.train(steps=50))
        while world.loop.state.step < 3:
            await asyncio.sleep(0.001)
        training.cancel()
        await asyncio.wait((training,))
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        world = make_world(agent, tmp_path, every=1, resume=True)
        world.journal = None
        await enter(world, 1, observer, stack)
        assert world.loop.state.dropped["run_stopped"] == 4 * len(world.loop.state.redo) == 4 * 3
        state = await world.train(steps=6)
    assert (state.step, state.dropped["run_stopped"], state.redo) == (6, 12, [])


async def test_groups_with_tokens_that_are_too_old_are_dropped_if_a_user_wants_it(agent: Agent, tmp_path: Path) -> None:
    observer = StepObserver()
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        world = await enter(make_world(agent, tmp_path, every=0), 3, observer, stack)
        rules = replace(world.loop.plan.rules, drop_beyond=0)
        world.loop.plan = replace(world.loop.plan, loop=LoopConfig(max_lag=3, drop_beyond=0), rules=rules)
        state = await world.train(steps=6)
        stats = await world.buffer.stats()
    check_conservation(state)
    assert state.dropped["stale"] == stats.dropped["stale"] > 0
    assert all(record.get("lag/max", 0) == 0 for record in world.observer.records)


def test_the_terminal_shows_the_lag_of_a_step_that_has_one() -> None:
    record = {"lag/mean": 0.81, "lag/max": 2.0, "time/rollout_p50": 9.1, "time/rollout_p99": 75.0}
    record |= {"time/engine_idle": 0.2, "time/learner_idle": 4.2}
    line = "0.8, max 2; rollouts p50 9 s, p99 1:15; idle: engines 0 s, learner 4 s"
    assert lag_text(record) == line
    assert lag_text({"lag/mean": 0.0, "lag/max": 0.0}) == lag_text({}) == ""
