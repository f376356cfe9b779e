"""What happens to a rollout that fails: it gets a reward, is masked, or is tried again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from agent_lightning.config.learning import FailuresConfig
from agent_lightning.config.running import RetryConfig
from agent_lightning.core.types import ModelCall, Outcome, Trajectory

TRUNCATED: Final = "truncated"
"""The name, beside the outcomes, for a rollout that finished although a reply was cut at the length limit."""


def is_truncated(outcome: Outcome, calls: Iterable[ModelCall]) -> bool:
    """Whether a rollout finished although the length limit cut one of its replies."""
    return outcome is Outcome.FINISHED and any(call.finish_reason == "length" for call in calls)


def learned_reward(trajectory: Trajectory, failures: FailuresConfig) -> float | None:
    """The reward to learn from; None masks the rollout: it is neither trained nor part of its group's statistics.
    Raises ValueError if the rollout finished without a reward."""
    if trajectory.outcome is not Outcome.FINISHED:
        treatment = dict(failures)[trajectory.outcome.value]
    elif trajectory.reward is None:
        raise ValueError(f"rollout {trajectory.key.rollout_id} finished without a reward")
    else:
        treatment = failures.truncated if is_truncated(trajectory.outcome, trajectory.calls) else "keep"
    if treatment == "keep":
        return trajectory.reward
    # A rollout whose last attempt failed as well is masked: there is nothing to learn from.
    return None if treatment == "resample" else treatment


def mask_reason(trajectory: Trajectory) -> str:
    """The reason under which a masked rollout is counted."""
    return f"masked_{TRUNCATED if trajectory.outcome is Outcome.FINISHED else trajectory.outcome.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Which failed attempts are tried again, how often, and how soon.

    Example: Retries(max_attempts=3, failures=FailuresConfig(timeout="resample"), limits=RetryConfig(budget=0.5))
    """

    max_attempts: int = 1
    """Most attempts at one rollout, including the first."""
    failures: FailuresConfig = FailuresConfig()
    """The outcomes after which another attempt is made."""
    limits: RetryConfig = RetryConfig(budget=math.inf, backoff_s=0.0)
    """None by default: every retry starts at once."""

    def wanted(self, outcome: Outcome, calls: Iterable[ModelCall]) -> bool:
        """Whether another attempt should follow this outcome."""
        resampled = self.failures.resampled
        return outcome in resampled or (TRUNCATED in resampled and is_truncated(outcome, calls))

    def allowed(self, attempt: int, retried: int, rollouts: int) -> bool:
        """Whether the limits allow another attempt after `attempt`: `rollouts` are open, and had `retried` retries."""
        return attempt + 1 < self.max_attempts and retried + 1 <= self.limits.budget * rollouts

    def delay(self, attempt: int, drawn: float) -> float:
        """Seconds until the attempt after `attempt` may start. `drawn`, a random number from 0 to 1, is the jitter:
        attempts that failed together must not restart together. Full jitter: M. Brooker, "Exponential Backoff And
        Jitter", AWS, 2015."""
        return drawn * min(self.limits.backoff_max_s, self.limits.backoff_s * 2.0 ** min(attempt, 64))
