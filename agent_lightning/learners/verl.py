"""The learner on veRL: a `TrainingWorker` group over FSDP2, on CPUs over gloo or on GPUs over NCCL.

veRL is imported when a learner is built, not before: it brings torch, and it reads its platform from the
environment on import.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from agent_lightning.learners.base import WeightBucket, Weights
from agent_lightning.metrics import Max, Mean, Metrics, merge
from agent_lightning.types import Batch

if TYPE_CHECKING:
    from tensordict import TensorDict
    from verl.workers.config import TrainingWorkerConfig

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VERL_LOGGING_LEVEL": "WARNING",
    "TORCH_COMPILE_DISABLE": "1",
}
"""What makes veRL choose our platform and its device-neutral FSDP engine."""


@dataclass(slots=True, kw_only=True)
class LearnerConfig:
    """How the policy is trained."""

    model_path: str
    loss: Literal["vanilla", "gspo", "cispo", "sft"] = "vanilla"
    """A policy loss on advantages by veRL's name (vanilla is PPO-clip), or sft: cross-entropy under the mask."""
    device: Literal["cpu", "cuda"] = "cpu"
    world_size: int = 1
    """Training processes; FSDP2 shards over them."""
    num_threads: int = 2
    """Threads of each process on a CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the parameters and the optimiser stay in float32."""
    seed: int = 0
    lr: float = 1e-3
    lr_warmup_steps: int = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    total_steps: int = -1
    """Optimiser steps of the whole run; only the cosine schedule needs them."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    kl_coef: float = 0.0
    """Weight of the KL to the starting policy; 0 builds no reference model."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 computes no entropy."""
    temperature: float = 1.0
    """Of the sampling that made the samples: log-probabilities are of the scaled logits."""
    max_tokens_per_micro_batch: int = 16384
    bucket_bytes: int = 256 * 1024 * 1024
    verl: dict[str, Any] | None = None
    """Fields of veRL's `FSDPEngineConfig`, untouched, for experts."""


class VerlLearner:
    """Trains the policy. Blocking calls of veRL run in a thread, so the loop's event loop stays free."""

    def __init__(self, config: LearnerConfig) -> None:
        self._config = config
        self._version = 0
        if config.device == "cpu":
            os.environ.update(CPU_ENVIRONMENT)
        self._group = _worker_group(config, name="learner")
        self._group.set_loss_fn(_loss(config))
        self._reference: Any = None
        if config.kl_coef:
            self._reference = _worker_group(config, name="reference", forward_only=True)

    async def update(self, batches: Sequence[Batch]) -> Metrics:
        """One optimiser step per batch. The log-probability gap is of the first batch only: after a step the
        learner is no longer the policy that sampled.
        """
        records = [await asyncio.to_thread(self._step, batch, index) for index, batch in enumerate(batches)]
        return merge(*records)

    async def publish(self) -> Weights:
        self._version += 1
        ranks = await asyncio.to_thread(self._group.export_weights, self._config.bucket_bytes)
        buckets = tuple(WeightBucket(parameters=tuple(entries), data=ref) for entries, ref in ranks[0])
        return Weights(version=self._version, buckets=buckets)

    async def save(self, path: Path) -> None:
        await asyncio.to_thread(self._group.save_checkpoint, str(path))

    async def restore(self, path: Path, version: int) -> None:
        await asyncio.to_thread(self._group.load_checkpoint, str(path))
        self._version = version

    async def log_probs(self, batch: Batch) -> list[np.ndarray]:
        """Of each row's tokens under the current weights: float32[length - 1], position i is of token i + 1."""
        data = _to_tensordict(batch, self._config)
        output = await asyncio.to_thread(lambda: self._group.infer_batch(data).get())
        return [row.numpy()[:-1] for row in output["log_probs"].unbind()]

    def shutdown(self) -> None:
        """Stop the training processes."""
        from agent_lightning.cluster import kill_handles

        for group in (self._group, self._reference):
            if group is not None:
                kill_handles(group.workers)

    def _step(self, batch: Batch, index: int) -> Metrics:
        data = _to_tensordict(batch, self._config)
        if self._reference is not None:
            data["ref_log_probs"] = self._reference.infer_batch(_to_tensordict(batch, self._config)).get()["log_probs"]
        output = self._group.train_batch(data)
        return _metrics(output.get()["metrics"], gap=index == 0)


def _loss(config: LearnerConfig) -> Any:
    from functools import partial

    from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig
    from verl.workers.utils.losses import sft_loss

    from agent_lightning.learners.verl_worker import policy_loss

    if config.loss == "sft":
        return partial(sft_loss, None)
    actor: ActorConfig = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=config.clip_ratio_low,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        policy_loss=PolicyLossConfig(loss_mode=config.loss),
        entropy_coeff=config.entropy_coef,
        use_kl_loss=config.kl_coef > 0,
        kl_loss_coef=config.kl_coef,
    )
    return partial(policy_loss, actor)


def _worker_group(config: LearnerConfig, *, name: str, forward_only: bool = False) -> Any:
    """Start the training processes and load the model."""
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup

    from agent_lightning.learners.verl_worker import PolicyWorker

    on_cpu = config.device == "cpu"
    threads = str(config.num_threads)
    group = RayWorkerGroup(
        RayResourcePool([config.world_size], use_gpu=not on_cpu, max_colocate_count=1),
        RayClassWithInitArgs(
            ray.remote(PolicyWorker),
            config=_training(config, forward_only=forward_only),
            device=config.device,
            seed=config.seed,
            num_threads=config.num_threads,
        ),
        name_prefix=name,
        device_name=config.device,
        worker_env=CPU_ENVIRONMENT | {"OMP_NUM_THREADS": threads} if on_cpu else {},
    )
    group.reset()
    return group


def _training(config: LearnerConfig, *, forward_only: bool) -> TrainingWorkerConfig:
    """What veRL's TrainingWorker is told."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig

    on_cpu = config.device == "cpu"
    engine = {
        "strategy": "fsdp2",
        # On a CPU veRL would pin the memory of a forward-only model, which needs an accelerator.
        "forward_only": forward_only and config.device != "cpu",
        "use_torch_compile": False,
        "model_dtype": "fp32",
        "dtype": config.dtype,
        "mixed_precision": {"param_dtype": config.dtype, "reduce_dtype": "float32", "buffer_dtype": "float32"},
        "seed": config.seed,
        "use_dynamic_bsz": True,
        "max_token_len_per_gpu": config.max_tokens_per_micro_batch,
        "infer_max_token_len_per_gpu": config.max_tokens_per_micro_batch,
    }
    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=config.model_path,
            # Sequences are padded on a CPU; unpadded attention needs flash-attn kernels.
            use_remove_padding=not on_cpu,
            enable_gradient_checkpointing=not on_cpu,
            override_config={"attn_implementation": "sdpa"} if on_cpu else {},
        ),
        engine_config=FSDPEngineConfig(**(engine | (config.verl or {}))),
        optimizer_config=FSDPOptimizerConfig(
            lr=config.lr,
            lr_warmup_steps=config.lr_warmup_steps,
            lr_scheduler_type=config.lr_schedule,
            total_training_steps=config.total_steps,
            weight_decay=config.weight_decay,
            betas=config.betas,
            clip_grad=config.clip_grad,
        ),
        checkpoint_config=CheckpointConfig(),
    )


def _to_tensordict(batch: Batch, config: LearnerConfig) -> TensorDict:
    """The one place where veRL's string keys are written: jagged rows, and what it needs to know of the whole."""
    import torch
    from verl.utils import tensordict_utils

    rows = [slice(0, int(length)) for length in batch.length_N]

    def jagged(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        tensors = [torch.tensor(array[i, row], dtype=dtype) for i, row in enumerate(rows)]
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    positions = np.broadcast_to(np.arange(batch.token_NT.shape[1]), batch.token_NT.shape)
    return tensordict_utils.get_tensordict(
        tensor_dict={
            "input_ids": jagged(batch.token_NT, torch.int64),
            "position_ids": jagged(positions, torch.int64),
            "loss_mask": jagged(batch.mask_NT, torch.int64),
            "weights": jagged(batch.weight_NT, torch.float32),
            "advantages": jagged(batch.advantage_NT, torch.float32),
            "old_log_probs": jagged(batch.logprob_NT, torch.float32),
        },
        non_tensor_dict={
            "global_batch_size": batch.token_NT.shape[0],
            "global_token_num": batch.length_N.tolist(),
            "temperature": config.temperature,
            "update_lr_scheduler": True,
            "compute_loss": False,
            "calculate_entropy": config.entropy_coef > 0,
        },
    )


def _metrics(raw: dict[str, Any], *, gap: bool) -> Metrics:
    def number(name: str, reduce: Any = np.mean) -> float:
        return float(reduce(np.concatenate([np.ravel(_plain(v)) for v in _listed(raw.get(name, []))] or [np.zeros(1)])))

    metrics: dict[str, Any] = {
        "learner/loss": Mean.of([number("loss")]),
        "learner/grad_norm": Mean.of([number("grad_norm")]),
        "learner/lr": Mean.of([number("lr")]),
        "learner/clip_fraction": Mean.of([number("actor/pg_clipfrac")]),
        "learner/approximate_kl": Mean.of([number("actor/ppo_kl")]),
        "learner/nll": Mean.of([number("actor/nll", np.sum)]),
    }
    if "actor/kl_loss" in raw:
        metrics["learner/kl_to_reference"] = Mean.of([number("actor/kl_loss", np.sum)])
    if "actor/entropy" in raw:
        metrics["learner/entropy"] = Mean.of([number("actor/entropy", np.sum)])
    if gap:
        metrics["logprob_gap/mean_abs"] = Mean(number("gap/sum", np.sum), number("gap/tokens", np.sum))
        metrics["logprob_gap/max_abs"] = Max(number("gap/max", np.max))
    return metrics


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(value: Any) -> Any:
    """veRL's Metric objects hold their values; numbers are themselves."""
    from verl.utils.metric import Metric

    return value.values if isinstance(value, Metric) else value
