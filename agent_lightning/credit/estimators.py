"""Returns and advantages of the calls of a group: NumPy, no spans, no batches.

Shapes: `_R` rollouts of a group, `_C` all calls of the group, rollout after rollout; `rollout_C` says whose they are.
Statistics are taken over rollouts: a rollout with ten calls weighs as much as one with a single call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agent_lightning.core.types import Bools, Floats

Scale = Literal["std", "none", "batch"]
"""batch: left as it is in the group, and `whitened` over the whole step later."""
Baseline = Literal["mean", "leave_one_out", "none"]
Values = NDArray[np.float64]

_EPSILON = 1e-6
"""Added to a standard deviation; veRL's compute_grpo_outcome_advantage has the same."""


def group_normalised(
    rewards_R: NDArray[np.floating], valid_R: Bools, *, scale: Scale = "std", baseline: Baseline = "mean"
) -> Floats:
    """How much better each rollout did than its group; shape [R], computed in float64.

    scale="std" is GRPO, arXiv 2402.03300 section 4.1: (r - mean) / (std + epsilon), with the sample standard deviation
    (ddof=1). scale="none" is Dr. GRPO, arXiv 2503.20783: r - mean. baseline="leave_one_out" with scale="none" is RLOO,
    arXiv 2402.14740 eq. 8: r minus the mean of the others, which is (r - mean) * R / (R - 1).

    Example:

        rewards_R                                1     0     0     7
        valid_R                                  1     1     1     0
        scale="std"                           1.15 -0.58 -0.58     0
        scale="none"                          0.67 -0.33 -0.33     0
        scale="none", "leave_one_out"            1  -0.5  -0.5     0

    Mean and std are over valid rollouts. Invalid ones get 0, and so do all, exactly, where fewer than two are valid or
    all valid rewards are equal. Raises ValueError for different shapes or a valid reward that is not finite.
    """
    if rewards_R.shape != valid_R.shape:
        raise ValueError(f"rewards of shape {rewards_R.shape}, validity of shape {valid_R.shape}")
    advantage_R = np.zeros(rewards_R.shape, np.float32)
    valid = rewards_R[valid_R].astype(np.float64)
    advantage_R[valid_R] = normalised(valid, np.arange(valid.size), scale=scale, baseline=baseline)
    return advantage_R


def normalised(
    value_C: Values, rollout_C: NDArray[np.integer], *, scale: Scale = "std", baseline: Baseline = "mean"
) -> Values:
    """How much better each call did than its group, where calls have values of their own; shape [C].

    With n_i calls in rollout i of R, a call weighs 1 / n_i: mean = sum(value / n_i) / R, and
    std^2 = sum((value - mean)^2 / n_i) / (R - 1). Where all calls of a rollout have its reward, this is
    `group_normalised`. Process supervision in arXiv 2402.03300 section 4.1.3 has the same form, with statistics over
    steps instead of rollouts. "leave_one_out" takes the mean over the other rollouts.

    Example, rollout 0 with values 1 and 0, rollout 1 with value 1, scale="none":

        mean = (0.5 + 1) / 2 = 0.75  ->  0.25 -0.75 | 0.25

    All zeros, exactly, where there are fewer than two rollouts or all values are equal; but baseline="none" gives the
    values themselves, whatever the scale. Raises ValueError for a value that is not finite.
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


def whitened(value_C: Values, rollout_C: NDArray[np.integer]) -> Values:
    """Values of a whole step with mean 0 and standard deviation 1, each rollout with the same weight; shape [C].

    The normalisation of REINFORCE++, arXiv 2501.03262 section 3, and of PPO's advantages: veRL's masked_whiten, with
    statistics over rollouts instead of tokens. Mean and variance are those of `normalised`.

    Example, two rollouts of one token each:

        whitened([1, 0], [0, 1])  # 0.7071 -0.7071
    """
    centred_C = normalised(value_C, rollout_C, scale="none")
    _, member_C, count_R = np.unique(rollout_C, return_inverse=True, return_counts=True)
    variance = (centred_C**2 / count_R[member_C]).sum() / max(count_R.size - 1, 1)
    return np.asarray(centred_C / np.sqrt(variance + 1e-8))


def generalised_advantage(reward_RS: Values, value_RS: Values, *, discount: float, trace: float) -> Values:
    """Generalised advantage estimation, arXiv 1506.02438 eq. 16; `_S` steps of each rollout, zeros after its last.

    delta[s] = r[s] + discount * V[s+1] - V[s], and A[s] = delta[s] + discount * trace * A[s+1]: nothing follows the
    last step. `trace` is the paper's lambda. veRL's compute_gae_advantage_return is the same before its whitening.

    Example, discount=1:

        reward_RS               0     0     1
        value_RS              0.5   0.5   0.5
        trace=1               0.5   0.5   0.5
        trace=0                 0     0   0.5
    """
    advantage_RS = reward_RS - value_RS
    advantage_RS[:, :-1] += discount * value_RS[:, 1:]
    for s in range(advantage_RS.shape[1] - 2, -1, -1):
        advantage_RS[:, s] += discount * trace * advantage_RS[:, s + 1]
    return np.asarray(advantage_RS)


def carried_back(reward_T: NDArray[np.floating], kept: Sequence[int]) -> Values:
    """The rewards of the `kept` calls of a rollout: what another call earned goes to the last kept one before it.

    What was earned before the first kept call is lost: no trained token led to it.

    Example:

        carried_back([1, 2, 3, 4], [1, 2])  # [2 7]
    """
    owner_T = np.searchsorted(kept, np.arange(reward_T.size), side="right") - 1
    led_T = owner_T >= 0
    return np.bincount(owner_T[led_T], reward_T[led_T], minlength=len(kept)).astype(np.float64)


def returns_to_go(reward_T: NDArray[np.floating], discount: float) -> Values:
    """What each call of a rollout and all that follow it earned: G[t] = r[t] + discount * G[t+1].

    Sutton and Barto, Reinforcement Learning (2018), eq. 3.9.

    Example:

        returns_to_go([0, 0.1, 1], 0.5)  # [0.3 0.6 1]
    """
    return_T = np.array(reward_T, np.float64)
    for t in range(return_T.size - 2, -1, -1):
        return_T[t] += discount * return_T[t + 1]
    return return_T


def same_state(
    value_C: Values, rollout_C: NDArray[np.integer], state_C: Sequence[Hashable], *, scale: Scale = "std"
) -> Values:
    """How much better each call did than calls of other rollouts that stood in the same state; shape [C].

    The step-level advantage of GiGPO, arXiv 2505.10978 eq. 7: calls whose states are equal form a group of their own.
    A state that only one rollout was in compares nothing, so its calls get 0. Statistics as in `normalised`.

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
        advantage_C[indices] = normalised(value_C[indices], rollout_C[indices], scale=scale)
    return advantage_C


def has_spread(values: NDArray[np.floating]) -> bool:
    """Whether the values differ. By extremes: the std of equal floats can be 1e-17 instead of 0."""
    return bool(values.size >= 2 and values.max() > values.min())
