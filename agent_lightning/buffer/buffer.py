"""The Buffer: what was admitted, what runs, what was recorded, and what may be trained.

    admit -> waiting --lease--> running --finish--> complete --take--> taken --advance--> trained | dropped(reason)
                ^                  |
                +---- next attempt-+   (after a pause; which ends are worth one: retries.py)

No method suspends between reading and changing the state, so each is atomic. What changes is an event, noted in the
ledger and, where there is one, in the journal; a method answers when the journal has it (docs/reliability.md).

`request` names one call of a client: where it is repeated, because the answer was lost, it has the first one's answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from agent_lightning.buffer.breaker import Breaker, cause_of
from agent_lightning.buffer.events import (
    Admitted,
    Advanced,
    Called,
    CallFailed,
    Cancelled,
    Checkpointed,
    Ended,
    Leased,
    Released,
    Resumed,
    Taken,
    Traced,
)
from agent_lightning.buffer.holdings import Rollout
from agent_lightning.buffer.journal import JournalConfig
from agent_lightning.buffer.ledger import keys_of, stats_of
from agent_lightning.buffer.store import Store
from agent_lightning.buffer.taken import TakenGroup
from agent_lightning.core.errors import UnknownRollout
from agent_lightning.core.types import Ending, ModelCall, Outcome, RolloutKey, Split, Task
from agent_lightning.credit.failures import Retries
from agent_lightning.spans.tree import RawSpan


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
    trouble: str = ""  # one line where the run had better stop: the circuit breaker has tripped, or `alarm` was called


def explain(rollout: Rollout, ending: Ending) -> Ending:
    """The ending given what the buffer knows: the worker sees an exception, the gateway saw its reason."""
    state = rollout.state
    unanswered = ending.outcome is Outcome.FINISHED and not state.num_calls
    if state.cause is not None and (unanswered or ending.outcome is Outcome.AGENT_ERROR):
        return state.cause
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
        retries: Retries | None = None,
        breaker: Breaker | None = None,
        max_calls: int = 100,
        max_spans: int = 10_000,
        grace: float = 30.0,
        first_group: Mapping[Split, int] | None = None,
        journal: JournalConfig | None = None,
        memory_bytes: int = 2**62,
    ) -> None:
        """`max_calls`: model calls of one attempt; `max_spans`: spans of its trace. `grace`: seconds after a lease's
        deadline until its worker counts as dead. `first_group`: on resume, where there is no journal. `journal`: keeps
        what is acknowledged; the buffer goes on from what it holds. `memory_bytes`: spans of complete rollouts beyond
        it are on disk only."""
        self._run_secret = run_secret
        self._retries = retries or Retries()
        self._breaker = breaker or Breaker(window=0, share=1.0)
        self._alarm = ""
        self._max_calls = max_calls
        self._max_spans = max_spans
        self._grace = grace
        self._store = Store(journal, first_group=first_group, memory_bytes=memory_bytes)
        self._ledger = self._store.ledger
        self._changed = asyncio.Condition()
        self._cancels = 0
        self._refused: Counter[str] = Counter()
        self._dead: set[str] = set()

    async def admit(self, task: Task, *, split: Split, num_rollouts: int, request: str = "") -> str:
        """Queue the rollouts of one task; their group's id, e.g. "train-12". Where an interrupted step has left that
        group, what its rollouts have done counts. Raises JournalFull."""
        if num_rollouts < 1:
            raise ValueError(f"a group has at least one rollout, not {num_rollouts}")
        async with self._changed:
            if request in self._ledger.answers:
                (group_id,) = self._ledger.answers[request]
            else:
                group_id = self._admit(task, split, num_rollouts, request)
            self._changed.notify_all()
        await self._store.kept()
        return group_id

    async def lease(
        self, num: int, timeout: float, *, deadline: float = math.inf, worker: str = "", request: str = ""
    ) -> list[Lease]:
        """Up to `num` waiting rollouts, as soon as there is one; [] after `timeout` seconds or on `cancel`.
        `deadline`: seconds in which the caller, `worker`, promises to finish each; see `expire` and `release`."""
        cancels, ledger, end = self._cancels, self._ledger, time.monotonic() + timeout
        async with self._changed:
            while True:  # ends with work, with `cancel`, or at `end`
                if worker in self._dead:  # its call outlived it: what it would get nobody would run
                    return []
                keys = self._still_running(keys_of(ledger.answers.get(request, ())))
                ready, left = ledger.ready(time.time(), num), end - time.monotonic()
                if keys or ready or self._cancels > cancels or left <= 0:
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, ledger.ready_at() - time.time())):
                        await self._changed.wait()
            if not keys and ready:
                keys, at = ready, time.time()
                event = Leased(keys=tuple(keys), at=at, expires_at=at + deadline, worker=worker, request=request)
                self._store.note(event)
            leases = [
                Lease(key=key, task=ledger.groups[key.group_id].task, secret=attempt_secret(self._run_secret, key))
                for key in keys
            ]
        await self._store.kept()
        return leases

    async def record(self, call: ModelCall) -> int:
        """Keep one call of an open attempt; how many more it may make. The same call_id twice is one call.
        A call beyond `max_calls` was sampled too, so it is kept; the gateway starts none once it was told 0."""
        rollout = self._open(call.key, refused="refused_spans")
        if call.call_id not in rollout.calls:
            self._store.note(Called(call=call), grows=True)
        left = max(0, self._max_calls - rollout.state.num_calls)
        await self._store.kept()
        return left

    async def record_spans(
        self, key: RolloutKey, spans: Sequence[RawSpan], faults: Mapping[str, int], request: str = ""
    ) -> int:
        """Keep what the agent's side sent of an open attempt; how many of `spans` were not kept. The same span twice
        is one: the later account counts, as a span may be sent before it has ended. `faults`: those refused before."""
        rollout = self._open(key, refused="refused_spans")
        known, kept = set(rollout.raw), list[RawSpan]()
        for span in spans:
            if span.span_id in known or len(known) < self._max_spans:
                known.add(span.span_id)
                kept.append(span)
        full = len(spans) - len(kept)
        if request not in self._ledger.answers:
            refused = {**faults, **({f"over {self._max_spans} in one attempt": full} if full else {})}
            self._store.note(Traced(key=key, spans=tuple(kept), refused=refused, request=request), grows=True)
        await self._store.kept()
        return full

    async def recorded_calls(self, key: RolloutKey) -> tuple[ModelCall, ...]:
        """The calls of an open attempt so far, in the order of their arrival."""
        return tuple(self._open(key).calls.values())

    async def recorded_spans(self, key: RolloutKey) -> tuple[RawSpan, ...]:
        """The spans that the agent's process has sent of an open attempt so far."""
        return tuple(self._open(key).raw.values())

    async def note_failure(self, key: RolloutKey, outcome: Outcome, error: str) -> None:
        """Remember why the gateway refused a call: it explains the exception that the agent may raise next."""
        self._open(key, refused="refused_spans")
        self._store.note(CallFailed(key=key, cause=Ending(outcome=outcome, error=error, at=time.time())))
        await self._store.kept()

    async def finish(
        self,
        key: RolloutKey,
        *,
        outcome: Outcome,
        reward: float | None,
        error: str = "",
        output: str = "",
        failed_tool: str = "",
        retry: bool = False,
    ) -> None:
        """End an attempt, once. If attempts remain and `retry` or the outcome demands it, the next attempt is queued.
        `failed_tool` is the last tool of a failed attempt as `last_failed_tool` describes it, for the breaker."""
        if outcome is Outcome.FINISHED and reward is None:
            raise ValueError(f"rollout {key.rollout_id}: FINISHED needs a reward")
        async with self._changed:
            rollout = self._open(key, refused="refused_finishes")
            ending = Ending(outcome=outcome, error=error, reward=reward, output=output, at=time.time())
            self._end(rollout, explain(rollout, ending), failed_tool=failed_tool, retry=retry)
            self._changed.notify_all()
        await self._store.kept()

    async def take(self, num_groups: int, *, split: Split, request: str = "") -> list[TakenGroup]:
        """The `num_groups` whole groups that were complete first, ordered by group number.
        Waits for them. After `cancel`, and until the next `admit`, returns what there is."""
        ledger, whole, seen = self._ledger, self._ledger.whole, self._cancels

        def ready() -> bool:
            enough = len(whole[split]) >= num_groups or request in ledger.answers
            return enough or ledger.cancelled or self._cancels > seen

        async with self._changed:  # the wait ends with finish, expire or cancel
            await self._changed.wait_for(ready)
            ids = ledger.answers.get(request)
            if ids is None:
                ids = tuple(itertools.islice(whole[split], num_groups))
                groups = [self._store.group(group_id) for group_id in ids]
                self._store.note(Taken(groups=ids, request=request))
            else:
                groups = [self._store.group(group_id) for group_id in ids]
        await self._store.kept()
        return sorted(groups, key=lambda group: group.rollouts[0].key.group)

    async def advance(self, *, trained: int, dropped: Mapping[str, int], request: str = "") -> None:
        """After an update: of the taken rollouts, `trained` were used and `dropped` were not, each for a reason.
        Raises ValueError where they are more than those taken."""
        if request not in self._ledger.answers:
            total, taken = trained + sum(dropped.values()), self._ledger.counts.count.get("taken", 0)
            if min(trained, *dropped.values(), 0) < 0 or total > taken:
                raise ValueError(f"{trained} trained, {dict(dropped)} dropped, but {taken} taken")
            self._store.note(Advanced(trained=trained, dropped=dict(dropped), request=request))
        await self._store.kept()

    async def cancel(self, reason: str) -> int:
        """End every open rollout as CANCELLED, and wake whoever waits; how many were open."""
        async with self._changed:
            opened = [rollout for rollout in self._ledger.open_rollouts() if rollout.state.phase != "complete"]
            for rollout in opened:
                ending = Ending(outcome=Outcome.CANCELLED, error=reason, at=time.time())
                self._store.note(Ended(key=rollout.state.key, ending=ending, again=False))
            self._store.note(Cancelled(reason=reason))
            self._cancels += 1
            self._changed.notify_all()
        await self._store.kept()
        return len(opened)

    async def expire(self, now: float) -> int:
        """Give up the leases whose deadline and grace have passed at Unix time `now`; how many."""
        return await self._lose(
            lambda one: now > one.state.expires_at + self._grace, "its lease expired: the worker died or hangs"
        )

    async def release(self, worker: str) -> int:
        """`worker` is dead: give up its leases, and give it no more, also where a call of it still waits; how many."""
        self._dead.add(worker)
        return await self._lose(lambda one: one.state.worker == worker, "its worker died")

    async def _lose(self, lost: Callable[[Rollout], bool], error: str) -> int:
        async with self._changed:
            running = (rollout for rollout in self._ledger.open_rollouts() if rollout.state.phase == "running")
            over = [rollout for rollout in running if lost(rollout)]
            for rollout in over:
                self._end(rollout, Ending(outcome=Outcome.WORKER_LOST, error=error, at=time.time()), retry=False)
            self._changed.notify_all()
        await self._store.kept()
        return len(over)

    async def alarm(self, trouble: str) -> None:
        """Have whoever watches know that rollouts cannot go on, and why, in one line."""
        self._alarm = trouble

    async def milestone(self, step: int) -> None:
        """A checkpoint of this step is about to be saved: `resume` can come back to here. From the first one on, the
        journal keeps what is trained until `forget_before`."""
        self._store.note(Checkpointed(step=step))
        await self._store.kept()

    async def forget_before(self, step: int) -> None:
        """The checkpoint of this step is whole: what was trained before it may go."""
        self._store.note(Released(step=step))
        await self._store.kept()

    async def resume(self, step: int, next_group: Mapping[Split, int]) -> int:
        """A new run goes on from the checkpoint of this step, where groups were counted up to `next_group`. Attempts
        of the old run are over. How many rollouts that have ended need not be run again."""
        async with self._changed:
            self._store.note(Resumed(step=step, next_group=dict(next_group)))
            self._changed.notify_all()
        await self._store.kept()
        rollouts = (one for group in self._ledger.groups.values() for one in group.rollouts if group.stage != "trained")
        return sum(rollout.state.phase == "complete" for rollout in rollouts)

    async def stats(self) -> Stats:
        counts = self._ledger.counts
        return Stats(
            dropped=dict(counts.dropped),
            failed={Outcome(name): number for name, number in counts.failed.items()},
            next_group=dict(counts.next_group),
            trouble=self._alarm or self._breaker.tripped,
            **(stats_of(self._ledger) + self._refused),
        )

    async def close(self) -> None:
        """Let go of the journal."""
        self._store.close()

    def _admit(self, task: Task, split: Split, num_rollouts: int, request: str) -> str:
        number = self._ledger.counts.next_group[split]
        group_id = RolloutKey(split=split, group=number, index=0).group_id
        left = self._ledger.groups.get(group_id)
        same = left is not None and left.task.task_id == task.task_id and len(left.rollouts) == num_rollouts
        event = Admitted(split=split, group=number, num_rollouts=num_rollouts, task=task, adopts=same, request=request)
        self._store.note(event, grows=True)
        return group_id

    def _still_running(self, keys: Sequence[RolloutKey]) -> list[RolloutKey]:
        found = [(key, self._ledger.rollout(key)) for key in keys]
        return [key for key, one in found if one is not None and one.state.key == key and one.state.phase == "running"]

    def _open(self, key: RolloutKey, *, refused: str = "") -> Rollout:
        rollout = self._ledger.rollout(key)
        if rollout is None or rollout.state.key != key or rollout.state.phase != "running":
            if refused:
                self._refused[refused] += 1
            raise UnknownRollout(f"rollout {key.rollout_id} attempt {key.attempt} is not open")
        return rollout

    def _end(self, rollout: Rollout, ending: Ending, *, failed_tool: str = "", retry: bool) -> None:
        state, calls = rollout.state, rollout.calls.values()
        if ending.outcome not in (Outcome.CANCELLED, Outcome.WORKER_LOST):  # one death ends many rollouts at once
            self._breaker.saw(cause_of(ending.outcome, ending.error, failed_tool))
        again = (retry or self._retries.wanted(ending.outcome, calls)) and self._may_retry(rollout)
        pause = self._retries.delay(state.key.attempt - state.voided, random.random()) if again else 0.0
        event = Ended(key=state.key, ending=ending, again=again, ready_at=time.time() + pause if pause else 0.0)
        self._store.note(event)

    def _may_retry(self, rollout: Rollout) -> bool:
        """Attempts that the end of an older run has voided count for nothing."""
        own = rollout.state
        states = [one.state for one in self._ledger.open_rollouts() if one.state.key.split == own.key.split]
        retried = sum(state.key.attempt - state.voided for state in states)
        return self._retries.allowed(own.key.attempt - own.voided, retried, len(states))
