"""LightningRL: rewards of a group -> advantages of its calls -> the samples to train on.

Statistics are taken over rollouts and before anything is dropped, so a rollout counts once whatever its number of
calls or rows. What is not trained is counted under one of these reasons:

    masked_<outcome>   the outcome has no reward (FailurePolicy)
    no_selected_call   no call of a trained agent sampled a token
    no_spread          all rewards of the group are equal: every advantage, and so the policy gradient, is zero
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

from agent_lightning.errors import ConfigError
from agent_lightning.metrics import Mean, Metrics
from agent_lightning.traces import OVERLONG_SAMPLE, select, to_samples
from agent_lightning.types import Bools, Floats, Group, ModelCall, Outcome, Sample, Trajectory

Scale = Literal["std", "none"]

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


def identical(reward: float, num_calls: int) -> Floats:
    """Every call of a rollout gets its final reward: the credit assignment of arXiv 2508.03680 (LightningRL).

    Example:

        identical(0.5, 3)  # [0.5 0.5 0.5]
    """
    return np.full(num_calls, reward, np.float32)


def group_normalised(
    rewards_R: NDArray[np.floating], valid_R: Bools, *, scale: Scale = "std", epsilon: float = 1e-6
) -> Floats:
    """How much better each rollout did than its group; shape [R], computed in float64.

    "std" is GRPO, arXiv 2402.03300 section 4.1: (r - mean) / (std + epsilon), with the sample standard deviation
    (ddof=1) and the epsilon of veRL's compute_grpo_outcome_advantage. "none" is Dr. GRPO, arXiv 2503.20783: r - mean.

    Example:

        rewards_R            1     0     0     7
        valid_R              1     1     1     0
        scale="std"       1.15 -0.58 -0.58     0
        scale="none"      0.67 -0.33 -0.33     0

    Mean and std are over valid rollouts. Invalid ones get 0, and so do all, exactly, where fewer than two are valid or
    all valid rewards are equal. Raises ValueError for different shapes or a valid reward that is not finite.
    """
    if rewards_R.shape != valid_R.shape:
        raise ValueError(f"rewards of shape {rewards_R.shape}, validity of shape {valid_R.shape}")
    advantage_R = np.zeros(rewards_R.shape, np.float32)
    valid = rewards_R[valid_R].astype(np.float64)
    if not np.isfinite(valid).all():
        raise ValueError(f"rewards {valid.tolist()} are not all finite")
    if not _has_spread(valid):
        return advantage_R
    centred = valid - valid.mean()
    advantage_R[valid_R] = centred / (valid.std(ddof=1) + epsilon) if scale == "std" else centred
    return advantage_R


def assign(group: Group, *, agents: str, failures: FailurePolicy, scale: Scale, max_tokens: int) -> Credit:
    """The samples of a group, with an advantage on every trained token, and an account of what is not trained.

    Example, one call a rollout, scale="none":

        rollout  outcome       reward   advantage
        0        finished        1         0.5      one sample
        1        finished        0        -0.5      one sample
        2        engine_error    -          -       dropped_rollouts = {"masked_engine_error": 1}

    `agents` selects the trained agents as in `traces.select`, which raises ConfigError; rows of more than `max_tokens`
    tokens are dropped.
    """
    rewards = [failures.reward_of(trajectory) for trajectory in group.trajectories]
    valid_R = np.array([reward is not None for reward in rewards], np.bool_)
    reward_R = np.array([math.nan if reward is None else reward for reward in rewards], np.float64)
    advantage_R = group_normalised(reward_R, valid_R, scale=scale)
    spread = _has_spread(reward_R[valid_R])

    shares: list[_Share] = []
    selected: list[tuple[ModelCall, ...]] = []
    for trajectory, valid, advantage in zip(group.trajectories, valid_R, advantage_R, strict=True):
        calls = select(trajectory.calls, agents)
        selected.append(calls)
        shares.append(_share(trajectory, calls, bool(valid), spread, float(advantage), max_tokens))

    dropped_tokens: Counter[str] = Counter()
    for share in shares:
        dropped_tokens.update(share.dropped_tokens)
    samples = tuple(sample for share in shares for sample in share.samples)
    return Credit(
        samples=samples,
        trained_rollouts=sum(share.reason is None for share in shares),
        dropped_rollouts=dict(Counter(share.reason for share in shares if share.reason is not None)),
        dropped_tokens=dict(dropped_tokens),
        sampled_tokens=sum(_num_sampled(calls) for calls in selected),
        reward_R=reward_R.astype(np.float32),
        metrics=_measure(group, selected, samples, reward_R[valid_R]),
    )


@dataclass(frozen=True, slots=True)
class _Share:
    """One rollout's part of a Credit: samples, or the reason why there are none."""

    samples: tuple[Sample, ...]
    reason: str | None
    dropped_tokens: Mapping[str, int]


def _share(
    trajectory: Trajectory, calls: Sequence[ModelCall], valid: bool, spread: bool, advantage: float, max_tokens: int
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
    samples, dropped = to_samples(trajectory, calls, identical(advantage, len(calls)), max_tokens=max_tokens)
    tokens: Counter[str] = Counter()
    for drop in dropped:
        tokens[drop.reason] += drop.tokens
    return _Share(samples, None if samples else OVERLONG_SAMPLE, tokens)


def _has_spread(rewards: NDArray[np.float64]) -> bool:
    # By extremes: the std of equal floats can be 1e-17 instead of 0, and dividing by it would make advantages of noise.
    return bool(rewards.size >= 2 and rewards.max() > rewards.min())


def _num_sampled(calls: Sequence[ModelCall]) -> int:
    return sum(call.response_T.size for call in calls)


def _measure(
    group: Group, selected: Sequence[Sequence[ModelCall]], samples: Sequence[Sample], valid_rewards: NDArray[np.float64]
) -> Metrics:
    """Averages over: rewards that count, the group, its rollouts, the calls of trained agents, the trained rows."""
    calls = [call for calls in selected for call in calls]
    return {
        "reward": Mean.of(valid_rewards.tolist()),
        "group/no_spread": Mean.of([not _has_spread(valid_rewards)]),
        "rollout/finished": Mean.of(t.outcome is Outcome.FINISHED for t in group.trajectories),
        "rollout/calls": Mean.of(len(calls) for calls in selected),
        "rollout/response_tokens": Mean.of(_num_sampled(calls) for calls in selected),
        "call/prompt_tokens": Mean.of(call.prompt_T.size for call in calls),
        "call/response_tokens": Mean.of(call.response_T.size for call in calls),
        "sample/tokens": Mean.of(sample.token_T.size for sample in samples),
    }
