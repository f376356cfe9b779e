"""When an attempt that ended badly gets another one: which ends are worth it, how many there may be, and how soon."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import ModelCall, Outcome

TRUNCATED: Final = "truncated"
"""Beside the outcomes: a rollout that finished, but one of whose replies was cut at the length limit."""


def is_truncated(outcome: Outcome, calls: Iterable[ModelCall]) -> bool:
    return outcome is Outcome.FINISHED and any(call.finish_reason == "length" for call in calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Which attempts are made again.

    Example: Retries(max_attempts=3, resampled=frozenset({"engine_error", "timeout"}), budget=0.5, backoff_s=1.0)
    """

    max_attempts: int = 1
    """Tries at one rollout."""
    resampled: frozenset[str] = field(default_factory=lambda: frozenset({Outcome.ENGINE_ERROR, Outcome.WORKER_LOST}))
    """Outcomes that are worth another attempt, and TRUNCATED."""
    budget: float = math.inf
    """Most retries among the groups that are open, as a share of their rollouts: a tool that is broken for everybody
    must not multiply the work of a step."""
    backoff_s: float = 0.0
    """Most seconds before the second attempt; twice as many before each later one."""
    backoff_max_s: float = 60.0

    def __post_init__(self) -> None:
        if min(self.budget, self.backoff_s, self.backoff_max_s) < 0:
            raise ConfigError("agent.retry: budget, backoff_s and backoff_max_s must be at least 0")

    def wanted(self, outcome: Outcome, calls: Iterable[ModelCall]) -> bool:
        """Whether this end asks for another attempt."""
        return outcome in self.resampled or (TRUNCATED in self.resampled and is_truncated(outcome, calls))

    def allowed(self, attempt: int, retried: int, rollouts: int) -> bool:
        """Whether there may be one after `attempt`, where `rollouts` are open that have had `retried` retries."""
        return attempt + 1 < self.max_attempts and retried + 1 <= self.budget * rollouts

    def delay(self, attempt: int, drawn: float) -> float:
        """Seconds until the attempt after `attempt` may start. `drawn`, from 0 to 1, is the jitter: what failed
        together must not come back together. Full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS, 2015."""
        return drawn * min(self.backoff_max_s, self.backoff_s * 2.0 ** min(attempt, 64))
