"""The learner on veRL: `TrainingWorker` groups over FSDP2, on CPUs over gloo or on GPUs over NCCL.

veRL is imported when a learner is built, not before: it brings torch, and it reads its platform from the
environment on import.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent_lightning.core.errors import UserError
from agent_lightning.core.metrics import Max, Mean, Metrics, merge
from agent_lightning.core.types import Batch
from agent_lightning.learners.base import WeightBucket, Weights
from agent_lightning.learners.verl_credit import Forward, Prepared, prepare
from agent_lightning.learners.verl_groups import (
    CriticSettings,
    Groups,
    LearnerConfig,
    from_jagged,
    policy_loss_of,
    start_groups,
    to_tensordict,
    value_loss_of,
)

__all__ = ["CriticSettings", "LearnerConfig", "VerlLearner"]


class VerlLearner:
    """Trains the policy. Blocking calls of veRL run in a thread, so the loop's event loop stays free."""

    def __init__(self, config: LearnerConfig, groups: Groups | None = None) -> None:
        """`groups` are running ones to use again, from the model's weights on; None starts what the config needs."""
        self._config = config
        self._version = 0
        self._updates = 0
        groups = groups or start_groups(config)
        self._group = groups.policy
        self._group.reset()
        self._group.set_loss_fn(policy_loss_of(config))
        self._reference = groups.reference if config.kl_coef else None
        if self._reference is not None:
            self._reference.reset()
        self._critic = None
        if config.critic is not None:
            self._critic = groups.critic
            self._critic.reset()
            self._critic.set_loss_fn(value_loss_of(config.critic))

    async def update(self, batches: Sequence[Batch], *, epochs: int = 1) -> Metrics:
        """One optimiser step per batch and epoch; what the models say before the first holds for all of them.

        The log-probability gap is of the whole step where the learner's own log-probabilities were asked for, else of
        the first batch: after an optimiser step the learner is no longer the policy that sampled.
        """
        config = self._config
        warming = config.critic is not None and self._updates < config.critic.warmup_steps
        unknown = any(np.isnan(batch.logprob_NT).any() for batch in batches)
        own = config.importance != "none" or unknown or warming
        said = [await asyncio.to_thread(self._ask, batch, own) for batch in batches]
        prepared, metrics = prepare(batches, said, config)
        records = [metrics]
        for index, one in enumerate(prepared * epochs):
            records.append(await asyncio.to_thread(self._step, one, not warming, index == 0 and not own))
        self._updates += 1
        return merge(*records)

    async def publish(self) -> Weights:
        self._version += 1
        ranks = await asyncio.to_thread(self._group.export_weights, self._config.bucket_bytes, self._config.dtype)
        buckets = tuple(WeightBucket(parameters=tuple(entries), data=ref) for entries, ref in ranks[0])
        return Weights(version=self._version, buckets=buckets)

    async def save(self, path: Path) -> None:
        await asyncio.to_thread(self._group.save_checkpoint, str(path))
        if self._critic is not None:
            await asyncio.to_thread(self._critic.save_checkpoint, str(path / "critic"))
            (path / "critic" / "updates").write_text(str(self._updates))

    async def restore(self, path: Path, version: int) -> None:
        if self._critic is not None:
            if not (path / "critic" / "updates").exists():
                raise UserError(f"{path} holds no critic: the run was trained without one, and cannot go on with one")
            await asyncio.to_thread(self._critic.load_checkpoint, str(path / "critic"))
            self._updates = int((path / "critic" / "updates").read_text())
        await asyncio.to_thread(self._group.load_checkpoint, str(path))
        self._version = version

    async def log_probs(self, batch: Batch) -> list[np.ndarray]:
        """Of each row's tokens under the current weights: float32[length - 1], position i is of token i + 1."""
        data = to_tensordict(batch, self._config)
        output = await asyncio.to_thread(lambda: self._group.infer_batch(data).get())
        return [row.numpy()[:-1] for row in output["log_probs"].unbind()]

    def shutdown(self) -> None:
        """Stop the training processes."""
        from agent_lightning.core.actors import kill_handles

        for group in (self._group, self._reference, self._critic):
            if group is not None:
                kill_handles(group.workers)

    def _ask(self, batch: Batch, own: bool) -> Forward:
        """What the models say before the step; of the policy only where `own`."""
        asked = {
            "logprob_NT": (self._group if own else None, "log_probs"),
            "reference_NT": (self._reference, "log_probs"),
            "value_NT": (self._critic, "values"),
        }
        pending = {
            name: (group.infer_batch(to_tensordict(batch, self._config)), key)
            for name, (group, key) in asked.items()
            if group is not None
        }
        return Forward(**{name: from_jagged(output.get()[key], batch) for name, (output, key) in pending.items()})

    def _step(self, one: Prepared, policy: bool, gap: bool) -> Metrics:
        """Train the critic where there is one, and the `policy` beside it."""
        data = to_tensordict(one.batch, self._config, one.columns)
        valued = self._critic.train_batch(data) if self._critic is not None else None
        learned = self._group.train_batch(data) if policy else None
        record = _metrics(learned.get()["metrics"], gap=gap) if learned is not None else {}
        return record | _critic_metrics(valued.get()["metrics"]) if valued is not None else record


def _metrics(raw: dict[str, Any], *, gap: bool) -> dict[str, Mean | Max]:
    metrics: dict[str, Mean | Max] = {
        "learner/loss": Mean.of([_number(raw, "loss")]),
        "learner/grad_norm": Mean.of([_number(raw, "grad_norm")]),
        "learner/lr": Mean.of([_number(raw, "lr")]),
        "learner/clip_fraction": Mean.of([_number(raw, "actor/pg_clipfrac")]),
        "learner/approximate_kl": Mean.of([_number(raw, "actor/ppo_kl")]),
        "learner/nll": Mean.of([_number(raw, "actor/nll", np.sum)]),
    }
    if "actor/kl_loss" in raw:
        metrics["learner/kl_to_reference"] = Mean.of([_number(raw, "actor/kl_loss", np.sum)])
    if "actor/entropy" in raw:
        metrics["learner/entropy"] = Mean.of([_number(raw, "actor/entropy", np.sum)])
    if gap:
        metrics["logprob_gap/mean_abs"] = Mean(_number(raw, "gap/sum", np.sum), _number(raw, "gap/tokens", np.sum))
        metrics["logprob_gap/max_abs"] = Max(_number(raw, "gap/max", np.max))
    return metrics


def _critic_metrics(raw: dict[str, Any]) -> dict[str, Mean | Max]:
    return {
        "critic/loss": Mean.of([_number(raw, "critic/loss", np.sum)]),
        "critic/grad_norm": Mean.of([_number(raw, "grad_norm")]),
        "critic/clip_fraction": Mean.of([_number(raw, "critic/clip_fraction")]),
    }


def _number(raw: dict[str, Any], name: str, reduce: Any = np.mean) -> float:
    return float(reduce(np.concatenate([np.ravel(_plain(v)) for v in _listed(raw.get(name, []))] or [np.zeros(1)])))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(value: Any) -> Any:
    """veRL's Metric objects hold their values; numbers are themselves."""
    from verl.utils.metric import Metric

    return value.values if isinstance(value, Metric) else value
