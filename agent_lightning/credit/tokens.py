"""From the credit of calls to the advantage of tokens, where the learner's models have a say: values and penalties.

A rollout's steps are its trained tokens in the order of its calls, whichever rows they stand in; what tools and users
wrote between them is no step. Everything here is of whole rollouts, because a batch never splits one.

Shapes: `_NT` as in Batch; `_K` all trained tokens of a batch, rollout after rollout, in the order they were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agent_lightning.core.types import Batch, Floats
from agent_lightning.credit.estimators import Values, generalised_advantage, whitened

Over = Literal["token", "call"]
"""What one step of the estimation is."""


def step_advantages(
    batch: Batch,
    reward_NT: NDArray[np.floating],
    value_NT: NDArray[np.floating],
    *,
    discount: float = 1.0,
    trace: float = 1.0,
    over: Over = "token",
) -> Floats:
    """Generalised advantage estimation over each rollout's steps, arXiv 1506.02438; 0 where nothing is trained.

    `value_NT` is the critic's estimate of the state in which the token was sampled. over="call": one step is a call,
    in the state in which its first token was sampled, with all of its rewards; its tokens share its advantage.

    Example, one rollout of two calls in two rows, no critic, so that the advantage is what followed:

        token_NT     5  6* 7*        reward_NT   0   0   0      result   0   1   1
                     5  8*                       0   1                   0   1
    """
    row_K, column_K = _in_order(batch)
    if row_K.size == 0:
        return np.zeros(batch.token_NT.shape, np.float32)
    rollout_K, call_K = batch.rollout_N[row_K], batch.call_NT[row_K, column_K]
    begins_K = np.ones(row_K.size, np.bool_)
    if over == "call":
        begins_K[1:] = (rollout_K[1:] != rollout_K[:-1]) | (call_K[1:] != call_K[:-1])
    step_K = np.cumsum(begins_K) - 1
    # Steps as a matrix, one row for each rollout: place is a step's number within its rollout.
    rollout_S = rollout_K[begins_K]
    _, first_R, owner_S = np.unique(rollout_S, return_index=True, return_inverse=True)
    place_S = np.arange(rollout_S.size) - first_R[owner_S]
    matrix = np.zeros((2, first_R.size, int(place_S.max()) + 1), np.float64)
    matrix[0, owner_S, place_S] = np.bincount(step_K, reward_NT[row_K, column_K])
    matrix[1, owner_S, place_S] = value_NT[row_K, column_K][begins_K]
    advantage_RS = generalised_advantage(matrix[0], matrix[1], discount=discount, trace=trace)
    advantage_NT = np.zeros(batch.token_NT.shape, np.float32)
    advantage_NT[row_K, column_K] = advantage_RS[owner_S, place_S][step_K]
    return advantage_NT


def first_of_call(batch: Batch, value_NT: Floats) -> Floats:
    """Each trained token's value replaced by that of its call's first one: the states that over="call" knows."""
    row_K, column_K = _in_order(batch)
    name_K = np.stack([batch.rollout_N[row_K], batch.call_NT[row_K, column_K]])
    _, first_C, call_K = np.unique(name_K, axis=1, return_index=True, return_inverse=True)
    shared_NT = value_NT.copy()
    shared_NT[row_K, column_K] = value_NT[row_K, column_K][first_C][call_K.ravel()]
    return shared_NT


def whiten(batches: Sequence[Batch], advantages: Sequence[Floats]) -> list[Floats]:
    """The step's advantages with mean 0 and deviation 1 over its trained tokens; see `estimators.whitened`."""
    masks = [batch.mask_NT for batch in batches]
    starts = np.cumsum([0, *(batch.num_rollouts for batch in batches[:-1])])
    owners = [
        batch.rollout_N[np.nonzero(batch.mask_NT)[0]] + start for batch, start in zip(batches, starts, strict=True)
    ]
    values = [advantage[mask].astype(np.float64) for advantage, mask in zip(advantages, masks, strict=True)]
    white = np.split(whitened(np.concatenate(values), np.concatenate(owners)), np.cumsum([v.size for v in values])[:-1])
    whole = [np.zeros(mask.shape, np.float32) for mask in masks]
    for advantage, mask, part in zip(whole, masks, white, strict=True):
        advantage[mask] = part
    return whole


def explained_variance(weight: Values, value: Values, returns: Values) -> float:
    """Share of the returns' spread that the values foresaw: 1 - Var(returns - value) / Var(returns), weighted.

    1 is a perfect critic, 0 one that might as well be a constant; NaN where the returns are all equal.
    """
    weight = weight / weight.sum()

    def variance(x: Values) -> float:
        return float((weight * (x - (weight * x).sum()) ** 2).sum())

    spread = variance(returns)
    return 1 - variance(returns - value) / spread if spread > 1e-12 else float("nan")


def _in_order(batch: Batch) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    row_K, column_K = np.nonzero(batch.mask_NT)
    order_K = np.lexsort((column_K, batch.call_NT[row_K, column_K], batch.rollout_N[row_K]))
    return row_K[order_K], column_K[order_K]
