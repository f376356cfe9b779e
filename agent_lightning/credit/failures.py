"""What happens to a rollout that fails: it gets a reward, is masked, or is tried again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import ModelCall, Outcome, Trajectory

TRUNCATED: Final = "truncated"
"""The name, beside the outcomes, for a rollout that finished although a reply was cut at the length limit."""
RESAMPLE: Final = "resample"
KEEP: Final = "keep"


_DEFAULT_REWARDS: Final[Mapping[Outcome, float | None]] = {
    Outcome.AGENT_ERROR: 0.0,
    Outcome.TIMEOUT: 0.0,
    Outcome.NO_MODEL_CALL: 0.0,
    Outcome.OVERLONG_PROMPT: 0.0,
    Outcome.TOO_MANY_CALLS: 0.0,
    Outcome.BAD_REWARD: 0.0,
    # Not the policy's fault: learning from these would teach it about the cluster.
    Outcome.ENGINE_ERROR: None,
    Outcome.TOOL_ERROR: None,
    Outcome.WORKER_LOST: None,
    Outcome.CANCELLED: None,
}


def is_truncated(outcome: Outcome, calls: Iterable[ModelCall]) -> bool:
    """Whether a rollout finished although the length limit cut one of its replies."""
    return outcome is Outcome.FINISHED and any(call.finish_reason == "length" for call in calls)


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """The treatment of a rollout that did not finish, or whose reply was cut: a reward, a mask, or another attempt.

    A masked rollout is neither trained nor part of its group's statistics.

    Example:

        FailurePolicy.of({"timeout": "resample", "agent_error": -1.0, "truncated": None})  # defaults for the others
    """

    rewards: Mapping[Outcome, float | None] = field(default_factory=lambda: dict(_DEFAULT_REWARDS))
    """Reward for every outcome but FINISHED; None masks the rollout."""
    resampled: frozenset[str] = field(
        default_factory=lambda: frozenset({Outcome.ENGINE_ERROR, Outcome.TOOL_ERROR, Outcome.WORKER_LOST})
    )
    """Outcomes, and TRUNCATED, that get another attempt; when no attempt is left, the rollout is masked."""
    truncated: float | Literal["keep"] | None = KEEP
    """Reward of a rollout that finished although a reply was cut at the length limit; KEEP keeps its own reward."""

    def __post_init__(self) -> None:
        if set(self.rewards) != set(_DEFAULT_REWARDS):
            raise ConfigError(f"algorithm.failures: needs exactly the outcomes {', '.join(_DEFAULT_REWARDS)}")
        for name, reward in (*self.rewards.items(), (TRUNCATED, self.truncated)):
            if isinstance(reward, float | int) and not math.isfinite(reward):
                raise ConfigError(f"algorithm.failures.{name}={reward}: must be a finite number")

    @classmethod
    def of(cls, overrides: Mapping[str, object]) -> FailurePolicy:
        """The defaults with some values replaced: by a number, None or RESAMPLE, and for TRUNCATED also by KEEP.

        Raises ConfigError.
        """
        default = cls()
        rewards, truncated = dict(default.rewards), default.truncated
        for name, value in overrides.items():
            if name == TRUNCATED:
                truncated = KEEP if value == KEEP else _parse_reward(name, value)
            elif name in _DEFAULT_REWARDS:
                rewards[Outcome(name)] = _parse_reward(name, value)
            else:
                known = ", ".join([*_DEFAULT_REWARDS, TRUNCATED])
                raise ConfigError(f"algorithm.failures.{name}: not a failure; use one of {known}")
        again = {name for name, value in overrides.items() if value == RESAMPLE}
        resampled = frozenset((default.resampled - overrides.keys()) | again)
        return cls(rewards=rewards, resampled=resampled, truncated=truncated)

    def reward_of(self, trajectory: Trajectory) -> float | None:
        """The reward to learn from; None masks the rollout. Raises ValueError if it finished without a reward."""
        if trajectory.outcome is not Outcome.FINISHED:
            return self.rewards[trajectory.outcome]
        if trajectory.reward is None:
            raise ValueError(f"rollout {trajectory.key.rollout_id} finished without a reward")
        if self.truncated == KEEP or not is_truncated(trajectory.outcome, trajectory.calls):
            return trajectory.reward
        return self.truncated

    def reason_of(self, trajectory: Trajectory) -> str:
        """The reason under which a masked rollout is counted."""
        return f"masked_{TRUNCATED if trajectory.outcome is Outcome.FINISHED else trajectory.outcome.value}"


def _parse_reward(name: str, value: object) -> float | None:
    """A value of algorithm.failures as a reward, or None for a mask; RESAMPLE masks too. Raises ConfigError."""
    if value is None or (value == RESAMPLE and name != Outcome.CANCELLED):
        return None
    if isinstance(value, bool) or not isinstance(value, float | int):
        words = {Outcome.CANCELLED: "", TRUNCATED: f", {RESAMPLE}, {KEEP}"}.get(name, f", {RESAMPLE}")
        raise ConfigError(f"algorithm.failures.{name}={value}: must be a number or null{words}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Which failed attempts are tried again, how often, and how soon.

    Example: Retries(max_attempts=3, resampled=frozenset({"engine_error", "timeout"}), budget=0.5, backoff_s=1.0)
    """

    max_attempts: int = 1
    """Most attempts at one rollout, including the first."""
    resampled: frozenset[str] = field(default_factory=lambda: frozenset({Outcome.ENGINE_ERROR, Outcome.WORKER_LOST}))
    """Outcomes, and TRUNCATED, after which another attempt is made."""
    budget: float = math.inf
    """Most retries of the open groups, as a share of their rollouts: a tool that fails for every rollout must not
    multiply the work of a step."""
    backoff_s: float = 0.0
    """Longest delay before the second attempt, in seconds; it doubles with each later attempt."""
    backoff_max_s: float = 60.0
    """Longest delay before any attempt, in seconds."""

    def __post_init__(self) -> None:
        if min(self.budget, self.backoff_s, self.backoff_max_s) < 0:
            raise ConfigError("agent.retry: budget, backoff_s and backoff_max_s must be at least 0")

    def wanted(self, outcome: Outcome, calls: Iterable[ModelCall]) -> bool:
        """Whether another attempt should follow this outcome."""
        return outcome in self.resampled or (TRUNCATED in self.resampled and is_truncated(outcome, calls))

    def allowed(self, attempt: int, retried: int, rollouts: int) -> bool:
        """Whether the limits allow another attempt after `attempt`: `rollouts` are open, and had `retried` retries."""
        return attempt + 1 < self.max_attempts and retried + 1 <= self.budget * rollouts

    def delay(self, attempt: int, drawn: float) -> float:
        """Seconds until the attempt after `attempt` may start.

        `drawn`, a random number from 0 to 1, is the jitter: attempts that failed together must not restart together.
        Full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS, 2015.
        """
        return drawn * min(self.backoff_max_s, self.backoff_s * 2.0 ** min(attempt, 64))
