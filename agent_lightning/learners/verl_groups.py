"""veRL's worker groups for policy, reference and critic: their configuration, their start, and their input.

veRL is imported when a group is started: it brings torch, and it reads its platform from the environment on import.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from agent_lightning.config.learning import AlgorithmConfig, CreditConfig, CriticConfig
from agent_lightning.config.running import Device, Dtype, LearnerConfig, LoraConfig
from agent_lightning.core.errors import UserError
from agent_lightning.core.processes import cpu_environment
from agent_lightning.core.text import error_line
from agent_lightning.core.types import Batch, Floats
from agent_lightning.learners.gap import LARGEST_DIFFERENCE, largest_gap

if TYPE_CHECKING:
    from tensordict import TensorDict
    from verl.workers.config import HFModelConfig

Role = Literal["policy", "reference", "critic"]

_QUIET = {"VERL_LOGGING_LEVEL": "WARNING"}
CPU_ENVIRONMENT = _QUIET | {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "TORCH_COMPILE_DISABLE": "1"}
"""Makes veRL choose our platform (verl_cpu.py) and its FSDP engine, whose code does not depend on the device."""
GPU_ENVIRONMENT = _QUIET | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Micro-batches have many lengths: without expandable segments, torch's memory becomes fragmented."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the policy is trained: the sections of the config, and what only the run knows."""

    model_path: str
    """The model's folder, which every node has, or its hub id."""
    model_revision: str | None = None
    """Commit of a model on the hub."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    credit: CreditConfig = CreditConfig()
    critic: CriticConfig = CriticConfig()
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig = field(default_factory=LoraConfig)
    device: Device = "cpu"
    gpu_share: float = 1.0
    """Share of a GPU that each process takes."""
    dtype: Dtype = "float32"
    """Type of the computation; the parameters and the optimiser stay in float32."""
    seed: int = 0
    sft: bool = False
    """Whether the loss is the cross-entropy of weighted tokens, instead of a policy loss on advantages."""
    total_steps: int = -1
    """Optimiser steps of the run; only the cosine schedule needs them."""
    betas: tuple[float, float] = (0.9, 0.999)
    temperature: float = 1.0
    """Temperature at which the samples were sampled; logits are divided by it."""
    bucket_bytes: int = 256 * 1024 * 1024
    verl: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of veRL's `FSDPEngineConfig`, for experts; they override the others."""

    @property
    def has_critic(self) -> bool:
        """Whether a critic turns the batches' rewards into advantages."""
        return self.credit.method == "gae"

    @property
    def has_own_reference(self) -> bool:
        """Whether the reference is a model of its own; with LoRA it is the policy with its adapters off."""
        return self.algorithm.has_reference and not self.lora.rank


def policy_loss_of(config: Training) -> Any:
    """The loss function of the policy's group."""
    from verl.workers.config import ActorConfig, FSDPActorConfig, PolicyLossConfig

    from agent_lightning.learners.verl_worker import policy_loss, sft_loss

    if config.sft:
        return sft_loss
    algorithm = config.algorithm
    actor: ActorConfig = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=algorithm.clip_ratio_low,
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        policy_loss=PolicyLossConfig(loss_mode=algorithm.loss),
        entropy_coeff=algorithm.entropy_coef,
        use_kl_loss=algorithm.has_reference and algorithm.kl_in == "loss",
        kl_loss_coef=algorithm.kl_coef,
        kl_loss_type=algorithm.kl_kind or "k3",
    )
    return partial(policy_loss, actor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """Running worker groups of veRL; None for models that the config does not need."""

    policy: Any
    reference: Any = None
    critic: Any = None


def start_groups(config: Training) -> Groups:
    """Start the training processes that a config needs. The groups share their placement, and on GPUs each GPU."""
    if config.device == "cpu":
        os.environ.update(CPU_ENVIRONMENT)
    import ray
    from ray.util.placement_group import placement_group
    from verl.single_controller.ray import RayResourcePool
    from verl.single_controller.ray.base import sort_placement_group_by_node_ip

    needed = {"policy": True, "reference": config.has_own_reference, "critic": config.has_critic}
    roles: list[Role] = [role for role in get_args(Role) if needed[role]]
    # An actor of each role takes 1 / max_colocate_count of a GPU; together they take gpu_share.
    count = len(roles) if config.gpu_share == 1 else round(len(roles) / config.gpu_share)
    processes = [config.learner.processes // config.learner.nodes] * config.learner.nodes
    pool: Any = RayResourcePool(processes, use_gpu=config.device != "cpu", max_colocate_count=count)
    if config.gpu_share < 1:  # the placement groups of veRL's pool would take each GPU completely
        bundle = {"CPU": count, "GPU": config.gpu_share}
        groups = [placement_group([bundle] * number, strategy="STRICT_PACK") for number in processes]
        ray.get([group.ready() for group in groups])
        pool.pgs = list(sort_placement_group_by_node_ip(groups))
    return Groups(**{role: _start(config, role, pool) for role in roles})


def _start(config: Training, role: Role, pool: Any) -> Any:
    """Start a role's group of veRL TrainingWorkers."""
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig

    from agent_lightning.learners.verl_worker import ModelWorker

    on_cpu, algorithm, learner = config.device == "cpu", config.algorithm, config.learner
    # The critic's learning rate is ten times the policy's if nothing else is given.
    critic_lr = 10 * algorithm.lr if config.critic.lr is None else config.critic.lr
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
        "max_token_len_per_gpu": learner.max_tokens_per_micro_batch,
        "infer_max_token_len_per_gpu": learner.max_tokens_per_micro_batch,
    }
    training = TrainingWorkerConfig(
        model_type="critic" if role == "critic" else "policy",  # registered by verl_engines.py
        model_config=_model(config, role),
        engine_config=FSDPEngineConfig(**(engine | dict(config.verl))),
        optimizer_config=FSDPOptimizerConfig(
            lr=critic_lr if role == "critic" else algorithm.lr,
            lr_warmup_steps=algorithm.lr_warmup_steps,
            lr_scheduler_type=algorithm.lr_schedule,
            total_training_steps=config.total_steps,
            weight_decay=algorithm.weight_decay,
            betas=config.betas,
            clip_grad=algorithm.clip_grad,
        ),
        checkpoint_config=CheckpointConfig(save_lora_only=True),
    )
    process: dict[str, Any] = {"device": config.device, "seed": config.seed, "num_threads": learner.threads}
    process["revision"] = config.model_revision
    return RayWorkerGroup(
        pool,
        RayClassWithInitArgs(ray.remote(ModelWorker), config=training, **process),
        name_prefix=role,
        device_name=config.device,
        worker_env=CPU_ENVIRONMENT | cpu_environment(learner.threads) if on_cpu else GPU_ENVIRONMENT,
    )


def load_model(group: Any, config: Training) -> str:
    """Load the model into the processes of a group, from the start; returns the layout of its rows in words. Raises
    UserError if veRL cannot train the model, or if no layout gives what rows give alone."""
    import ray

    try:
        return str(group.choose_layout(LARGEST_DIFFERENCE[config.dtype])[0])
    except ray.exceptions.RayTaskError as error:
        raise UserError(f"model.path={config.model_path}: cannot be trained here: {error_line(error.cause)}") from error


def _model(config: Training, role: Role) -> HFModelConfig:
    """The config by which veRL loads and runs a role's model."""
    from verl.workers.config import HFModelConfig

    on_cpu = config.device == "cpu"
    override: dict[str, Any] = {}
    if role == "critic":
        override |= {"architectures": ["ForTokenClassification"], "num_labels": 1, "classifier_dropout": 0.0}
        # The checkpoint has no value head: with this, values start at about zero instead of at random. Transformers
        # would take 0 for its default.
        override["initializer_range"] = 1e-6
    return HFModelConfig(
        path=config.model_path,
        lora_rank=config.lora.rank if role == "policy" else 0,
        lora_alpha=config.lora.alpha,
        target_modules=config.lora.targets if isinstance(config.lora.targets, str) else list(config.lora.targets),
        lora_adapter_path=config.lora.path,
        lora={"dropout": config.lora.dropout},
        enable_gradient_checkpointing=not on_cpu,
        # Every model has this attention. The engine then chooses a faster one that gives the same (verl_engines.py).
        # What is under "model_config" is written into checkpoints; the name of our attention is not.
        override_config={"attn_implementation": "eager", "model_config": override},
    )


def to_tensordict(
    batch: Batch, config: Training, columns: Mapping[str, Floats] | None = None, *, adapters: bool = True
) -> TensorDict:
    """A batch in veRL's form, with its string keys: rows as jagged tensors, and settings of the batch. `columns` holds
    further inputs, each float32[N, T] with every value at its token; without `adapters` LoRA's are off."""
    import torch
    from verl.utils import tensordict_utils

    rows = [slice(0, int(length)) for length in batch.length_N]

    def jagged(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        tensors = [torch.tensor(array[i, row], dtype=dtype) for i, row in enumerate(rows)]
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    positions = np.broadcast_to(np.arange(batch.token_NT.shape[1]), batch.token_NT.shape)
    integers = {"input_ids": batch.token_NT, "position_ids": positions, "loss_mask": batch.mask_NT}
    floats = {"weights": batch.weight_NT, "advantages": batch.advantage_NT, "old_log_probs": batch.logprob_NT}
    floats |= columns or {}
    return tensordict_utils.get_tensordict(
        tensor_dict={name: jagged(array, torch.int64) for name, array in integers.items()}
        | {name: jagged(array, torch.float32) for name, array in floats.items()},
        non_tensor_dict={
            "global_batch_size": batch.token_NT.shape[0],
            "global_token_num": batch.length_N.tolist(),
            "temperature": config.temperature,
            "update_lr_scheduler": True,
            "compute_loss": False,
            "calculate_entropy": config.algorithm.entropy_coef > 0,
            "no_lora_adapter": bool(config.lora.rank) and not adapters,
        }
        | (
            {"gap_bound": largest_gap(config.learner, config.dtype), "return_model_output": True}
            if "is_current" in floats
            else {}
        ),
    )


def from_jagged(rows: Any, batch: Batch) -> Floats:
    """A model's output as float32[N, T] with every value at its token; veRL has the value of token i at i - 1."""
    column_NT = np.zeros(batch.token_NT.shape, np.float32)
    for n, row in enumerate(rows.unbind()):
        column_NT[n, 1 : row.numel()] = row.float().numpy()[:-1]
    return column_NT
