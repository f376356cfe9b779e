"""The ledger: all that a Buffer knows, in values that a journal can hold. Events, and nothing else, change it.

open: waiting -> running -> complete    taken    trained (kept until a checkpoint covers it)    orphaned
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from agent_lightning.buffer.segments import RecordLocation
from agent_lightning.core.types import Ending, ModelCall, Outcome, RolloutKey, Split, Task
from agent_lightning.spans.tree import RawSpan

_REMEMBERED_ANSWERS: Final = 4096
"""Number of client calls whose answers are remembered: many more than are in flight when a process dies."""
Phase = Literal["waiting", "running", "complete"]
Stage = Literal["open", "taken", "trained", "orphaned"]
"""How far a group is. An orphaned group was left unfinished by an interrupted run; it becomes open again when the
resumed run admits it."""


@dataclass(slots=True, kw_only=True)
class StoredRollout:
    """The latest attempt of a rollout, without its spans. All times are Unix seconds: they outlive a process."""

    key: RolloutKey
    phase: Phase = "waiting"
    ready_at: float = 0.0  # when a waiting attempt may start
    started_at: float = 0.0
    expires_at: float = math.inf  # when the lease of a running attempt ends
    worker: str = ""  # the worker that has the lease
    refused: dict[str, int] = field(default_factory=dict)  # reason -> number of spans that were refused on arrival
    cause: Ending | None = None
    """Why the gateway refused the latest call, if it did: it explains an error of the agent that follows."""
    ending: Ending | None = None  # of a complete attempt
    num_calls: int = 0
    sampled_tokens: int = 0
    replaced_tokens: int = 0  # tokens that earlier attempts sampled
    newest_version: int = 0  # of the policy, among the recorded calls
    voided: int = 0  # number of attempts that ended because their run did: they do not count against the rollout

    @property
    def retries(self) -> int:
        """Number of attempts before this one that count against the rollout."""
        return self.key.attempt - self.voided


@dataclass(slots=True, kw_only=True)
class StoredGroup:
    """The rollouts of one task."""

    group_id: str
    task: Task
    stage: Stage = "open"
    checkpoint_epoch: int = 0  # the epoch, counted in checkpoints of the run, in which the group was taken or trained
    rollouts: list[StoredRollout]

    @property
    def complete(self) -> bool:
        return all(rollout.phase == "complete" for rollout in self.rollouts)

    @property
    def split(self) -> Split:
        return self.rollouts[0].key.split

    @property
    def number(self) -> int:
        return self.rollouts[0].key.group


@dataclass(slots=True, kw_only=True)
class Counts:
    """Totals of the run, and the numbers of the next groups."""

    count: dict[str, int] = field(default_factory=dict)  # name of a field of `Stats` -> its value
    dropped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    next_group: dict[Split, int] = field(default_factory=lambda: {"train": 0, "val": 0})

    def add(self, **numbers: int) -> None:
        """Add to the fields of `Stats` with these names."""
        add_counts(self.count, numbers)


@dataclass(slots=True, kw_only=True)
class Milestone:
    """A checkpoint of the run, to which a resumed run returns."""

    step: int
    checkpoint_epoch: int
    counts: Counts  # when the checkpoint was written


@dataclass(slots=True)
class RecordedSpans:
    """The spans of an attempt: in memory or, if `spilled`, only in the journal."""

    calls: dict[str, ModelCall] = field(default_factory=dict)  # the gateway's calls by id, in the order of arrival
    raw: dict[str, RawSpan] = field(default_factory=dict)  # the spans that the agent's process sent, by id
    locations: list[RecordLocation] = field(default_factory=list)  # of the events that brought these spans
    spilled: bool = False
    size: int = 0
    """Bytes of all events that the agent has caused, as a journal has them: what the attempt has used of its budget."""

    @property
    def bytes(self) -> int:
        """Size of the spans in the journal."""
        return sum(location.length for location in self.locations)


class Ledger:
    """The state of every rollout. With `keeps_taken`, which needs a journal, a taken group stays until it is trained
    and a newer checkpoint is complete, so that a resumed run can take it again. Without it, a group is forgotten when
    it is taken. Spans of complete rollouts beyond `memory_bytes` are kept in the journal only."""

    def __init__(
        self, *, next_group: Mapping[Split, int] | None = None, keeps_taken: bool = False, memory_bytes: int = 2**62
    ) -> None:
        self.keeps_taken = keeps_taken
        self._memory_bytes = memory_bytes
        self._held_bytes = 0
        self.counts = Counts(next_group={"train": 0, "val": 0, **(next_group or {})})
        self.groups: dict[str, StoredGroup] = {}  # by id, in the order of their admission
        self._spans: dict[RolloutKey, RecordedSpans] = {}
        self.waiting: deque[RolloutKey] = deque()
        # Split -> ids of complete groups, in the order in which they became complete.
        self.complete: dict[str, deque[str]] = {"train": deque(), "val": deque()}
        self.taken: deque[str] = deque()
        self.partly_advanced = 0  # rollouts of the first taken group that were trained or dropped already
        self.checkpoint_epoch = 0  # number of checkpoints so far
        self.milestones: list[Milestone] = []
        # Request -> ids of what was admitted, leased or taken for it, the newest last.
        self.answers: dict[str, tuple[str, ...]] = {}
        self.cancelled = False
        self.known_span_events = 0  # span events that are still to come and that a Base has counted already

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
        return self._spans.get(key) or RecordedSpans()

    def charge(self, key: RolloutKey, size: int) -> None:
        """Add the size of an event to what an attempt has used of its budget."""
        self._spans.setdefault(key, RecordedSpans()).size += size

    def open_rollouts(self) -> Iterator[StoredRollout]:
        """The rollouts of open groups, in order of admission."""
        return (rollout for group in self.groups.values() if group.stage == "open" for rollout in group.rollouts)

    def leased_for(self, request: str) -> tuple[RolloutKey, ...]:
        """Attempts that were leased for this request and still run."""
        ids = (attempt_id.partition("/") for attempt_id in self.answers.get(request, ()))
        keys = (RolloutKey.parse(rollout_id, int(attempt)) for rollout_id, _, attempt in ids)
        return tuple(key for key in keys if self.running(key))

    @property
    def live_bytes(self) -> int:
        """Size of the spans that a compacted journal would hold."""
        return sum(spans.bytes for spans in self._spans.values())

    def recorded(self) -> list[RecordedSpans]:
        """The spans of every attempt that the journal has spans of."""
        return [spans for spans in self._spans.values() if spans.locations]

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

    def next_attempt(self, rollout: StoredRollout, *, voided: int = 0) -> StoredRollout:
        """The attempt that replaces the one of `rollout`, whose spans are forgotten."""
        self.forget_spans(rollout.key)
        key = replace(rollout.key, attempt=rollout.key.attempt + 1)
        tokens = rollout.replaced_tokens + rollout.sampled_tokens
        return StoredRollout(key=key, voided=rollout.voided + voided, replaced_tokens=tokens)

    def count(self, rollout: StoredRollout, counts: Counts | None = None, sign: int = 1) -> None:
        """Add what a rollout has sampled and how it ended to `counts`, or with sign=-1 take it away; None: to those of
        the run."""
        counts = counts or self.counts
        tokens = sign * (rollout.sampled_tokens + rollout.replaced_tokens)
        replaced_tokens = sign * rollout.replaced_tokens
        counts.add(calls=sign * rollout.num_calls, sampled_tokens=tokens, replaced_tokens=replaced_tokens)
        self.count_ending(rollout, counts, sign)

    def count_ending(self, rollout: StoredRollout, counts: Counts | None = None, sign: int = 1) -> None:
        """The part of `count` for a rollout that has ended, if it has."""
        if rollout.ending is not None:
            counts = counts or self.counts
            counts.add(ended=sign)
            if rollout.ending.outcome is not Outcome.FINISHED and rollout.key.split == "train":
                add_counts(counts.failed, {rollout.ending.outcome: sign})

    def queue(self, group: StoredGroup) -> None:
        """Queue the rollouts of a group that wait, or the group itself if it is complete."""
        self.waiting.extend(rollout.key for rollout in group.rollouts if rollout.phase == "waiting")
        if group.complete:
            self.complete[group.split].append(group.group_id)


def add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    """Add each of `more` to the count of the same name."""
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number
