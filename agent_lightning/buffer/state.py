"""What a Buffer stores, as values that a journal can hold, and the spans beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agent_lightning.buffer.segments import RecordLocation
from agent_lightning.core.types import Ending, ModelCall, RolloutKey, Split, Task
from agent_lightning.spans.tree import RawSpan

Phase = Literal["waiting", "running", "complete"]
Stage = Literal["open", "taken", "trained", "orphaned"]
"""How far a group is. An orphaned group was left unfinished by an interrupted run; it becomes open again when the
resumed run admits it."""


@dataclass(slots=True, kw_only=True)
class StoredRollout:
    """The latest attempt of a rollout, without its spans. All times are Unix seconds: they outlive a process."""

    key: RolloutKey
    phase: Phase = "waiting"
    ready_at: float = 0.0
    """When a waiting attempt may start."""
    started_at: float = 0.0
    expires_at: float = math.inf
    """When the lease of a running attempt ends."""
    worker: str = ""
    """Name of the worker that has the lease."""
    refused: dict[str, int] = field(default_factory=dict)
    """Reason -> number of spans that were refused when they arrived."""
    cause: Ending | None = None
    """Why the gateway refused the latest call, if it did: it explains an error of the agent that follows."""
    ending: Ending | None = None
    """How a complete attempt ended."""
    num_calls: int = 0
    sampled_tokens: int = 0
    voided: int = 0
    """Number of attempts that ended because their run did: they do not count against the rollout."""


@dataclass(slots=True, kw_only=True)
class StoredGroup:
    """The rollouts of one task."""

    group_id: str
    task: Task
    stage: Stage = "open"
    checkpoint_epoch: int = 0
    """The epoch, counted in checkpoints of the run, in which the group was taken or trained."""
    rollouts: list[StoredRollout]

    @property
    def complete(self) -> bool:
        """Whether every rollout has ended."""
        return all(rollout.phase == "complete" for rollout in self.rollouts)

    @property
    def split(self) -> Split:
        return self.rollouts[0].key.split

    @property
    def number(self) -> int:
        """The group's number in its split."""
        return self.rollouts[0].key.group


@dataclass(slots=True, kw_only=True)
class Counts:
    """Totals of the run, and the numbers of the next groups."""

    count: dict[str, int] = field(default_factory=dict)
    """Name of a field of `Stats` -> its value."""
    dropped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    next_group: dict[Split, int] = field(default_factory=lambda: {"train": 0, "val": 0})

    def add(self, name: str, number: int) -> None:
        self.count[name] = self.count.get(name, 0) + number

    def copy(self) -> Counts:
        return Counts(
            count=dict(self.count),
            dropped=dict(self.dropped),
            failed=dict(self.failed),
            next_group=dict(self.next_group),
        )


@dataclass(slots=True, kw_only=True)
class Milestone:
    """A checkpoint of the run, to which a resumed run returns."""

    step: int
    checkpoint_epoch: int
    counts: Counts
    """The totals when the checkpoint was written."""


@dataclass(slots=True)
class RecordedSpans:
    """The spans of an attempt: in memory or, if `spilled`, only in the journal."""

    calls: dict[str, ModelCall] = field(default_factory=dict)
    """The gateway's calls by their id, in the order of their arrival."""
    raw: dict[str, RawSpan] = field(default_factory=dict)
    """The spans that the agent's process sent, by their id."""
    locations: list[RecordLocation] = field(default_factory=list)
    """Where the journal has the events that brought these spans."""
    spilled: bool = False

    @property
    def bytes(self) -> int:
        """Size of the spans in the journal."""
        return sum(location.length for location in self.locations)


def add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    """Add each of `more` to the count of the same name."""
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number
