"""Everything that an agent does wrong becomes a counted outcome, while the other agents go on and learn."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from agent_lightning.buffer.breaker import Breaker
from agent_lightning.config.learning import AlgorithmConfig, FailuresConfig
from agent_lightning.config.running import AgentConfig, BreakerConfig, RetryConfig
from agent_lightning.core.errors import StepFailed
from agent_lightning.core.types import Outcome, Policy, Task, Trajectory
from agent_lightning.credit.assign import CreditRules
from agent_lightning.credit.failures import Retries
from agent_lightning.rollouts.client import current_rollout
from agent_lightning.run.state import check_conservation, newest_checkpoint, read_state
from agent_lightning.testing.world import ToyWorld

WORDS = ("0", "1", "2", "3")
GOOD = [Task(task_id=f"good-{n}", payload={"do": "answer", "answer": str(n + 1)}) for n in range(2)]
MAX_CALLS = 5
FAULTS = {
    "raise": Outcome.AGENT_ERROR,
    "raise a timeout": Outcome.AGENT_ERROR,
    "exit": Outcome.AGENT_ERROR,
    "hang": Outcome.TIMEOUT,
    "never stop": Outcome.TIMEOUT,
    "nan": Outcome.BAD_REWARD,
    "none": Outcome.BAD_REWARD,
    "text": Outcome.BAD_REWARD,
    "ask nothing": Outcome.NO_MODEL_CALL,
    "ask too long": Outcome.OVERLONG_PROMPT,
    "ask nonsense": Outcome.AGENT_ERROR,
    "ask for ever": Outcome.TOO_MANY_CALLS,
    "ask many at once": Outcome.TOO_MANY_CALLS,
}


class Agent:
    """An agent that answers or misbehaves, as its task says."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client

    async def ask(self, policy: Policy, text: object) -> str | None:
        client = self.client.with_options(base_url=policy.base_url)
        messages: Any = [{"role": "user", "content": text}]
        return (await client.chat.completions.create(model=policy.model, messages=messages)).choices[0].message.content

    async def __call__(self, task: Mapping[str, Any], policy: Policy) -> object:
        if task["do"] == "ask nothing":
            return 1.0
        answer = await self.ask(policy, f"{task['do']} {task.get('answer')}")
        match task["do"]:
            case "raise":
                raise ValueError("a bug")
            case "raise a timeout":
                raise TimeoutError
            case "exit":
                raise SystemExit(1)
            case "hang":
                await asyncio.sleep(60)
            case "never stop":
                while True:
                    try:
                        await asyncio.sleep(0.2)
                    except asyncio.CancelledError:
                        return 1.0
            case "nan":
                return math.nan
            case "none":
                return None
            case "text":
                return answer
            case "ask too long":
                await self.ask(policy, "word " * 1000)
            case "ask nonsense":
                await self.ask(policy, 5)
            case "ask for ever":
                while True:
                    await self.ask(policy, "more")
            case "ask many at once":
                await asyncio.gather(*(self.ask(policy, "more") for _ in range(100)))
            case "fail if wrong" if answer != task["answer"]:
                raise ValueError("the tool did not understand that")
        return float(answer == task.get("answer"))


@pytest.fixture
async def agent() -> AsyncIterator[AgentConfig]:
    async with openai.AsyncOpenAI(base_url="http://unset.invalid", api_key="any", max_retries=0) as client:
        yield AgentConfig(target=Agent(client), timeout_s=20.0, max_calls=MAX_CALLS)


def make_world(agent: AgentConfig, tasks: list[Task], **settings: Any) -> ToyWorld:
    settings = {"concurrency": 64, "max_len": 1024, **settings}
    return ToyWorld(agent=agent, tasks=tasks, words=WORDS, val_tasks=GOOD, **settings)


def trajectories_of(world: ToyWorld, name: str) -> list[Trajectory]:
    return [t for group in world.observer.groups for t in group.trajectories if t.task_id == name]


@pytest.mark.parametrize("kind", ["ends badly", "floods"])
async def test_faulty_agents_are_counted_and_the_others_finish(agent: AgentConfig, kind: str) -> None:
    floods = [name for name in FAULTS if name.startswith("ask ")]
    names = floods if kind == "floods" else [name for name in FAULTS if name not in floods]
    tasks = [*GOOD, *(Task(task_id=name, payload={"do": name}) for name in names)]
    # Without a hanging agent the time is generous, because all agents share an event loop with the gateway.
    agent = agent.model_copy(update={"timeout_s": 20.0 if kind == "floods" else 6.0})
    async with asyncio.timeout(25), make_world(agent, tasks, algorithm=AlgorithmConfig(rollouts_per_task=2)) as world:
        state = await world.train(steps=1)
        stats = await world.buffer.stats()
    expected = Counter({FAULTS[name].value: 0 for name in names})
    for name in names:
        ended = trajectories_of(world, name)
        assert {t.outcome for t in ended} == {FAULTS[name]}, (name, ended[0].error)
        assert all(t.reward is None and t.error and "\n" not in t.error for t in ended)
        expected[FAULTS[name].value] += len(ended)
    assert state.failed == expected == Counter({outcome.value: num for outcome, num in stats.failed.items()})
    record = world.observer.records[0]
    assert {name: record[f"rollouts/failed/{name}"] for name in expected} == expected
    assert state.admitted == state.trained + sum(state.dropped.values()) == 2 * len(tasks)
    assert all(t.outcome is Outcome.FINISHED for task in GOOD for t in trajectories_of(world, task.task_id))


async def test_other_tasks_are_learned_beside_failing_ones(agent: AgentConfig) -> None:
    faults = ("raise", "nan", "ask nothing", "ask for ever")
    tasks = [*GOOD, *(Task(task_id=name, payload={"do": name}) for name in faults)]
    async with asyncio.timeout(25), make_world(agent, tasks) as world:
        state = await world.train(steps=7)
    assert state.val_rewards[0][1] == 0.0
    assert state.val_rewards[-1][1] == 1.0
    assert state.failed == {"agent_error": 56, "bad_reward": 56, "no_model_call": 56, "too_many_calls": 56}


async def test_a_rollout_gets_no_more_samples_than_its_calls_allow(agent: AgentConfig) -> None:
    tasks = [Task(task_id=name, payload={"do": name}) for name in ("ask for ever", "ask many at once")]
    async with make_world(agent, [*GOOD, *tasks], algorithm=AlgorithmConfig(rollouts_per_task=2)) as world:
        await world.train(steps=1)
    for name in ("ask for ever", "ask many at once"):
        assert {len(t.calls) for t in trajectories_of(world, name)} == {MAX_CALLS}


async def test_failures_are_learned_from(agent: AgentConfig) -> None:
    """By default a failure has the reward 0: the policy learns the words with which its agent does not fail."""
    tasks = [Task(task_id="t", payload={"do": "fail if wrong", "answer": "2"})]
    async with make_world(agent, tasks, algorithm=AlgorithmConfig(rollouts_per_task=16)) as world:
        world.loop.val_tasks = tasks
        state = await world.train(steps=10)
    assert (state.val_rewards[0][1], state.val_rewards[-1][1]) == (0.0, 1.0)
    first, last = world.observer.records[0], world.observer.records[-1]
    assert first["rollout/finished"] < 0.6 < 0.8 < last["rollout/finished"]


async def test_failures_that_are_masked_are_not_learned_from(agent: AgentConfig) -> None:
    tasks = [*GOOD, Task(task_id="t", payload={"do": "fail if wrong", "answer": "2"})]
    async with make_world(agent, tasks) as world:
        world.loop.plan = replace(world.loop.plan, rules=CreditRules(failures=FailuresConfig(agent_error=None)))
        state = await world.train(steps=1)
    assert state.dropped["masked_agent_error"] == state.failed["agent_error"] > 0


async def test_engine_failures_are_not_trained(agent: AgentConfig) -> None:
    async with make_world(agent, GOOD) as world:
        await world.loop.evaluate()
        world.engine.fail_next(4)
        state = await world.train(steps=1)
    assert state.failed == {"engine_error": 4}
    assert state.dropped["masked_engine_error"] == 4
    assert world.observer.records[0]["rollout/finished"] == 12 / 16


async def test_agents_that_hang_together_cost_the_time_of_one_timeout(agent: AgentConfig) -> None:
    tasks = [*GOOD, Task(task_id="hang", payload={"do": "hang"})]
    async with make_world(
        agent.model_copy(update={"timeout_s": 4.0}), tasks, algorithm=AlgorithmConfig(rollouts_per_task=16)
    ) as world:
        started = time.monotonic()
        state = await world.train(steps=1)
        assert time.monotonic() - started < 12  # in sequence, 16 timeouts would take 64
    assert state.failed == {"timeout": 16}


async def test_a_failure_that_is_resampled_costs_its_group_no_member(agent: AgentConfig) -> None:
    failed: set[str] = set()

    async def flaky(task: Mapping[str, Any], policy: Policy) -> float:
        reward = await agent.target(task, policy)  # type: ignore[operator]
        rollout = current_rollout()
        assert rollout is not None
        if rollout.rollout_id not in failed and rollout.rollout_id.endswith(("1", "3")):
            failed.add(rollout.rollout_id)
            raise ConnectionError("the search service is away")
        return float(reward)

    spec = agent.model_copy(update={"target": flaky, "tool_errors": ("ConnectionError: *",)})
    retries = Retries(max_attempts=2)
    async with asyncio.timeout(20), make_world(spec, GOOD, retries=retries) as world:
        state = await world.train(steps=1)
        stats = await world.buffer.stats()
    assert (state.failed, stats.retried, world.observer.records[0]["rollouts/retried"]) == ({}, len(failed), 4)
    assert all(len(group.trajectories) == 8 for group in world.observer.groups if group.group_id.startswith("train"))


async def test_a_tool_that_is_down_ends_the_step_early_and_is_named(agent: AgentConfig, tmp_path: Path) -> None:
    """Some agents hang; without the breaker the step would wait for their deadline."""

    async def down(task: Mapping[str, Any], policy: Policy) -> float:
        if task["do"] == "hang":
            await asyncio.sleep(60)
        raise ConnectionError(f"search-{id(task)} refused {policy.base_url}")

    tasks = [*GOOD, Task(task_id="hang", payload={"do": "hang"})]
    tools = {"target": down, "timeout_s": 60.0, "tool_errors": ("ConnectionError*",)}
    spec = agent.model_copy(update=tools)
    settings: dict[str, Any] = {
        "retries": Retries(max_attempts=9, limits=RetryConfig(backoff_s=0)),
        "breaker": Breaker(BreakerConfig(window=12, share=0.8)),
        "checkpoints": tmp_path,
    }
    async with asyncio.timeout(20), make_world(spec, tasks, **settings) as world:
        world.loop.state.val_rewards.append((0, 0.0))
        position = replace(world.loop.state.cursor)
        with pytest.raises(StepFailed) as failed:
            await world.train(steps=3)
        stats = await world.buffer.stats()
    reason = r"generate: \d+ of the last 12 attempts ended alike: tool_error: ConnectionError: search-# refused URL"
    assert re.fullmatch(reason, str(failed.value))
    assert stats.retried <= 24
    state = read_state(newest_checkpoint(tmp_path))  # the state before the failed step
    assert (state.step, state.cursor, state.dropped) == (0, position, {"step_failed": 24})
    check_conservation(state)


async def test_a_step_without_a_success_stops_the_run_even_if_its_failures_are_resampled(agent: AgentConfig) -> None:
    tasks = [Task(task_id="t", payload={"do": "raise"})]
    retries = Retries(max_attempts=3, failures=FailuresConfig(agent_error="resample"), limits=RetryConfig(backoff_s=0))
    async with asyncio.timeout(20), make_world(agent, tasks, retries=retries) as world:
        with pytest.raises(StepFailed, match=r"all 8 rollouts of the step failed: 8 agent_error\. Most often: Value"):
            await world.train(steps=1)
        stats = await world.buffer.stats()
    assert 0 < stats.retried <= 8
