"""Before a step: from the outputs of policy, reference and critic to old log-probabilities, advantages and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.core.metrics import Max, Mean, Metrics, Sum, merge
from agent_lightning.core.types import Batch, Bools, Floats
from agent_lightning.credit.tokens import explained_variance, share_first_values, step_advantages, whiten_step
from agent_lightning.learners.gap import measure
from agent_lightning.learners.verl_groups import Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Outputs of the models for a batch before the step, float32[N, T], each at its token; None if not computed."""

    logprob_NT: Floats | None = None
    """Log-probabilities under the policy that is trained."""
    reference_NT: Floats | None = None
    """Log-probabilities under the starting policy."""
    value_NT: Floats | None = None
    """The critic's values of the states in which the tokens were sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A batch with the old log-probabilities and the advantages to train on."""

    batch: Batch
    columns: Mapping[str, Floats]
    """Further inputs of the losses by veRL's names, float32[N, T]: ref_log_probs, values, returns."""


def prepare(
    batches: Sequence[Batch], forwards: Sequence[Forward], config: Training, version: int
) -> tuple[list[Prepared], Metrics]:
    """The batches of a step, with everything that the losses read; `forwards` holds the outputs for each batch. Tokens
    sampled before the policy's `version` do not count for the gap.

    old log-probabilities   the engine's. With importance sampling the policy's (decoupled PPO, arXiv 2110.00641), and
                            each advantage is multiplied by a weight (`_weights`). A row for which the engine gave no
                            log-probabilities has the policy's, and no correction; such rows are counted.
    advantages              the batch's. With a critic, generalised advantages of the batch's rewards. A KL in the
                            reward subtracts coef * KL from each token's reward, arXiv 2203.02155 eq. 2; without a
                            critic, it subtracts those of the token and all later ones from the token's advantage,
                            arXiv 2501.03262 section 3.
    """
    records: list[Metrics] = []
    old_logprobs, corrections, advantages, columns = [], [], [], []
    for batch, forward in zip(batches, forwards, strict=True):
        old_NT, correction_NT, gap_metrics = _old_logprobs(batch, forward.logprob_NT, config, version)
        penalty_NT, kl_metrics = _kl_penalty(batch, old_NT, forward.reference_NT, config)
        advantage_NT, column = _advantages(batch, penalty_NT, forward.value_NT, config)
        if forward.reference_NT is not None and config.algorithm.kl_in == "loss":
            column["ref_log_probs"] = forward.reference_NT
        columns.append(column)
        records += [gap_metrics, kl_metrics]
        old_logprobs.append(old_NT)
        corrections.append(correction_NT)
        advantages.append(advantage_NT)
    if config.credit.scale == "batch" and batches:
        advantages = whiten_step(batches, advantages)
    if config.has_critic and batches:
        records.append({"critic/explained_variance": Mean.of([_explained_variance(batches, columns)])})
    prepared = []
    for index, (batch, correction_NT) in enumerate(zip(batches, corrections, strict=True)):
        changes: dict[str, Any] = {"logprob_NT": old_logprobs[index], "advantage_NT": advantages[index] * correction_NT}
        if config.algorithm.importance_sampling == "geometric":  # a dropped row trains no entropy and no KL either
            changes["mask_NT"] = batch.mask_NT & (correction_NT != 0)
        prepared.append(Prepared(batch=replace(batch, **changes), columns=columns[index]))
    return prepared, merge(*records)


def _old_logprobs(
    batch: Batch, policy_NT: Floats | None, config: Training, version: int
) -> tuple[Floats, Floats, Metrics]:
    """The old log-probabilities and the factor of each advantage, both float32[N, T], and metrics of the gap."""
    ones_NT = np.ones(batch.token_NT.shape, np.float32)
    if policy_NT is None:
        return batch.logprob_NT, ones_NT, {}
    unknown_N: Bools = np.asarray((np.isnan(batch.logprob_NT) & batch.mask_NT).any(axis=1))
    known_NT = batch.mask_NT & ~unknown_N[:, None]
    log_ratio_NT = np.where(known_NT, policy_NT - batch.logprob_NT, 0).astype(np.float32)
    metrics: dict[str, Mean | Sum | Max] = {
        **measure(np.extract(known_NT & (batch.version_NT >= version), log_ratio_NT)),
        "learner/rows_without_logprobs": Sum(float(unknown_N.sum())),
    }
    if config.algorithm.importance_sampling == "none":
        return np.where(known_NT, batch.logprob_NT, policy_NT).astype(np.float32), ones_NT, metrics
    weight_NT = _weights(log_ratio_NT, batch.mask_NT, config.algorithm)
    weights, cap = weight_NT[known_NT], config.algorithm.importance_sampling_cap
    metrics["learner/importance_weight"] = Mean.of(weights.tolist())
    if config.algorithm.importance_sampling in ("token", "sequence"):
        metrics["learner/importance_capped"] = Mean.of((weights >= cap).tolist())
    elif config.algorithm.importance_sampling in ("icepop", "geometric"):
        metrics["learner/importance_dropped"] = Mean.of((weights == 0).tolist())
    return policy_NT, weight_NT, metrics


def _weights(log_ratio_NT: Floats, mask_NT: Bools, algorithm: AlgorithmConfig) -> Floats:
    """The weight of each token, float32[N, T], by veRL's functions, from log r = log(policy / engine) of each token:

    token       min(r, cap)
    sequence    min(product of r over the row, cap)
    decoupled   r
    icepop      r if 1/cap <= r <= cap, else 0 (arXiv 2510.18855)
    geometric   1 if the geometric mean of r over the row is from 1/cap to cap, else 0
    """
    import torch
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights, compute_rollout_rejection_mask

    log_ratio, mask = torch.from_numpy(log_ratio_NT), torch.from_numpy(mask_NT.copy())
    kind, cap = algorithm.importance_sampling, algorithm.importance_sampling_cap
    bounds = f"{1 / cap}_{cap}"
    if kind == "geometric":
        kept, _ = compute_rollout_rejection_mask(log_ratio, mask.float(), "seq_mean_k1", bounds)
        return np.asarray(kept.numpy(), np.float32)
    thresholds: dict[str, str | float] = {"icepop": bounds, "decoupled": 1e30}
    level = "sequence" if kind == "sequence" else "token"
    weight, _ = compute_rollout_correction_weights(
        log_ratio, mask, rollout_is=level, rollout_is_threshold=thresholds.get(kind, cap)
    )
    return np.asarray(weight.numpy(), np.float32)


def _kl_penalty(batch: Batch, old_NT: Floats, reference_NT: Floats | None, config: Training) -> tuple[Floats, Metrics]:
    """What the KL in the reward subtracts from each token's reward, float32[N, T]; 0 if the KL is in the loss."""
    if reference_NT is None or config.algorithm.kl_in == "loss":
        return np.zeros(batch.token_NT.shape, np.float32), {}
    import torch
    from verl.trainer.ppo.core_algos import kl_penalty

    old, reference = (torch.from_numpy(np.where(batch.mask_NT, array, 0)) for array in (old_NT, reference_NT))
    kl_NT = kl_penalty(old, reference, config.algorithm.kl_kind or "k1").numpy()
    metrics: Metrics = {"learner/kl_to_reference": Mean.of([float((kl_NT * batch.weight_NT).sum())])}
    return (config.algorithm.kl_coef * kl_NT).astype(np.float32), metrics


def _advantages(
    batch: Batch, penalty_NT: Floats, value_NT: Floats | None, config: Training
) -> tuple[Floats, dict[str, Floats]]:
    """The advantage of each token before normalisation, float32[N, T]; with a critic, also its values and returns."""
    if not config.has_critic or value_NT is None:
        if not penalty_NT.any():
            return batch.advantage_NT, {}
        return batch.advantage_NT + step_advantages(batch, -penalty_NT, np.zeros_like(penalty_NT)), {}
    credit, level = config.credit, config.credit.gae_level
    rates = {"discount": credit.discount, "gae_lambda": credit.gae_lambda}
    advantage_NT = step_advantages(batch, batch.reward_NT - penalty_NT, value_NT, **rates, level=level)
    state_NT = share_first_values(batch, value_NT) if level == "call" else value_NT
    return advantage_NT, {"values": value_NT, "returns": advantage_NT + state_NT}


def _explained_variance(batches: Sequence[Batch], columns: Sequence[Mapping[str, Floats]]) -> float:
    """The share of the returns' variance that the critic's values explain, over the trained tokens of the step."""
    weights = np.concatenate([batch.weight_NT[batch.mask_NT] * batch.num_rollouts for batch in batches])
    values, returns = (
        np.concatenate([column[name][batch.mask_NT] for batch, column in zip(batches, columns, strict=True)])
        for name in ("values", "returns")
    )
    return explained_variance(*(array.astype(np.float64) for array in (weights, values, returns)))
