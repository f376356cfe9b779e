"""What the gateway knows of an attempt, and of one request of it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field

from agent_lightning.core.types import RolloutKey
from agent_lightning.serving.bounds import Held
from agent_lightning.serving.dialects.base import Asked, Stream, Wire


@dataclass(slots=True)
class Attempt:
    """What the gateway remembers of an attempt that it has seen."""

    calls_left: int = sys.maxsize
    """The least that the buffer ever told: its answers to calls in flight may come back in any order."""
    in_flight: int = 0
    asked: Counter[int] = field(default_factory=Counter)
    """How often it asked for the same, by a hash of it; counted where calls are seeded."""
    held: Held = field(default_factory=Held)
    ended: str = ""
    """Why the buffer knows this attempt no more: the engine does not work for those that run on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request of an agent."""

    key: RolloutKey
    secret: str = field(repr=False)
    agent: str
    parent_id: str
    """Of the span that sent it, "" where it does not say."""
    wire: Wire
    asked: Asked
    stream: Stream
    attempt: Attempt
    counts: bool
    """Whether it asks for the number of its tokens only."""

    @property
    def streams(self) -> bool:
        return bool(self.asked.body.get("stream")) and not self.counts
