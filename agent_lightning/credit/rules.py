"""The rules of credit: how rewards become advantages, and whose calls are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from agent_lightning.core.errors import ConfigError
from agent_lightning.credit.air import Air
from agent_lightning.credit.estimators import Baseline, Scale
from agent_lightning.credit.failures import FailurePolicy

Method = Literal["identical", "return_to_go", "same_state", "gae"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """How rewards become the advantage of each call.

    identical      every call has the advantage of its rollout: the total reward, normalised over the group.
                   LightningRL, arXiv 2508.03680 section 3.3, where the total is the final reward.
    return_to_go   a call has its return: its reward and all later ones, discounted per call, normalised over the group.
    same_state     the advantage of "identical", plus `state_weight` times the advantage of the call over calls of other
                   rollouts with the same prompt: GiGPO, arXiv 2505.10978 eq. 8.
    gae            the learner's critic computes the advantage of each token from the rewards of the calls: `tokens`.

    With scale="batch" the learner then applies `estimators.whiten` to all advantages of the step: REINFORCE++.
    """

    method: Method = "identical"
    scale: Scale = "std"
    baseline: Baseline = "mean"
    discount: float = 1.0
    """Discount for each call (return_to_go, same_state) or for each step of GAE (gae)."""
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
        """Whether rollouts are compared with others of their group, which takes at least two of them."""
        return self.method != "gae" and self.baseline != "none"

    @property
    def is_per_group(self) -> bool:
        """Whether a group's advantages depend on the group alone; a group without spread then trains nothing."""
        return self.method != "gae" and self.scale != "batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditRules:
    """All settings that `credit.assign` needs."""

    agents: str = "*"
    """Names of the trained agents; a pattern of `samples.select_calls`."""
    failures: FailurePolicy = field(default_factory=FailurePolicy)
    estimator: Estimator = field(default_factory=Estimator)
    air: Air | None = None
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """Factors of the rewards that the agent emits about calls and tools, by name; 1 if a name is missing."""
    reward_range: float = 1.0
    """Highest minus lowest final reward; AIR's rewards are scaled by it."""
    max_tokens: int = 2**31
    """Longest row that is trained; a longer one is dropped."""
