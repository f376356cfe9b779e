"""Returns and advantages of a group's calls: statistics over rollouts, and what the papers and veRL compute."""

import itertools
import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from agent_lightning.config.learning import CreditConfig
from agent_lightning.credit.estimators import (
    Scale,
    best_of,
    generalised_advantage,
    normalise,
    normalise_group,
    returns_to_go,
    same_state_advantages,
)

# fmt: off
NORMALISED: list[tuple[Scale, list[float], list[int], list[float]]] = [
    ("none", [1, 0, 0, 7], [1, 1, 1, 0], [2 / 3, -1 / 3, -1 / 3, 0]),
    ("std",  [1, 0, 0, 7], [1, 1, 1, 0], [1.1547, -.57735, -.57735, 0]),  # sample std of 1 0 0 is 0.57735
    ("std",  [1, 0],       [1, 1],       [.7071, -.7071]),
    ("std",  [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]),                   # no spread among the valid
    ("std",  [1, 0],       [1, 0],       [0, 0]),                         # one valid rollout
    ("std",  [1, 0],       [0, 0],       [0, 0]),
    ("std",  [],           [],           []),
    ("std",  [math.nan, 1, 0], [0, 1, 1], [0, .7071, -.7071]),            # a masked reward may be anything
]
# fmt: on


@pytest.mark.parametrize(("scale", "rewards", "valid", "expected"), NORMALISED)
def test_group_normalised(scale: Scale, rewards: list[float], valid: list[int], expected: list[float]) -> None:
    actual = normalise_group(np.array(rewards, np.float64), np.array(valid, np.bool_), scale=scale)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_without_a_baseline_the_rewards_stay_as_they_are() -> None:
    for scale in ("none", "batch"):
        same = normalise_group(np.array([1.0, 1.0, 7.0]), np.array([1, 1, 0], np.bool_), scale=scale, baseline="none")
        assert same.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("gae_lambda", "expected"), [(1.0, [0.5, 0.5, 0.5]), (0.0, [0, 0, 0.5]), (0.5, [0.125, 0.25, 0.5])]
)
def test_generalised_advantage(gae_lambda: float, expected: list[float]) -> None:
    rewards, values = np.array([[0.0, 0, 1], [2, 0, 0]]), np.array([[0.5, 0.5, 0.5], [1, 0, 0]])
    actual = generalised_advantage(rewards, values, discount=1.0, gae_lambda=gae_lambda)
    np.testing.assert_allclose(actual, [expected, [1, 0, 0]])


def test_group_normalised_refuses_what_is_not_a_reward() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        normalise_group(np.array([math.inf, 0.0]), np.ones(2, np.bool_))
    with pytest.raises(ValueError, match="validity of shape"):
        normalise_group(np.zeros(2), np.ones(3, np.bool_))


rewards_and_valid = st.lists(
    st.tuples(st.integers(-50, 50).map(lambda n: n / 10), st.booleans()), min_size=1, max_size=8
).map(lambda rows: (np.array([r for r, _ in rows], np.float64), np.array([v for _, v in rows], np.bool_)))
Rollouts = tuple[NDArray[np.float64], NDArray[np.bool_]]


@settings(deadline=None, max_examples=1000)
@given(rewards_and_valid, st.floats(-10, 10), st.floats(0.1, 10))
def test_advantages_do_not_depend_on_the_reward_s_unit(case: Rollouts, shift: float, factor: float) -> None:
    rewards, valid = case
    moved = normalise_group(rewards * factor + shift, valid)
    np.testing.assert_allclose(moved, normalise_group(rewards, valid), atol=1e-3)
    unscaled = normalise_group(rewards * factor + shift, valid, scale="none")
    np.testing.assert_allclose(unscaled, factor * normalise_group(rewards, valid, scale="none"), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=1000)
@given(rewards_and_valid, st.integers(0, 999), st.sampled_from(["std", "none"]))
def test_order_of_rollouts_does_not_matter(case: Rollouts, seed: int, scale: Scale) -> None:
    rewards, valid = case
    order = np.random.default_rng(seed).permutation(len(rewards))
    shuffled = normalise_group(rewards[order], valid[order], scale=scale)
    np.testing.assert_allclose(shuffled, normalise_group(rewards, valid, scale=scale)[order], atol=1e-5)


@settings(deadline=None, max_examples=1000)
@given(rewards_and_valid, st.sampled_from(["std", "none"]))
def test_advantages_balance_and_masked_rollouts_leave_no_trace(case: Rollouts, scale: Scale) -> None:
    rewards, valid = case
    actual = normalise_group(rewards, valid, scale=scale)
    assert abs(float(actual.sum())) < 1e-4
    assert not actual[~valid].any()
    np.testing.assert_array_equal(actual[valid], normalise_group(rewards[valid], valid[valid], scale=scale))


@pytest.mark.parametrize("scale", ["std", "none"])
@settings(deadline=None, max_examples=1000)
@given(reward=st.floats(-1e3, 1e3), size=st.integers(1, 12))
def test_equal_rewards_give_exactly_zero(scale: Scale, reward: float, size: int) -> None:
    assert normalise_group(np.full(size, reward), np.ones(size, np.bool_), scale=scale).tolist() == [0.0] * size


@pytest.mark.stack
@pytest.mark.parametrize("scale", ["std", "none"])
def test_group_normalised_agrees_with_verl(scale: Scale) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for size in (2, 3, 8, 64):
        rewards = rng.integers(0, 5, size).astype(np.float32)
        rewards[0] += 1  # some spread, whatever was drawn
        token_rewards = torch.zeros(size, 4)
        token_rewards[:, -1] = torch.from_numpy(rewards)
        reference, _ = core_algos.compute_grpo_outcome_advantage(
            token_rewards,
            response_mask=torch.ones(size, 4),
            index=np.zeros(size, np.int64),
            norm_adv_by_std_in_grpo=scale == "std",
        )
        ours = normalise_group(rewards, np.ones(size, np.bool_), scale=scale)
        np.testing.assert_allclose(ours, reference[:, 0].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.stack
def test_leave_one_out_agrees_with_verl() -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    torch = pytest.importorskip("torch")
    rewards = np.random.default_rng(0).normal(size=12)
    reference, _ = core_algos.compute_rloo_outcome_advantage(
        torch.from_numpy(rewards)[:, None], response_mask=torch.ones(12, 1), index=np.zeros(12, np.int64)
    )
    ours = normalise_group(rewards, np.ones(12, np.bool_), scale="none", baseline="leave_one_out")
    np.testing.assert_allclose(ours, reference[:, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_the_best_of_k_is_that_of_all_subsets(k: int, scale: Literal["std", "none"]) -> None:
    rng = np.random.default_rng(k)
    for reward_R in (rng.integers(0, 2, 6).astype(float), rng.normal(size=6), np.array([0.0, 0, 0, 0, 0, 1])):
        subsets = [list(subset) for subset in itertools.combinations(range(6), k)]
        best = np.array([reward_R[subset].max() for subset in subsets])
        means = [np.mean([value for subset, value in zip(subsets, best, strict=True) if r in subset]) for r in range(6)]
        expected = (np.array(means) - best.mean()) / (best.std() + 1e-6 if scale == "std" else 1)
        ours = normalise_group(reward_R, np.ones(6, np.bool_), scale=scale, k=k)
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_the_best_of_k_leaves_groups_alone_that_mostly_succeed() -> None:
    """The closed form of arXiv 2508.10751 for rewards of 0 and 1: with N rollouts of which F fail, the mean of the best
    is 1 - C(F, k) / C(N, k)."""
    for failures in range(9):
        reward_R = np.array([0.0] * failures + [1.0] * (8 - failures))
        advantage_R = best_of(reward_R, 4, scale="none")
        best = 1 - math.comb(failures, 4) / math.comb(8, 4)
        if failures < 4 or failures == 8:
            assert not advantage_R.any()
            continue
        assert advantage_R[-1] == pytest.approx(1 - best)
        assert advantage_R[0] == pytest.approx(1 - best - math.comb(failures - 1, 3) / math.comb(7, 3))


# Calls with values of their own ---------------------------------------------------------------------------------------


def test_a_rollout_weighs_the_same_however_many_calls_it_made() -> None:
    value_C = np.array([1.0, 0.0, 1.0])
    assert normalise(value_C, np.array([0, 0, 1]), scale="none").tolist() == pytest.approx([0.25, -0.75, 0.25])
    # Weighted variance: (0.25^2 + 0.75^2) / 2 + 0.25^2 over one degree of freedom.
    std = math.sqrt(0.3125 + 0.0625)
    assert normalise(value_C, np.array([0, 0, 1])).tolist() == pytest.approx(
        [0.25 / std, -0.75 / std, 0.25 / std], rel=1e-5
    )
    left_out = normalise(value_C, np.array([0, 0, 1]), scale="none", baseline="leave_one_out")
    assert left_out.tolist() == pytest.approx([0.0, -1.0, 0.5])


@settings(deadline=None, max_examples=1000)
@given(rewards_and_valid, st.lists(st.integers(1, 5), min_size=8, max_size=8), st.sampled_from(["std", "none"]))
def test_where_calls_share_their_rollout_s_value_it_is_the_group_s(
    case: Rollouts, counts: list[int], scale: Scale
) -> None:
    rewards = case[0]
    rollout_C = np.repeat(np.arange(rewards.size), counts[: rewards.size])
    actual = normalise(rewards[rollout_C], rollout_C, scale=scale)
    per_rollout = normalise_group(rewards, np.ones(rewards.size, np.bool_), scale=scale)
    np.testing.assert_allclose(actual, per_rollout[rollout_C], atol=1e-4)


@settings(deadline=None, max_examples=1000)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-5, 5)), min_size=1, max_size=20), st.integers(0, 99))
def test_call_advantages_balance_over_rollouts_and_ignore_order(rows: list[tuple[int, float]], seed: int) -> None:
    rollout_C, value_C = np.array([r for r, _ in rows]), np.array([v for _, v in rows])
    actual = normalise(value_C, rollout_C)
    means = [actual[rollout_C == rollout].mean() for rollout in np.unique(rollout_C)]
    assert abs(sum(means)) < 1e-6 * max(1.0, np.abs(actual).max())
    order = np.random.default_rng(seed).permutation(len(rows))
    np.testing.assert_allclose(normalise(value_C[order], rollout_C[order]), actual[order], atol=1e-6)


def test_returns_to_go() -> None:
    assert returns_to_go(np.array([0.0, 0.1, 1.0]), 0.5).tolist() == pytest.approx([0.3, 0.6, 1.0])
    assert returns_to_go(np.array([0.0, 0.1, 1.0]), 1.0).tolist() == pytest.approx([1.1, 1.1, 1.0])
    assert returns_to_go(np.zeros(0), 1.0).shape == (0,)


def test_same_state() -> None:
    value_C, rollout_C = np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1])
    assert same_state_advantages(value_C, rollout_C, "abac", scale="none").tolist() == [0.5, 0.0, -0.5, 0.0]
    # Twice in the same state within one rollout compares nothing.
    assert same_state_advantages(value_C, rollout_C, "aabb", scale="none").tolist() == [0.0] * 4


def test_a_discount_above_one_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        CreditConfig(discount=1.1)
