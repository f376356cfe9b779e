"""The events of a Buffer: what its journal records, and the only way in which its ledger changes.

An event records a decision, not a request: applied in order, the events of a journal give the same ledger again,
whatever the clock shows and however the rules have changed since. A new event is a class and a number in `KINDS`.

The field `request` names the client's call that the event answers: if the call is repeated, because its answer was
lost, the client gets the first answer again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Final, Self

from agent_lightning.buffer.ledger import Counts, Ledger, Milestone, StoredGroup, StoredRollout, add_counts
from agent_lightning.buffer.segments import RecordLocation
from agent_lightning.core.types import Ending, ModelCall, Outcome, RolloutKey, Split, Task
from agent_lightning.spans.tree import RawSpan


class Event(ABC):
    """A change of a Buffer that has been decided."""

    __slots__ = ()

    @abstractmethod
    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        """Change the ledger; decides nothing and reads no clock. `location` is where the journal, if there is one, has
        the event. Raises KeyError, IndexError or ValueError if the event does not fit the events before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Event):
    """All that a ledger holds except spans, which follow as events: the first event of a compacted journal. Fields have
    the meaning of `Ledger`'s."""

    spans: int  # number of Called and Traced events that follow and are already part of `counts`
    counts: Counts
    groups: tuple[StoredGroup, ...]
    waiting: tuple[RolloutKey, ...]  # in the order in which they are leased
    complete: Mapping[str, tuple[str, ...]]
    taken: tuple[str, ...]
    partly_advanced: int
    checkpoint_epoch: int
    milestones: tuple[Milestone, ...]
    answers: tuple[tuple[str, tuple[str, ...]], ...]
    cancelled: bool

    @classmethod
    def of(cls, ledger: Ledger) -> Self:
        """The content of a ledger."""
        return cls(
            spans=sum(len(spans.locations) for spans in ledger.recorded()),
            counts=ledger.counts,
            groups=tuple(ledger.groups.values()),
            waiting=tuple(ledger.waiting),
            complete={split: tuple(ids) for split, ids in ledger.complete.items()},
            taken=tuple(ledger.taken),
            partly_advanced=ledger.partly_advanced,
            checkpoint_epoch=ledger.checkpoint_epoch,
            milestones=tuple(ledger.milestones),
            answers=tuple(ledger.answers.items()),
            cancelled=ledger.cancelled,
        )

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        ledger.counts, ledger.cancelled = self.counts, self.cancelled
        ledger.groups = {group.group_id: group for group in self.groups}
        ledger.waiting, ledger.taken = deque(self.waiting), deque(self.taken)
        ledger.complete = {split: deque(ids) for split, ids in self.complete.items()}
        ledger.partly_advanced, ledger.checkpoint_epoch = self.partly_advanced, self.checkpoint_epoch
        ledger.milestones, ledger.answers = list(self.milestones), dict(self.answers)
        ledger.known_span_events = self.spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted(Event):
    """A group was queued. If an interrupted step has left the same group unfinished, its rollouts that have ended are
    used again (`adopts`)."""

    split: Split
    group: int
    num_rollouts: int
    task: Task
    adopts: bool = False
    request: str = ""

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        keys = [RolloutKey(split=self.split, group=self.group, index=index) for index in range(self.num_rollouts)]
        group_id = keys[0].group_id
        ledger.counts.next_group[self.split] = self.group + 1
        orphan = ledger.groups.get(group_id)
        if orphan is not None and orphan.stage != "orphaned":
            raise ValueError(f"{group_id} is admitted twice")
        if orphan is not None and self.adopts:
            orphan.stage = "open"
            ledger.groups[group_id] = ledger.groups.pop(group_id)  # in the order of admission
            for rollout in orphan.rollouts:
                ledger.count(rollout)
        else:
            ledger.drop(group_id)
            rollouts = [StoredRollout(key=key) for key in keys]
            ledger.groups[group_id] = StoredGroup(group_id=group_id, task=self.task, rollouts=rollouts)
        ledger.queue(ledger.groups[group_id])
        ledger.counts.add(admitted=self.num_rollouts if self.split == "train" else 0)
        ledger.cancelled = False
        ledger.remember(self.request, (group_id,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased(Event):
    """A worker received attempts to run."""

    keys: tuple[RolloutKey, ...]
    at: float
    expires_at: float
    worker: str = ""
    request: str = ""

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        for key in self.keys:
            rollout = ledger.attempt(key)
            rollout.phase, rollout.worker = "running", self.worker
            rollout.started_at, rollout.expires_at = self.at, self.expires_at
            ledger.waiting.remove(key)  # it is the first, or near
        ledger.remember(self.request, tuple(f"{key.rollout_id}/{key.attempt}" for key in self.keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class Called(Event):
    """The gateway recorded a model call."""

    call: ModelCall

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        call, rollout = self.call, ledger.attempt(self.call.key)
        spans = ledger.attach(rollout, location)
        if not spans.spilled:
            spans.calls[call.call_id] = call
        if ledger.is_counted():
            return
        rollout.num_calls += 1
        rollout.sampled_tokens += len(call.response_T)
        rollout.newest_version = max(rollout.newest_version, call.policy_version, call.last_version or 0)
        ledger.counts.add(calls=1, sampled_tokens=len(call.response_T))
        if rollout.cause is not None and call.started_at > rollout.cause.at:
            rollout.cause = None  # the agent recovered from that refusal, so it does not explain a later error


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced(Event):
    """The agent's process sent spans; some of them were refused."""

    key: RolloutKey
    spans: tuple[RawSpan, ...]
    refused: Mapping[str, int]
    request: str = ""

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        rollout = ledger.attempt(self.key)
        spans = ledger.attach(rollout, location)
        if not spans.spilled:
            spans.raw.update({span.span_id: span for span in self.spans})
        if not ledger.is_counted():
            add_counts(rollout.refused, self.refused)
            ledger.remember(self.request, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed(Event):
    """The gateway refused a model call."""

    key: RolloutKey
    cause: Ending

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        ledger.attempt(self.key).cause = self.cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Event):
    """An attempt ended. If `again`, the rollout's next attempt is queued, and may start at `ready_at`."""

    key: RolloutKey
    ending: Ending
    again: bool
    ready_at: float = 0.0

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        group, rollout = ledger.groups[self.key.group_id], ledger.attempt(self.key)
        if self.again:
            group.rollouts[self.key.index] = following = ledger.next_attempt(rollout)
            following.ready_at = self.ready_at
            ledger.waiting.appendleft(following.key)  # it goes first: the rest of its group waits for it
            ledger.counts.add(retried=1, replaced_tokens=rollout.sampled_tokens)
            return
        if rollout.phase == "waiting":
            ledger.waiting.remove(self.key)
        rollout.phase, rollout.ending = "complete", self.ending
        ledger.count_ending(rollout)
        ledger.spill_beyond_memory(self.key)
        if group.complete:
            ledger.complete[group.split].append(group.group_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled(Event):
    """All open rollouts were ended, and everything that waits for rollouts is to return."""

    reason: str

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        ledger.cancelled = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken(Event):
    """Complete groups were given to the run."""

    groups: tuple[str, ...]
    request: str = ""

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        if ledger.keeps_taken and not ledger.milestones:  # a client that takes more has received what it took before
            for group_id in [group.group_id for group in ledger.groups.values() if group.stage == "trained"]:
                ledger.drop(group_id)
        for group_id in self.groups:
            group = ledger.groups[group_id]
            ledger.complete[group.split].remove(group_id)
            ledger.counts.add(**{"taken" if group.split == "train" else "evaluated": len(group.rollouts)})
            if not ledger.keeps_taken:
                ledger.drop(group_id)
                continue
            group.stage = "taken" if group.split == "train" else "trained"
            group.checkpoint_epoch = ledger.checkpoint_epoch
            for rollout in group.rollouts:
                ledger.spill(rollout.key)
            if group.split == "train":
                ledger.taken.append(group_id)
        ledger.remember(self.request, self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced(Event):
    """Taken rollouts were trained, or dropped for a reason."""

    trained: int
    dropped: Mapping[str, int]
    request: str = ""

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        total = self.trained + sum(self.dropped.values())
        ledger.counts.add(taken=-total, trained=self.trained)
        add_counts(ledger.counts.dropped, self.dropped)
        ledger.partly_advanced += total if ledger.keeps_taken else 0
        while ledger.taken and ledger.partly_advanced >= len(ledger.groups[ledger.taken[0]].rollouts):
            group = ledger.groups[ledger.taken.popleft()]
            ledger.partly_advanced -= len(group.rollouts)
            group.stage, group.checkpoint_epoch = "trained", ledger.checkpoint_epoch
        ledger.remember(self.request, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed(Event):
    """A checkpoint of this step is about to be written; a run that resumes from it returns to this event."""

    step: int

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        ledger.checkpoint_epoch += 1
        epoch, counts = ledger.checkpoint_epoch, deepcopy(ledger.counts)
        for rollout in ledger.open_rollouts():  # `Resumed` counts what they are then
            ledger.count(rollout, counts, sign=-1)
        ledger.milestones.append(Milestone(step=self.step, checkpoint_epoch=epoch, counts=counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Released(Event):
    """The checkpoint of this step is complete: groups that were trained before it are no longer needed."""

    step: int

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        epoch = next((m.checkpoint_epoch for m in reversed(ledger.milestones) if m.step == self.step), None)
        if epoch is None:
            return
        ledger.milestones = [m for m in ledger.milestones if m.checkpoint_epoch >= epoch]
        for group in list(ledger.groups.values()):
            trained = group.stage == "trained" and group.checkpoint_epoch < epoch
            skipped = group.stage == "orphaned" and group.number < ledger.counts.next_group[group.split]
            if trained or skipped:
                ledger.drop(group.group_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """A new run starts from the checkpoint of this step: no attempt of the old run is open any more, and groups after
    the checkpoint are orphaned until they are admitted again."""

    step: int
    next_group: Mapping[Split, int]
    newest: int | None = None  # the newest policy version of the checkpoint; None: attempts of later ones count too

    def apply(self, ledger: Ledger, location: RecordLocation | None) -> None:
        # There are two milestones of a step if the step after the first was abandoned; the numbers of the next groups
        # tell which of them was saved.
        of_step = [milestone for milestone in ledger.milestones if milestone.step == self.step]
        exact = [milestone for milestone in of_step if milestone.counts.next_group == dict(self.next_group)]
        milestone = next(reversed(exact or of_step), None)
        if milestone is None:
            for group_id in list(ledger.groups):
                ledger.drop(group_id)
            counts, ledger.milestones = Counts(next_group=dict(self.next_group)), []
        else:
            counts = deepcopy(milestone.counts)
            ledger.milestones = ledger.milestones[: ledger.milestones.index(milestone) + 1]
        counts.count["taken"] = 0  # the run that had taken them is over
        ledger.counts, ledger.cancelled, ledger.answers, ledger.partly_advanced = counts, False, {}, 0
        ledger.waiting.clear()
        for ids in (ledger.taken, *ledger.complete.values()):
            ids.clear()
        for group in list(ledger.groups.values()):
            if milestone and group.stage == "trained" and group.checkpoint_epoch < milestone.checkpoint_epoch:
                continue
            for index, rollout in enumerate(group.rollouts):
                cancelled = rollout.ending is not None and rollout.ending.outcome is Outcome.CANCELLED
                lost = self.newest is not None and rollout.newest_version > self.newest
                if rollout.phase == "running" or cancelled or lost:  # it ended with its run: a new one replaces it
                    group.rollouts[index] = ledger.next_attempt(rollout, voided=1)
            group.stage, group.checkpoint_epoch = "orphaned", ledger.checkpoint_epoch
            if group.number < counts.next_group[group.split]:
                group.stage = "open"
                ledger.queue(group)
                for rollout in group.rollouts:
                    ledger.count(rollout)


_BY_NUMBER: Final[tuple[type[Event], ...]] = (
    *(Base, Admitted, Leased, Called, Traced, CallFailed, Ended, Cancelled),  # 1 to 8
    *(Taken, Advanced, Checkpointed, Released, Resumed),  # 9 to 13
)
KINDS: Final[Mapping[int, type[Event]]] = dict(enumerate(_BY_NUMBER, 1))
"""The number of each event in a journal -> its class. A number never changes its meaning: new events are the last."""
