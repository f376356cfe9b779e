"""What can happen in a buffer, as values: what is written to its journal, and all that changes its ledger.

An event says what was decided, not what was asked: applied in order, events give the same ledger again, whatever the
clock says and however the rules have changed since. `request` names the call of a client that may be repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent_lightning.buffer.holdings import Counts, GroupState, Milestone
from agent_lightning.core.types import Ending, ModelCall, RolloutKey, Split, Task
from agent_lightning.spans.tree import RawSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A group, with all its rollouts. Where an interrupted step has left a group of this number, it goes on."""

    split: Split
    group: int
    num_rollouts: int
    task: Task
    adopts: bool = False
    request: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    keys: tuple[RolloutKey, ...]
    at: float
    expires_at: float
    worker: str = ""
    request: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Called:
    call: ModelCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Spans that the agent's side sent, and what was refused of them."""

    key: RolloutKey
    spans: tuple[RawSpan, ...]
    refused: Mapping[str, int]
    request: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFailed:
    key: RolloutKey
    cause: Ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An attempt is over; `again`: the next one waits, and may start at `ready_at`."""

    key: RolloutKey
    ending: Ending
    again: bool
    ready_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """All that was open has ended, and who waits is to wake."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    groups: tuple[str, ...]
    request: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    trained: int
    dropped: Mapping[str, int]
    request: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed:
    """A checkpoint of this step is about to be written: a run that resumes from it comes back to here."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The checkpoint of this step is whole: what was trained before it is needed no more."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A new run goes on from the checkpoint of this step. No attempt of the old one is open any more."""

    step: int
    next_group: Mapping[Split, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """All that a ledger holds but the spans, which follow as events. The first event of a compacted journal."""

    spans: int
    """How many events of spans follow that are counted here already."""
    counts: Counts
    groups: tuple[GroupState, ...]
    waiting: tuple[RolloutKey, ...]
    """In the order in which they are leased."""
    whole: Mapping[str, tuple[str, ...]]
    """Per split, groups that are complete, in the order in which they became so."""
    taken: tuple[str, ...]
    partly: int
    """Rollouts of the first taken group that were advanced already."""
    era: int
    milestones: tuple[Milestone, ...]
    answers: tuple[tuple[str, tuple[str, ...]], ...]
    cancelled: bool


Event = (
    Admitted
    | Leased
    | Called
    | Traced
    | CallFailed
    | Ended
    | Cancelled
    | Taken
    | Advanced
    | Checkpointed
    | Released
    | Resumed
    | Base
)
