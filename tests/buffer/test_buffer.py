"""The Buffer: every rollout ends exactly once, and the counts always balance."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable
from dataclasses import replace

import pytest
from agents_for_tests import RUN_SECRET, make_call, make_task
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.buffer.buffer import Buffer, Lease, Stats, attempt_secret, verify_secret
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.learning import FailuresConfig
from agent_lightning.config.running import AgentConfig, RetryConfig
from agent_lightning.core.errors import UnknownRollout
from agent_lightning.core.types import Ending, Group, Outcome, RolloutKey
from agent_lightning.credit.failures import Retries


def make_buffer(**settings: object) -> Buffer:
    return Buffer(run_secret=RUN_SECRET, **settings)  # type: ignore[arg-type]


async def started(buffer: Buffer, num_rollouts: int = 1) -> list[Lease]:
    await buffer.admit(make_task(), split="train", num_rollouts=num_rollouts)
    return await buffer.lease(num_rollouts, 1.0)


def balanced(stats: Stats) -> bool:
    ended = stats.complete + stats.taken + stats.trained + sum(stats.dropped.values())
    return stats.admitted == stats.waiting + stats.running + ended


def test_a_secret_opens_one_attempt_only() -> None:
    key = RolloutKey(split="train", group=3, index=1, attempt=2)
    secret = attempt_secret(RUN_SECRET, key)
    assert len(secret) == 32
    assert verify_secret(RUN_SECRET, key, secret)
    assert not verify_secret(b"another run", key, secret)
    assert not verify_secret(RUN_SECRET, key, secret[:-1])
    assert not verify_secret(RUN_SECRET, key, "é")
    for other in (RolloutKey(split="train", group=3, index=1), RolloutKey(split="val", group=3, index=1, attempt=2)):
        assert not verify_secret(RUN_SECRET, other, secret)


async def test_a_lease_does_not_show_its_secret() -> None:
    (lease,) = await started(make_buffer())
    assert lease.secret == attempt_secret(RUN_SECRET, lease.key)
    assert lease.secret not in repr(lease)


async def test_groups_are_numbered_by_split_and_from_where_a_run_resumes() -> None:
    buffer = make_buffer(first_group={"train": 7})
    assert await buffer.admit(make_task(), split="train", num_rollouts=1) == "train-7"
    assert await buffer.admit(make_task(), split="val", num_rollouts=1) == "val-0"
    assert await buffer.admit(make_task(), split="train", num_rollouts=1) == "train-8"
    assert (await buffer.stats()).next_group == {"train": 9, "val": 1}


async def test_a_group_needs_a_rollout() -> None:
    with pytest.raises(ValueError, match="at least one"):
        await make_buffer().admit(make_task(), split="train", num_rollouts=0)


async def test_lease_waits_for_work_until_its_timeout() -> None:
    buffer = make_buffer()
    before = time.monotonic()
    assert await buffer.lease(4, 0.05) == []
    assert 0.04 < time.monotonic() - before < 1.0
    waiting = asyncio.create_task(buffer.lease(4, 5.0))
    await asyncio.sleep(0)
    await buffer.admit(make_task(), split="train", num_rollouts=6)
    assert [lease.key.index for lease in await waiting] == [0, 1, 2, 3]
    assert [lease.key.index for lease in await buffer.lease(4, 5.0)] == [4, 5]


async def test_a_trajectory_has_each_call_once_in_the_order_of_start() -> None:
    buffer = make_buffer(agent=AgentConfig(target="", max_calls=3))
    (lease,) = await started(buffer)
    late, early = make_call(lease.key, "late", started_at=20.0), make_call(lease.key, "early", started_at=10.0)
    assert await buffer.record(late) == 2
    assert await buffer.record(early) == 1
    assert await buffer.record(early) == 1
    await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=0.5, output="42"))
    (group,) = await take_groups(buffer, 1, split="train")
    (trajectory,) = group.trajectories
    assert [call.call_id for call in trajectory.calls] == ["early", "late"]
    assert (trajectory.reward, trajectory.outcome, trajectory.output) == (0.5, Outcome.FINISHED, "42")
    assert 0 < trajectory.started_at <= trajectory.ended_at
    stats = await buffer.stats()
    assert (stats.calls, stats.sampled_tokens) == (2, 4)


async def test_calls_left_never_go_below_zero() -> None:
    buffer = make_buffer(agent=AgentConfig(target="", max_calls=1))
    (lease,) = await started(buffer)
    assert [await buffer.record(make_call(lease.key, f"{n}")) for n in range(3)] == [0, 0, 0]


async def test_only_the_running_attempt_may_record_note_a_failure_or_finish() -> None:
    buffer = make_buffer(retries=Retries(max_attempts=2))
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    key = RolloutKey(split="train", group=0, index=0)
    never = RolloutKey(split="train", group=0, index=5)

    async def is_refused(key: RolloutKey) -> None:
        with pytest.raises(UnknownRollout):
            await buffer.record(make_call(key, "x"))
        with pytest.raises(UnknownRollout):
            await buffer.note_failure(key, Outcome.ENGINE_ERROR, "x")
        with pytest.raises(UnknownRollout):
            await buffer.finish(key, Ending(outcome=Outcome.FINISHED, reward=1.0))

    await is_refused(key)  # waiting
    await is_refused(never)
    await buffer.lease(1, 1.0)
    await buffer.finish(key, Ending(outcome=Outcome.ENGINE_ERROR))
    await is_refused(key)  # an older attempt
    (again,) = await buffer.lease(1, 1.0)
    assert again.key.attempt == 1
    await is_refused(key)
    await buffer.record(make_call(again.key, "x"))
    await buffer.finish(again.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
    await is_refused(again.key)  # ended
    (group,) = await take_groups(buffer, 1, split="train")
    assert group.trajectories[0].key.attempt == 1
    await is_refused(again.key)  # taken
    stats = await buffer.stats()
    assert (stats.refused_spans, stats.refused_finishes, stats.retried) == (12, 6, 1)


async def test_a_finished_rollout_needs_a_reward() -> None:
    buffer = make_buffer()
    (lease,) = await started(buffer)
    with pytest.raises(ValueError, match="needs a reward"):
        await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED))


@pytest.mark.parametrize(
    ("refusal", "calls_after", "reported", "expected"),
    [
        (None, 1, Outcome.AGENT_ERROR, Outcome.AGENT_ERROR),
        (None, 0, Outcome.FINISHED, Outcome.NO_MODEL_CALL),
        (None, 0, Outcome.TIMEOUT, Outcome.TIMEOUT),
        (Outcome.OVERLONG_PROMPT, 0, Outcome.AGENT_ERROR, Outcome.OVERLONG_PROMPT),
        (Outcome.ENGINE_ERROR, 0, Outcome.AGENT_ERROR, Outcome.ENGINE_ERROR),
        (Outcome.TOO_MANY_CALLS, 0, Outcome.AGENT_ERROR, Outcome.TOO_MANY_CALLS),
        (Outcome.ENGINE_ERROR, 0, Outcome.FINISHED, Outcome.ENGINE_ERROR),
        (Outcome.ENGINE_ERROR, 0, Outcome.TIMEOUT, Outcome.TIMEOUT),
        (Outcome.ENGINE_ERROR, 1, Outcome.FINISHED, Outcome.FINISHED),
        (Outcome.ENGINE_ERROR, 1, Outcome.AGENT_ERROR, Outcome.AGENT_ERROR),
    ],
)
async def test_a_refusal_of_the_gateway_explains_the_outcome_that_the_worker_reports(
    refusal: Outcome | None, calls_after: int, reported: Outcome, expected: Outcome
) -> None:
    buffer = make_buffer()
    (lease,) = await started(buffer)
    if refusal is not None:
        await buffer.note_failure(lease.key, refusal, "the cause")
    for number in range(calls_after):
        await buffer.record(make_call(lease.key, f"{number}", started_at=time.time() + 1.0))
    await buffer.finish(lease.key, Ending(outcome=reported, error="seen", reward=1.0))
    (group,) = await take_groups(buffer, 1, split="train")
    assert group.trajectories[0].outcome is expected
    assert (group.trajectories[0].reward is None) == (expected is not Outcome.FINISHED)
    if expected is refusal:
        assert group.trajectories[0].error == "the cause"


async def test_attempts_are_limited_and_a_retry_is_leased_first() -> None:
    buffer = make_buffer(retries=Retries(max_attempts=2))
    first, _ = await started(buffer, 2)
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    await buffer.record(make_call(first.key, "lost"))
    await buffer.finish(first.key, Ending(outcome=Outcome.CANCELLED), retry=True)
    (again,) = await buffer.lease(1, 1.0)
    assert (again.key.rollout_id, again.key.attempt) == ("train-0-0", 1)
    await buffer.finish(again.key, Ending(outcome=Outcome.CANCELLED), retry=True)
    stats = await buffer.stats()
    assert (stats.complete, stats.retried, stats.failed) == (1, 1, {Outcome.CANCELLED: 1})


async def test_the_outcomes_that_are_retried_are_configurable() -> None:
    buffer = make_buffer(
        retries=Retries(max_attempts=2, failures=FailuresConfig(timeout="resample", engine_error=None))
    )
    engine, slow = await started(buffer, 2)
    await buffer.finish(engine.key, Ending(outcome=Outcome.ENGINE_ERROR))
    await buffer.finish(slow.key, Ending(outcome=Outcome.TIMEOUT))
    stats = await buffer.stats()
    assert (stats.complete, stats.waiting) == (1, 1)


async def test_the_leases_of_a_dead_worker_end_at_once_and_those_of_others_continue() -> None:
    buffer = make_buffer(retries=Retries(max_attempts=2))
    await buffer.admit(make_task(), split="train", num_rollouts=3)
    dead = await buffer.lease(2, 1.0, deadline=100.0, worker="worker-0")
    (alive,) = await buffer.lease(1, 1.0, deadline=100.0, worker="worker-1")
    assert await buffer.release("worker-0") == 2
    for lease in dead:
        with pytest.raises(UnknownRollout):
            await buffer.record(make_call(lease.key, "late"))
    await end(buffer, alive)
    again = await buffer.lease(9, 1.0)
    assert {(lease.key.index, lease.key.attempt) for lease in again} == {(0, 1), (1, 1)}
    assert await buffer.release("worker-0") == 0


async def test_a_failed_or_truncated_rollout_of_a_group_is_run_again() -> None:
    buffer = make_buffer(
        retries=Retries(max_attempts=2, failures=FailuresConfig(timeout="resample", truncated="resample"))
    )
    slow, cut, good = await started(buffer, 3)
    await buffer.finish(slow.key, Ending(outcome=Outcome.TIMEOUT))
    await buffer.record(replace(make_call(cut.key, "cut"), finish_reason="length"))
    await buffer.finish(cut.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
    await end(buffer, good)
    for lease in await buffer.lease(9, 1.0):
        await end(buffer, lease)
    (group,) = await take_groups(buffer, 1, split="train")
    assert [(t.outcome, t.key.attempt) for t in group.trajectories] == [(Outcome.FINISHED, n) for n in (1, 1, 0)]


async def test_retries_are_limited_to_a_share_of_the_open_rollouts() -> None:
    buffer = make_buffer(retries=Retries(max_attempts=9, limits=RetryConfig(budget=0.5, backoff_s=0)))
    for lease in await started(buffer, 8):
        await buffer.finish(lease.key, Ending(outcome=Outcome.ENGINE_ERROR))
    stats = await buffer.stats()
    assert (stats.retried, stats.complete) == (4, 4)
    for _ in range(2):  # they have used up what there was
        for lease in await buffer.lease(9, 0.0):
            await buffer.finish(lease.key, Ending(outcome=Outcome.ENGINE_ERROR))
    assert (await buffer.stats()).retried == 4
    await take_groups(buffer, 1, split="train")
    (fresh, *_) = await started(buffer, 2)  # a later step has a budget of its own
    await buffer.finish(fresh.key, Ending(outcome=Outcome.ENGINE_ERROR))
    assert (await buffer.stats()).retried == 5


async def test_a_retry_waits_for_its_pause_and_other_rollouts_are_leased_meanwhile() -> None:
    buffer = make_buffer(retries=Retries(max_attempts=2, limits=RetryConfig(backoff_s=0.4)))
    (lease,) = await started(buffer)
    random.seed(2)  # draws 0.96
    await buffer.finish(lease.key, Ending(outcome=Outcome.ENGINE_ERROR))
    assert await buffer.lease(1, 0.0) == []
    await buffer.admit(make_task(1), split="train", num_rollouts=1)
    (other,) = await buffer.lease(9, 0.0)
    assert other.key.group == 1
    before = time.monotonic()
    (again,) = await buffer.lease(1, 5.0)
    assert again.key.attempt == 1
    assert 0.2 < time.monotonic() - before < 1.0


async def end(buffer: Buffer, lease: Lease) -> None:
    await buffer.record(make_call(lease.key, lease.key.rollout_id))
    await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=1.0))


async def test_take_waits_for_complete_groups_and_returns_the_first() -> None:
    buffer = make_buffer()
    for number in range(3):
        await buffer.admit(make_task(number), split="train", num_rollouts=2)
    await buffer.admit(make_task(9), split="val", num_rollouts=1)
    leases = await buffer.lease(7, 1.0)
    taking = asyncio.create_task(take_groups(buffer, 2, split="train"))
    for index in (4, 0, 5, 6):  # group 2 and the evaluation are complete, group 0 is not
        await end(buffer, leases[index])
    await asyncio.sleep(0)
    assert not taking.done()
    await end(buffer, leases[1])
    groups = await taking
    assert [group.group_id for group in groups] == ["train-0", "train-2"]
    assert [t.key.index for t in groups[0].trajectories] == [0, 1]
    assert groups[0].task == make_task(0)
    assert [group.group_id for group in await take_groups(buffer, 1, split="val")] == ["val-0"]
    stats = await buffer.stats()
    assert (stats.admitted, stats.taken, stats.running, stats.evaluated) == (6, 4, 2, 1)


async def test_advance_counts_no_more_rollouts_than_were_taken() -> None:
    buffer = make_buffer()
    for lease in await started(buffer, 4):
        await end(buffer, lease)
    await take_groups(buffer, 1, split="train")
    await buffer.advance(trained=1, dropped={"stale": 2})
    stats = await buffer.stats()
    assert (stats.taken, stats.trained, stats.dropped) == (1, 1, {"stale": 2})
    with pytest.raises(ValueError, match="1 taken"):
        await buffer.advance(trained=2, dropped={})
    with pytest.raises(ValueError, match="dropped"):
        await buffer.advance(trained=0, dropped={"stale": -1})


async def test_cancel_ends_every_rollout_and_every_waiting_call() -> None:
    buffer = make_buffer(retries=Retries(max_attempts=3))
    leases = await started(buffer, 1)
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    await buffer.lease(1, 1.0)
    await buffer.admit(make_task(), split="val", num_rollouts=2)
    await buffer.lease(2, 1.0)
    leasing = asyncio.create_task(buffer.lease(1, 60.0))
    taking = asyncio.create_task(take_groups(buffer, 9, split="train"))
    await asyncio.sleep(0.01)
    assert await buffer.cancel("the run stopped") == 4
    assert await leasing == []
    groups = await taking
    assert [t.outcome for group in groups for t in group.trajectories] == [Outcome.CANCELLED] * 2
    assert groups[0].trajectories[0].error == "the run stopped"
    assert await take_groups(buffer, 9, split="train") == []
    with pytest.raises(UnknownRollout):
        await buffer.finish(leases[0].key, Ending(outcome=Outcome.FINISHED, reward=1.0))
    before = time.monotonic()
    assert await buffer.lease(1, 0.05) == []  # waits again: workers do not spin
    assert time.monotonic() - before > 0.04
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await take_groups(buffer, 1, split="train")  # waits again


async def test_a_rollout_whose_lease_expired_is_retried_and_then_lost() -> None:
    buffer = make_buffer(retries=Retries(max_attempts=2), grace=5.0)
    await buffer.admit(make_task(), split="train", num_rollouts=2)
    (dead,) = await buffer.lease(1, 1.0, deadline=10.0)
    (endless,) = await buffer.lease(1, 1.0)
    now = time.time()
    assert await buffer.expire(now + 14.0) == 0
    assert await buffer.expire(now + 16.0) == 1
    with pytest.raises(UnknownRollout):
        await buffer.record(make_call(dead.key, "late"))
    (again,) = await buffer.lease(1, 1.0, deadline=10.0)
    assert again.key.attempt == 1
    assert await buffer.expire(time.time() + 16.0) == 1
    await end(buffer, endless)
    (group,) = await take_groups(buffer, 1, split="train")
    assert [t.outcome for t in group.trajectories] == [Outcome.WORKER_LOST, Outcome.FINISHED]


async def test_a_cancelled_take_or_lease_loses_nothing() -> None:
    buffer = make_buffer()
    taking = asyncio.create_task(take_groups(buffer, 1, split="train"))
    leasing = asyncio.create_task(buffer.lease(1, 60.0))
    await asyncio.sleep(0.01)
    taking.cancel()
    leasing.cancel()
    await asyncio.gather(taking, leasing, return_exceptions=True)
    (lease,) = await started(buffer)
    await end(buffer, lease)
    assert len(await take_groups(buffer, 1, split="train")) == 1


class Scenario:
    """Random operations, in an order that Hypothesis chooses, and the groups that they produced."""

    def __init__(self, choice: random.Random, max_attempts: int) -> None:
        self.buffer = make_buffer(retries=Retries(max_attempts=max_attempts), grace=0.0)
        self.choice = choice
        self.leases: list[Lease] = []
        self.groups: list[Group] = []
        self.num_admitted = self.num_taken = self.num_calls = 0

    async def step(self, operation: str) -> None:
        buffer, choice = self.buffer, self.choice
        match operation:
            case "admit":
                num, split = choice.randint(1, 3), choice.choice(["train", "val"])
                await buffer.admit(make_task(), split=split, num_rollouts=num)
                self.num_admitted += num
            case "lease":
                self.leases += await buffer.lease(choice.randint(1, 4), 0.0, deadline=choice.choice([1.0, 1000.0]))
            case "record" if self.leases:
                self.num_calls += 1
                await self.expect(buffer.record(make_call(choice.choice(self.leases).key, f"{self.num_calls}")))
            case "finish" if self.leases:
                key, outcome = choice.choice(self.leases).key, choice.choice(list(Outcome))
                finish = buffer.finish(key, Ending(outcome=outcome, reward=1.0), retry=choice.random() < 0.2)
                await self.expect(finish)
            case "expire":
                await buffer.expire(time.time() + 10.0)
            case "take":
                await self.take()
            case "advance":
                taken = (await buffer.stats()).taken
                trained = choice.randint(0, taken)
                await buffer.advance(trained=trained, dropped={"stale": choice.randint(0, taken - trained)})
            case "cancel" if choice.random() < 0.2:
                await buffer.cancel("given up")

    async def expect(self, operation: Awaitable[object]) -> None:
        with contextlib.suppress(UnknownRollout):
            await operation

    async def take(self) -> None:
        for split in ("train", "val"):
            try:
                async with asyncio.timeout(0.0):
                    taken = await self.buffer.take(1, split=split)
            except TimeoutError:
                continue
            self.groups += [group.assemble() for group in taken]

    async def drain(self) -> None:
        await self.buffer.cancel("the end")
        for split in ("train", "val"):
            self.groups += await take_groups(self.buffer, 1000, split=split)


OPERATIONS = ["admit", "lease", "record", "finish", "expire", "take", "advance", "cancel"]


@settings(max_examples=150, deadline=None)
@given(
    operations=st.lists(st.sampled_from(OPERATIONS), min_size=5, max_size=60),
    choice=st.randoms(use_true_random=False),
    max_attempts=st.integers(1, 3),
)
def test_the_counts_balance_after_every_operation(
    operations: list[str], choice: random.Random, max_attempts: int
) -> None:
    async def play() -> None:
        scenario = Scenario(choice, max_attempts)
        for operation in operations:
            await scenario.step(operation)
            assert balanced(await scenario.buffer.stats())
        await scenario.drain()
        stats = await scenario.buffer.stats()
        assert balanced(stats)
        assert stats.waiting == stats.running == stats.complete == 0
        ended = [t.key.rollout_id for group in scenario.groups for t in group.trajectories]
        assert len(ended) == len(set(ended)) == scenario.num_admitted  # each exactly once
        assert stats.admitted + stats.evaluated == scenario.num_admitted
        for trajectory in (t for group in scenario.groups for t in group.trajectories):
            assert all(call.key == trajectory.key for call in trajectory.calls)  # none of an older attempt
            assert (trajectory.reward is None) == (trajectory.outcome is not Outcome.FINISHED)

    asyncio.run(play())
