"""The Buffer: what was admitted, what runs, what was recorded, and what may be trained.

    admit -> waiting --lease--> running --finish--> complete --take--> taken --advance--> trained | dropped(reason)
                ^                  |
                +---- next attempt-+   (engine failures, expired leases, stopped workers)

No method suspends between reading and changing the state, so each is atomic."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from agent_lightning.errors import UnknownRollout
from agent_lightning.telemetry.conventions import read
from agent_lightning.telemetry.span_tree import RawSpan
from agent_lightning.telemetry.spans import assemble, emitted
from agent_lightning.types import Group, ModelCall, Outcome, RolloutKey, Split, Task, Trajectory


def attempt_secret(run_secret: bytes, key: RolloutKey) -> str:
    """The unguessable part of an attempt's URL: 32 hex characters of HMAC-SHA256 (RFC 2104)."""
    message = f"{key.rollout_id}/{key.attempt}".encode()
    return hmac.new(run_secret, message, hashlib.sha256).hexdigest()[:32]


def verify_secret(run_secret: bytes, key: RolloutKey, secret: str) -> bool:
    """Whether `secret` belongs to this attempt, in a time that does not depend on where it differs."""
    return hmac.compare_digest(attempt_secret(run_secret, key).encode(), secret.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One attempt that a worker now owns."""

    key: RolloutKey
    task: Task
    secret: str = field(repr=False)
    """Opens the URL of this attempt only. Workers, which run user code, never hold the secret of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts of rollouts of the train split, unless a field says otherwise. At every moment:
    admitted == waiting + running + complete + taken + trained + sum(dropped.values())."""

    admitted: int = 0
    waiting: int = 0
    running: int = 0
    complete: int = 0  # ended, not yet taken; those of unfinished groups included
    taken: int = 0
    trained: int = 0
    dropped: Mapping[str, int]  # reason -> how many
    failed: Mapping[Outcome, int]  # ended rollouts by outcome, FINISHED left out
    evaluated: int = 0  # val split: taken
    ended: int = 0  # rollouts of both splits that have ended, ever
    retried: int = 0  # attempts given up for another one; both splits, as all below
    refused_spans: int = 0  # calls, traces and marks for an attempt that was not open
    refused_finishes: int = 0
    calls: int = 0
    sampled_tokens: int = 0
    next_group: Mapping[Split, int]  # the number that the next group of each split gets


@dataclass(frozen=True, slots=True)
class _Ending:
    """How an attempt ended, or what the gateway says went wrong in it."""

    outcome: Outcome
    error: str
    reward: float | None = None
    output: str = ""
    at: float = field(default_factory=time.time)


@dataclass(slots=True, kw_only=True)
class _Rollout:
    key: RolloutKey
    task: Task
    phase: Literal["waiting", "running", "complete"] = "waiting"
    started_at: float = 0.0
    expires_at: float = math.inf
    calls: dict[str, ModelCall] = field(default_factory=dict)
    raw: dict[str, RawSpan] = field(default_factory=dict)
    """Spans that the agent's side sent, by id."""
    refused: Counter[str] = field(default_factory=Counter)
    cause: _Ending | None = None
    trajectory: Trajectory | None = None

    def explain(self, ending: _Ending) -> _Ending:
        """The ending given what the buffer knows: the worker sees an exception, the gateway saw its reason."""
        unanswered = ending.outcome is Outcome.FINISHED and not self.calls
        if self.cause is not None and (unanswered or ending.outcome is Outcome.AGENT_ERROR):
            return self.cause
        return replace(ending, outcome=Outcome.NO_MODEL_CALL, error="no call was recorded") if unanswered else ending


class Buffer:
    """The central actor. Keys that are not open raise UnknownRollout.

    Example:

        buffer = Buffer(run_secret=b"...")
        await buffer.admit(task, split="train", num_rollouts=2)  # "train-0"
        first, second = await buffer.lease(8, timeout=1.0)
        await buffer.record(call)                                # 99: calls left
        await buffer.finish(first.key, reward=1.0, outcome=Outcome.FINISHED)
        await buffer.finish(second.key, reward=None, outcome=Outcome.TIMEOUT)
        (group,) = await buffer.take(1, split="train")
    """

    def __init__(
        self,
        *,
        run_secret: bytes,
        max_attempts: int = 1,
        max_calls: int = 100,
        max_spans: int = 10_000,
        retry_on: Collection[Outcome] = (Outcome.ENGINE_ERROR,),
        grace: float = 30.0,
        first_group: Mapping[Split, int] | None = None,
    ) -> None:
        """`max_calls`: model calls of one attempt; `max_spans`: spans of its trace. `retry_on`: outcomes that are worth
        another attempt. `grace`: seconds after a lease's deadline until its worker counts as dead. `first_group`: on
        resume."""
        self._run_secret = run_secret
        self._max_attempts = max_attempts
        self._max_calls = max_calls
        self._max_spans = max_spans
        self._retry_on = frozenset(retry_on)
        self._grace = grace
        self._next_group: dict[Split, int] = {"train": 0, "val": 0, **(first_group or {})}
        self._groups: dict[str, list[_Rollout]] = {}
        self._waiting: deque[_Rollout] = deque()
        self._whole: dict[Split, deque[str]] = {"train": deque(), "val": deque()}
        self._changed = asyncio.Condition()
        self._cancels = 0
        self._cancelled = False
        self._count: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._failed: Counter[Outcome] = Counter()

    async def admit(self, task: Task, *, split: Split, num_rollouts: int) -> str:
        """Queue the rollouts of one task; their group's id, e.g. "train-12"."""
        if num_rollouts < 1:
            raise ValueError(f"a group has at least one rollout, not {num_rollouts}")
        async with self._changed:
            number = self._next_group[split]
            self._next_group[split] += 1
            rollouts = [
                _Rollout(key=RolloutKey(split=split, group=number, index=index), task=task)
                for index in range(num_rollouts)
            ]
            group_id = rollouts[0].key.group_id
            self._groups[group_id] = rollouts
            self._waiting.extend(rollouts)
            self._count["admitted"] += num_rollouts if split == "train" else 0
            self._cancelled = False
            self._changed.notify_all()
        return group_id

    async def lease(self, num: int, timeout: float, *, deadline: float = math.inf) -> list[Lease]:
        """Up to `num` waiting rollouts, as soon as there is one; [] after `timeout` seconds or on `cancel`.
        `deadline`: seconds in which the caller promises to finish each; see `expire`."""
        cancels = self._cancels
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):  # ends with admit, a retry, cancel, or the timeout
                    await self._changed.wait_for(lambda: self._waiting or self._cancels > cancels)
            return [self._start(self._waiting.popleft(), deadline) for _ in range(min(num, len(self._waiting)))]

    async def record(self, call: ModelCall) -> int:
        """Keep one call of an open attempt; how many more it may make. The same call_id twice is one call.
        A call beyond `max_calls` was sampled too, so it is kept; the gateway starts none once it was told 0."""
        rollout = self._open(call.key, refused="refused_spans")
        if call.call_id not in rollout.calls:
            rollout.calls[call.call_id] = call
            self._count["calls"] += 1
            self._count["sampled_tokens"] += len(call.response_T)
        if rollout.cause is not None and call.started_at > rollout.cause.at:
            rollout.cause = None  # the agent got over that error: it does not explain a later one
        return max(0, self._max_calls - len(rollout.calls))

    async def record_spans(self, key: RolloutKey, spans: Sequence[RawSpan], faults: Mapping[str, int]) -> int:
        """Keep what the agent's side sent of an open attempt; how many of `spans` were not kept. The same span twice
        is one: the later account counts, as a span may be sent before it has ended. `faults`: those refused before."""
        rollout = self._open(key, refused="refused_spans")
        rollout.refused.update(faults)
        full = 0
        for span in spans:
            if span.span_id not in rollout.raw and len(rollout.raw) >= self._max_spans:
                full += 1
            else:
                rollout.raw[span.span_id] = span
        if full:
            rollout.refused[f"over {self._max_spans} in one attempt"] += full
        return full

    async def emitted(self, key: RolloutKey) -> float | None:
        """The reward that the agent of an open attempt has emitted about it so far; see `spans.emitted`."""
        rollout = self._open(key, refused="refused_spans")
        return emitted(read(tuple(rollout.raw.values()), key).rewards)

    async def mark(self, key: RolloutKey, outcome: Outcome, error: str) -> None:
        """Remember why the gateway refused a call: it explains the exception that the agent may raise next."""
        self._open(key, refused="refused_spans").cause = _Ending(outcome, error)

    async def finish(
        self,
        key: RolloutKey,
        *,
        outcome: Outcome,
        reward: float | None,
        error: str = "",
        output: str = "",
        retry: bool = False,
    ) -> None:
        """End an attempt, once. Where attempts remain and `retry` or the outcome asks for it, the next one waits."""
        if outcome is Outcome.FINISHED and reward is None:
            raise ValueError(f"rollout {key.rollout_id}: FINISHED needs a reward")
        async with self._changed:
            rollout = self._open(key, refused="refused_finishes")
            self._end(rollout, rollout.explain(_Ending(outcome, error, reward, output)), retry=retry)
            self._changed.notify_all()

    async def take(self, num_groups: int, *, split: Split) -> list[Group]:
        """The `num_groups` whole groups that were complete first, ordered by group number.
        Waits for them. After `cancel`, and until the next `admit`, returns what there is."""
        whole, seen = self._whole[split], self._cancels
        async with self._changed:  # the wait ends with finish, expire or cancel
            await self._changed.wait_for(lambda: len(whole) >= num_groups or self._cancelled or self._cancels > seen)
            groups = [self._hand_out(whole.popleft()) for _ in range(min(num_groups, len(whole)))]
        return sorted(groups, key=lambda group: group.trajectories[0].key.group)

    async def advance(self, *, trained: int, dropped: Mapping[str, int]) -> None:
        """After an update: of the taken rollouts, `trained` were used and `dropped` were not, each for a reason.
        Raises ValueError where they are more than those taken."""
        total = trained + sum(dropped.values())
        if min(trained, *dropped.values(), 0) < 0 or total > self._count["taken"]:
            raise ValueError(f"{trained} trained, {dict(dropped)} dropped, but {self._count['taken']} taken")
        self._count["taken"] -= total
        self._count["trained"] += trained
        self._dropped.update(dropped)

    async def cancel(self, reason: str) -> int:
        """End every open rollout as CANCELLED, and wake whoever waits; how many were open."""
        async with self._changed:
            opened = [rollout for rollout in self._all() if rollout.phase != "complete"]
            self._waiting.clear()
            for rollout in opened:
                self._complete(rollout, _Ending(Outcome.CANCELLED, reason))
            self._cancels += 1
            self._cancelled = True
            self._changed.notify_all()
        return len(opened)

    async def expire(self, now: float) -> int:
        """Give up the leases whose deadline and grace have passed at Unix time `now`; how many.
        Their workers are dead or stuck: each rollout gets another attempt, or ends as TIMEOUT."""
        async with self._changed:
            over = [r for r in self._all() if r.phase == "running" and now > r.expires_at + self._grace]
            for rollout in over:
                self._end(rollout, _Ending(Outcome.TIMEOUT, "its lease expired: the worker died or hangs"), retry=True)
            self._changed.notify_all()
        return len(over)

    async def stats(self) -> Stats:
        count = self._count + Counter(str(r.phase) for r in self._all() if r.key.split == "train")
        return Stats(dropped=dict(self._dropped), failed=dict(self._failed), next_group=dict(self._next_group), **count)

    def _all(self) -> Iterator[_Rollout]:
        return itertools.chain.from_iterable(self._groups.values())

    def _open(self, key: RolloutKey, *, refused: str) -> _Rollout:
        group = self._groups.get(key.group_id, [])
        rollout = group[key.index] if key.index < len(group) else None
        if rollout is None or rollout.key != key or rollout.phase != "running":
            self._count[refused] += 1
            raise UnknownRollout(f"rollout {key.rollout_id} attempt {key.attempt} is not open")
        return rollout

    def _start(self, rollout: _Rollout, deadline: float) -> Lease:
        rollout.phase = "running"
        rollout.started_at = time.time()
        rollout.expires_at = rollout.started_at + deadline
        return Lease(key=rollout.key, task=rollout.task, secret=attempt_secret(self._run_secret, rollout.key))

    def _end(self, rollout: _Rollout, ending: _Ending, *, retry: bool) -> None:
        if not (retry or ending.outcome in self._retry_on) or rollout.key.attempt + 1 >= self._max_attempts:
            self._complete(rollout, ending)
            return
        again = _Rollout(key=replace(rollout.key, attempt=rollout.key.attempt + 1), task=rollout.task)
        self._groups[again.key.group_id][again.key.index] = again
        self._waiting.appendleft(again)  # first in line: the rest of its group waits for it
        self._count["retried"] += 1

    def _complete(self, rollout: _Rollout, ending: _Ending) -> None:
        rollout.phase = "complete"
        self._count["ended"] += 1
        seen = assemble(rollout.key, rollout.calls.values(), tuple(rollout.raw.values()))
        rollout.trajectory = Trajectory(
            key=rollout.key,
            task_id=rollout.task.task_id,
            calls=seen.calls,
            reward=ending.reward if ending.outcome is Outcome.FINISHED else None,
            outcome=ending.outcome,
            error=ending.error,
            output=ending.output,
            started_at=rollout.started_at,
            ended_at=time.time(),
            tools=seen.tools,
            rewards=seen.rewards,
            agents=seen.agents,
            refused_spans=dict(rollout.refused + Counter(seen.refused)),
        )
        rollout.calls, rollout.raw = {}, {}
        if ending.outcome is not Outcome.FINISHED and rollout.key.split == "train":
            self._failed[ending.outcome] += 1
        if all(other.phase == "complete" for other in self._groups[rollout.key.group_id]):
            self._whole[rollout.key.split].append(rollout.key.group_id)

    def _hand_out(self, group_id: str) -> Group:
        rollouts = self._groups.pop(group_id)
        self._count["taken" if rollouts[0].key.split == "train" else "evaluated"] += len(rollouts)
        trajectories = tuple(rollout.trajectory for rollout in rollouts if rollout.trajectory is not None)
        return Group(group_id=group_id, task=rollouts[0].task, trajectories=trajectories)
