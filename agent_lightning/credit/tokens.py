"""Advantages of tokens from the rewards of calls and the values of the learner's critic.

The steps of a rollout are its trained tokens in the order of its calls, whichever rows they are in; the text of tools
and users between them is no step. A batch never splits a rollout, so every rollout is complete here.

Shapes: `_NT` as in Batch; `_K` all trained tokens of a batch, rollout after rollout, in the order they were sampled;
`_S` all steps of a batch, in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agent_lightning.config.learning import AdvantageLevel
from agent_lightning.core.types import Batch, Floats
from agent_lightning.credit.estimators import Values, generalised_advantage, whiten


def step_advantages(
    batch: Batch,
    reward_NT: NDArray[np.floating],
    value_NT: NDArray[np.floating],
    *,
    discount: float = 1.0,
    gae_lambda: float = 1.0,
    level: AdvantageLevel = "token",
) -> Floats:
    """Generalised advantage estimation over each rollout's steps, arXiv 1506.02438; 0 where `batch.mask_NT` is False.

    `value_NT` is the critic's estimate of the state in which each token was sampled. With level="call" a step is a
    call: its state is that of its first token, its reward is the sum of its tokens' rewards, and its tokens share its
    advantage.

    Example, one rollout of two calls in two rows, no critic, so that the advantage is the sum of the later rewards:

        token_NT     5  6* 7*        reward_NT   0   0   0      result   0   1   1
                     5  8*                       0   1                   0   1
    """
    row_K, column_K = _trained_tokens(batch)
    if row_K.size == 0:
        return np.zeros(batch.token_NT.shape, np.float32)
    rollout_K, call_K = batch.rollout_N[row_K], batch.call_NT[row_K, column_K]
    begins_K = np.ones(row_K.size, np.bool_)
    if level == "call":
        begins_K[1:] = (rollout_K[1:] != rollout_K[:-1]) | (call_K[1:] != call_K[:-1])
    step_K = np.cumsum(begins_K) - 1
    # Steps become a matrix with a row for each rollout; `place_S` is a step's number within its rollout.
    rollout_S = rollout_K[begins_K]
    _, first_R, owner_S = np.unique(rollout_S, return_index=True, return_inverse=True)
    place_S = np.arange(rollout_S.size) - first_R[owner_S]
    matrix = np.zeros((2, first_R.size, int(place_S.max()) + 1), np.float64)
    matrix[0, owner_S, place_S] = np.bincount(step_K, reward_NT[row_K, column_K])
    matrix[1, owner_S, place_S] = value_NT[row_K, column_K][begins_K]
    advantage_RS = generalised_advantage(matrix[0], matrix[1], discount=discount, gae_lambda=gae_lambda)
    advantage_NT = np.zeros(batch.token_NT.shape, np.float32)
    advantage_NT[row_K, column_K] = advantage_RS[owner_S, place_S][step_K]
    return advantage_NT


def share_first_values(batch: Batch, value_NT: Floats) -> Floats:
    """Values in which each trained token has the value of its call's first token: the states of level="call"."""
    row_K, column_K = _trained_tokens(batch)
    name_K = np.stack([batch.rollout_N[row_K], batch.call_NT[row_K, column_K]])
    _, first_C, call_K = np.unique(name_K, axis=1, return_index=True, return_inverse=True)
    shared_NT = value_NT.copy()
    shared_NT[row_K, column_K] = value_NT[row_K, column_K][first_C][call_K.ravel()]
    return shared_NT


def whiten_step(batches: Sequence[Batch], advantages: Sequence[Floats]) -> list[Floats]:
    """The advantages of all batches of a step, scaled to mean 0 and standard deviation 1; see `estimators.whiten`."""
    masks = [batch.mask_NT for batch in batches]
    starts = np.cumsum([0, *(batch.num_rollouts for batch in batches[:-1])])
    pairs = zip(batches, starts, strict=True)
    owners = [batch.rollout_N[np.nonzero(batch.mask_NT)[0]] + start for batch, start in pairs]
    values = [advantage[mask].astype(np.float64) for advantage, mask in zip(advantages, masks, strict=True)]
    white = np.split(whiten(np.concatenate(values), np.concatenate(owners)), np.cumsum([v.size for v in values])[:-1])
    scaled = [np.zeros(mask.shape, np.float32) for mask in masks]
    for advantage, mask, part in zip(scaled, masks, white, strict=True):
        advantage[mask] = part
    return scaled


def explained_variance(weight: Values, value: Values, returns: Values) -> float:
    """The explained variance of a critic: 1 - Var(returns - value) / Var(returns), with weights. 1 is a perfect critic,
    0 is no better than a constant. NaN if all returns are equal."""
    weight = weight / weight.sum()

    def variance(x: Values) -> float:
        return float((weight * (x - (weight * x).sum()) ** 2).sum())

    spread = variance(returns)
    return 1 - variance(returns - value) / spread if spread > 1e-12 else float("nan")


def _trained_tokens(batch: Batch) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of all trained tokens, rollout after rollout, in the order they were sampled; shape [K]."""
    row_K, column_K = np.nonzero(batch.mask_NT)
    order_K = np.lexsort((column_K, batch.call_NT[row_K, column_K], batch.rollout_N[row_K]))
    return row_K[order_K], column_K[order_K]
