"""Before a step: from the outputs of policy, reference and critic to old log-probabilities, advantages and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

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
    """The batches of a step, with everything that the losses read; `forwards` holds the outputs for each batch. Rows
    sampled before the policy's `version` do not count for the gap.

    old log-probabilities   the engine's. With importance sampling the policy's, and each advantage is multiplied by
                            min(policy / engine, cap), computed by veRL. A row for which the engine gave no
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
    rows = zip(batches, old_logprobs, advantages, corrections, columns, strict=True)
    prepared = [
        Prepared(batch=replace(batch, logprob_NT=old, advantage_NT=advantage * correction), columns=column)
        for batch, old, advantage, correction, column in rows
    ]
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
        **measure(np.extract(known_NT & (batch.version_N >= version)[:, None], log_ratio_NT)),
        "learner/rows_without_logprobs": Sum(float(unknown_N.sum())),
    }
    if config.algorithm.importance_sampling == "none":
        return np.where(known_NT, batch.logprob_NT, policy_NT).astype(np.float32), ones_NT, metrics
    import torch
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    cap = config.algorithm.importance_sampling_cap
    weight_NT, _ = compute_rollout_correction_weights(
        torch.from_numpy(log_ratio_NT),
        torch.from_numpy(batch.mask_NT.copy()),
        rollout_is=config.algorithm.importance_sampling,
        rollout_is_threshold=cap,
    )
    weight: Floats = weight_NT.numpy()
    metrics["learner/importance_weight"] = Mean.of(weight[known_NT].tolist())
    metrics["learner/importance_capped"] = Mean.of((weight[known_NT] >= cap).tolist())
    return policy_NT, weight, metrics


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
