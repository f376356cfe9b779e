"""What a ledger holds: groups, their rollouts with spans, and the books."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agent_lightning.buffer.segments import Place
from agent_lightning.core.types import Ending, ModelCall, RolloutKey, Split, Task
from agent_lightning.spans.tree import RawSpan

Phase = Literal["waiting", "running", "complete"]
Stage = Literal["open", "taken", "trained", "left"]
"""Of a group. left: of a step that was interrupted, until it is admitted again."""


@dataclass(slots=True, kw_only=True)
class RolloutState:
    """A rollout without its spans."""

    key: RolloutKey
    phase: Phase = "waiting"
    ready_at: float = 0.0
    """When a waiting attempt may start; Unix seconds, as all here: they outlive a process."""
    started_at: float = 0.0
    expires_at: float = math.inf
    worker: str = ""
    refused: dict[str, int] = field(default_factory=dict)
    cause: Ending | None = None
    ending: Ending | None = None
    num_calls: int = 0
    sampled_tokens: int = 0
    voided: int = 0
    """Attempts that ended with the run that they were part of: no fault of the rollout."""


@dataclass(slots=True, kw_only=True)
class GroupState:
    """A group as it is in a base."""

    group_id: str
    task: Task
    stage: Stage
    era: int
    rollouts: list[RolloutState]


@dataclass(slots=True, kw_only=True)
class Counts:
    """The books, and the numbers of the next groups."""

    count: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    next_group: dict[Split, int] = field(default_factory=lambda: {"train": 0, "val": 0})

    def copy(self) -> Counts:
        return Counts(
            count=dict(self.count),
            dropped=dict(self.dropped),
            failed=dict(self.failed),
            next_group=dict(self.next_group),
        )


@dataclass(slots=True, kw_only=True)
class Milestone:
    """Where a resumed run may come back to."""

    step: int
    era: int
    counts: Counts


@dataclass(slots=True)
class Rollout:
    """A rollout and its spans: in memory, or, where `spilled`, only at their places in the journal."""

    state: RolloutState
    calls: dict[str, ModelCall] = field(default_factory=dict)
    raw: dict[str, RawSpan] = field(default_factory=dict)
    """Spans that the agent's side sent, by id."""
    places: list[Place] = field(default_factory=list)
    """Of the events that brought them."""
    spilled: bool = False

    @property
    def bytes(self) -> int:
        """Of its spans, in the journal."""
        return sum(place.length for place in self.places)


@dataclass(slots=True)
class GroupOf:
    """The rollouts of a task."""

    group_id: str
    task: Task
    rollouts: list[Rollout]
    stage: Stage = "open"
    era: int = 0
    """In which it was trained."""

    @property
    def whole(self) -> bool:
        return all(rollout.state.phase == "complete" for rollout in self.rollouts)


def add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    """Count more of each."""
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number
