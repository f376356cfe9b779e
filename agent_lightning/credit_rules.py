"""How credit is given: what a failed rollout is worth, how rewards become advantages, whose calls are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from agent_lightning.air import Air
from agent_lightning.errors import ConfigError
from agent_lightning.estimators import Baseline, Scale
from agent_lightning.types import Outcome, Trajectory

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
    Outcome.CANCELLED: None,
}


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What a rollout that did not finish is worth.

    Example:

        FailurePolicy.of({"timeout": None, "agent_error": -1.0})  # the other outcomes keep their defaults
    """

    rewards: Mapping[Outcome, float | None] = field(default_factory=lambda: dict(_DEFAULT_REWARDS))
    """For every outcome but FINISHED: a reward, or None: not in the group's statistics and not trained."""

    def __post_init__(self) -> None:
        if set(self.rewards) != set(_DEFAULT_REWARDS):
            raise ConfigError(f"failures: needs exactly the outcomes {', '.join(_DEFAULT_REWARDS)}")
        for outcome, reward in self.rewards.items():
            if reward is not None and not math.isfinite(reward):
                raise ConfigError(f"failures.{outcome}: {reward} is not a finite number")

    @classmethod
    def of(cls, overrides: Mapping[str, float | None]) -> FailurePolicy:
        """The defaults with some outcomes changed. Raises ConfigError for an outcome that is not a failure."""
        for name in overrides:
            if name not in _DEFAULT_REWARDS:
                raise ConfigError(f"failures.{name}: not a failure; use one of {', '.join(_DEFAULT_REWARDS)}")
        return cls({**_DEFAULT_REWARDS, **{Outcome(name): reward for name, reward in overrides.items()}})

    def reward_of(self, trajectory: Trajectory) -> float | None:
        """The reward to learn from, or None where the rollout is masked. Raises ValueError: finished without one."""
        if trajectory.outcome is not Outcome.FINISHED:
            return self.rewards[trajectory.outcome]
        if trajectory.reward is None:
            raise ValueError(f"rollout {trajectory.key.rollout_id} finished without a reward")
        return trajectory.reward


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
