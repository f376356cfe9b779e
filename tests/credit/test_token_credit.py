"""Advantages of tokens: whole rollouts, whatever rows their calls stand in, each with the same weight."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.types import Batch, RolloutKey, Sample
from agent_lightning.credit import batching
from agent_lightning.credit.estimators import carry_back, returns_to_go, whiten
from agent_lightning.credit.tokens import explained_variance, share_first_values, step_advantages, whiten_step


def row(rollout: int, calls: Sequence[int], rewards: Sequence[float]) -> Sample:
    """`calls`: which call sampled each token, -1 where none did."""
    call_T = np.array(calls, np.int32)
    mask_T = call_T >= 0
    zeros_T = np.zeros(call_T.shape, np.float32)
    return Sample(
        key=RolloutKey(split="train", group=0, index=rollout),
        token_T=np.zeros(call_T.shape, np.int32),
        mask_T=mask_T,
        logprob_T=zeros_T,
        advantage_T=zeros_T.copy(),
        reward_T=np.array(rewards, np.float32),
        call_T=np.where(mask_T, call_T, 0).astype(np.int32),
        version_T=np.zeros(call_T.shape, np.int32),
    )


def pack(*rows: Sample) -> Batch:
    (batch,) = batching.pack(rows, rollouts_per_batch=None, pad_token=0, row_multiple=4)
    return batch


def test_what_followed_in_another_row_counts() -> None:
    # Calls 0 and 2 make the first row, call 1 the second; the reward is at the end of call 1 and of call 2.
    batch = pack(row(0, [-1, 0, 0, -1, 2], [0, 0, 0, 0, 1]), row(0, [-1, 1, 1], [0, 0, 4]))
    actual = step_advantages(batch, batch.reward_NT, np.zeros_like(batch.reward_NT))
    assert actual.tolist() == [[0, 5, 5, 0, 1], [0, 5, 5, 0, 0], [0] * 5, [0] * 5]
    half = step_advantages(batch, batch.reward_NT, np.zeros_like(batch.reward_NT), discount=0.5)
    np.testing.assert_allclose(half[:2], [[0, 0.5 + 1 / 16, 1 + 1 / 8, 0, 1], [0, 2.25, 4.5, 0, 0]])


def test_over_calls_the_tokens_of_a_call_share_one_step() -> None:
    batch = pack(row(0, [-1, 0, 0, 1, 1], [0, 0, 0, 0, 1]))
    value_NT = np.zeros(batch.token_NT.shape, np.float32)
    value_NT[0] = [9, 0.5, 7, 0.25, 7]
    actual = step_advantages(batch, batch.reward_NT, value_NT, discount=0.5, gae_lambda=0.0, level="call")
    np.testing.assert_allclose(actual[0], [0, 0.125 - 0.5, 0.125 - 0.5, 0.75, 0.75])
    assert share_first_values(batch, value_NT)[0].tolist() == [9, 0.5, 0.5, 0.25, 0.25]


calls_of_rollouts = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), min_size=1, max_size=5)


@settings(deadline=None, max_examples=200)
@given(calls_of_rollouts, st.integers(0, 999), st.floats(0, 1))
def test_without_a_critic_it_is_the_return_of_the_rollout_s_tokens(
    lengths: list[list[int]], seed: int, discount: float
) -> None:
    rng = np.random.default_rng(seed)
    rows, expected = [], []
    for rollout, sizes in enumerate(lengths):
        rewards = [rng.normal(size=size) for size in sizes]
        expected.append(returns_to_go(np.concatenate(rewards), discount))
        for call, reward in enumerate(rewards):  # a row for each call
            rows.append(row(rollout, [-1, *[call] * reward.size], [0, *reward]))
    order = rng.permutation(len(rows))
    batch = pack(*(rows[i] for i in order))
    actual = step_advantages(batch, batch.reward_NT, np.zeros_like(batch.reward_NT), discount=discount)
    for sample, n in zip(_packed(rows, order), range(len(rows)), strict=True):
        index, call = sample.key.index, int(sample.call_T[-1])
        start = sum(lengths[index][:call])
        np.testing.assert_allclose(
            actual[n, 1 : sample.token_T.size], expected[index][start : start + lengths[index][call]], atol=1e-5
        )


def _packed(rows: list[Sample], order: np.ndarray) -> list[Sample]:
    """The rows in the order in which `pack` leaves them: rollouts by first appearance."""
    given_rows = [rows[i] for i in order]
    names = list(dict.fromkeys(sample.key.rollout_id for sample in given_rows))
    return sorted(given_rows, key=lambda sample: names.index(sample.key.rollout_id))


def test_whitening_counts_rollouts_and_goes_over_all_batches() -> None:
    long, short, other = row(0, [0] * 9, [0] * 9), row(1, [0], [0]), row(2, [0, 0], [0, 0])
    batches = [pack(long, short), pack(other)]
    advantages = [np.zeros(batch.mask_NT.shape, np.float32) for batch in batches]
    advantages[0][1, 0], advantages[1][0, :2] = 3.0, 6.0
    first, second = whiten_step(batches, advantages)
    np.testing.assert_allclose([first[0, 0], first[1, 0], second[0, 0]], [-1, 0, 1], atol=1e-6)
    assert not first[~batches[0].mask_NT].any()
    np.testing.assert_allclose(whiten(np.array([0.0, 3, 6]), np.arange(3)), [-1, 0, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("kept", "expected"), [([0, 1, 2, 3], [1, 2, 3, 4]), ([1, 2], [2, 7]), ([3], [4]), ([0], [10]), ([], [])]
)
def test_rewards_are_carried_back_to_the_last_kept_call(kept: list[int], expected: list[float]) -> None:
    assert carry_back(np.array([1.0, 2, 3, 4]), kept).tolist() == expected


def test_explained_variance() -> None:
    weight, returns = np.full(4, 0.25), np.array([0.0, 0, 1, 1])
    assert explained_variance(weight, returns + 5, returns) == 1
    assert explained_variance(weight, np.full(4, 0.5), returns) == 0
    assert explained_variance(weight, 1 - returns, returns) == -3
    assert np.isnan(explained_variance(weight, returns, np.ones(4)))
