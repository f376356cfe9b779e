"""The nouns keep their promises: read-only arrays, matching shapes, keys that survive a URL."""

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_lightning.core.types import Batch, ModelCall, Outcome, RolloutKey, Sample

KEY = RolloutKey(split="train", group=12, index=3)


def model_call(num_logprobs: int = 2) -> ModelCall:
    return ModelCall(
        key=KEY,
        call_id="c0",
        agent="main",
        policy_version=0,
        prompt_T=np.array([5, 6], np.int32),
        response_T=np.array([7, 8], np.int32),
        logprob_T=np.zeros(num_logprobs, np.float32),
        finish_reason="stop",
        started_at=0.0,
        ended_at=1.0,
    )


def sample(num_masks: int = 3) -> Sample:
    return Sample(
        key=KEY,
        token_T=np.zeros(3, np.int32),
        mask_T=np.ones(num_masks, np.bool_),
        logprob_T=np.zeros(3, np.float32),
        advantage_T=np.zeros(3, np.float32),
        reward_T=np.zeros(3, np.float32),
        call_T=np.zeros(3, np.int32),
        version_T=np.zeros(3, np.int32),
    )


def test_key_names_its_group_and_rollout() -> None:
    assert (KEY.group_id, KEY.rollout_id) == ("train-12", "train-12-3")


@given(st.sampled_from(["train", "val"]), st.integers(0, 10**6), st.integers(0, 999), st.integers(0, 9))
def test_key_is_read_back_from_its_url_parts(split: str, group: int, index: int, attempt: int) -> None:
    key = RolloutKey.parse(f"{split}-{group}-{index}", attempt)
    assert (key.split, key.group, key.index, key.attempt) == (split, group, index, attempt)
    assert RolloutKey.parse(key.rollout_id, attempt) == key


@pytest.mark.parametrize("text", ["", "train", "train-1", "test-1-2", "train-1-2-3", "train-x-2", "train--1-2"])
def test_key_refuses_other_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        RolloutKey.parse(text, 0)


def test_keys_sort_by_group_then_index_then_attempt() -> None:
    first = RolloutKey(split="train", group=2, index=0)
    retried = RolloutKey(split="train", group=2, index=0, attempt=1)
    sibling = RolloutKey(split="train", group=2, index=1)
    later = RolloutKey(split="train", group=10, index=0)
    assert sorted([later, sibling, retried, first]) == [first, retried, sibling, later]


def test_a_call_has_one_log_probability_for_each_sampled_token() -> None:
    with pytest.raises(ValueError, match="call c0: 2 tokens but 3 log-probabilities"):
        model_call(num_logprobs=3)


@pytest.mark.parametrize("logprob", [0.5, math.inf, -math.inf])
def test_a_log_probability_is_that_of_something_possible(logprob: float) -> None:
    with pytest.raises(ValueError, match="call c0: a log-probability must be at most 0 and finite, or NaN"):
        replace(model_call(), logprob_T=np.array([-1.0, logprob], np.float32))
    unknown = replace(model_call(), logprob_T=np.array([-1.0, math.nan], np.float32))
    assert np.isnan(unknown.logprob_T).tolist() == [False, True]


def test_a_sample_has_arrays_of_one_shape() -> None:
    with pytest.raises(ValueError, match="sample of train-12-3: arrays of different shapes"):
        sample(num_masks=2)


@pytest.mark.parametrize(
    ("new_versions", "version_T"), [((), [0, 0]), (((1, 1),), [0, 1]), (((0, 2),), [2, 2]), (((0, 1), (1, 3)), [1, 3])]
)
def test_a_call_knows_the_version_of_each_token(new_versions: Any, version_T: list[int]) -> None:
    assert replace(model_call(), new_versions=new_versions).version_T.tolist() == version_T


def test_arrays_are_read_only() -> None:
    batch = Batch(
        token_NT=np.zeros((1, 2), np.int32),
        mask_NT=np.zeros((1, 2), np.bool_),
        logprob_NT=np.zeros((1, 2), np.float32),
        advantage_NT=np.zeros((1, 2), np.float32),
        reward_NT=np.zeros((1, 2), np.float32),
        call_NT=np.zeros((1, 2), np.int32),
        version_NT=np.zeros((1, 2), np.int32),
        weight_NT=np.zeros((1, 2), np.float32),
        length_N=np.ones(1, np.int32),
        rollout_N=np.zeros(1, np.int32),
        num_rollouts=1,
    )
    for array in (model_call().prompt_T, model_call().logprob_T, sample().mask_T, batch.weight_NT, batch.length_N):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_call_survives_a_process_boundary() -> None:
    copy = pickle.loads(pickle.dumps(model_call()))
    assert copy.response_T.tolist() == [7, 8]
    assert copy.key == KEY


def test_outcomes_are_written_in_lower_case() -> None:
    assert [outcome.value for outcome in Outcome] == [outcome.name.lower() for outcome in Outcome]
