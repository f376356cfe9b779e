"""How old the tokens of a step are, in updates, and how long its rollouts took (docs/async.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent_lightning.core.types import Sample, Trajectory


def overlap_metrics(rollouts: Sequence[Trajectory], samples: Sequence[Sample], version: int) -> dict[str, float]:
    """The metrics of a step that trains `version`:

    time/rollout_p50, _p99      seconds of the step's rollouts, from lease to end
    lag/mean, lag/max           updates since the version that sampled a trained token
    lag/tokens/2                trained tokens that are two updates old
    lag/mixed_rollouts          share of rollouts whose tokens are of more than one version
    """
    seconds = [rollout.ended_at - rollout.started_at for rollout in rollouts if rollout.started_at]
    metrics = {f"time/rollout_p{q}": float(np.percentile(seconds, q)) for q in (50, 99) if seconds}
    if samples:
        lag_T = version - np.concatenate([sample.version_T[sample.mask_T] for sample in samples])
        metrics |= {"lag/mean": float(lag_T.mean()), "lag/max": float(lag_T.max())}
        metrics |= {f"lag/tokens/{lag}": float((lag_T == lag).sum()) for lag in np.unique(lag_T)}
    versions = [{version for call in r.calls for version in call.version_T.tolist()} for r in rollouts]
    mixed = [len(of_rollout) > 1 for of_rollout in versions if of_rollout]
    return metrics | ({"lag/mixed_rollouts": float(np.mean(mixed))} if mixed else {})
