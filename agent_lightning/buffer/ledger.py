"""The ledger: all that a buffer knows, changed by events and by nothing else.

    open: waiting -> running -> complete   taken   trained (kept until a checkpoint covers it)   left (by a dead run)

`apply` decides nothing and looks at no clock, so that a journal's events give the same ledger again.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from agent_lightning.buffer.events import (
    Admitted,
    Advanced,
    Base,
    Called,
    CallFailed,
    Cancelled,
    Checkpointed,
    Ended,
    Event,
    Leased,
    Released,
    Resumed,
    Taken,
    Traced,
)
from agent_lightning.buffer.holdings import Counts, GroupOf, GroupState, Milestone, Rollout, RolloutState, add
from agent_lightning.buffer.segments import Place
from agent_lightning.core.types import Outcome, RolloutKey, Split

_ANSWERS: Final = 4096
"""Calls of clients whose answers are remembered: many more than are in flight when a process dies."""


class Ledger:
    """Where every rollout is. With `keeps`, which needs a journal, groups outlive being taken: until they are trained,
    and where a run may come back to a milestone, until a later one is released."""

    def __init__(
        self, *, next_group: Mapping[Split, int] | None = None, keeps: bool = False, memory_bytes: int = 2**62
    ) -> None:
        """`memory_bytes`: spans of complete rollouts beyond it are not held in memory."""
        self.counts = Counts(next_group={"train": 0, "val": 0, **(next_group or {})})
        self.groups: dict[str, GroupOf] = {}
        self.waiting: deque[RolloutKey] = deque()
        self.whole: dict[str, deque[str]] = {"train": deque(), "val": deque()}
        self.answers: dict[str, tuple[str, ...]] = {}
        """Request -> the ids of what was admitted, leased or taken, the newest last."""
        self.cancelled = False
        self.held_bytes = 0
        self._keeps = keeps
        self._memory_bytes = memory_bytes
        self._taken: deque[str] = deque()
        self._partly = 0
        self._era = 0
        self._restoring = 0
        """Events that a base counts already, and that are still to come."""
        self._milestones: list[Milestone] = []
        self._appliers: Mapping[type[Event], Callable[..., None]] = {
            Admitted: self._admitted,
            Leased: self._leased,
            Called: self._called,
            Traced: self._traced,
            CallFailed: self._call_failed,
            Ended: self._ended,
            Cancelled: self._cancelled,
            Taken: self._took,
            Advanced: self._advanced,
            Checkpointed: self._checkpointed,
            Released: self._released,
            Resumed: self._resumed,
            Base: self._begun,
        }

    def apply(self, event: Event, place: Place | None = None) -> None:
        """Let it have happened; `place`: where the journal has it. Raises KeyError, IndexError or ValueError where it
        does not fit what happened before."""
        self._appliers[type(event)](event, place)

    def rollout(self, key: RolloutKey) -> Rollout | None:
        """The rollout of a key, at whatever attempt; None where there is none."""
        group = self.groups.get(key.group_id)
        return group.rollouts[key.index] if group is not None and key.index < len(group.rollouts) else None

    def open_rollouts(self) -> Iterator[Rollout]:
        """Of groups that are neither taken nor left, in order of admission."""
        return (rollout for group in self.groups.values() if group.stage == "open" for rollout in group.rollouts)

    def ready(self, now: float, num: int) -> list[RolloutKey]:
        """The first `num` waiting rollouts that may start at Unix time `now`."""
        return list(itertools.islice((key for key in self.waiting if self._of(key).state.ready_at <= now), num))

    def ready_at(self) -> float:
        """When the first of those that wait may start; infinity where none waits."""
        return min((self._of(key).state.ready_at for key in self.waiting), default=math.inf)

    @property
    def live_bytes(self) -> int:
        """What a compacted journal would have of spans."""
        return sum(rollout.bytes for group in self.groups.values() for rollout in group.rollouts)

    def base(self) -> Base:
        """All but the spans; see `Base`."""
        groups = (
            GroupState(
                group_id=one.group_id,
                task=one.task,
                stage=one.stage,
                era=one.era,
                rollouts=[rollout.state for rollout in one.rollouts],
            )
            for one in self.groups.values()
        )
        return Base(
            spans=sum(len(rollout.places) for rollout in self.kept()),
            counts=self.counts,
            groups=tuple(groups),
            waiting=tuple(self.waiting),
            whole={split: tuple(ids) for split, ids in self.whole.items()},
            taken=tuple(self._taken),
            partly=self._partly,
            era=self._era,
            milestones=tuple(self._milestones),
            answers=tuple(self.answers.items()),
            cancelled=self.cancelled,
        )

    def kept(self) -> Iterator[Rollout]:
        """Every rollout with spans in the journal, in the order in which `base` names them."""
        return (rollout for group in self.groups.values() for rollout in group.rollouts if rollout.places)

    def _admitted(self, event: Admitted, place: Place | None) -> None:
        numbers = range(event.num_rollouts)
        keys = [RolloutKey(split=event.split, group=event.group, index=index) for index in numbers]
        group_id = keys[0].group_id
        self.counts.next_group[event.split] = event.group + 1
        group = self.groups.get(group_id)
        if group is not None and group.stage != "left":
            raise ValueError(f"{group_id} is admitted twice")
        if group is None or not event.adopts:
            self._drop(group_id)
            group = GroupOf(group_id, event.task, [Rollout(RolloutState(key=key)) for key in keys])
            self.groups[group_id] = group
            self.waiting.extend(keys)
        else:
            self._adopt(group)
        self._count("admitted", event.num_rollouts if event.split == "train" else 0)
        self.cancelled = False
        self._answer(event.request, (group_id,))

    def _leased(self, event: Leased, place: Place | None) -> None:
        for key in event.keys:
            state = self._of(key).state
            state.phase, state.started_at, state.expires_at = "running", event.at, event.expires_at
            state.worker = event.worker
            self.waiting.remove(key)  # it is the first, or near
        self._answer(event.request, tuple(f"{key.rollout_id}/{key.attempt}" for key in event.keys))

    def _called(self, event: Called, place: Place | None) -> None:
        call, rollout = event.call, self._of(event.call.key)
        state, first = rollout.state, self._is_first()
        if not rollout.spilled:
            rollout.calls[call.call_id] = call
        self._attach(rollout, place)
        if first:
            state.num_calls += 1
            state.sampled_tokens += len(call.response_T)
            self._count("calls", 1)
            self._count("sampled_tokens", len(call.response_T))
        if first and state.cause is not None and call.started_at > state.cause.at:
            state.cause = None  # the agent got over that error: it does not explain a later one

    def _traced(self, event: Traced, place: Place | None) -> None:
        rollout = self._of(event.key)
        if not rollout.spilled:
            rollout.raw.update({span.span_id: span for span in event.spans})
        self._attach(rollout, place)
        if self._is_first():
            add(rollout.state.refused, event.refused)
            self._answer(event.request, ())

    def _call_failed(self, event: CallFailed, place: Place | None) -> None:
        self._of(event.key).state.cause = event.cause

    def _ended(self, event: Ended, place: Place | None) -> None:
        group, rollout = self.groups[event.key.group_id], self._of(event.key)
        if event.again:
            self._forget_spans(rollout)
            key = replace(event.key, attempt=event.key.attempt + 1)
            again = RolloutState(key=key, voided=rollout.state.voided, ready_at=event.ready_at)
            group.rollouts[event.key.index] = Rollout(again)
            self.waiting.appendleft(again.key)  # first in line: the rest of its group waits for it
            self._count("retried", 1)
            return
        state = rollout.state
        if state.phase == "waiting":
            self.waiting.remove(state.key)
        state.phase, state.ending = "complete", event.ending
        self._count("ended", 1)
        if event.ending.outcome is not Outcome.FINISHED and event.key.split == "train":
            add(self.counts.failed, {event.ending.outcome: 1})
        if self.held_bytes > self._memory_bytes:
            self._spill(rollout)
        if group.whole:
            self.whole[event.key.split].append(group.group_id)

    def _cancelled(self, event: Cancelled, place: Place | None) -> None:
        self.cancelled = True

    def _took(self, event: Taken, place: Place | None) -> None:
        if self._keeps and not self._milestones:  # who took the last ones has them: it asks for others
            for group_id in [one.group_id for one in self.groups.values() if one.stage == "trained"]:
                self._drop(group_id)
        for group_id in event.groups:
            group = self.groups[group_id]
            split = group.rollouts[0].state.key.split
            self.whole[split].remove(group_id)
            self._count("taken" if split == "train" else "evaluated", len(group.rollouts))
            if not self._keeps:
                self._drop(group_id)
                continue
            group.stage, group.era = ("taken" if split == "train" else "trained"), self._era
            for rollout in group.rollouts:
                self._spill(rollout)
            if split == "train":
                self._taken.append(group_id)
        self._answer(event.request, event.groups)

    def _advanced(self, event: Advanced, place: Place | None) -> None:
        total = event.trained + sum(event.dropped.values())
        self._count("taken", -total)
        self._count("trained", event.trained)
        add(self.counts.dropped, event.dropped)
        self._partly += total if self._keeps else 0
        while self._taken and self._partly >= len(self.groups[self._taken[0]].rollouts):
            group = self.groups[self._taken.popleft()]
            self._partly -= len(group.rollouts)
            group.stage, group.era = "trained", self._era
        self._answer(event.request, ())

    def _checkpointed(self, event: Checkpointed, place: Place | None) -> None:
        self._era += 1
        self._milestones.append(Milestone(step=event.step, era=self._era, counts=self.counts.copy()))

    def _released(self, event: Released, place: Place | None) -> None:
        kept = next((one for one in reversed(self._milestones) if one.step == event.step), None)
        if kept is None:
            return
        self._milestones = [one for one in self._milestones if one.era >= kept.era]
        for group in list(self.groups.values()):
            key = group.rollouts[0].state.key
            trained = group.stage == "trained" and group.era < kept.era
            passed = group.stage == "left" and key.group < self.counts.next_group[key.split]
            if trained or passed:
                self._drop(group.group_id)

    def _resumed(self, event: Resumed, place: Place | None) -> None:
        """Back to the milestone: what came after it is left, until it is admitted again."""
        # Two of one step: after the first, the next step was given up. Which of them was saved, its groups tell.
        those = [one for one in self._milestones if one.step == event.step]
        exact = [one for one in those if one.counts.next_group == dict(event.next_group)]
        found = next(reversed(exact or those), None)
        if found is None:
            for group_id in list(self.groups):
                self._drop(group_id)
            counts = Counts(next_group=dict(event.next_group))
            self._milestones = []
        else:
            counts = found.counts.copy()
            self._milestones = self._milestones[: self._milestones.index(found) + 1]
        counts.count["taken"] = 0  # the run that held them is dead
        self.counts, self.cancelled, self.answers, self._partly = counts, False, {}, 0
        self.waiting.clear()
        self._taken.clear()
        for ids in self.whole.values():
            ids.clear()
        for group in list(self.groups.values()):
            before = found is not None and group.stage == "trained" and group.era < found.era
            if before:
                continue
            key = group.rollouts[0].state.key
            self._void(group)
            group.stage, group.era = "left", self._era
            if key.group < counts.next_group[key.split]:
                group.stage = "open"
                self._queue(group)

    def _begun(self, event: Base, place: Place | None) -> None:
        self.counts, self.cancelled, self._era = event.counts, event.cancelled, event.era
        self.waiting, self._taken, self._partly = deque(event.waiting), deque(event.taken), event.partly
        self.whole = {split: deque(ids) for split, ids in event.whole.items()}
        self._milestones, self.answers = list(event.milestones), dict(event.answers)
        self._restoring = event.spans
        self.groups = {
            one.group_id: GroupOf(
                one.group_id, one.task, [Rollout(state) for state in one.rollouts], one.stage, one.era
            )
            for one in event.groups
        }

    # What they have in common.

    def _of(self, key: RolloutKey) -> Rollout:
        rollout = self.groups[key.group_id].rollouts[key.index]
        if rollout.state.key != key:
            raise ValueError(f"{key} is not the attempt that runs, which is {rollout.state.key.attempt}")
        return rollout

    def _count(self, name: str, number: int) -> None:
        self.counts.count[name] = self.counts.count.get(name, 0) + number

    def _answer(self, request: str, ids: tuple[str, ...]) -> None:
        if request:
            self.answers[request] = ids
            while len(self.answers) > _ANSWERS:
                del self.answers[next(iter(self.answers))]

    def _is_first(self) -> bool:
        """Whether spans are new, and not those that a base counts already."""
        self._restoring -= 1
        return self._restoring < 0

    def _attach(self, rollout: Rollout, place: Place | None) -> None:
        if place is None:
            return
        rollout.places.append(place)
        self.held_bytes += 0 if rollout.spilled else place.length
        if rollout.state.phase == "complete" and self.held_bytes > self._memory_bytes:
            self._spill(rollout)  # of a base

    def _spill(self, rollout: Rollout) -> None:
        if rollout.places and not rollout.spilled:
            rollout.calls, rollout.raw, rollout.spilled = {}, {}, True
            self.held_bytes -= rollout.bytes

    def _forget_spans(self, rollout: Rollout) -> None:
        self.held_bytes -= 0 if rollout.spilled else rollout.bytes
        rollout.calls, rollout.raw, rollout.places = {}, {}, []

    def _drop(self, group_id: str) -> None:
        group = self.groups.pop(group_id, None)
        for rollout in group.rollouts if group is not None else ():
            self._forget_spans(rollout)

    def _void(self, group: GroupOf) -> None:
        """No worker runs its rollouts any more: what has not ended begins anew, as another attempt."""
        for index, rollout in enumerate(group.rollouts):
            ending = rollout.state.ending
            if rollout.state.phase == "running" or (ending is not None and ending.outcome is Outcome.CANCELLED):
                self._forget_spans(rollout)
                key = rollout.state.key
                state = RolloutState(key=replace(key, attempt=key.attempt + 1), voided=rollout.state.voided + 1)
                group.rollouts[index] = Rollout(state)

    def _queue(self, group: GroupOf) -> None:
        self.waiting.extend(one.state.key for one in group.rollouts if one.state.phase == "waiting")
        if group.whole:
            self.whole[group.rollouts[0].state.key.split].append(group.group_id)

    def _adopt(self, group: GroupOf) -> None:
        """A group that was left goes on: what its rollouts had done counts again."""
        self.groups[group.group_id] = self.groups.pop(group.group_id)  # in the order of admission
        group.stage = "open"
        self._queue(group)
        for state in (rollout.state for rollout in group.rollouts):
            self._count("calls", state.num_calls)
            self._count("sampled_tokens", state.sampled_tokens)
            if state.ending is not None:
                self._count("ended", 1)
                if state.ending.outcome is not Outcome.FINISHED and state.key.split == "train":
                    add(self.counts.failed, {state.ending.outcome: 1})


def stats_of(ledger: Ledger) -> Counter[str]:
    """The counts of the train split by name: those that are kept, and the rollouts of each phase."""
    phases = Counter(str(one.state.phase) for one in ledger.open_rollouts() if one.state.key.split == "train")
    return Counter(ledger.counts.count) + phases


def keys_of(ids: Iterable[str]) -> list[RolloutKey]:
    """Read back what a lease was answered with: "train-3-1/0"."""
    return [
        RolloutKey.parse(rollout_id, int(attempt)) for rollout_id, _, attempt in (one.partition("/") for one in ids)
    ]
