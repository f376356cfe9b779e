"""Returns and advantages of the calls of a group, as functions of NumPy arrays.

Shapes: `_R` the rollouts of a group; `_C` all calls of the group, one rollout after the other, with `rollout_C` the
index of each call's rollout; `_T` the calls of one rollout.
Statistics are taken over rollouts: a rollout with ten calls weighs as much as one with a single call.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from agent_lightning.config.learning import Baseline, Scale
from agent_lightning.core.types import Bools, Floats

Values = NDArray[np.float64]

_EPSILON = 1e-6
"""A number added to standard deviations, the same as in veRL's compute_grpo_outcome_advantage."""


def normalise_group(
    rewards_R: NDArray[np.floating], valid_R: Bools, *, scale: Scale = "std", baseline: Baseline = "mean", k: int = 1
) -> Floats:
    """The advantage of each rollout over its group; shape [R], computed in float64.

    scale="std" is GRPO, arXiv 2402.03300 section 4.1: (r - mean) / (std + epsilon), with the sample standard deviation
    (ddof=1). scale="none" is Dr. GRPO, arXiv 2503.20783: r - mean. baseline="leave_one_out" with scale="none" is RLOO,
    arXiv 2402.14740 eq. 8: r minus the mean of the others, which is (r - mean) * R / (R - 1). `k` above 1: see
    `best_of`.

    Example:

        rewards_R                                1     0     0     7
        valid_R                                  1     1     1     0
        scale="std"                           1.15 -0.58 -0.58     0
        scale="none"                          0.67 -0.33 -0.33     0
        scale="none", "leave_one_out"            1  -0.5  -0.5     0

    Mean and std are taken over the valid rollouts. Invalid rollouts get 0. All get exactly 0 if fewer than two rollouts
    are valid or all valid rewards are equal. Raises ValueError if the shapes differ or a valid reward is not finite.
    """
    if rewards_R.shape != valid_R.shape:
        raise ValueError(f"rewards of shape {rewards_R.shape}, validity of shape {valid_R.shape}")
    advantage_R = np.zeros(rewards_R.shape, np.float32)
    valid = rewards_R[valid_R].astype(np.float64)
    if k > 1:
        advantage_R[valid_R] = best_of(valid, k, scale=scale)
    else:
        advantage_R[valid_R] = normalise(valid, np.arange(valid.size), scale=scale, baseline=baseline)
    return advantage_R


def normalise(
    value_C: Values, rollout_C: NDArray[np.integer], *, scale: Scale = "std", baseline: Baseline = "mean"
) -> Values:
    """The advantage of each call over its group, if each call has a value of its own; shape [C].

    If rollout i of R has n_i calls, each of them weighs 1 / n_i: mean = sum(value / n_i) / R, and
    std^2 = sum((value - mean)^2 / n_i) / (R - 1). If all calls of a rollout have its reward as value, this equals
    `normalise_group`. Process supervision in arXiv 2402.03300 section 4.1.3 has the same form, with statistics over
    steps instead of rollouts. "leave_one_out" takes the mean over the other rollouts.

    Example, rollout 0 with values 1 and 0, rollout 1 with value 1, scale="none": the mean is (0.5 + 1) / 2 = 0.75, and
    the result 0.25 -0.75 | 0.25.

    The result is exactly 0 for all calls if there are fewer than two rollouts or all values are equal. baseline="none"
    returns the values unchanged, whatever the scale. Raises ValueError if a value is not finite.
    """
    if not np.isfinite(value_C).all():
        raise ValueError(f"values {value_C.tolist()} are not all finite")
    if baseline == "none":
        return value_C.astype(np.float64)
    _, member_C, count_R = np.unique(rollout_C, return_inverse=True, return_counts=True)
    rollouts = count_R.size
    if rollouts < 2 or not has_spread(value_C):
        return np.zeros(value_C.shape, np.float64)
    weight_C = 1.0 / count_R[member_C]
    total_R = np.bincount(member_C, weight_C * value_C)
    if baseline == "leave_one_out":
        centred_C = value_C - ((total_R.sum() - total_R) / (rollouts - 1))[member_C]
    else:
        centred_C = value_C - total_R.sum() / rollouts
    if scale != "std":
        return np.asarray(centred_C)
    spread_C = value_C - total_R.sum() / rollouts
    std = np.sqrt((weight_C * spread_C**2).sum() / (rollouts - 1))
    return np.asarray(centred_C / (std + _EPSILON))


def best_of(reward_R: Values, k: int, *, scale: Scale = "std") -> Values:
    """The advantage of each rollout where k of them count as their best: pass@k training, arXiv 2508.10751 section 2.3.

    Over all subsets of k rollouts: the mean of the best reward among subsets with this rollout, minus the mean over all
    subsets; with scale="std" divided by the deviation over all subsets. The paper's closed form is for rewards of 0 and
    1; this one is for any. Groups that mostly succeed get little or nothing, so that the policy does not merely become
    surer of what it does already. All get 0 if no subset has another best reward than the others.

    Example, k=2, scale="none": the best of two is 1 in half of the subsets of four rewards, and in those with the 1.

        reward_R            1      0      0      0
                          0.5  -0.17  -0.17  -0.17
    """
    if not np.isfinite(reward_R).all():
        raise ValueError(f"values {reward_R.tolist()} are not all finite")
    size, k = reward_R.size, min(k, reward_R.size)
    order = np.argsort(reward_R)
    sorted_R = reward_R[order]
    if size < 2 or not has_spread(sorted_R[k - 1 :]):
        return np.zeros(size, np.float64)
    share_R = np.array([math.comb(rank, k - 1) / math.comb(size, k) for rank in range(size)])
    best = share_R @ sorted_R
    # Of the subsets with a rollout: those in which a later one is the best, and those in which it is.
    later_R = np.array([math.comb(rank - 1, k - 2) if rank > 0 else 0 for rank in range(size)]) * sorted_R
    own_R = np.array([math.comb(rank, k - 1) for rank in range(size)]) * sorted_R
    with_R = (own_R + np.append(np.cumsum(later_R[::-1])[-2::-1], 0)) / math.comb(size - 1, k - 1)
    advantage_R = np.empty(size, np.float64)
    advantage_R[order] = with_R - best
    return advantage_R / (np.sqrt(share_R @ (sorted_R - best) ** 2) + _EPSILON) if scale == "std" else advantage_R


def whiten(value_C: Values, rollout_C: NDArray[np.integer]) -> Values:
    """The values of all rollouts of a step, scaled to mean 0 and standard deviation 1; shape [C].

    This is the normalisation of REINFORCE++, arXiv 2501.03262 section 3, and of PPO's advantages: veRL's masked_whiten,
    but each rollout has the same weight, instead of each token. Mean and variance are those of `normalise`.

    Example, two rollouts of one token each: whiten([1, 0], [0, 1]) -> 0.7071 -0.7071
    """
    centred_C = normalise(value_C, rollout_C, scale="none")
    _, member_C, count_R = np.unique(rollout_C, return_inverse=True, return_counts=True)
    variance = (centred_C**2 / count_R[member_C]).sum() / max(count_R.size - 1, 1)
    return np.asarray(centred_C / np.sqrt(variance + 1e-8))


def generalised_advantage(reward_RS: Values, value_RS: Values, *, discount: float, gae_lambda: float) -> Values:
    """Generalised advantage estimation (GAE), arXiv 1506.02438 eq. 16; shape [R, S].

    `_S` are the steps of each rollout, with zeros after its last step.
    delta[s] = r[s] + discount * V[s+1] - V[s], and A[s] = delta[s] + discount * gae_lambda * A[s+1], with V and A equal
    to 0 after the last step. veRL's compute_gae_advantage_return computes the same before its whitening.

    Example, discount=1:

        reward_RS               0     0     1
        value_RS              0.5   0.5   0.5
        gae_lambda=1          0.5   0.5   0.5
        gae_lambda=0            0     0   0.5
    """
    advantage_RS = reward_RS - value_RS
    advantage_RS[:, :-1] += discount * value_RS[:, 1:]
    for s in range(advantage_RS.shape[1] - 2, -1, -1):
        advantage_RS[:, s] += discount * gae_lambda * advantage_RS[:, s + 1]
    return np.asarray(advantage_RS)


def carry_back(reward_T: NDArray[np.floating], kept: Sequence[int]) -> Values:
    """Rewards of the `kept` calls (indices) of a rollout, including those of the calls that are left out.

    The reward of a call that is left out goes to the last kept call before it. Rewards before the first kept call are
    lost: no trained token led to them.

    Example: carry_back([1, 2, 3, 4], [1, 2]) -> [2 7]
    """
    owner_T = np.searchsorted(kept, np.arange(reward_T.size), side="right") - 1
    owned_T = owner_T >= 0
    return np.bincount(owner_T[owned_T], reward_T[owned_T], minlength=len(kept)).astype(np.float64)


def returns_to_go(reward_T: NDArray[np.floating], discount: float) -> Values:
    """The discounted return of each call of a rollout: G[t] = r[t] + discount * G[t+1]; shape [T].

    Sutton and Barto, Reinforcement Learning (2018), eq. 3.9. Example: returns_to_go([0, 0.1, 1], 0.5) -> [0.3 0.6 1]
    """
    return_T = np.array(reward_T, np.float64)
    for t in range(return_T.size - 2, -1, -1):
        return_T[t] += discount * return_T[t + 1]
    return return_T


def same_state_advantages(
    value_C: Values, rollout_C: NDArray[np.integer], state_C: Sequence[Hashable], *, scale: Scale = "std"
) -> Values:
    """The advantage of each call over calls of other rollouts in the same state; shape [C].

    This is the step-level advantage of GiGPO, arXiv 2505.10978 eq. 7: calls with equal states form a group of their
    own. If a state occurs in a single rollout, nothing can be compared, and its calls get 0. The statistics are those
    of `normalise`.

    Example, scale="none":

        rollout_C   0    0    1    1
        state_C     a    b    a    c
        value_C     1    1    0    0
                  0.5    0 -0.5    0
    """
    advantage_C = np.zeros(value_C.shape, np.float64)
    members: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, state in enumerate(state_C):
        members[state].append(index)
    for indices in members.values():
        advantage_C[indices] = normalise(value_C[indices], rollout_C[indices], scale=scale)
    return advantage_C


def has_spread(values: NDArray[np.floating]) -> bool:
    """Whether the values differ. The extremes are compared, because the std of equal floats can be 1e-17."""
    return bool(values.size >= 2 and values.max() > values.min())
