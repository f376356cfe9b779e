"""Before a step: what the learner's models say of its batches becomes old log-probabilities, advantages and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agent_lightning.core.metrics import Max, Mean, Metrics, Sum, merge
from agent_lightning.core.types import Batch, Bools, Floats
from agent_lightning.credit.tokens import explained_variance, share_first_values, step_advantages, whiten_step
from agent_lightning.learners.verl_groups import LearnerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What the models say of a batch before the step, [N, T], each value in its token's place; None: not asked."""

    logprob_NT: Floats | None = None
    """The policy's own."""
    reference_NT: Floats | None = None
    """The starting policy's log-probabilities."""
    value_NT: Floats | None = None
    """The critic's, of the state in which the token was sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A batch with the advantages and the old log-probabilities to train on, and what else the losses read."""

    batch: Batch
    columns: Mapping[str, Floats]


def prepare(batches: Sequence[Batch], said: Sequence[Forward], config: LearnerConfig) -> tuple[list[Prepared], Metrics]:
    """A step's batches as its losses take them.

    old log-probabilities   the engine's; with importance sampling the policy's own, and each advantage times
                            min(own / engine, cap), by veRL. A row for which the engine gave no log-probabilities has
                            the policy's own and no correction, and is counted.
    advantages              the batch's own; with a critic, generalised advantages of its rewards. The KL in the
                            reward charges each token coef * KL, arXiv 2203.02155 eq. 2; without a critic, a token's
                            advantage loses what it and all later ones were charged, arXiv 2501.03262 section 3.
    """
    records: list[Metrics] = []
    olds, corrections, advantages = [], [], []
    columns: list[dict[str, Floats]] = []
    for batch, one in zip(batches, said, strict=True):
        old_NT, correction_NT, record = _old(batch, one.logprob_NT, config)
        penalty_NT, more = _penalty(batch, old_NT, one.reference_NT, config)
        advantage_NT, column = _advantages(batch, penalty_NT, one.value_NT, config)
        if one.reference_NT is not None and config.kl_in == "loss":
            column["ref_log_probs"] = one.reference_NT
        columns.append(column)
        records += [record, more]
        olds.append(old_NT)
        corrections.append(correction_NT)
        advantages.append(advantage_NT)
    if config.normalise and batches:
        advantages = whiten_step(batches, advantages)
    if config.critic is not None and batches:
        records.append({"critic/explained_variance": Mean.of([_explained(batches, columns)])})
    prepared = [
        Prepared(batch=replace(batch, logprob_NT=old, advantage_NT=advantage * correction), columns=column)
        for batch, old, advantage, correction, column in zip(
            batches, olds, advantages, corrections, columns, strict=True
        )
    ]
    return prepared, merge(*records)


def _old(batch: Batch, own_NT: Floats | None, config: LearnerConfig) -> tuple[Floats, Floats, Metrics]:
    """Log-probabilities of the old policy, and what each advantage is multiplied by."""
    whole_NT = np.ones(batch.token_NT.shape, np.float32)
    if own_NT is None:
        return batch.logprob_NT, whole_NT, {}
    unknown_N: Bools = np.asarray((np.isnan(batch.logprob_NT) & batch.mask_NT).any(axis=1))
    known_NT = batch.mask_NT & ~unknown_N[:, None]
    log_ratio_NT = np.where(known_NT, own_NT - batch.logprob_NT, 0).astype(np.float32)
    gap = np.abs(np.extract(known_NT, log_ratio_NT))
    metrics: dict[str, Mean | Sum | Max] = {
        "logprob_gap/mean_abs": Mean.of(gap.tolist()),
        "logprob_gap/max_abs": Max(float(gap.max(initial=0.0))),
        "learner/rows_without_logprobs": Sum(float(unknown_N.sum())),
    }
    if config.importance == "none":
        return np.where(known_NT, batch.logprob_NT, own_NT).astype(np.float32), whole_NT, metrics
    import torch
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    weight_NT, _ = compute_rollout_correction_weights(
        torch.from_numpy(log_ratio_NT),
        torch.from_numpy(batch.mask_NT.copy()),
        rollout_is=config.importance,
        rollout_is_threshold=config.importance_cap,
    )
    weight: Floats = weight_NT.numpy()
    metrics["learner/importance_weight"] = Mean.of(weight[known_NT].tolist())
    metrics["learner/importance_capped"] = Mean.of((weight[known_NT] >= config.importance_cap).tolist())
    return own_NT, weight, metrics


def _penalty(
    batch: Batch, old_NT: Floats, reference_NT: Floats | None, config: LearnerConfig
) -> tuple[Floats, Metrics]:
    """What the KL in the reward charges each token."""
    if reference_NT is None or config.kl_in == "loss":
        return np.zeros(batch.token_NT.shape, np.float32), {}
    import torch
    from verl.trainer.ppo.core_algos import kl_penalty

    old, reference = (torch.from_numpy(np.where(batch.mask_NT, array, 0)) for array in (old_NT, reference_NT))
    kl_NT = kl_penalty(old, reference, config.kl_kind or "k1").numpy()
    metrics: Metrics = {"learner/kl_to_reference": Mean.of([float((kl_NT * batch.weight_NT).sum())])}
    return (config.kl_coef * kl_NT).astype(np.float32), metrics


def _advantages(
    batch: Batch, penalty_NT: Floats, value_NT: Floats | None, config: LearnerConfig
) -> tuple[Floats, dict[str, Floats]]:
    """Of each token, before any normalisation; with a critic, also the values and returns that it is trained on."""
    critic = config.critic
    if critic is None or value_NT is None:
        if not penalty_NT.any():
            return batch.advantage_NT, {}
        return batch.advantage_NT + step_advantages(batch, -penalty_NT, np.zeros_like(penalty_NT)), {}
    advantage_NT = step_advantages(
        batch,
        batch.reward_NT - penalty_NT,
        value_NT,
        discount=critic.discount,
        gae_lambda=critic.gae_lambda,
        level=critic.level,
    )
    state_NT = share_first_values(batch, value_NT) if critic.level == "call" else value_NT
    return advantage_NT, {"values": value_NT, "returns": advantage_NT + state_NT}


def _explained(batches: Sequence[Batch], columns: Sequence[Mapping[str, Floats]]) -> float:
    masks = [batch.mask_NT for batch in batches]
    weights = [batch.weight_NT[mask] * batch.num_rollouts for batch, mask in zip(batches, masks, strict=True)]
    values, returns = (
        np.concatenate([column[name][mask] for column, mask in zip(columns, masks, strict=True)]).astype(np.float64)
        for name in ("values", "returns")
    )
    return explained_variance(np.concatenate(weights).astype(np.float64), values, returns)
