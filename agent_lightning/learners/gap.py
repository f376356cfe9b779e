"""The log-probability gap between engine and learner, and its bound: two models that differ are not one policy.

If the learner computes other log-probabilities than those that a token was sampled with, every probability ratio is
wrong, and nothing in the rewards shows it. So a gap beyond its bound ends the run before an optimiser step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from agent_lightning.config.running import Dtype, LearnerConfig
from agent_lightning.core.errors import GapError
from agent_lightning.core.metrics import Max, Mean, Metrics
from agent_lightning.core.types import Floats

LARGEST_GAP: Final[Mapping[Dtype, float]] = {"float32": 1e-3, "bfloat16": 5e-2}
"""Bounds of the mean absolute gap. Measured (docs/models.md): rounding gives 1e-7 to 1e-6 in float32 and 1e-3 to 3e-2
in bfloat16; a sampling parameter that the learner does not know gives 0.01 to 0.1. The mean, since in bfloat16 single
tokens are off by 0.1 without any fault."""
LARGEST_DIFFERENCE: Final[Mapping[Dtype, float]] = {"float32": 1e-4, "bfloat16": 5e-2}
"""Bounds of the mean absolute difference between two layouts of the same rows in the learner."""


def largest_gap(learner: LearnerConfig, dtype: Dtype) -> float | None:
    """The bound of a run; None: there is none."""
    bound = learner.max_logprob_gap
    return LARGEST_GAP[dtype] if bound == "by_dtype" else bound


def measure(gap_T: Floats) -> dict[str, Mean | Max]:
    """The metrics of the gap, none without tokens; `gap_T` has the learner's log-probability minus the engine's."""
    if not gap_T.size:
        return {}
    size_T = np.abs(gap_T.astype(np.float64))
    return {
        "logprob_gap/mean_abs": Mean(float(size_T.sum()), float(size_T.size)),
        "logprob_gap/mean": Mean(float(gap_T.sum()), float(size_T.size)),
        "logprob_gap/max_abs": Max(float(size_T.max(initial=0.0))),
    }


def check(metrics: Metrics, bound: float | None, dtype: Dtype, layout: str) -> None:
    """Raise GapError if the gap of a step is beyond `bound`. If the engine samples from fewer tokens than the policy
    has, its log-probabilities are the larger ones almost everywhere."""
    gap, signed = metrics.get("logprob_gap/mean_abs"), metrics.get("logprob_gap/mean")
    if bound is None or gap is None or signed is None or gap.value <= bound:
        return
    cause = (
        "a sampling default, a penalty or a logits processor of the engine; weights that it did not take; a template "
        f"or tokens that change on the way; or number formats (model.dtype={dtype}; the learner's rows are {layout})"
    )
    if -signed.value > gap.value / 2:
        cause = "the engine samples from fewer tokens: a sampling default (top_p, top_k, min_p), or a grammar"
    raise GapError(
        f"engine and learner disagree about the policy: the log-probabilities of sampled tokens differ by "
        f"{gap.value:.1e} on average, and at most {bound:g} is taken for {dtype} (learner.max_logprob_gap). Likely: "
        f"{cause}. No optimiser step was taken"
    )
