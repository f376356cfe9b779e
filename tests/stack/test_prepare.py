"""From the models' outputs to advantages: by veRL's own functions, or equal to them; without Ray or a model."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import random_batch

from agent_lightning.config.learning import AlgorithmConfig, CreditConfig
from agent_lightning.core.metrics import Metrics, values
from agent_lightning.core.types import Batch, Floats
from agent_lightning.credit.estimators import normalise, whiten
from agent_lightning.learners.verl_credit import Forward, Prepared, prepare
from agent_lightning.learners.verl_groups import Training

pytestmark = pytest.mark.stack
RNG = np.random.default_rng(0)
BATCH = random_batch(3, rows=6, vocab=50)
SHAPE = BATCH.token_NT.shape


@pytest.fixture(scope="module")
def core_algos() -> ModuleType:
    """veRL's own formulas. veRL takes seconds to import: here, and not when the tests are collected."""
    return importlib.import_module("verl.trainer.ppo.core_algos")


def noise(scale: float = 1.0) -> Floats:
    return (scale * RNG.normal(size=SHAPE)).astype(np.float32)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(array, np.float64)) for array in arrays]


def prepared(
    batch: Batch, forward: Forward, credit: CreditConfig | None = None, **algorithm: Any
) -> tuple[Prepared, dict[str, float]]:
    metrics: Metrics
    training = Training(model_path="", credit=credit or CreditConfig(), algorithm=AlgorithmConfig(**algorithm))
    (result,), metrics = prepare([batch], [forward], training, 0)
    return result, values(metrics)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_generalised_advantages_and_returns_are_veRL_s(
    discount: float, gae_lambda: float, core_algos: ModuleType
) -> None:
    value_NT = noise()
    reward, value, mask = tensors(BATCH.reward_NT, value_NT, BATCH.mask_NT)
    _, returns = core_algos.compute_gae_advantage_return(reward, value, mask, discount, gae_lambda)
    credit = CreditConfig(method="gae", scale="none", discount=discount, gae_lambda=gae_lambda)
    result, metrics = prepared(BATCH, Forward(value_NT=value_NT), credit)
    expected = np.where(BATCH.mask_NT, (returns - value).numpy(), 0)  # before veRL's whitening
    np.testing.assert_allclose(result.batch.advantage_NT, expected, atol=1e-6)
    np.testing.assert_allclose(result.columns["returns"][BATCH.mask_NT], returns.numpy()[BATCH.mask_NT], atol=1e-6)
    assert result.columns["values"] is value_NT
    assert -10 < metrics["critic/explained_variance"] < 1


def one_token_a_rollout(rewards: list[float]) -> Batch:
    """Where tokens and rollouts are the same number, statistics over either are the same."""
    rows = len(rewards)
    mask = np.zeros((rows, 3), np.bool_)
    mask[:, 1] = True
    reward = np.where(mask, np.array(rewards)[:, None], 0).astype(np.float32)
    zeros = np.zeros((rows, 3), np.float32)
    return Batch(
        token_NT=np.ones((rows, 3), np.int32),
        mask_NT=mask,
        logprob_NT=zeros,
        advantage_NT=reward.copy(),
        reward_NT=reward,
        call_NT=np.zeros((rows, 3), np.int32),
        version_NT=np.zeros((rows, 3), np.int32),
        weight_NT=(mask / rows).astype(np.float32),
        length_N=np.full(rows, 3, np.int32),
        rollout_N=np.arange(rows, dtype=np.int32),
        num_rollouts=rows,
    )


def test_reinforce_plus_plus_is_veRL_s(core_algos: ModuleType) -> None:
    batch = one_token_a_rollout([1.0, 0.0, 0.0, 0.25, 1.0, -0.5])
    reward, mask = tensors(batch.reward_NT, batch.mask_NT)
    expected, _ = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        reward, mask, config=SimpleNamespace(gamma=1.0)
    )
    result, _ = prepared(batch, Forward(), CreditConfig(scale="batch"))
    np.testing.assert_allclose(result.batch.advantage_NT, expected.numpy(), atol=1e-6)


def test_reinforce_plus_plus_with_a_group_baseline_is_veRL_s(core_algos: ModuleType) -> None:
    rewards, groups = np.array([1.0, 0.0, 0.0, 0.25, 1.0, -0.5]), np.array([0, 0, 0, 1, 1, 1])
    batch = one_token_a_rollout(rewards.tolist())
    reward, mask = tensors(batch.reward_NT, batch.mask_NT)
    expected, _ = core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(reward, mask, groups)
    centred = np.concatenate([normalise(rewards[groups == g], np.arange(3), scale="batch") for g in (0, 1)])
    np.testing.assert_allclose(whiten(centred, np.arange(6)), expected.numpy()[:, 1], atol=1e-6)


def test_reinforce_plus_plus_charges_a_token_the_kl_from_there_on(core_algos: ModuleType) -> None:
    batch = replace(BATCH, logprob_NT=-np.abs(noise()), advantage_NT=np.zeros(SHAPE, np.float32))
    reference_NT = -np.abs(noise())
    old, reference, mask = tensors(batch.logprob_NT, reference_NT, batch.mask_NT)
    rewards = core_algos.compute_rewards(torch.zeros(SHAPE), old, reference, 0.1) * mask
    _, expected = core_algos.compute_reinforce_plus_plus_outcome_advantage(
        rewards, mask, config=SimpleNamespace(gamma=1.0)
    )
    result, metrics = prepared(batch, Forward(reference_NT=reference_NT), kl_coef=0.1, kl_in="reward")
    np.testing.assert_allclose(result.batch.advantage_NT, expected.numpy(), atol=1e-6)
    assert result.columns == {}
    kl = (batch.logprob_NT - reference_NT) * batch.weight_NT
    assert metrics["learner/kl_to_reference"] == pytest.approx(float(kl.sum()), abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_veRL_s(level: str) -> None:
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    engine, own = -np.abs(noise()), -np.abs(noise())
    batch = replace(BATCH, logprob_NT=np.where(BATCH.mask_NT, engine, 0).astype(np.float32))
    log_ratio, mask = tensors(own - engine, BATCH.mask_NT)
    expected, _ = compute_rollout_correction_weights(log_ratio, mask, rollout_is=level, rollout_is_threshold=1.5)
    result, metrics = prepared(batch, Forward(logprob_NT=own), importance_sampling=level, importance_sampling_cap=1.5)
    np.testing.assert_allclose(result.batch.advantage_NT, BATCH.advantage_NT * expected.numpy(), atol=1e-6)
    np.testing.assert_array_equal(result.batch.logprob_NT, own)
    assert metrics["learner/rows_without_logprobs"] == 0
    assert 0 < metrics["learner/importance_capped"] < 1
    gap = np.abs(own - engine)[BATCH.mask_NT]
    assert metrics["logprob_gap/mean_abs"] == pytest.approx(float(gap.mean()), rel=1e-5)
    assert metrics["logprob_gap/max_abs"] == pytest.approx(float(gap.max()), rel=1e-5)


def test_the_gap_is_measured_on_the_tokens_of_the_current_version() -> None:
    engine, own = -np.abs(noise()), -np.abs(noise())
    version_NT = np.broadcast_to(np.arange(SHAPE[1]) % 3, SHAPE).astype(np.int32)  # several versions in each row
    batch = replace(BATCH, logprob_NT=np.where(BATCH.mask_NT, engine, 0).astype(np.float32), version_NT=version_NT)
    training = Training(model_path="", credit=CreditConfig(), algorithm=AlgorithmConfig(importance_sampling="token"))
    (result,), metrics = prepare([batch], [Forward(logprob_NT=own)], training, 2)
    gap = np.abs(own - engine)[BATCH.mask_NT & (version_NT == 2)]
    assert values(metrics)["logprob_gap/mean_abs"] == pytest.approx(float(gap.mean()), rel=1e-5)
    weight_NT = np.minimum(np.exp(own - engine), AlgorithmConfig().importance_sampling_cap)  # every token is corrected
    np.testing.assert_allclose(
        result.batch.advantage_NT, BATCH.advantage_NT * np.where(BATCH.mask_NT, weight_NT, 0), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ("token", "decoupled_token_is"),
        ("sequence", "decoupled_seq_is"),
        ("icepop", "decoupled_token_icepop"),
        ("geometric", "decoupled_geo_rs"),
    ],
)
def test_corrections_are_veRL_s_presets(kind: str, preset: str) -> None:
    """Weights times mask, of veRL's own preset with the same bounds, to 1e-6; and some of each kind are dropped."""
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask

    cap = 1.05 if kind == "geometric" else 1.5
    bounds = {
        "icepop": {"threshold": cap, "threshold_lower": 1 / cap},
        "geometric": {"rs_threshold": f"{1 / cap}_{cap}"},
    }
    made = getattr(RolloutCorrectionConfig, preset)(**bounds.get(kind, {"threshold": cap}))
    own = -np.abs(noise())
    engine = np.where(BATCH.mask_NT, own + 0.3 * noise(), 0).clip(max=0).astype(np.float32)
    old, rollout, mask = tensors(own, engine, BATCH.mask_NT)
    weights, kept, _ = compute_rollout_correction_and_rejection_mask(
        old,
        rollout,
        mask,
        made.rollout_is,
        made.rollout_is_threshold,
        False,
        made.rollout_rs,
        made.rollout_rs_threshold,
    )
    expected = kept.numpy() if weights is None else (weights.batch["rollout_is_weights"] * kept).numpy()
    batch = replace(BATCH, logprob_NT=engine)
    result, metrics = prepared(batch, Forward(logprob_NT=own), importance_sampling=kind, importance_sampling_cap=cap)
    np.testing.assert_allclose(result.batch.advantage_NT, BATCH.advantage_NT * expected, atol=1e-6)
    np.testing.assert_array_equal(result.batch.mask_NT, kept.numpy().astype(bool))
    share = metrics["learner/importance_dropped" if kind in ("icepop", "geometric") else "learner/importance_capped"]
    assert 0 < share < 1


def test_decoupled_ppo_weighs_without_a_cap() -> None:
    own = -np.abs(noise())
    engine = np.where(BATCH.mask_NT, own - np.abs(noise()), 0).astype(np.float32)
    result, _ = prepared(replace(BATCH, logprob_NT=engine), Forward(logprob_NT=own), importance_sampling="decoupled")
    expected = BATCH.advantage_NT * np.exp(own - engine)
    np.testing.assert_allclose(result.batch.advantage_NT[BATCH.mask_NT], expected[BATCH.mask_NT], rtol=1e-5)
    np.testing.assert_array_equal(result.batch.logprob_NT, own)


@pytest.mark.parametrize("level", ["none", "token", "sequence", "decoupled", "icepop"])
def test_a_row_without_log_probabilities_is_not_corrected_and_no_other_row_minds(level: str) -> None:
    own = -np.abs(noise())
    engine = np.where(BATCH.mask_NT, own + 0.3 * np.abs(noise()), 0).clip(max=0).astype(np.float32)
    holed = engine.copy()
    holed[2, np.flatnonzero(BATCH.mask_NT[2])[0]] = math.nan
    complete, _ = prepared(replace(BATCH, logprob_NT=engine), Forward(logprob_NT=own), importance_sampling=level)
    result, metrics = prepared(replace(BATCH, logprob_NT=holed), Forward(logprob_NT=own), importance_sampling=level)
    others = np.arange(len(engine)) != 2
    np.testing.assert_array_equal(result.batch.advantage_NT[others], complete.batch.advantage_NT[others])
    np.testing.assert_array_equal(result.batch.logprob_NT[others], complete.batch.logprob_NT[others])
    np.testing.assert_array_equal(result.batch.advantage_NT[2], BATCH.advantage_NT[2])
    np.testing.assert_array_equal(result.batch.logprob_NT[2], own[2])
    assert metrics["learner/rows_without_logprobs"] == 1
    assert math.isfinite(metrics["logprob_gap/max_abs"])


def test_the_value_loss_is_veRL_s_token_by_token_with_our_weights(core_algos: ModuleType) -> None:
    from tensordict import TensorDict

    from agent_lightning.learners.verl_worker import value_loss

    torch.manual_seed(0)
    lengths = (5, 3)
    rows = {name: [torch.rand(n) for n in lengths] for name in ("weights", "values", "returns")}
    predicted = [torch.rand(n) for n in lengths]  # position i is of token i + 1
    masks = [torch.arange(n) >= 1 for n in lengths]
    data = TensorDict({}, batch_size=[])
    for name, parts in (rows | {"loss_mask": [mask.long() for mask in masks]}).items():
        data[name] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    data["dp_size"] = 1
    expected = 0.0
    for n, length in enumerate(lengths):
        for t in range(1, length):
            weight, old, target = (rows[name][n][t : t + 1][None] for name in ("weights", "values", "returns"))
            loss, _ = core_algos.compute_value_loss(
                predicted[n][t - 1 : t][None], target, old, torch.ones(1, 1), cliprange_value=0.1
            )
            expected += float(weight * loss)
    output = {"values": torch.nested.as_nested_tensor(predicted, layout=torch.jagged)}
    actual, metrics = value_loss(0.1, output, data)
    assert float(actual) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["critic/loss"].values[0]) == pytest.approx(expected, rel=1e-5)
