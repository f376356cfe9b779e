"""Every token from the gateway's record to the row that trains it, over random rollouts of several agents with
sub-agents, retries and failures, and with calls that arrive in any order."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import numpy as np
from builders import model_call
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.config.learning import CreditConfig, Method
from agent_lightning.core.errors import UnknownRollout
from agent_lightning.core.types import Ending, Group, ModelCall, Outcome, RolloutKey, Task
from agent_lightning.credit.assign import Credit, CreditRules, assign
from agent_lightning.credit.batching import pack, unpack
from agent_lightning.credit.failures import Retries, learned_reward
from agent_lightning.credit.samples import by_call

FAILURES = [Outcome.AGENT_ERROR, Outcome.ENGINE_ERROR, Outcome.TIMEOUT, Outcome.CANCELLED]


class Story:
    """The events of a group: the attempts of each rollout, each with calls and an ending. A seed determines them."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.token = 100  # each sampled token is a different number, so that it can be traced
        self.rollouts = [
            [self._attempt(draw, index, attempt) for attempt in range(draw.choice([1, 1, 1, 2, 3]))]
            for index in range(draw.randint(2, 4))
        ]

    def _attempt(self, draw: random.Random, index: int, attempt: int) -> tuple[list[ModelCall], Outcome, float | None]:
        key = RolloutKey(split="train", group=0, index=index, attempt=attempt)
        histories: dict[str, list[int]] = {}
        calls = []
        for n in range(draw.randint(0, 6)):
            agent = draw.choice(["writer", "writer/helper", "judge"])
            fresh = agent not in histories or draw.random() < 0.2  # a new conversation
            history = [1, n] if fresh else [*histories[agent], 2]
            response = list(range(self.token, self.token + draw.randint(0, 3)))
            self.token += len(response)
            calls.append(model_call(key, history, response, agent=agent, started_at=float(n), call_id=f"{key}-{n}"))
            histories[agent] = [*history, *response]
        outcome = draw.choice([Outcome.FINISHED, Outcome.FINISHED, *FAILURES])
        return calls, outcome, float(draw.randint(0, 1)) if outcome is Outcome.FINISHED else None


async def play(story: Story, arrival: random.Random) -> tuple[Group, Counter[str]]:
    """The group that the buffer returns, and the number of calls that it refused because their attempt had ended."""
    attempts = max(len(rollout) for rollout in story.rollouts)
    buffer, refused = Buffer(run_secret=b"s", retries=Retries(max_attempts=attempts)), Counter[str]()
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=len(story.rollouts))

    async def record(call: ModelCall) -> None:
        try:
            await buffer.record(call)
        except UnknownRollout:
            refused["late"] += 1

    for _ in range(attempts):
        for lease in await buffer.lease(99, 0.0):
            rollout = story.rollouts[lease.key.index]
            if lease.key.attempt >= len(rollout):  # an engine error leads to one attempt more than the story has
                await buffer.finish(lease.key, Ending(outcome=Outcome.AGENT_ERROR))
                continue
            calls, outcome, reward = rollout[lease.key.attempt]
            shuffled = arrival.sample(calls, len(calls))
            for call in [*shuffled, *arrival.sample(calls, len(calls) // 2)]:  # some of them twice
                await record(call)
            await buffer.finish(
                lease.key, Ending(outcome=outcome, reward=reward), retry=lease.key.attempt + 1 < len(rollout)
            )
            for call in shuffled[:1]:
                await record(call)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.0):
            (group,) = await buffer.take(1, split="train")
            return group.assemble(), refused
    await buffer.cancel("the story is over")
    (group,) = await buffer.take(1, split="train")
    return group.assemble(), refused


def rows(credit: Credit) -> list[tuple[object, ...]]:
    return [(s.key, s.token_T.tolist(), s.mask_T.tolist(), s.advantage_T.tolist()) for s in credit.samples]


@settings(max_examples=1000, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["*", "writer*", "judge"]),
    st.sampled_from(["identical", "return_to_go", "same_state"]),
    st.integers(4, 30),
)
def test_every_token_is_trained_once_or_dropped_for_a_reason_whatever_the_order_of_arrival(
    seed: int, agents: str, method: Method, max_tokens: int
) -> None:
    story = Story(seed)
    rules = CreditRules(agents=agents, credit=CreditConfig(method=method), max_tokens=max_tokens)
    group, refused = asyncio.run(play(story, random.Random(seed)))
    credit = assign(group, rules)
    # Only the last attempt of each rollout counts; calls after its end were refused.
    for trajectory in group.trajectories:
        attempts = story.rollouts[trajectory.key.index]
        calls = attempts[trajectory.key.attempt][0] if trajectory.key.attempt < len(attempts) else []
        assert [call.call_id for call in trajectory.calls] == [call.call_id for call in calls]
    assert refused["late"] == sum(bool(calls) for rollout in story.rollouts for calls, _, _ in rollout)
    # What the learner computes for a batch comes back to the calls that sampled the tokens.
    batches = pack(credit.samples, rollouts_per_batch=2, pad_token=0, row_multiple=3)
    learnt = unpack(credit.samples, batches, [batch.logprob_NT for batch in batches])
    returned = by_call(learnt, group.trajectories, agents)
    for trajectory in group.trajectories:
        for call in trajectory.calls:
            values_T = returned.pop((trajectory.key.rollout_id, call.call_id), None)
            assert values_T is None or values_T.tolist() == call.logprob_T.tolist()
            is_trained = any(set(call.response_T.tolist()) & set(s.token_T[s.mask_T].tolist()) for s in credit.samples)
            assert is_trained == (values_T is not None)
    assert not returned
    # Each token of a selected call is in exactly one row, or dropped; no other token is in any row.
    trained = Counter(token for s in credit.samples for token in s.token_T[s.mask_T].tolist())
    chosen = [c for t in group.trajectories for c in t.calls if agents == "*" or c.agent.startswith(agents.rstrip("*"))]
    sampled = {token for call in chosen for token in call.response_T.tolist()}
    assert max(trained.values(), default=1) == 1
    assert trained.keys() <= sampled
    assert len(sampled) == len(trained) + sum(credit.dropped_tokens.values())
    # Another order of arrival, another order of rollouts: the same rows.
    again, _ = asyncio.run(play(story, random.Random(seed + 1)))
    assert rows(assign(again, rules)) == rows(credit)
    backwards = Group(group_id=group.group_id, task=group.task, trajectories=group.trajectories[::-1])
    by_rollout = sorted(rows(assign(backwards, rules)), key=str)
    for mine, other in zip(sorted(rows(credit), key=str), by_rollout, strict=True):
        assert mine[:3] == other[:3]
        np.testing.assert_allclose(np.array(mine[3]), np.array(other[3]), atol=1e-6)


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["std", "none"]), st.sampled_from(["mean", "leave_one_out"]))
def test_advantages_of_a_group_s_rollouts_sum_to_zero(seed: int, scale: str, baseline: str) -> None:
    group, _ = asyncio.run(play(Story(seed), random.Random(seed)))
    rules = CreditRules(credit=CreditConfig(scale=scale, baseline=baseline))  # type: ignore[arg-type]
    credit = assign(group, rules)
    of_rollout = {s.key: float(s.advantage_T[s.mask_T][0]) for s in credit.samples}
    valid = sum(learned_reward(t, rules.failures) is not None for t in group.trajectories)
    if len(of_rollout) == valid:  # a rollout without a trained token has an advantage, but no row
        assert abs(sum(of_rollout.values())) < 1e-4
