"""LightningRL: rewards of a group -> advantages of its calls -> the samples to train on.

Statistics are taken over rollouts and before anything is dropped, so a rollout counts once whatever its number of
calls or rows. What is not trained is counted under one of these reasons:

    masked_<outcome>   the outcome has no reward (FailurePolicy)
    no_selected_call   no call of a trained agent sampled a token
    no_spread          every advantage of the group, and so its policy gradient, is zero
    overlong_sample    a row longer than `max_tokens`; the rollout too, where all of its rows are
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from agent_lightning.air import Air
from agent_lightning.errors import ConfigError
from agent_lightning.estimators import (
    Baseline,
    Scale,
    group_normalised,
    normalised,
    returns_to_go,
    same_state,
)
from agent_lightning.metrics import Mean, Metrics
from agent_lightning.traces import OVERLONG_SAMPLE, select, selects, to_samples
from agent_lightning.types import Floats, Group, ModelCall, Outcome, Sample, Trajectory

Method = Literal["identical", "return_to_go", "same_state"]

NO_SPREAD: Final = "no_spread"
NO_SELECTED_CALL: Final = "no_selected_call"

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
    """

    method: Method = "identical"
    scale: Scale = "std"
    baseline: Baseline = "mean"
    discount: float = 1.0
    """Per call, of the returns of return_to_go and same_state."""
    state_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"credit.discount={self.discount}: must be from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """What a group gives to train on, and an account of the rest.

    rollouts of the group = trained_rollouts + sum(dropped_rollouts), and
    sampled_tokens = tokens with mask True in `samples` + sum(dropped_tokens).
    """

    samples: tuple[Sample, ...]
    trained_rollouts: int
    """Rollouts with at least one sample."""
    dropped_rollouts: Mapping[str, int]
    """Reason -> rollouts."""
    dropped_tokens: Mapping[str, int]
    """Reason -> sampled tokens of selected calls."""
    sampled_tokens: int
    """Of all selected calls of the group."""
    reward_R: Floats
    """In the order of the group's trajectories; NaN where masked."""
    metrics: Metrics


def assign(
    group: Group,
    *,
    agents: str,
    failures: FailurePolicy,
    max_tokens: int,
    estimator: Estimator = Estimator(),
    air: Air | None = None,
    reward_range: float = 1.0,
) -> Credit:
    """The samples of a group, with an advantage on every trained token, and an account of what is not trained.

    Example, one call a rollout, scale="none":

        rollout  outcome       reward   advantage
        0        finished        1         0.5      one sample
        1        finished        0        -0.5      one sample
        2        engine_error    -          -       dropped_rollouts = {"masked_engine_error": 1}

    `agents` selects the trained agents as in `traces.select`, which raises ConfigError; rows of more than `max_tokens`
    tokens are dropped. `air` adds intermediate rewards, scaled by `reward_range`, the range of the final reward.
    """
    rewards = [failures.reward_of(trajectory) for trajectory in group.trajectories]
    earned = [
        _earned(t, reward, air, estimator, reward_range) for t, reward in zip(group.trajectories, rewards, strict=True)
    ]
    selected = [select(trajectory.calls, agents) for trajectory in group.trajectories]
    advantages = _advantages(group, earned, [reward is not None for reward in rewards], agents, estimator)
    spread = any(advantage.any() for advantage in advantages)

    shares = [
        _share(trajectory, calls, reward is not None, spread, advantage, max_tokens)
        for trajectory, calls, reward, advantage in zip(group.trajectories, selected, rewards, advantages, strict=True)
    ]
    dropped_tokens = sum((Counter(share.dropped_tokens) for share in shares), Counter[str]())
    samples = tuple(sample for share in shares for sample in share.samples)
    valid = np.array([reward for reward in rewards if reward is not None], np.float64)
    metrics = dict(_measure(group, selected, samples, valid, spread=spread))
    if air is not None:
        metrics["air/reward"] = Mean.of(float(one.intermediate_T.sum()) for one in earned)
    return Credit(
        samples=samples,
        trained_rollouts=sum(share.reason is None for share in shares),
        dropped_rollouts=dict(Counter(share.reason for share in shares if share.reason is not None)),
        dropped_tokens=dict(dropped_tokens),
        sampled_tokens=sum(_num_sampled(calls) for calls in selected),
        reward_R=np.array([math.nan if reward is None else reward for reward in rewards], np.float32),
        metrics=metrics,
    )


@dataclass(frozen=True, slots=True)
class Earned:
    """What a rollout earned: `T` are all of its calls, those of unselected agents included."""

    intermediate_T: Floats
    """By AIR; zeros without it."""
    return_T: NDArray[np.float64]
    """Discounted return of each call, the final reward included; NaN where the rollout is masked."""
    total: float
    """Undiscounted."""


def _earned(
    trajectory: Trajectory, reward: float | None, air: Air | None, estimator: Estimator, reward_range: float
) -> Earned:
    calls, discount = trajectory.calls, estimator.discount
    if air is None:
        intermediate_T = np.zeros(len(calls), np.float32)
    else:
        intermediate_T = air.rewards(calls, reward_range=reward_range, discount=discount)
    final = math.nan if reward is None else reward
    reward_T = intermediate_T.astype(np.float64)
    reward_T[-1:] += final
    return Earned(intermediate_T, returns_to_go(reward_T, discount), final + float(intermediate_T.sum()))


def _advantages(
    group: Group, earned: Sequence[Earned], valid: Sequence[bool], agents: str, estimator: Estimator
) -> list[Floats]:
    """Of each trajectory's selected calls; zeros where it is masked."""
    valid_R = np.array(valid, np.bool_)
    chosen = [[i for i, call in enumerate(t.calls) if selects(agents, call)] for t in group.trajectories]
    rollout_C = np.array([r for r, indices in enumerate(chosen) for _ in indices], np.int64)
    advantage_C = np.zeros(rollout_C.size, np.float64)
    if estimator.method != "return_to_go":
        total_R = np.array([one.total for one in earned], np.float64)
        whole_R = group_normalised(total_R, valid_R, scale=estimator.scale, baseline=estimator.baseline)
        advantage_C += whole_R[rollout_C]
    if estimator.method != "identical":
        counts_C = valid_R[rollout_C]
        return_C = np.array([one.return_T[i] for one, indices in zip(earned, chosen, strict=True) for i in indices])
        values, owners = return_C[counts_C], rollout_C[counts_C]
        if estimator.method == "return_to_go":
            own = normalised(values, owners, scale=estimator.scale, baseline=estimator.baseline)
        else:
            calls = [t.calls[i] for t, indices in zip(group.trajectories, chosen, strict=True) for i in indices]
            states = [(c.agent, c.prompt_T.tobytes()) for c, counts in zip(calls, counts_C, strict=True) if counts]
            own = estimator.state_weight * same_state(values, owners, states, scale=estimator.scale)
        advantage_C[counts_C] += own
    ends = np.cumsum([len(indices) for indices in chosen])
    return [advantage_C[end - len(indices) : end].astype(np.float32) for indices, end in zip(chosen, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class _Share:
    """One rollout's part of a Credit: samples, or the reason why there are none."""

    samples: tuple[Sample, ...]
    reason: str | None
    dropped_tokens: Mapping[str, int]


def _share(
    trajectory: Trajectory, calls: Sequence[ModelCall], valid: bool, spread: bool, advantage: Floats, max_tokens: int
) -> _Share:
    num_sampled = _num_sampled(calls)
    reason: str | None = None
    if not valid:
        reason = f"masked_{trajectory.outcome.value}"
    elif num_sampled == 0:
        reason = NO_SELECTED_CALL
    elif not spread:
        reason = NO_SPREAD
    if reason is not None:
        return _Share((), reason, {reason: num_sampled} if num_sampled else {})
    samples, dropped = to_samples(trajectory, calls, advantage, max_tokens=max_tokens)
    tokens: Counter[str] = Counter()
    for drop in dropped:
        tokens[drop.reason] += drop.tokens
    return _Share(samples, None if samples else OVERLONG_SAMPLE, tokens)


def _num_sampled(calls: Sequence[ModelCall]) -> int:
    return sum(call.response_T.size for call in calls)


def _measure(
    group: Group,
    selected: Sequence[Sequence[ModelCall]],
    samples: Sequence[Sample],
    valid_rewards: NDArray[np.float64],
    *,
    spread: bool,
) -> Metrics:
    """Averages over: rewards that count, the group, its rollouts, the calls of trained agents, the trained rows."""
    calls = [call for calls in selected for call in calls]
    return {
        "reward": Mean.of(valid_rewards.tolist()),
        "group/no_spread": Mean.of([not spread]),
        "rollout/finished": Mean.of(t.outcome is Outcome.FINISHED for t in group.trajectories),
        "rollout/calls": Mean.of(len(calls) for calls in selected),
        "rollout/response_tokens": Mean.of(_num_sampled(calls) for calls in selected),
        "call/prompt_tokens": Mean.of(call.prompt_T.size for call in calls),
        "call/response_tokens": Mean.of(call.response_T.size for call in calls),
        "sample/tokens": Mean.of(sample.token_T.size for sample in samples),
    }
