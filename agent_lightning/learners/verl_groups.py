"""veRL's worker groups for policy, reference and critic: how they are configured and started, and what they are fed.

veRL is imported when a group is started: it brings torch, and it reads its platform from the environment on import.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from agent_lightning.config.learning import AdvantageLevel
from agent_lightning.core.types import Batch, Floats

if TYPE_CHECKING:
    from tensordict import TensorDict
    from verl.workers.config import HFModelConfig, TrainingWorkerConfig

Role = Literal["policy", "reference", "critic"]

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "VERL_LOGGING_LEVEL": "WARNING",
    "TORCH_COMPILE_DISABLE": "1",
}
"""Makes veRL choose our platform (verl_cpu.py) and its FSDP engine, whose code does not depend on the device."""
GPU_ENVIRONMENT = {"VERL_LOGGING_LEVEL": "WARNING", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Micro-batches have many lengths: without expandable segments, torch's memory becomes fragmented."""


@dataclass(slots=True, kw_only=True)
class CriticSettings:
    """How the critic is trained, and how its values become advantages; see credit/tokens.py."""

    lr: float = 1e-5
    clip_range: float = 0.5
    """PPO's clip range for values: how far a value may move in a step."""
    warmup_steps: int = 0
    """Number of first steps of the run in which only the critic is trained."""
    discount: float = 1.0
    gae_lambda: float = 0.95
    level: AdvantageLevel = "token"


@dataclass(slots=True, kw_only=True)
class LearnerConfig:
    """How the policy is trained."""

    model_path: str
    loss: Literal["vanilla", "gspo", "cispo", "sft"] = "vanilla"
    """A policy loss by veRL's name (vanilla is PPO-clip), or sft: the cross-entropy of weighted tokens."""
    device: Literal["cpu", "cuda"] = "cpu"
    world_size: int = 1
    """Number of training processes; FSDP2 shards the model over them."""
    nodes: int = 1
    """Number of nodes that the processes are spread over."""
    gpu_share: float = 1.0
    """Share of a GPU that each process takes."""
    num_threads: int = 2
    """Number of threads of each process on a CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; the parameters and the optimiser stay in float32."""
    seed: int = 0
    lr: float = 1e-3
    lr_warmup_steps: int = 0
    lr_schedule: Literal["constant", "cosine"] = "constant"
    total_steps: int = -1
    """Optimiser steps of the run; only the cosine schedule needs them."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    kl_coef: float = 0.0
    """Weight of the KL to the starting policy; 0 builds no reference model."""
    kl_in: Literal["loss", "reward"] = "loss"
    kl_kind: str | None = None
    """veRL's estimator of the KL: k1, abs, k2 or k3; None: k3 in the loss, k1 in the reward."""
    importance_sampling: Literal["none", "token", "sequence"] = "none"
    """Truncated importance sampling (Ionides, 2008) between engine and learner, with a ratio for each token or row."""
    importance_sampling_cap: float = 2.0
    normalise: bool = False
    """Whiten the advantages over the step."""
    critic: CriticSettings | None = None
    """None: train on the batches' advantages instead of their rewards."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 computes no entropy."""
    temperature: float = 1.0
    """Temperature at which the samples were sampled; logits are divided by it."""
    max_tokens_per_micro_batch: int = 16384
    bucket_bytes: int = 256 * 1024 * 1024
    verl: dict[str, Any] | None = None
    """Further fields of veRL's `FSDPEngineConfig`, for experts; they override the others."""


def policy_loss_of(config: LearnerConfig) -> Any:
    """The loss function of the policy's group."""
    from functools import partial

    from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig

    from agent_lightning.learners.verl_worker import policy_loss, sft_loss

    if config.loss == "sft":
        return sft_loss
    actor: ActorConfig = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=config.clip_ratio_low,
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        policy_loss=PolicyLossConfig(loss_mode=config.loss),
        entropy_coeff=config.entropy_coef,
        use_kl_loss=config.kl_coef > 0 and config.kl_in == "loss",
        kl_loss_coef=config.kl_coef,
        kl_loss_type=config.kl_kind or "k3",
    )
    return partial(policy_loss, actor)


def value_loss_of(config: CriticSettings) -> Any:
    """The loss function of the critic's group."""
    from functools import partial

    from agent_lightning.learners.verl_worker import value_loss

    return partial(value_loss, config.clip_range)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Running worker groups of veRL; None for models that the config does not need."""

    policy: Any
    reference: Any = None
    critic: Any = None


def start_groups(config: LearnerConfig) -> Groups:
    """Start the training processes that a config needs. The groups share their placement, and on GPUs each GPU."""
    if config.device == "cpu":
        os.environ.update(CPU_ENVIRONMENT)
    from verl.single_controller.ray import RayResourcePool

    needed = {"policy": True, "reference": config.kl_coef > 0, "critic": config.critic is not None}
    roles: list[Role] = [role for role in get_args(Role) if needed[role]]
    # An actor of each role takes 1 / max_colocate_count of a GPU; together they take gpu_share.
    count = len(roles) if config.gpu_share == 1 else round(len(roles) / config.gpu_share)
    processes = [config.world_size // config.nodes] * config.nodes
    pool: Any = RayResourcePool(processes, use_gpu=config.device != "cpu", max_colocate_count=count)
    if config.gpu_share < 1:
        pool.pgs = _shared_groups(processes, {"CPU": count, "GPU": config.gpu_share})
    return Groups(**{role: _start(config, role, pool) for role in roles})


def _shared_groups(processes: Sequence[int], bundle: Mapping[str, float]) -> list[Any]:
    """Placement groups that take only a part of each GPU; those of veRL's pool take it completely."""
    import ray
    from ray.util.placement_group import placement_group
    from verl.single_controller.ray.base import sort_placement_group_by_node_ip

    groups = [placement_group([dict(bundle)] * number, strategy="STRICT_PACK") for number in processes]
    ray.get([group.ready() for group in groups])
    return list(sort_placement_group_by_node_ip(groups))


def _start(config: LearnerConfig, role: Role, pool: Any) -> Any:
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup

    from agent_lightning.learners.verl_worker import ModelWorker

    on_cpu = config.device == "cpu"
    threads = str(config.num_threads)
    return RayWorkerGroup(
        pool,
        RayClassWithInitArgs(
            ray.remote(ModelWorker),
            config=_training(config, role),
            device=config.device,
            seed=config.seed,
            num_threads=config.num_threads,
        ),
        name_prefix=role,
        device_name=config.device,
        worker_env=CPU_ENVIRONMENT | {"OMP_NUM_THREADS": threads} if on_cpu else GPU_ENVIRONMENT,
    )


def _training(config: LearnerConfig, role: Role) -> TrainingWorkerConfig:
    """The config of a role's veRL TrainingWorker."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig

    on_cpu = config.device == "cpu"
    engine = {
        "strategy": "fsdp2",
        # On a CPU veRL would pin the memory of a forward-only model, which needs an accelerator.
        "forward_only": role == "reference" and not on_cpu,
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
        # Registered by verl_engines.py.
        model_type="critic" if role == "critic" else "policy",
        model_config=_model(config, role),
        engine_config=FSDPEngineConfig(**(engine | (config.verl or {}))),
        optimizer_config=FSDPOptimizerConfig(
            lr=config.critic.lr if role == "critic" and config.critic is not None else config.lr,
            lr_warmup_steps=config.lr_warmup_steps,
            lr_scheduler_type=config.lr_schedule,
            total_training_steps=config.total_steps,
            weight_decay=config.weight_decay,
            betas=config.betas,
            clip_grad=config.clip_grad,
        ),
        checkpoint_config=CheckpointConfig(),
    )


def _model(config: LearnerConfig, role: Role) -> HFModelConfig:
    """The config by which veRL loads and runs a role's model."""
    from verl.workers.config import HFModelConfig

    on_cpu = config.device == "cpu"
    flash = not on_cpu and find_spec("flash_attn") is not None
    override: dict[str, Any] = {"attn_implementation": "flash_attention_2" if flash else "rows_sdpa"}
    if role == "critic":
        override |= {"architectures": ["ForTokenClassification"], "num_labels": 1, "classifier_dropout": 0.0}
        # The checkpoint has no value head: with this, values start at about zero instead of at random. Transformers
        # would take 0 for its default.
        override["initializer_range"] = 1e-6
    return HFModelConfig(
        path=config.model_path,
        # Rows are laid end to end, without padding, so that they cost only their tokens.
        use_remove_padding=True,
        # Log-probabilities are computed for some tokens at a time, since logits are as wide as the vocabulary.
        use_fused_kernels=role != "critic",
        fused_kernel_options={"impl_backend": "torch"},
        enable_gradient_checkpointing=not on_cpu,
        override_config=override,
    )


def to_tensordict(batch: Batch, config: LearnerConfig, columns: Mapping[str, Floats] | None = None) -> TensorDict:
    """A batch in veRL's form, with its string keys: rows as jagged tensors, and settings of the batch.

    `columns` holds further inputs, each float32[N, T] with every value at its token.
    """
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
            **{name: jagged(column, torch.float32) for name, column in (columns or {}).items()},
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


def from_jagged(rows: Any, batch: Batch) -> Floats:
    """A model's output as float32[N, T] with every value at its token; veRL has the value of token i at i - 1."""
    column_NT = np.zeros(batch.token_NT.shape, np.float32)
    for n, row in enumerate(rows.unbind()):
        column_NT[n, 1 : row.numel()] = row.float().numpy()[:-1]
    return column_NT
