"""The ledger: all that a Buffer knows. Events, and nothing else, change it (`events.Event.apply`).

open: waiting -> running -> complete    taken    trained (kept until a checkpoint covers it)    orphaned
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from agent_lightning.buffer.events import Base
from agent_lightning.buffer.segments import RecordLocation
from agent_lightning.buffer.state import Counts, Milestone, RecordedSpans, StoredGroup, StoredRollout, add_counts
from agent_lightning.core.types import Outcome, RolloutKey, Split, Task

_REMEMBERED_ANSWERS: Final = 4096
"""Number of client calls whose answers are remembered: many more than are in flight when a process dies."""


class Ledger:
    """The state of every rollout.

    With `keeps_taken`, which needs a journal, a taken group stays until it is trained and a newer checkpoint is
    complete, so that a resumed run can take it again. Without it, a group is forgotten when it is taken.
    """

    def __init__(
        self, *, next_group: Mapping[Split, int] | None = None, keeps_taken: bool = False, memory_bytes: int = 2**62
    ) -> None:
        """`memory_bytes`: spans of complete rollouts beyond this size are kept in the journal only."""
        self.keeps_taken = keeps_taken
        self._memory_bytes = memory_bytes
        self._held_bytes = 0
        self.counts = Counts(next_group={"train": 0, "val": 0, **(next_group or {})})
        self.groups: dict[str, StoredGroup] = {}
        """Groups by id, in the order of their admission."""
        self._spans: dict[RolloutKey, RecordedSpans] = {}
        self.waiting: deque[RolloutKey] = deque()
        self.complete: dict[str, deque[str]] = {"train": deque(), "val": deque()}
        """Split -> ids of complete groups, in the order in which they became complete."""
        self.taken: deque[str] = deque()
        self.partly_advanced = 0
        """Number of rollouts of the first taken group that were trained or dropped already."""
        self.checkpoint_epoch = 0
        """Number of checkpoints so far."""
        self.milestones: list[Milestone] = []
        self.answers: dict[str, tuple[str, ...]] = {}
        """Request -> ids of what was admitted, leased or taken for it, the newest last."""
        self.cancelled = False
        self.known_span_events = 0
        """Number of span events that are still to come and that a Base has counted already."""

    # Questions.

    def running(self, key: RolloutKey) -> StoredRollout | None:
        """The rollout of a key if a worker has leased exactly this attempt; else None."""
        group = self.groups.get(key.group_id)
        rollout = group.rollouts[key.index] if group is not None and key.index < len(group.rollouts) else None
        return rollout if rollout is not None and rollout.key == key and rollout.phase == "running" else None

    def attempt(self, key: RolloutKey) -> StoredRollout:
        """The rollout, at exactly this attempt. Raises KeyError, IndexError or ValueError for any other key."""
        rollout = self.groups[key.group_id].rollouts[key.index]
        if rollout.key != key:
            raise ValueError(f"{key} is not the latest attempt, which is {rollout.key.attempt}")
        return rollout

    def spans(self, key: RolloutKey) -> RecordedSpans:
        """The spans of an attempt; empty if none were recorded."""
        return self._spans.get(key) or RecordedSpans()

    def open_rollouts(self) -> Iterator[StoredRollout]:
        """The rollouts of open groups, in order of admission."""
        return (rollout for group in self.groups.values() if group.stage == "open" for rollout in group.rollouts)

    def ready(self, now: float, num: int) -> list[RolloutKey]:
        """The first `num` waiting rollouts that may start at Unix time `now`."""
        return list(itertools.islice((key for key in self.waiting if self.attempt(key).ready_at <= now), num))

    def ready_at(self) -> float:
        """Unix time at which the first waiting rollout may start; infinity if none waits."""
        return min((self.attempt(key).ready_at for key in self.waiting), default=math.inf)

    def task_of(self, key: RolloutKey) -> Task:
        return self.groups[key.group_id].task

    def answer(self, request: str) -> tuple[str, ...] | None:
        """The ids with which this request was answered; None for a new request."""
        return self.answers.get(request)

    def leased_for(self, request: str) -> list[RolloutKey]:
        """Attempts that were leased for this request and still run."""
        ids = (attempt_id.partition("/") for attempt_id in self.answers.get(request, ()))
        keys = [RolloutKey.parse(rollout_id, int(attempt)) for rollout_id, _, attempt in ids]
        return [key for key in keys if self.running(key)]

    def complete_groups(self, split: Split, num: int) -> tuple[str, ...]:
        """Ids of the first `num` complete groups of a split."""
        return tuple(itertools.islice(self.complete[split], num))

    def has_orphan(self, group_id: str, task: Task, num_rollouts: int) -> bool:
        """Whether an interrupted run has left this group, with the same task and number of rollouts."""
        group = self.groups.get(group_id)
        return group is not None and group.task.task_id == task.task_id and len(group.rollouts) == num_rollouts

    @property
    def num_taken(self) -> int:
        """Number of rollouts that are taken and neither trained nor dropped."""
        return self.counts.count.get("taken", 0)

    @property
    def num_reusable(self) -> int:
        """Number of rollouts that have ended and are not trained: a resumed run need not run them again."""
        untrained = (group for group in self.groups.values() if group.stage != "trained")
        return sum(rollout.phase == "complete" for group in untrained for rollout in group.rollouts)

    @property
    def live_bytes(self) -> int:
        """Size of the spans that a compacted journal would hold."""
        return sum(spans.bytes for spans in self._spans.values())

    def totals(self) -> Counter[str]:
        """The fields of `Stats` that are plain counts: totals of the run, and train rollouts in each phase."""
        phases = Counter(str(rollout.phase) for rollout in self.open_rollouts() if rollout.key.split == "train")
        return Counter(self.counts.count) + phases

    def recorded(self) -> list[RecordedSpans]:
        """The spans of every attempt that the journal has spans of."""
        return [spans for spans in self._spans.values() if spans.locations]

    def base(self) -> Base:
        """The ledger without its spans, as the first event of a compacted journal."""
        return Base(
            spans=sum(len(spans.locations) for spans in self.recorded()),
            counts=self.counts,
            groups=tuple(self.groups.values()),
            waiting=tuple(self.waiting),
            complete={split: tuple(ids) for split, ids in self.complete.items()},
            taken=tuple(self.taken),
            partly_advanced=self.partly_advanced,
            checkpoint_epoch=self.checkpoint_epoch,
            milestones=tuple(self.milestones),
            answers=tuple(self.answers.items()),
            cancelled=self.cancelled,
        )

    # Changes that several events share.

    def remember(self, request: str, ids: tuple[str, ...]) -> None:
        """Remember the answer to a request; a request without a name is not repeated."""
        if request:
            self.answers[request] = ids
            while len(self.answers) > _REMEMBERED_ANSWERS:
                del self.answers[next(iter(self.answers))]

    def is_counted(self) -> bool:
        """Whether the span event that is being applied was counted by a Base already. Call it once for each."""
        self.known_span_events -= 1
        return self.known_span_events >= 0

    def attach(self, rollout: StoredRollout, location: RecordLocation | None) -> RecordedSpans:
        """The spans of an attempt, after noting that the record at `location` has brought more of them."""
        spans = self._spans.get(rollout.key)
        if spans is None:
            spans = self._spans[rollout.key] = RecordedSpans()
        if location is not None:
            spans.locations.append(location)
            self._held_bytes += 0 if spans.spilled else location.length
            if rollout.phase == "complete":  # it follows a Base
                self.spill_beyond_memory(rollout.key)
        return spans

    def spill_beyond_memory(self, key: RolloutKey) -> None:
        """Spill the spans of a complete attempt if the memory for spans is used up."""
        if self._held_bytes > self._memory_bytes:
            self.spill(key)

    def spill(self, key: RolloutKey) -> None:
        """Keep the spans of an attempt in the journal only."""
        spans = self._spans.get(key)
        if spans is not None and spans.locations and not spans.spilled:
            spans.calls, spans.raw, spans.spilled = {}, {}, True
            self._held_bytes -= spans.bytes

    def forget_spans(self, key: RolloutKey) -> None:
        spans = self._spans.pop(key, None)
        if spans is not None and not spans.spilled:
            self._held_bytes -= spans.bytes

    def drop(self, group_id: str) -> None:
        """Forget a group and its spans, if it exists."""
        group = self.groups.pop(group_id, None)
        for rollout in group.rollouts if group is not None else ():
            self.forget_spans(rollout.key)

    def count_ending(self, rollout: StoredRollout) -> None:
        """Count a rollout that has ended, if it has."""
        if rollout.ending is not None:
            self.counts.add("ended", 1)
            if rollout.ending.outcome is not Outcome.FINISHED and rollout.key.split == "train":
                add_counts(self.counts.failed, {rollout.ending.outcome: 1})

    def void_unfinished(self, group: StoredGroup) -> None:
        """Replace the attempts of a run that is over and that have not ended by new attempts."""
        for index, rollout in enumerate(group.rollouts):
            cancelled = rollout.ending is not None and rollout.ending.outcome is Outcome.CANCELLED
            if rollout.phase == "running" or cancelled:
                self.forget_spans(rollout.key)
                key = replace(rollout.key, attempt=rollout.key.attempt + 1)
                group.rollouts[index] = StoredRollout(key=key, voided=rollout.voided + 1)

    def queue(self, group: StoredGroup) -> None:
        """Queue the rollouts of a group that wait, or the group itself if it is complete."""
        self.waiting.extend(rollout.key for rollout in group.rollouts if rollout.phase == "waiting")
        if group.complete:
            self.complete[group.split].append(group.group_id)

    def adopt(self, group: StoredGroup) -> None:
        """Open an orphaned group again, and count what its rollouts have done."""
        self.groups[group.group_id] = self.groups.pop(group.group_id)  # in the order of admission
        group.stage = "open"
        self.queue(group)
        for rollout in group.rollouts:
            self.counts.add("calls", rollout.num_calls)
            self.counts.add("sampled_tokens", rollout.sampled_tokens)
            self.count_ending(rollout)
