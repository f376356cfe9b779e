"""The log-probability gap is a law: what ends a run, what it says, and what does not count."""

from __future__ import annotations

import numpy as np
import pytest
from models import random_batch

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import Dtype, LearnerConfig
from agent_lightning.core.errors import GapError
from agent_lightning.core.metrics import values
from agent_lightning.learners.gap import check, largest_gap, measure
from agent_lightning.learners.verl_credit import Forward, prepare
from agent_lightning.learners.verl_groups import Training

RNG = np.random.default_rng(0)


def rounding(size: float) -> np.ndarray:
    return (RNG.normal(size=4000) * size).astype(np.float32)


NARROWER = -np.abs(rounding(0.07))
"""Top-p, top-k, a penalty: the engine's log-probabilities are the larger ones."""


@pytest.mark.parametrize(
    ("gap", "dtype", "words"),
    [
        (rounding(1e-6), "float32", None),
        (rounding(1e-4), "float32", None),
        (rounding(0.02), "bfloat16", None),
        (np.zeros(0, np.float32), "float32", None),
        (rounding(0.02), "float32", "a sampling default.*template.*model.dtype=float32; the learner's rows are packed"),
        (
            rounding(0.2),
            "bfloat16",
            "at most 0.05 is taken for bfloat16 .learner.max_logprob_gap.*weights that it did not take",
        ),
        (NARROWER, "float32", "differ by 5.*e-02 on average.*fewer tokens.*top_p.*No optimiser step"),
        (NARROWER, "bfloat16", "fewer tokens"),
        (np.full(9, np.nan, np.float32), "float32", "nan"),
    ],
)
def test_a_gap_beyond_its_bound_names_what_is_likely(gap: np.ndarray, dtype: Dtype, words: str | None) -> None:
    bound = largest_gap(LearnerConfig(), dtype)
    if words is None:
        check(measure(gap), bound, dtype, "packed")
    else:
        with pytest.raises(GapError, match=words):
            check(measure(gap), bound, dtype, "packed")


@pytest.mark.parametrize(("key", "bound"), [("by_dtype", 1e-3), (0.5, 0.5), (None, None)])
def test_a_key_changes_the_bound(key: float | None, bound: float | None) -> None:
    assert largest_gap(LearnerConfig(max_logprob_gap=key), "float32") == bound
    if bound != 1e-3:
        check(measure(NARROWER), bound, "float32", "packed")


def test_calls_of_older_versions_do_not_count() -> None:
    batch = random_batch(0, rows=6, vocab=50)
    training = Training(model_path="", algorithm=AlgorithmConfig(importance_sampling="token"))
    forward = Forward(logprob_NT=batch.logprob_NT + np.float32(1))
    _, current = prepare([batch], [forward], training, 0)
    _, older = prepare([batch], [forward], training, 1)
    assert values(current)["logprob_gap/mean"] == pytest.approx(1.0, rel=1e-5)
    assert not [name for name in older if name.startswith("logprob_gap")]
