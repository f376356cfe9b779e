"""The learner on veRL: `TrainingWorker` groups over FSDP2, on CPUs over gloo or on GPUs over NCCL.

veRL is imported when a learner is built: it brings torch, and it reads its platform from the environment on import.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agent_lightning.core.errors import UserError
from agent_lightning.core.metrics import Max, Mean, Metrics, merge
from agent_lightning.core.types import Batch, Floats
from agent_lightning.learners import verl_groups
from agent_lightning.learners.base import Update, WeightBucket, Weights
from agent_lightning.learners.gap import check, largest_gap
from agent_lightning.learners.verl_credit import Forward, Prepared, prepare
from agent_lightning.learners.verl_groups import Groups, Training


class VerlLearner:
    """Trains the policy, and its critic if the config has one. veRL's calls block, so they run in a thread and the
    loop's event loop stays free."""

    def __init__(self, config: Training, groups: Groups | None = None) -> None:
        """`groups`: running worker groups, which start again from the model's weights; None starts new ones. Raises
        UserError if the model cannot be trained."""
        self._config, self._version, self._updates = config, 0, 0
        groups = groups or verl_groups.start_groups(config)
        self._group = groups.policy
        self.layout = verl_groups.load_model(self._group, config)
        """How the rows of a batch go through the model: "packed, ..." or "padded, ..."."""
        self._group.set_loss_fn(verl_groups.policy_loss_of(config))
        self._reference = groups.reference if config.has_own_reference else None
        if self._reference is not None:
            verl_groups.load_model(self._reference, config)
        elif config.algorithm.has_reference:
            self._reference = self._group
        self._critic = None
        if config.has_critic:
            from agent_lightning.learners.verl_worker import value_loss

            self._critic = groups.critic
            verl_groups.load_model(self._critic, config)
            self._critic.set_loss_fn(partial(value_loss, config.critic.clip_range))

    async def update(self, batches: Sequence[Batch], *, epochs: int = 1) -> Update:
        """Train on a step's batches: one optimiser step for each batch and epoch.

        The models' forward passes before the first optimiser step are used in all of them. If these include the
        policy's, the log-probability gap between engine and learner is measured over the whole step, else over its
        first batch: after an optimiser step the learner is no longer the policy that sampled. Raises GapError, before
        an optimiser step, if the gap is beyond its bound.
        """
        config = self._config
        warming_up = config.has_critic and self._updates < config.critic.warmup_steps
        unknown = any(np.isnan(batch.logprob_NT).any() for batch in batches)
        with_policy = config.algorithm.importance_sampling != "none" or unknown or warming_up
        forwards = [await asyncio.to_thread(self._forward, batch, with_policy) for batch in batches]
        prepared, metrics = prepare(batches, forwards, config, self._version)
        self._check_gap(metrics)
        records, logprobs = [metrics], [forward.logprob_NT for forward in forwards]
        for index, batch in enumerate(prepared * epochs):
            with_gap = index == 0 and not with_policy and not config.sft
            trained = await asyncio.to_thread(self._train, batch, not warming_up, with_gap)
            records.append(trained.metrics)
            self._check_gap(trained.metrics)
            logprobs[: len(trained.logprobs)] = trained.logprobs
        self._updates += 1
        return Update(metrics=merge(*records), logprobs=tuple(logprobs))

    async def publish(self) -> Weights:
        """The current weights under the next version number, in Ray's object store."""
        self._version += 1
        ranks = await asyncio.to_thread(self._group.export_weights, self._config.bucket_bytes, self._config.dtype)
        buckets = tuple(WeightBucket(parameters=tuple(entries), data=ref) for entries, ref in ranks[0])
        return Weights(version=self._version, buckets=buckets)

    async def save(self, path: Path) -> None:
        """Save weights, optimiser, schedule and random state, of the critic too."""
        await asyncio.to_thread(self._group.save_checkpoint, str(path))
        if self._critic is not None:
            await asyncio.to_thread(self._critic.save_checkpoint, str(path / "critic"))
            (path / "critic" / "updates").write_text(str(self._updates))

    async def restore(self, path: Path, version: int) -> None:
        """Load what `save` has written. Raises UserError if a critic is needed and the checkpoint has none."""
        if self._critic is not None:
            if not (path / "critic" / "updates").exists():
                raise UserError(f"{path} holds no critic: the run was trained without one, and cannot go on with one")
            await asyncio.to_thread(self._critic.load_checkpoint, str(path / "critic"))
            self._updates = int((path / "critic" / "updates").read_text())
        await asyncio.to_thread(self._group.load_checkpoint, str(path))
        self._version = version

    async def log_probs(self, batch: Batch) -> list[Floats]:
        """Log-probabilities under the current weights; for each row float32[length - 1], where i is of token i + 1."""
        data = verl_groups.to_tensordict(batch, self._config)
        output = await asyncio.to_thread(lambda: self._group.infer_batch(data).get())
        return [row.numpy()[:-1] for row in output["log_probs"].unbind()]

    def shutdown(self) -> None:
        """Stop the training processes."""
        from agent_lightning.core.actors import kill_handles

        for group in (self._group, self._reference, self._critic):
            if group is not None:
                kill_handles(group.workers)

    def _check_gap(self, metrics: Metrics) -> None:
        check(metrics, largest_gap(self._config.learner, self._config.dtype), self._config.dtype, self.layout)

    def _forward(self, batch: Batch, with_policy: bool) -> Forward:
        """The outputs of reference and critic, if there are any, and of the policy if `with_policy`, all at once."""
        outputs = {
            "logprob_NT": (self._group if with_policy else None, "log_probs"),
            "reference_NT": (self._reference, "log_probs"),
            "value_NT": (self._critic, "values"),
        }
        pending = {}
        for name, (group, key) in outputs.items():
            if group is not None:
                data = verl_groups.to_tensordict(batch, self._config, adapters=name != "reference_NT")
                pending[name] = group.infer_batch(data), key
        arrays = {name: verl_groups.from_jagged(output.get()[key], batch) for name, (output, key) in pending.items()}
        return Forward(**arrays)

    def _train(self, prepared: Prepared, with_policy: bool, with_gap: bool) -> Update:
        """An optimiser step of the critic, if there is one, and at the same time of the policy if `with_policy`. The
        log-probabilities are in it if `with_gap`."""
        columns = dict(prepared.columns)
        if with_gap:
            columns["is_current"] = (prepared.batch.version_NT >= self._version).astype(np.float32)
        data = verl_groups.to_tensordict(prepared.batch, self._config, columns)
        critic_output = self._critic.train_batch(data) if self._critic is not None else None
        policy_output = self._group.train_batch(data) if with_policy else None
        metrics: dict[str, Mean | Max] = {}
        logprobs: tuple[Floats, ...] = ()
        if policy_output is not None:
            output = policy_output.get()
            raw = output["metrics"]
            metrics["learner/loss"] = Mean.of([_number(raw, "loss")])
            metrics["learner/grad_norm"] = Mean.of([_number(raw, "grad_norm")])
            metrics["learner/lr"] = Mean.of([_number(raw, "lr")])
            metrics["learner/clip_fraction"] = Mean.of([_number(raw, "actor/pg_clipfrac")])
            metrics["learner/approximate_kl"] = Mean.of([_number(raw, "actor/ppo_kl")])
            metrics["learner/nll"] = Mean.of([_number(raw, "actor/nll", np.sum)])
            for name, key in (("learner/kl_to_reference", "actor/kl_loss"), ("learner/entropy", "actor/entropy")):
                if key in raw:
                    metrics[name] = Mean.of([_number(raw, key, np.sum)])
            logprobs = (verl_groups.from_jagged(output["log_probs"], prepared.batch),) if with_gap else ()
            if with_gap and (tokens := _number(raw, "gap/tokens", np.sum)):
                metrics["logprob_gap/mean_abs"] = Mean(_number(raw, "gap/sum", np.sum), tokens)
                metrics["logprob_gap/mean"] = Mean(_number(raw, "gap/signed", np.sum), tokens)
                metrics["logprob_gap/max_abs"] = Max(_number(raw, "gap/max", np.max))
        if critic_output is not None:
            raw = critic_output.get()["metrics"]
            metrics["critic/loss"] = Mean.of([_number(raw, "critic/loss", np.sum)])
            metrics["critic/grad_norm"] = Mean.of([_number(raw, "grad_norm")])
            metrics["critic/clip_fraction"] = Mean.of([_number(raw, "critic/clip_fraction")])
        return Update(metrics=metrics, logprobs=logprobs)


def _number(raw: dict[str, Any], name: str, reduce: Any = np.mean) -> float:
    """veRL's metric as a number: it is a number, a Metric object that holds several, or a list of either."""
    from verl.utils.metric import Metric

    metric = raw.get(name, [])
    parts = metric if isinstance(metric, list) else [metric]
    arrays = [np.ravel(part.values if isinstance(part, Metric) else part) for part in parts]
    return float(reduce(np.concatenate(arrays or [np.zeros(1)])))
