"""How credit is given: what a failed rollout is worth, how rewards become advantages, whose calls are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import Outcome, Trajectory
from agent_lightning.credit.air import Air
from agent_lightning.credit.estimators import Baseline, Scale
from agent_lightning.credit.failures import TRUNCATED, is_truncated

Method = Literal["identical", "return_to_go", "same_state", "gae"]

_DEFAULT_REWARDS: Final[Mapping[Outcome, float | None]] = {
    Outcome.AGENT_ERROR: 0.0,
    Outcome.TIMEOUT: 0.0,
    Outcome.NO_MODEL_CALL: 0.0,
    Outcome.OVERLONG_PROMPT: 0.0,
    Outcome.TOO_MANY_CALLS: 0.0,
    Outcome.BAD_REWARD: 0.0,
    # Not the policy's doing: learning from these would teach it about the cluster.
    Outcome.ENGINE_ERROR: None,
    Outcome.TOOL_ERROR: None,
    Outcome.WORKER_LOST: None,
    Outcome.CANCELLED: None,
}
RESAMPLE: Final = "resample"
KEEP: Final = "keep"


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What becomes of a rollout that did not finish, or whose reply was cut: a reward, a mask, or another attempt.

    Example:

        FailurePolicy.of({"timeout": "resample", "agent_error": -1.0, "truncated": None})  # the others: as they were
    """

    rewards: Mapping[Outcome, float | None] = field(default_factory=lambda: dict(_DEFAULT_REWARDS))
    """For every outcome but FINISHED: a reward, or None: not in the group's statistics and not trained."""
    resampled: frozenset[str] = field(
        default_factory=lambda: frozenset({Outcome.ENGINE_ERROR, Outcome.TOOL_ERROR, Outcome.WORKER_LOST})
    )
    """Of these, and TRUNCATED, another attempt is made; where there may be none any more, it is masked."""
    truncated: float | Literal["keep"] | None = KEEP
    """Of a rollout that finished although a reply was cut at the length limit; KEEP: the reward that it earned."""

    def __post_init__(self) -> None:
        if set(self.rewards) != set(_DEFAULT_REWARDS):
            raise ConfigError(f"algorithm.failures: needs exactly the outcomes {', '.join(_DEFAULT_REWARDS)}")
        for name, reward in (*self.rewards.items(), (TRUNCATED, self.truncated)):
            if isinstance(reward, float | int) and not math.isfinite(reward):
                raise ConfigError(f"algorithm.failures.{name}={reward}: must be a finite number")

    @classmethod
    def of(cls, overrides: Mapping[str, object]) -> FailurePolicy:
        """The defaults with some changed: a number, None or RESAMPLE, of TRUNCATED also KEEP. Raises ConfigError."""
        default = cls()
        rewards, truncated = dict(default.rewards), default.truncated
        for name, value in overrides.items():
            if name == TRUNCATED:
                truncated = KEEP if value == KEEP else _worth(name, value)
            elif name in _DEFAULT_REWARDS:
                rewards[Outcome(name)] = _worth(name, value)
            else:
                known = ", ".join([*_DEFAULT_REWARDS, TRUNCATED])
                raise ConfigError(f"algorithm.failures.{name}: not a failure; use one of {known}")
        again = {name for name, value in overrides.items() if value == RESAMPLE}
        resampled = frozenset((default.resampled - overrides.keys()) | again)
        return cls(rewards=rewards, resampled=resampled, truncated=truncated)

    def reward_of(self, trajectory: Trajectory) -> float | None:
        """The reward to learn from, or None where the rollout is masked. Raises ValueError: finished without one."""
        if trajectory.outcome is not Outcome.FINISHED:
            return self.rewards[trajectory.outcome]
        if trajectory.reward is None:
            raise ValueError(f"rollout {trajectory.key.rollout_id} finished without a reward")
        if self.truncated == KEEP or not is_truncated(trajectory.outcome, trajectory.calls):
            return trajectory.reward
        return self.truncated

    def reason_of(self, trajectory: Trajectory) -> str:
        """Under which a rollout that is masked is counted."""
        return f"masked_{TRUNCATED if trajectory.outcome is Outcome.FINISHED else trajectory.outcome.value}"


def _worth(name: str, value: object) -> float | None:
    """A value of algorithm.failures: what is resampled is masked where it is not made again. Raises ConfigError."""
    if value is None or (value == RESAMPLE and name != Outcome.CANCELLED):
        return None
    if isinstance(value, bool) or not isinstance(value, float | int):
        words = {Outcome.CANCELLED: "", TRUNCATED: f", {RESAMPLE}, {KEEP}"}.get(name, f", {RESAMPLE}")
        raise ConfigError(f"algorithm.failures.{name}={value}: must be a number or null{words}")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """How rewards become the advantage of each call.

    identical      every call has its rollout's: the total reward, normalised over the group. LightningRL, arXiv
                   2508.03680 section 3.3, where the total is the final reward.
    return_to_go   a call has what it and the calls after it earned, discounted per call, normalised over the group.
    same_state     identical plus `state_weight` times how the call did among calls of other rollouts with the same
                   prompt: GiGPO, arXiv 2505.10978 eq. 8.
    gae            the learner's critic says, token by token, from the rewards of the calls: `token_credit`.

    With scale="batch" the values are `estimators.whitened` over the step, by the learner: REINFORCE++.
    """

    method: Method = "identical"
    scale: Scale = "std"
    baseline: Baseline = "mean"
    discount: float = 1.0
    """Per call, of the returns of return_to_go and same_state; per step of gae."""
    state_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"credit.discount={self.discount}: must be from 0 to 1")
        if self.method == "gae" and (self.scale == "std" or self.baseline != "mean"):
            raise ConfigError("credit.method=gae: needs credit.scale=batch or none, and no other credit.baseline")
        if self.baseline == "none" and self.scale == "std":
            raise ConfigError("credit.baseline=none: needs credit.scale=batch or none; std is of the group")

    @property
    def compares(self) -> bool:
        """Whether rollouts are compared with others of their group: it then takes two of them."""
        return self.method != "gae" and self.baseline != "none"

    @property
    def of_group(self) -> bool:
        """Whether a group's advantages come from the group alone: one without spread then gives nothing."""
        return self.method != "gae" and self.scale != "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditRules:
    """Everything that `credit.assign` has to be told."""

    agents: str = "*"
    """Names of the trained agents, as for `traces.select`."""
    failures: FailurePolicy = field(default_factory=FailurePolicy)
    estimator: Estimator = field(default_factory=Estimator)
    air: Air | None = None
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """Of rewards that the agent's side emitted about a call or a tool, by their name; 1 where a name is not here."""
    reward_range: float = 1.0
    """Width of the final reward's range; AIR is measured by it."""
    max_tokens: int = 2**31
    """Of a row; a longer one is dropped."""
