"""The Buffer: which rollouts wait, run or have ended, what was recorded of them, and which may be trained."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from agent_lightning.buffer import events
from agent_lightning.buffer.breaker import Breaker, cause_of
from agent_lightning.buffer.ledger import StoredRollout
from agent_lightning.buffer.store import Store
from agent_lightning.buffer.taken import Deadlines, TakenGroup
from agent_lightning.config.running import AgentConfig, BreakerConfig, BufferConfig
from agent_lightning.core.errors import OverBudget, UnknownRollout
from agent_lightning.core.types import Ending, ModelCall, Outcome, RolloutKey, Split, Task
from agent_lightning.credit.failures import Retries
from agent_lightning.spans.tree import RawSpan


def attempt_secret(run_secret: bytes, key: RolloutKey) -> str:
    """The unguessable part of an attempt's URL: 32 hex characters of HMAC-SHA256 (RFC 2104)."""
    message = f"{key.rollout_id}/{key.attempt}".encode()
    return hmac.new(run_secret, message, hashlib.sha256).hexdigest()[:32]


def verify_secret(run_secret: bytes, key: RolloutKey, secret: str) -> bool:
    """Whether `secret` belongs to this attempt; takes the same time whichever characters differ."""
    return hmac.compare_digest(attempt_secret(run_secret, key).encode(), secret.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of a worker to run one attempt."""

    key: RolloutKey
    task: Task
    secret: str = field(repr=False)
    """Authorizes calls for this attempt only. Workers, which run user code, never hold the secret of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Numbers of rollouts; of the train split, unless a field says otherwise. At every moment admitted == waiting +
    running + complete + taken + trained + sum(dropped.values())."""

    admitted: int = 0
    waiting: int = 0
    running: int = 0
    complete: int = 0  # rollouts that have ended and are not taken yet, also if their group is incomplete
    taken: int = 0
    trained: int = 0
    dropped: Mapping[str, int]  # reason -> number of taken rollouts that were not trained for it
    failed: Mapping[Outcome, int]  # outcome other than FINISHED -> number of rollouts that ended with it
    evaluated: int = 0  # rollouts of the val split that were taken
    ended: int = 0  # rollouts of both splits that have ended
    retried: int = 0  # attempts of both splits that were followed by another one
    refused_spans: int = 0
    """Calls, traces and failures that were reported for an attempt that was not running; of both splits."""
    refused_finishes: int = 0  # endings that were reported for an attempt that was not running; of both splits
    calls: int = 0  # recorded model calls of both splits
    sampled_tokens: int = 0  # tokens that these calls sampled
    replaced_tokens: int = 0  # those of attempts that were followed by another one
    idle_s: float = 0.0  # seconds between rollouts in which none was waiting or running
    next_group: Mapping[Split, int]  # split -> the number of its next group
    trouble: str = ""
    """One line that says why the run should stop: the circuit breaker has tripped, or `alarm` was called."""


class Buffer:
    """Holds all rollouts of a run; one process, which all others call.

    admit -> waiting --lease--> running --finish--> complete --take--> taken --advance--> trained | dropped(reason)
                ^                  |
                +---- next attempt-+   (after a pause; which endings are tried again: credit/failures.py)

    No method suspends between reading and changing the state, so each is atomic. Every change is an event that the
    ledger and, if there is one, the journal receive; a method returns when the journal has it (docs/reliability.md).
    `request` names one call of a client: if the call is repeated, because its answer was lost, it gets the first
    answer. A method that is called for an attempt that is not running raises UnknownRollout.

        buffer = Buffer(run_secret=b"...")
        await buffer.admit(task, split="train", num_rollouts=2)  # "train-0"
        first, second = await buffer.lease(8, timeout=1.0)
        await buffer.record(call)                                # 31: calls that remain
        await buffer.finish(first.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
        await buffer.finish(second.key, Ending(outcome=Outcome.TIMEOUT))
        (group,) = await buffer.take(1, split="train")           # group.assemble() gives its trajectories
    """

    def __init__(
        self,
        *,
        run_secret: bytes,
        retries: Retries | None = None,
        breaker: Breaker | None = None,
        agent: AgentConfig | None = None,
        grace: float = 30.0,
        first_group: Mapping[Split, int] | None = None,
        journal: Path | None = None,
        config: BufferConfig = BufferConfig(),
    ) -> None:
        """`agent` has the limits of one attempt. A worker is dead `grace` seconds after its lease has ended.
        `first_group` gives the numbers of the first groups of a resumed run without a journal; with the folder of a
        journal, `journal`, the buffer continues from what is in it. `config` says how the journal is written, and how
        much memory spans take before they are kept in the journal only."""
        self._run_secret = run_secret
        self._retries = retries or Retries()
        self._breaker = breaker or Breaker(BreakerConfig(window=0))
        self._agent = agent or AgentConfig(target="")
        self._grace = grace
        self._store = Store(journal, config, first_group=first_group)
        self._ledger = self._store.ledger
        self._changed = asyncio.Condition()
        self._alarm, self._cancels, self._refused, self._dead = "", 0, Counter[str](), set[str]()
        self._idle_s, self._ended_at = 0.0, math.inf

    async def admit(self, task: Task, *, split: Split, num_rollouts: int, request: str = "") -> str:
        """Queue the rollouts of a task; returns their group's id, such as "train-12". If an interrupted step left the
        same group, its rollouts that have ended are not run again. Raises JournalFull."""
        if num_rollouts < 1:
            raise ValueError(f"a group has at least one rollout, not {num_rollouts}")
        async with self._change():
            answer = self._ledger.answers.get(request)
            if answer is None:
                self._idle_s += self._idle_now()
                group = self._ledger.counts.next_group[split]
                answer = (RolloutKey(split=split, group=group, index=0).group_id,)
                left = self._ledger.groups.get(answer[0])
                adopts = left is not None and (left.task.task_id, len(left.rollouts)) == (task.task_id, num_rollouts)
                event = events.Admitted(
                    split=split, group=group, num_rollouts=num_rollouts, task=task, adopts=adopts, request=request
                )
                self._store.note(event, grows=True)
        return answer[0]

    async def lease(
        self, num: int, timeout: float, *, deadline: float = math.inf, worker: str = "", request: str = ""
    ) -> list[Lease]:
        """Up to `num` waiting rollouts, as soon as one may start; [] after `timeout` seconds or on `cancel`. The
        caller, `worker`, promises to finish each within `deadline` seconds; see `expire` and `release`."""
        cancels, ledger, end = self._cancels, self._ledger, time.monotonic() + timeout
        async with self._changed:
            while True:  # ends with work, with `cancel`, or at `end`
                if worker in self._dead:  # the worker is dead but its request was still queued: nobody would run these
                    return []
                keys = ledger.leased_for(request)
                now, remaining = time.time(), end - time.monotonic()
                may_start = (key for key in ledger.waiting if ledger.attempt(key).ready_at <= now)
                ready = tuple(itertools.islice(may_start, num))
                if keys or ready or self._cancels > cancels or remaining <= 0:
                    break
                next_ready = min((ledger.attempt(key).ready_at for key in ledger.waiting), default=math.inf)
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(remaining, next_ready - now)):
                        await self._changed.wait()
            if not keys and ready:
                keys, until = ready, now + deadline
                self._store.note(events.Leased(keys=keys, at=now, expires_at=until, worker=worker, request=request))
            leases = [
                Lease(key=key, task=ledger.groups[key.group_id].task, secret=attempt_secret(self._run_secret, key))
                for key in keys
            ]
        await self._store.durable()
        return leases

    async def record(self, call: ModelCall) -> int:
        """Record a call of a running attempt, once for each call_id; returns how many it may still make. A call beyond
        `max_calls` or the attempt's budget is recorded, because it was sampled; after an answer of 0 the gateway starts
        no call. Raises JournalFull."""
        rollout = self._running(call.key, refused="refused_spans")
        if call.call_id not in self._ledger.spans(call.key).calls:
            self._store.note(events.Called(call=call), grows=True)
        remaining = 0 if self._has_spent(call.key) else max(0, self._agent.max_calls - rollout.num_calls)
        await self._store.durable()
        return remaining

    async def record_spans(
        self, key: RolloutKey, spans: Sequence[RawSpan], faults: Mapping[str, int], request: str = ""
    ) -> int:
        """Record spans of a running attempt from the agent's process; returns how many of them are beyond `max_spans`
        and refused. Of spans with the same id the latest counts, as a span may be sent before it has ended.
        `faults`: reason -> number of spans that the gateway has refused. Raises JournalFull, and OverBudget if the
        attempt has used up its bytes."""
        rollout = self._running(key, refused="refused_spans")
        if self._has_spent(key):
            reason = f"over {self._agent.max_recorded_mib:g} MiB in one attempt"
            if reason not in rollout.refused:  # later ones are not counted: that would be written down again and again
                await self._note(events.Traced(key=key, spans=(), refused={reason: len(spans)}, request=request))
            raise OverBudget(f"this rollout has sent {reason}: it may send no more spans")
        known, accepted = set(self._ledger.spans(key).raw), list[RawSpan]()
        for span in spans:
            if span.span_id in known or len(known) < self._agent.max_spans:
                known.add(span.span_id)
                accepted.append(span)
        excess = len(spans) - len(accepted)
        if request not in self._ledger.answers and (spans or faults):
            refused = dict(faults) | ({f"over {self._agent.max_spans} in one attempt": excess} if excess else {})
            event = events.Traced(key=key, spans=tuple(accepted), refused=refused, request=request)
            self._store.note(event, grows=True)
        await self._store.durable()
        return excess

    async def recorded_calls(self, key: RolloutKey) -> tuple[ModelCall, ...]:
        """The calls of a running attempt so far, in the order of their arrival."""
        self._running(key)
        return tuple(self._ledger.spans(key).calls.values())

    async def recorded_messages(self, key: RolloutKey, wanted: Mapping[str, bool]) -> Mapping[str, tuple[str, str]]:
        """Request and reply (JSON texts) of the calls of a running attempt with these ids, of those that there are. The
        request is "" where the value in `wanted` is False."""
        self._running(key)
        calls = self._ledger.spans(key).calls
        known = {call_id: calls[call_id] for call_id in wanted if call_id in calls}
        return {call_id: (call.request if wanted[call_id] else "", call.reply) for call_id, call in known.items()}

    async def recorded_spans(self, key: RolloutKey) -> tuple[RawSpan, ...]:
        """The spans that the agent's process has sent of a running attempt so far."""
        self._running(key)
        return tuple(self._ledger.spans(key).raw.values())

    async def note_failure(self, key: RolloutKey, outcome: Outcome, error: str) -> None:
        """Note why the gateway refused a call: it explains the exception that the agent may raise next."""
        rollout = self._running(key, refused="refused_spans")
        if self._has_spent(key) and rollout.cause is not None and rollout.cause.outcome is outcome:
            return
        await self._note(events.CallFailed(key=key, cause=Ending(outcome=outcome, error=error, at=time.time())))

    async def finish(self, key: RolloutKey, ending: Ending, *, failed_tool: str = "", retry: bool = False) -> None:
        """End a running attempt. The next attempt is queued if attempts remain, and if `retry` is set or the outcome is
        retried. `failed_tool` is what `breaker.last_failed_tool` returns for a failed attempt. A refusal that the
        gateway has noted explains the ending: an agent often raises an error of its own after it."""
        if ending.outcome is Outcome.FINISHED and ending.reward is None:
            raise ValueError(f"rollout {key.rollout_id}: FINISHED needs a reward")
        async with self._change():
            rollout = self._running(key, refused="refused_finishes")
            no_call = ending.outcome is Outcome.FINISHED and not rollout.num_calls
            if rollout.cause is not None and (no_call or ending.outcome is Outcome.AGENT_ERROR):
                ending = rollout.cause
            elif no_call:
                ending = replace(ending, outcome=Outcome.NO_MODEL_CALL, error="no call was recorded")
            self._end(rollout, ending, failed_tool=failed_tool, retry=retry)

    async def take(
        self, num_groups: int, *, split: Split, deadlines: Deadlines | None = None, request: str = ""
    ) -> list[TakenGroup]:
        """The first `num_groups` groups that became complete, or those that `deadlines` chooses, ordered by group
        number; waits for them. After `cancel`, and until the next `admit`, returns the groups that are complete,
        however few. See `taken.take_groups`."""
        ledger, cancels, complete = self._ledger, self._cancels, self._ledger.complete[split]
        chosen, seen = tuple[str, ...](), -1

        def ready() -> bool:
            nonlocal chosen, seen
            if seen != len(complete) >= num_groups:  # groups only join `complete` meanwhile
                seen, first = len(complete), tuple(itertools.islice(complete, num_groups))
                chosen = first if deadlines is None else deadlines.choose(set(complete), num_groups)
            return bool(chosen) or request in ledger.answers or ledger.cancelled or self._cancels > cancels

        async with self._changed:
            await self._changed.wait_for(ready)  # ends with finish, expire or cancel
            answer = ledger.answers.get(request, chosen or tuple(itertools.islice(complete, num_groups)))
            groups = [self._store.group(group_id) for group_id in answer]
            if request not in ledger.answers:
                self._store.note(events.Taken(groups=answer, request=request))
        await self._store.durable()
        return sorted(groups, key=lambda group: group.rollouts[0].key.group)

    async def advance(self, *, trained: int, dropped: Mapping[str, int], request: str = "") -> None:
        """Count taken rollouts as trained, or as dropped for a reason. Raises ValueError for more than are taken."""
        if request not in self._ledger.answers:
            total, taken = trained + sum(dropped.values()), self._ledger.counts.count.get("taken", 0)
            if min(trained, *dropped.values(), 0) < 0 or total > taken:
                raise ValueError(f"{trained} trained, {dict(dropped)} dropped, but {taken} taken")
            self._store.note(events.Advanced(trained=trained, dropped=dict(dropped), request=request))
        await self._store.durable()

    async def cancel(self, reason: str) -> int:
        """End every open rollout as CANCELLED, and let all waiting calls of `lease` and `take` return; returns the
        number of rollouts that were open."""
        async with self._change():
            opened = [rollout for rollout in self._ledger.open_rollouts() if rollout.phase != "complete"]
            for rollout in opened:
                ending = Ending(outcome=Outcome.CANCELLED, error=reason, at=time.time())
                self._store.note(events.Ended(key=rollout.key, ending=ending, again=False))
            self._store.note(events.Cancelled(reason=reason))
            self._cancels += 1
            self._ended_at = time.monotonic() if opened else self._ended_at
        return len(opened)

    async def expire(self, now: float) -> int:
        """End the attempts whose deadline and grace period have passed at Unix time `now`; returns how many."""
        error = "its lease expired: the worker died or hangs"
        return await self._lose(lambda rollout: now > rollout.expires_at + self._grace, error)

    async def release(self, worker: str) -> int:
        """End the attempts of a worker that is dead, and refuse it any more, also if a call of it is still queued; the
        number of attempts."""
        self._dead.add(worker)
        return await self._lose(lambda rollout: rollout.worker == worker, "its worker died")

    async def alarm(self, trouble: str) -> None:
        """Report in one line why rollouts cannot continue; see `Stats.trouble`."""
        self._alarm = trouble

    async def milestone(self, step: int) -> None:
        """Note that a checkpoint of this step is about to be written, to which `resume` can return. From the first
        milestone on, the journal keeps trained groups until `forget_before`."""
        await self._note(events.Checkpointed(step=step))

    async def forget_before(self, step: int) -> None:
        """Forget what was trained before the checkpoint of this step, which is complete."""
        await self._note(events.Released(step=step))

    async def resume(self, step: int, next_group: Mapping[Split, int], newest: int | None = None) -> int:
        """Start a new run from the checkpoint of this step, when the next groups had the numbers `next_group`. Attempts
        of the old run that were running are over, and so are those with calls of a policy version above `newest`, whose
        weights are lost. Returns the number of rollouts that have ended and need not be run again."""
        async with self._change():
            self._store.note(events.Resumed(step=step, next_group=dict(next_group), newest=newest))
        untrained = [group for group in self._ledger.groups.values() if group.stage != "trained"]
        return sum(rollout.phase == "complete" for group in untrained for rollout in group.rollouts)

    async def stats(self) -> Stats:
        """The numbers of rollouts at this moment."""
        counts = self._ledger.counts
        phases = Counter[str](r.phase for r in self._ledger.open_rollouts() if r.key.split == "train")
        return Stats(
            dropped=dict(counts.dropped),
            failed={Outcome(name): number for name, number in counts.failed.items()},
            next_group=dict(counts.next_group),
            trouble=self._alarm or self._breaker.tripped,
            idle_s=self._idle_s + self._idle_now(),
            **(Counter(counts.count) + phases + self._refused),
        )

    async def close(self) -> None:
        """Release the journal."""
        self._store.close()

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """Hold the lock for a change; at its end, wake the calls that wait for one, and wait for the journal."""
        async with self._changed:
            yield
            self._changed.notify_all()
        await self._store.durable()

    async def _note(self, event: events.Event) -> None:
        self._store.note(event)
        await self._store.durable()

    def _idle_now(self) -> float:
        """Seconds since the last rollout ended; 0 if a rollout is waiting or running, or none has ended."""
        busy = self._ledger.waiting or any(r.phase == "running" for r in self._ledger.open_rollouts())
        return 0.0 if busy else max(0.0, time.monotonic() - self._ended_at)

    def _has_spent(self, key: RolloutKey) -> bool:
        """Whether an attempt has used up its budget of bytes: the next record is refused, whatever its size."""
        return self._ledger.spans(key).size >= self._agent.max_recorded_mib * 2**20

    def _running(self, key: RolloutKey, *, refused: str = "") -> StoredRollout:
        """The rollout of a running attempt. Raises UnknownRollout for any other key, counted in the field `refused` of
        `Stats`."""
        rollout = self._ledger.running(key)
        if rollout is None:
            if refused:
                self._refused[refused] += 1
            raise UnknownRollout(f"rollout {key.rollout_id} attempt {key.attempt} is not open")
        return rollout

    async def _lose(self, is_lost: Callable[[StoredRollout], bool], error: str) -> int:
        async with self._change():
            running = (rollout for rollout in self._ledger.open_rollouts() if rollout.phase == "running")
            lost = [rollout for rollout in running if is_lost(rollout)]
            for rollout in lost:
                self._end(rollout, Ending(outcome=Outcome.WORKER_LOST, error=error))
        return len(lost)

    def _end(self, rollout: StoredRollout, ending: Ending, *, failed_tool: str = "", retry: bool = False) -> None:
        if ending.outcome not in (Outcome.CANCELLED, Outcome.WORKER_LOST):  # one death ends many rollouts at once
            self._breaker.note(cause_of(ending.outcome, ending.error, failed_tool))
        again = retry or self._retries.wanted(ending.outcome, self._ledger.spans(rollout.key).calls.values())
        now, ready_at, self._ended_at = time.time(), 0.0, time.monotonic()
        if again:
            same_split = [r for r in self._ledger.open_rollouts() if r.key.split == rollout.key.split]
            again = self._retries.allowed(rollout.retries, sum(r.retries for r in same_split), len(same_split))
        if again and (pause := self._retries.delay(rollout.retries, random.random())):
            ready_at = now + pause
        self._store.note(events.Ended(key=rollout.key, ending=replace(ending, at=now), again=again, ready_at=ready_at))
