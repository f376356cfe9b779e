"""LightningRL: rewards of a group -> advantages of its calls -> the samples to train on.

Statistics are taken over rollouts and before anything is dropped, so a rollout counts once whatever its number of
calls or rows. What is not trained is counted under one of these reasons:

    masked_<outcome>   the outcome has no reward (FailurePolicy); masked_truncated: finished, but a reply was cut
    no_selected_call   no call of a trained agent sampled a token
    no_spread          every advantage of the group, and so its policy gradient, is zero; not where the whole step or
                       a critic decides on the advantage
    overlong_sample    a row longer than `max_tokens`; the rollout too, where all of its rows are
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent_lightning.core.metrics import Mean, Metrics
from agent_lightning.core.types import Bools, Floats, Group, ModelCall, Outcome, Sample, Trajectory
from agent_lightning.credit.estimators import (
    carried_back,
    group_normalised,
    has_spread,
    normalised,
    returns_to_go,
    same_state,
)
from agent_lightning.credit.rules import CreditRules, Estimator
from agent_lightning.credit.samples import OVERLONG_SAMPLE, select, to_samples

NO_SPREAD: Final = "no_spread"
NO_SELECTED_CALL: Final = "no_selected_call"


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


def assign(group: Group, rules: CreditRules) -> Credit:
    """The samples of a group, with an advantage on every trained token, and an account of what is not trained.

    The step's learner has the last word where the estimator says so: scale="batch" and method="gae".

    Example, one call a rollout, scale="none":

        rollout  outcome       reward   advantage
        0        finished        1         0.5      one sample
        1        finished        0        -0.5      one sample
        2        engine_error    -          -       dropped_rollouts = {"masked_engine_error": 1}

    Raises ConfigError where the pattern of agents has an empty name.
    """
    accounting = _Accounting.of(group, rules)
    dropped_tokens = sum((Counter(share.dropped_tokens) for share in accounting.shares), Counter[str]())
    samples = tuple(sample for share in accounting.shares for sample in share.samples)
    return Credit(
        samples=samples,
        trained_rollouts=sum(share.reason is None for share in accounting.shares),
        dropped_rollouts=dict(Counter(share.reason for share in accounting.shares if share.reason is not None)),
        dropped_tokens=dict(dropped_tokens),
        sampled_tokens=sum(_num_sampled(calls) for calls in accounting.selected),
        reward_R=np.array([math.nan if reward is None else reward for reward in accounting.rewards], np.float32),
        metrics=_measure(group, accounting, samples, with_air=rules.air is not None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCredit:
    """What one call got, and what became of its tokens."""

    call_id: str
    intermediate: float
    """What AIR and the agent's side gave it."""
    return_to_go: float
    """What it and the calls after it earned; NaN where the rollout is masked."""
    advantage: float
    """0 where it is not trained; NaN where a critic said, token by token."""
    tokens: int
    """Sampled."""
    status: str
    """"trained", "not selected", or the reason why it was dropped."""


def examine(group: Group, index: int, rules: CreditRules) -> tuple[CallCredit, ...]:
    """Call by call, what `assign` makes of the rollout at `index` of the group's trajectories."""
    accounting = _Accounting.of(group, rules)
    trajectory, earned, share = group.trajectories[index], accounting.earned[index], accounting.shares[index]
    advantage = dict(zip((c.call_id for c in accounting.selected[index]), accounting.advantages[index], strict=True))
    rows, token_wise = [], rules.estimator.method == "gae"
    for t, call in enumerate(trajectory.calls):
        status = "trained" if call.call_id in advantage else "not selected"
        if status == "trained":
            status = share.reason or share.dropped_calls.get(call.call_id, status)
        rows.append(
            CallCredit(
                call_id=call.call_id,
                intermediate=float(earned.intermediate_T[t]),
                return_to_go=float(earned.return_T[t]),
                advantage=0.0 if status != "trained" else math.nan if token_wise else float(advantage[call.call_id]),
                tokens=call.response_T.size,
                status=status,
            )
        )
    return tuple(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Accounting:
    """All that is worked out of a group, in the order of its trajectories."""

    rewards: Sequence[float | None]
    earned: Sequence[_Earned]
    selected: Sequence[Sequence[ModelCall]]
    advantages: Sequence[Floats]
    """Of the selected calls."""
    spread: bool
    """Whether the group's own rewards tell its rollouts apart."""
    shares: Sequence[_Share]

    @classmethod
    def of(cls, group: Group, rules: CreditRules) -> _Accounting:
        rewards = [rules.failures.reward_of(trajectory) for trajectory in group.trajectories]
        earned = [_earned(t, reward, rules) for t, reward in zip(group.trajectories, rewards, strict=True)]
        chosen = [select(trajectory.calls, rules.agents) for trajectory in group.trajectories]
        selected = [[t.calls[i] for i in indices] for t, indices in zip(group.trajectories, chosen, strict=True)]
        return_C = np.array([one.return_T[i] for one, indices in zip(earned, chosen, strict=True) for i in indices])
        total_R = np.array([one.total for one in earned], np.float64)
        valid_R = np.array([reward is not None for reward in rewards], np.bool_)
        advantages = _advantages(selected, total_R, return_C, valid_R, rules.estimator)
        of_group = rules.estimator.of_group
        spread = any(one.any() for one in advantages) if of_group else has_spread(total_R[valid_R])
        earnings = [carried_back(one.reward_T, indices) for one, indices in zip(earned, chosen, strict=True)]
        masks = [
            None if reward is not None else rules.failures.reason_of(trajectory)
            for trajectory, reward in zip(group.trajectories, rewards, strict=True)
        ]
        shares = [
            _share(trajectory, calls, masked, spread or not of_group, advantage, earning, rules.max_tokens)
            for trajectory, calls, masked, advantage, earning in zip(
                group.trajectories, selected, masks, advantages, earnings, strict=True
            )
        ]
        return cls(
            rewards=rewards, earned=earned, selected=selected, advantages=advantages, spread=spread, shares=shares
        )


@dataclass(frozen=True, slots=True)
class _Earned:
    """What a rollout earned: `T` are all of its calls, those of unselected agents included."""

    intermediate_T: Floats
    """By AIR, and by rewards that the agent's side emitted about a call or its tools."""
    reward_T: NDArray[np.float64]
    """With the final reward on the last call; NaN there where the rollout is masked."""
    return_T: NDArray[np.float64]
    """Discounted return of each call, the final reward included; NaN where the rollout is masked."""
    total: float
    """Undiscounted."""


def _earned(trajectory: Trajectory, reward: float | None, rules: CreditRules) -> _Earned:
    discount = rules.estimator.discount
    intermediate_T = emitted_rewards(trajectory, rules.reward_weights)
    if rules.air is not None:
        intermediate_T += rules.air.rewards(trajectory, reward_range=rules.reward_range, discount=discount)
    final = math.nan if reward is None else reward
    reward_T = intermediate_T.astype(np.float64)
    reward_T[-1:] += final
    return _Earned(intermediate_T, reward_T, returns_to_go(reward_T, discount), final + float(intermediate_T.sum()))


def emitted_rewards(trajectory: Trajectory, weights: Mapping[str, float]) -> Floats:
    """What the agent's side said that each call was worth; shape [len(trajectory.calls)].

    A reward about a tool goes to the call that caused it. `weights`: by name of the reward, 1 where it is not there.

    Example: Reward(name="format", value=0.5, about="call-1") with weights {"format": 0.2} -> [0, 0.1]
    """
    reward_T = np.zeros(len(trajectory.calls), np.float32)
    if trajectory.rewards:
        index = {call.call_id: i for i, call in enumerate(trajectory.calls)}
        index |= {tool.span_id: index[tool.call_id] for tool in trajectory.tools if tool.call_id in index}
        for one in trajectory.rewards:
            if one.about in index:
                reward_T[index[one.about]] += weights.get(one.name, 1.0) * one.value
    return reward_T


def _advantages(
    selected: Sequence[Sequence[ModelCall]],
    total_R: NDArray[np.float64],
    return_C: NDArray[np.float64],
    valid_R: Bools,
    estimator: Estimator,
) -> list[Floats]:
    """Of each rollout's selected calls, of which `_C` are all, rollout after rollout; zeros where it is masked."""
    rollout_C = np.array([r for r, calls in enumerate(selected) for _ in calls], np.int64)
    advantage_C = np.zeros(rollout_C.size, np.float64)
    if estimator.method in ("identical", "same_state"):
        whole_R = group_normalised(total_R, valid_R, scale=estimator.scale, baseline=estimator.baseline)
        advantage_C += whole_R[rollout_C]
    if estimator.method in ("return_to_go", "same_state"):
        counts_C = valid_R[rollout_C]
        values, owners = return_C[counts_C], rollout_C[counts_C]
        if estimator.method == "return_to_go":
            own = normalised(values, owners, scale=estimator.scale, baseline=estimator.baseline)
        else:
            calls = [call for calls, valid in zip(selected, valid_R, strict=True) if valid for call in calls]
            states = [(call.agent, call.prompt_T.tobytes()) for call in calls]
            own = estimator.state_weight * same_state(values, owners, states, scale=estimator.scale)
        advantage_C[counts_C] += own
    ends = np.cumsum([len(calls) for calls in selected])
    return [advantage_C[end - len(calls) : end].astype(np.float32) for calls, end in zip(selected, ends, strict=True)]


@dataclass(frozen=True, slots=True)
class _Share:
    """One rollout's part of a Credit: samples, or the reason why there are none."""

    samples: tuple[Sample, ...]
    reason: str | None
    dropped_tokens: Mapping[str, int]
    dropped_calls: Mapping[str, str] = field(default_factory=dict)
    """Call id -> reason, of calls whose row alone was dropped."""


def _share(
    trajectory: Trajectory,
    calls: Sequence[ModelCall],
    masked: str | None,
    worthwhile: bool,
    advantage: Floats,
    earning: NDArray[np.float64],
    max_tokens: int,
) -> _Share:
    num_sampled = _num_sampled(calls)
    reason = masked
    if reason is None and num_sampled == 0:
        reason = NO_SELECTED_CALL
    elif reason is None and not worthwhile:
        reason = NO_SPREAD
    if reason is not None:
        return _Share((), reason, {reason: num_sampled} if num_sampled else {})
    samples, dropped = to_samples(trajectory, calls, advantage, earning, max_tokens=max_tokens)
    tokens: Counter[str] = Counter()
    for drop in dropped:
        tokens[drop.reason] += drop.tokens
    calls_of = {call_id: drop.reason for drop in dropped for call_id in drop.calls}
    return _Share(samples, None if samples else OVERLONG_SAMPLE, tokens, calls_of)


def _num_sampled(calls: Sequence[ModelCall]) -> int:
    return sum(call.response_T.size for call in calls)


def _measure(group: Group, accounting: _Accounting, samples: Sequence[Sample], *, with_air: bool) -> Metrics:
    """Averages over: rewards that count, the group, its rollouts, the calls of trained agents, the trained rows."""
    calls = [call for calls in accounting.selected for call in calls]
    metrics = {
        "reward": Mean.of(reward for reward in accounting.rewards if reward is not None),
        "group/no_spread": Mean.of([not accounting.spread]),
        "rollout/finished": Mean.of(t.outcome is Outcome.FINISHED for t in group.trajectories),
        "rollout/calls": Mean.of(len(calls) for calls in accounting.selected),
        "rollout/response_tokens": Mean.of(_num_sampled(calls) for calls in accounting.selected),
        "call/prompt_tokens": Mean.of(call.prompt_T.size for call in calls),
        "call/response_tokens": Mean.of(call.response_T.size for call in calls),
        "sample/tokens": Mean.of(sample.token_T.size for sample in samples),
    }
    names = sorted({one.name for t in group.trajectories for one in t.rewards})
    for name in names:
        metrics[f"emitted/{name}"] = Mean.of(o.value for t in group.trajectories for o in t.rewards if o.name == name)
    if with_air:
        metrics["air/reward"] = Mean.of(float(one.intermediate_T.sum()) for one in accounting.earned)
    return metrics
