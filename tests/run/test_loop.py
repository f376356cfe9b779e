"""The toy world learns, and the invariants of the design hold at every step of it. No Ray."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from agent_lightning.buffer.buffer import Buffer, attempt_secret
from agent_lightning.config.learning import AlgorithmConfig, CreditConfig
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.errors import StepFailed
from agent_lightning.core.types import ModelCall, Outcome, Policy, RolloutKey, Task
from agent_lightning.credit.failures import Retries
from agent_lightning.rollouts.client import emit_reward
from agent_lightning.run.report import untrained
from agent_lightning.run.state import State, newest_checkpoint, read_state
from agent_lightning.serving.gateway import Gateway, GatewayConfig, application
from agent_lightning.testing.model import ToyEngine, ToyLanguage
from agent_lightning.testing.world import SAMPLING, ToyWorld

WORDS = ("0", "1", "2", "3", "4")
TASKS = [Task(task_id=f"t{n}", payload={"question": f"What is {n} plus 1?", "answer": str(n + 1)}) for n in range(4)]
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}


@pytest.fixture
async def client() -> AsyncIterator[openai.AsyncOpenAI]:
    """A client for all rollouts: making a client takes many milliseconds."""
    async with openai.AsyncOpenAI(base_url="http://unset.invalid", api_key="any", max_retries=0) as shared_client:
        yield shared_client


class Asks:
    """An agent as any user would write it, with the plain openai client."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client

    async def __call__(self, task: Mapping[str, Any], policy: Policy) -> float:
        client = self.client.with_options(base_url=policy.base_url)
        reply = await client.chat.completions.create(
            model=policy.model, messages=[{"role": "user", "content": task["question"]}]
        )
        return float(reply.choices[0].message.content == task["answer"])


def make_world(client: openai.AsyncOpenAI, **settings: Any) -> ToyWorld:
    return ToyWorld(**{"agent": Asks(client), "tasks": TASKS, "words": WORDS, **settings})


def change_algorithm(world: ToyWorld, **changes: Any) -> None:
    plan = world.loop.plan
    world.loop.plan = replace(plan, algorithm=plan.algorithm.model_copy(update=changes))


async def check_accounts(world: ToyWorld) -> None:
    """Between steps nothing is open, and every rollout and every token is accounted for."""
    state, stats = world.loop.state, await world.buffer.stats()
    assert stats.admitted == stats.trained + sum(stats.dropped.values())
    assert stats.waiting == stats.running == stats.complete == stats.taken == 0
    assert state.admitted == state.trained + sum(state.dropped.values())
    assert (state.trained, dict(state.dropped)) == (stats.trained, dict(stats.dropped))


async def test_the_toy_world_learns(client: openai.AsyncOpenAI) -> None:
    async with make_world(client) as world:
        state = await world.train(steps=12)
    (first, before), (last, after) = state.val_rewards
    assert (first, last) == (0, 12)
    assert before <= 0.25
    assert after == 1.0
    rewards = [record["train/reward"] for record in world.observer.records]
    assert len(rewards) == 12
    assert rewards[-1] > 0.8 > 0.5 > rewards[0]


async def test_two_turns_with_a_tool_are_learned_as_one_row(client: openai.AsyncOpenAI) -> None:
    """First call the calculator, then repeat its result: neither turn alone is right."""

    async def solve(task: Mapping[str, Any], policy: Policy) -> float:
        mine = client.with_options(base_url=policy.base_url)
        messages: list[Any] = [{"role": "user", "content": task["question"]}]
        for _ in range(2):
            reply = await mine.chat.completions.create(model=policy.model, messages=messages, tools=[TOOL])  # type: ignore[list-item]
            message = reply.choices[0].message
            if not message.tool_calls:
                return 0.2 * (len(messages) > 1) + 0.8 * (message.content == "5" and len(messages) > 1)
            messages.append(message.model_dump(include={"role": True, "tool_calls": True}))
            messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"})
        return 0.1

    task = Task(task_id="sum", payload={"question": "What is 2 plus 3?"})
    async with make_world(
        client, agent=solve, tasks=[task], words=("4", "5", "call:2+3"), algorithm=AlgorithmConfig(rollouts_per_task=24)
    ) as world:
        state = await world.train(steps=15)
    assert state.val_rewards[0][1] == 0.0
    assert state.val_rewards[-1][1] == 1.0
    trajectory = world.observer.groups[-1].trajectories[0]
    assert [call.finish_reason for call in trajectory.calls] == ["stop", "stop"]
    first, second = trajectory.calls
    history = [*first.prompt_T.tolist(), *first.response_T.tolist()]
    assert second.prompt_T.tolist()[: len(history)] == history
    assert world.observer.records[0]["sample/tokens"] > first.prompt_T.size + 2  # merged: a row holds both turns


async def test_a_second_run_learns_the_same_numbers() -> None:
    """Rollouts run in turn, so that the engine draws its random numbers in the same order."""
    runs = []
    for _ in range(2):
        async with openai.AsyncOpenAI(base_url="http://unset.invalid", api_key="any") as client:
            spec = AgentConfig(target=Asks(client))
            async with make_world(client, agent=spec, concurrency=1, seed=7) as world:
                await world.train(steps=3)
                runs.append([record["train/reward"] for record in world.observer.records])
    assert runs[0] == runs[1]


# The invariants, by their number in the design.


class Holding:
    """A recorder that keeps its acknowledgement back."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer
        self.recorded = asyncio.Event()
        self.release = asyncio.Event()

    async def record(self, call: ModelCall) -> int:
        left = await self.buffer.record(call)
        self.recorded.set()
        await self.release.wait()
        return left

    async def note_failure(self, key: RolloutKey, outcome: Outcome, error: str) -> None:
        await self.buffer.note_failure(key, outcome, error)


async def test_1_a_call_is_recorded_before_it_is_answered() -> None:
    secret = b"secret"
    recorder = Holding(Buffer(run_secret=secret))
    config = GatewayConfig(model="policy", run_secret=secret, sampling=SAMPLING)
    gateway = Gateway(engine=ToyEngine(ToyLanguage(WORDS)), recorder=recorder, config=config)
    await recorder.buffer.admit(TASKS[0], split="train", num_rollouts=1)
    ((key,),) = [[lease.key for lease in await recorder.buffer.lease(1, 1.0)]]
    url = f"http://g/rollout/{key.rollout_id}/attempt/0/{attempt_secret(secret, key)}/agent/v1/chat/completions"
    async with asyncio.timeout(5), httpx.AsyncClient(transport=httpx.ASGITransport(application(gateway))) as http:
        asking = asyncio.create_task(http.post(url, json={"messages": [{"role": "user", "content": "?"}]}))
        await recorder.recorded.wait()
        await asyncio.sleep(0.1)
        assert not asking.done()
        assert (await recorder.buffer.stats()).calls == 1
        recorder.release.set()
        assert (await asking).status_code == 200


async def test_2_every_rollout_ends_exactly_once(client: openai.AsyncOpenAI) -> None:
    async with make_world(client) as world:
        await world.train(steps=3)
        stats = await world.buffer.stats()
    keys = [trajectory.key for group in world.observer.groups for trajectory in group.trajectories]
    assert len(keys) == len(set(keys)) == stats.ended == 3 * 4 * 8 + 2 * 4
    for group in world.observer.groups:
        for trajectory in group.trajectories:
            assert (trajectory.reward is not None) == (trajectory.outcome is Outcome.FINISHED)


async def test_3_and_5_the_accounts_balance_and_every_call_has_the_steps_version(client: openai.AsyncOpenAI) -> None:
    async with make_world(client) as world:
        for _ in range(8):
            version, seen = world.loop.state.version, len(world.observer.groups)
            sampled = trained = dropped = 0
            assert await world.loop.step()
            await check_accounts(world)
            for group in world.observer.groups[seen:]:
                for trajectory in group.trajectories:
                    assert [call.policy_version for call in trajectory.calls] == [version]
                    sampled += sum(call.response_T.size for call in trajectory.calls)
                rewards = {trajectory.reward for trajectory in group.trajectories}
                tokens = sum(call.response_T.size for t in group.trajectories for call in t.calls)
                trained, dropped = trained + tokens * (len(rewards) > 1), dropped + tokens * (len(rewards) == 1)
            record = world.observer.records[-1]
            assert (record["tokens/sampled"], record["tokens/trained"]) == (sampled, trained)
            assert sampled == trained + dropped
            assert set((await world.board.versions()).values()) == {world.loop.state.version}
        state = world.loop.state
        assert state.sampled_tokens >= state.trained_tokens > 0


async def test_6_the_learner_believes_what_the_engine_sampled(client: openai.AsyncOpenAI) -> None:
    async with make_world(client) as world:
        state = await world.train(steps=6)
    gaps = [record["logprob_gap/max_abs"] for record in world.observer.records if record["tokens/trained"]]
    assert gaps
    assert state.gap_max == max(gaps) < 1e-5


# Stop and resume.


async def test_a_run_stopped_in_the_middle_loses_nothing(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    async with asyncio.timeout(20), make_world(client, checkpoints=tmp_path) as world:
        training = asyncio.create_task(world.train(steps=50))
        while world.loop.state.step < 3:
            await asyncio.sleep(0.001)
        world.engine.delay_s = 60.0  # a stop that waited for the running calls would meet the timeout
        while (await world.buffer.stats()).running == 0:
            await asyncio.sleep(0.001)
        position = (world.loop.state.cursor.epoch, world.loop.state.cursor.position)
        world.stop()
        state = await training
        await check_accounts(world)
    assert position
    assert 3 <= state.step < 50
    assert state.dropped["run_stopped"] == 4 * 8
    saved = read_state(newest_checkpoint(tmp_path))
    assert saved == state
    assert saved.cursor.epoch == state.step  # a step is an epoch here, and the abandoned step does not count
    assert saved.next_group == {"train": state.step * 4 + 4, "val": 4}


async def test_a_run_stopped_before_its_first_step_can_be_resumed(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    async with make_world(client, checkpoints=tmp_path) as world:
        world.stop()
        state = await world.train(steps=5)
        assert (state.step, state.val_rewards) == (0, [])
    async with make_world(client, checkpoints=tmp_path, resume=True) as world:
        state = await world.train(steps=1)
    assert [step for step, _ in state.val_rewards] == [0, 1]


async def test_a_resumed_run_continues_where_it_was(client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    tasks = TASKS[:3]
    async with make_world(client, tasks=tasks, checkpoints=tmp_path) as world:
        change_algorithm(world, tasks_per_step=2)
        before = await world.train(steps=5)
    async with make_world(client, tasks=tasks, checkpoints=tmp_path, resume=True) as world:
        change_algorithm(world, tasks_per_step=2)
        state = world.loop.state
        assert (state.step, state.cursor, state.trained) == (before.step, before.cursor, before.trained)
        assert set((await world.board.versions()).values()) == {state.version}
        assert state.version == before.version
        assert await world.loop.evaluate() == before.val_rewards[-1][1]
        state = await world.train(steps=15)
        numbers = [group.trajectories[0].key.group for group in world.observer.groups]
    trained = [step for step, _ in state.val_rewards]
    assert trained == [0, 5, 5, 15]
    assert state.val_rewards[-1][1] == 1.0
    assert (state.cursor.epoch, state.cursor.position) == (10, 0)  # 15 steps of 2 tasks out of 3
    assert min(numbers[3:9]) >= 3  # numbers of groups go on: no rollout id is used twice
    assert state.admitted == 15 * 2 * 8 == state.trained + sum(state.dropped.values())


async def test_a_step_in_which_everything_fails_ends_the_run(client: openai.AsyncOpenAI) -> None:
    async def solve(task: Mapping[str, Any], policy: Policy) -> float:
        reward = await Asks(client)(task, policy)
        if "/val-" in policy.base_url:
            return reward
        if task["answer"] in ("1", "2"):
            raise ValueError("no idea")
        return float("nan")

    with pytest.raises(StepFailed) as failed:
        async with make_world(client, agent=solve) as world:
            await world.train(steps=5)
    assert "all 32 rollouts of the step failed: 16 agent_error, 16 bad_reward" in str(failed.value) or (
        "all 32 rollouts of the step failed: 16 bad_reward, 16 agent_error" in str(failed.value)
    )
    assert "Most often: " in str(failed.value)
    assert world.loop.state.step == 0


async def test_an_engine_that_recovers_costs_an_attempt_and_no_rollout(client: openai.AsyncOpenAI) -> None:
    async with make_world(client, retries=Retries(max_attempts=20)) as world:
        world.engine.fail_next(10)
        state: State = await world.train(steps=1)
        stats = await world.buffer.stats()
    assert stats.retried == 10
    assert not state.failed


async def test_a_step_with_nothing_to_learn_changes_nothing(client: openai.AsyncOpenAI) -> None:
    async def always_right(task: Mapping[str, Any], policy: Policy) -> float:
        await Asks(client)(task, policy)
        return 1.0

    async with make_world(client, agent=always_right) as world:
        state = await world.train(steps=2)
        await check_accounts(world)
    assert (state.version, state.trained, state.dropped) == (0, 0, {"no_spread": 64})
    assert untrained(world.observer.records[0]) == "all 4 groups had equal rewards"
    assert world.observer.records[0]["train/reward_ci95"] == 0
    assert state.val_ci95 == [(step, 0.0) for step, _ in state.val_rewards]


async def test_after_some_steps_groups_that_mostly_succeed_are_trained_too(client: openai.AsyncOpenAI) -> None:
    num_asked: Counter[str] = Counter()

    async def mostly_right(task: Mapping[str, Any], policy: Policy) -> float:
        await Asks(client)(task, policy)
        num_asked[task["question"]] += 1
        return float(num_asked[task["question"]] % 8 > 0)

    async with make_world(client, agent=mostly_right) as world:
        credit = CreditConfig(pass_at=4, pass_at_steps=1)
        world.loop.plan = replace(world.loop.plan, rules=replace(world.loop.plan.rules, credit=credit))
        state = await world.train(steps=2)
        await check_accounts(world)
    assert (state.trained, state.dropped) == (32, {"no_spread": 32})
    assert [record["rollouts/trained"] for record in world.observer.records] == [0, 32]


async def test_groups_without_samples_are_replaced(client: openai.AsyncOpenAI) -> None:
    num_asked: Counter[str] = Counter()

    async def easy_or_not(task: Mapping[str, Any], policy: Policy) -> float:
        await Asks(client)(task, policy)
        num_asked[task["question"]] += 1
        # The first task is always right; of the others every second rollout is.
        return float(task["answer"] == "1" or num_asked[task["question"]] % 2)

    async with make_world(client, agent=easy_or_not) as world:
        change_algorithm(world, dynamic_sampling_rounds=3)
        state = await world.train(steps=1)
        await check_accounts(world)
    # A task of the four gives no samples: further tasks are drawn until four groups give samples.
    assert state.trained == 32
    assert state.dropped["no_spread"] >= 8
    assert state.admitted == state.trained + state.dropped["no_spread"]


async def test_dynamic_sampling_ends_if_nothing_can_be_learned(client: openai.AsyncOpenAI) -> None:
    async def always_right(task: Mapping[str, Any], policy: Policy) -> float:
        await Asks(client)(task, policy)
        return 1.0

    async with make_world(client, agent=always_right) as world:
        change_algorithm(world, dynamic_sampling_rounds=2)
        state = await world.train(steps=1)
        await check_accounts(world)
    assert (state.step, state.trained, state.dropped) == (1, 0, {"no_spread": 3 * 32})


# Rewards that people write, and evaluations that fail.


async def ask_once(client: openai.AsyncOpenAI, task: Mapping[str, Any], policy: Policy) -> str:
    await Asks(client)(task, policy)
    return str(task["answer"])


@pytest.mark.parametrize("way", ["score", "emitted", "returned"])
async def test_a_reward_outside_the_range_stops_the_run_and_names_the_keys(
    client: openai.AsyncOpenAI, way: str
) -> None:
    async def solve(task: Mapping[str, Any], policy: Policy) -> object:
        output = await ask_once(client, task, policy)
        if way == "emitted":
            emit_reward({"format": 1.0, "answer": 1.0})
        return {"score": output, "emitted": None, "returned": 2.0}[way]

    agent = AgentConfig(target=solve, timeout_s=20.0, reward=(lambda task, output: 2) if way == "score" else None)
    with pytest.raises(
        StepFailed, match=r"the reward 2 is outside \[0, 1\]: set agent.reward_min and agent.reward_max"
    ):
        async with make_world(client, agent=agent) as world:
            await world.train(steps=3)
    assert world.loop.state.step == 0
    assert any("outside [0, 1]" in t.error for group in world.observer.groups for t in group.trajectories)


async def test_parts_of_rewards_are_weighed_and_measured(client: openai.AsyncOpenAI) -> None:
    async def solve(task: Mapping[str, Any], policy: Policy) -> dict[str, Any]:
        return {"answer": await Asks(client)(task, policy), "format": True}

    agent = AgentConfig(target=solve, timeout_s=20.0, part_weights={"answer": 0.75, "format": 0.25})
    async with make_world(client, agent=agent) as world:
        state = await world.train(steps=12)
    assert state.val_rewards[-1][1] == 1.0
    first = world.observer.records[0]
    assert first["reward_part/format"] == 1.0
    assert first["train/reward"] == pytest.approx(0.75 * first["reward_part/answer"] + 0.25)


async def test_rollouts_without_a_score_are_left_out_and_counted(client: openai.AsyncOpenAI) -> None:
    async def score(task: Mapping[str, Any], output: float) -> float | None:
        if task["answer"] == "1":
            return None
        if task["answer"] == "2":
            raise ValueError("the scorer's own")
        return float(output)

    agent = AgentConfig(target=Asks(client), timeout_s=20.0, reward=score)
    async with make_world(client, agent=agent) as world:
        state = await world.train(steps=12)
        await check_accounts(world)
    assert state.val_rewards[-1][1] == 1.0  # of the two tasks that are scored
    assert state.failed == {"unscored": 96, "scorer_error": 96}
    assert (state.dropped["masked_unscored"], state.dropped["masked_scorer_error"]) == (96, 96)


async def test_an_evaluation_that_fails_whole_stops_the_run_and_its_rollouts_are_kept(
    client: openai.AsyncOpenAI,
) -> None:
    def score(task: Mapping[str, Any], output: str) -> float:
        return float(task["anwser"] == output)

    agent = AgentConfig(target=partial(ask_once, client), timeout_s=20.0, reward=score)
    with pytest.raises(StepFailed) as failed:
        async with make_world(client, agent=agent) as world:
            await world.train(steps=3)
    line = (
        r"all 4 rollouts of the evaluation failed: 4 scorer_error. Most often: KeyError: 'anwser' \(tests/run/test_loop"
    )
    assert re.match(line, str(failed.value))
    kept = [t for group in world.observer.groups for t in group.trajectories]
    assert len(kept) == 4
    assert all("in score" in t.trace for t in kept)


async def test_the_rollouts_of_a_failed_step_are_kept(client: openai.AsyncOpenAI) -> None:
    async def solve(task: Mapping[str, Any], policy: Policy) -> float:
        reward = await Asks(client)(task, policy)
        if "/train-" in policy.base_url:
            raise ValueError("only in training")
        return reward

    with pytest.raises(StepFailed, match=r"all 32 rollouts of the step failed: 32 agent_error. Most often: ValueError"):
        async with make_world(client, agent=solve) as world:
            await world.train(steps=3)
    splits = Counter(t.key.split for group in world.observer.groups for t in group.trajectories)
    assert splits == {"val": 4, "train": 32}


async def test_a_run_without_held_out_tasks_trains_and_evaluates_nothing(client: openai.AsyncOpenAI) -> None:
    async with make_world(client) as world:
        world.loop.val_tasks = ()
        state = await world.train(steps=2)
    assert (state.step, state.val_rewards, world.observer.evaluations) == (2, [], [])
