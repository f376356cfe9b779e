"""What the types of a config cannot say of its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from agent_lightning.buffer.journal import FSYNC
from agent_lightning.config.schema import (
    SOURCE_FIELDS,
    AirConfig,
    AlgorithmConfig,
    BufferConfig,
    Config,
    CriticConfig,
    LearnerConfig,
    ServingConfig,
    SourceConfig,
)
from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import OnWeightUpdate
from agent_lightning.credit.air import Form
from agent_lightning.credit.estimators import Baseline, Scale
from agent_lightning.credit.rules import Method


def check(config: Config) -> None:
    """Raise ConfigError, with the key's path, for values that contradict each other or that nothing reads."""
    _check_source("data.train", config.data.train)
    _check_source("data.val", config.data.val)
    _check_choices(config)
    # What they say of themselves they refuse themselves, with the key.
    config.air_rules()
    config.retries()
    config.breaker()
    compares = config.estimator().compares
    _check_read(config)
    _check_placement(config)
    if config.model.words:
        _check_toy(config)
    for key, value, low in _lowest(config, compares):
        if value < low:
            raise ConfigError(f"{key}={value}: must be at least {low}")
    if not 0 <= config.serving.port <= 65535:
        raise ConfigError(f"serving.port={config.serving.port}: must be from 0 to 65535")
    if config.agent.instrument and config.agent.mode == "command":
        raise ConfigError("agent.instrument: a command sets up its own; its environment says where traces go")
    for name, weight in config.credit.reward_weights.items():
        if not math.isfinite(weight):
            raise ConfigError(f"credit.reward_weights.{name}={weight}: must be a finite number")
    if config.sampling.seeded and config.serving.gateways not in (None, 1):
        raise ConfigError("sampling.seeded: serving.gateways must be 1, as each counts what it is asked by itself")
    if config.agent.reward_min >= config.agent.reward_max:
        raise ConfigError("agent.reward_min must be below agent.reward_max")
    for key, seconds in (
        ("agent.timeout_s", config.agent.timeout_s),
        ("agent.call_timeout_s", config.agent.call_timeout_s),
        ("rollout.hung_s", config.rollout.hung_s),
    ):
        if seconds is not None and seconds <= 0:
            raise ConfigError(f"{key}={seconds}: must be above 0")


def _check_choices(config: Config) -> None:
    """A word that is none of those allowed. Raises ConfigError."""
    algorithm, credit = config.algorithm, config.credit
    for choice, chosen, allowed in (
        ("agent.mode", config.agent.mode, ("async", "thread", "process", "command")),
        ("algorithm.lr_schedule", algorithm.lr_schedule, ("constant", "cosine")),
        ("algorithm.loss", algorithm.loss, ("vanilla", "gspo", "cispo")),
        ("algorithm.kl_in", algorithm.kl_in, ("loss", "reward")),
        ("algorithm.kl_kind", algorithm.kl_kind or "k3", ("k1", "abs", "k2", "k3")),
        ("algorithm.importance", algorithm.importance, ("none", "token", "sequence")),
        ("credit.method", credit.method, get_args(Method)),
        ("credit.scale", credit.scale, get_args(Scale)),
        ("credit.baseline", credit.baseline, get_args(Baseline)),
        ("credit.gae_over", credit.gae_over, ("token", "call")),
        ("air.form", config.air.form, get_args(Form)),
        ("hardware.device", config.hardware.device, ("cpu", "cuda")),
        ("buffer.fsync", config.buffer.fsync, tuple(FSYNC)),
        ("serving.in_flight", config.serving.in_flight, get_args(OnWeightUpdate)),
        ("hardware.placement", config.hardware.placement, ("apart", "together")),
        ("model.dtype", config.model.dtype, ("float32", "bfloat16")),
        ("tracking.wandb", config.tracking.wandb, ("offline", "online", "disabled")),
    ):
        _one_of(choice, chosen, allowed)


def _check_read(config: Config) -> None:
    """A key that nothing would read is a mistake. Raises ConfigError."""
    algorithm, credit, method = config.algorithm, config.credit, config.credit.method
    if credit.discount != 1 and method == "identical":
        raise ConfigError("credit.discount: credit.method=identical does not read it; choose another method")
    if credit.state_weight != 1 and method != "same_state":
        raise ConfigError(f"credit.state_weight: credit.method={method} does not read it; only same_state does")
    if not config.air.enabled and config.air != AirConfig():
        raise ConfigError("air: its keys are set but it is off; add air.enabled=true, or credit=air")
    buffer = config.buffer
    for key, unread, why in (
        ("buffer", not buffer.journal and buffer != BufferConfig(journal=False), "buffer.journal is false"),
        ("buffer.fsync_interval_s", buffer.fsync_interval_s != 1 and buffer.fsync != "interval", "of fsync=interval"),
        ("credit.gae_lambda", credit.gae_lambda != 0.95 and method != "gae", "only credit.method=gae does"),
        ("credit.gae_over", credit.gae_over != "token" and method != "gae", "only credit.method=gae does"),
        ("critic", config.critic != CriticConfig() and method != "gae", "only credit.method=gae has a critic"),
        ("algorithm.kl_in", algorithm.kl_in != "loss" and not algorithm.kl_coef, "algorithm.kl_coef is 0"),
        ("algorithm.kl_kind", algorithm.kl_kind is not None and not algorithm.kl_coef, "algorithm.kl_coef is 0"),
        (
            "algorithm.importance_cap",
            algorithm.importance_cap != 2 and algorithm.importance == "none",
            "algorithm.importance is none",
        ),
    ):
        if unread:
            raise ConfigError(f"{key}: set, but nothing reads it: {why}")


def _check_placement(config: Config) -> None:
    """What the hardware cannot do together. Raises ConfigError."""
    serving, learner, hardware = config.serving, config.learner, config.hardware
    if learner.processes % learner.nodes:
        raise ConfigError(f"learner.processes={learner.processes}: must be a multiple of learner.nodes={learner.nodes}")
    if hardware.device == "cpu" and hardware.placement == "together":
        raise ConfigError("hardware.placement=together: shares GPUs, and hardware.device=cpu has none")
    if hardware.placement == "together" and serving.tensor_parallel_size > 1:
        raise ConfigError("serving.tensor_parallel_size: must be 1 where hardware.placement=together shares each GPU")
    if hardware.placement == "together" and serving.gpu_memory_utilization > MOST_SHARED:
        raise ConfigError(
            f"serving.gpu_memory_utilization={serving.gpu_memory_utilization}: at most {MOST_SHARED} where "
            "hardware.placement=together leaves the learner the rest of each GPU"
        )
    if hardware.device == "cpu" and serving.gpu_memory_utilization != ServingConfig().gpu_memory_utilization:
        raise ConfigError("serving.gpu_memory_utilization: set, but nothing reads it: hardware.device is cpu")
    if hardware.device == "cuda":
        for key, value, default in (
            ("serving.kv_cache_gib", serving.kv_cache_gib, ServingConfig().kv_cache_gib),
            ("learner.threads", learner.threads, LearnerConfig().threads),
        ):
            if value != default:
                raise ConfigError(f"{key}: set, but nothing reads it: hardware.device is cuda")


MOST_SHARED = 0.5
"""Share of a GPU that an engine may take where a learner process has the rest."""

_TOY_READS = {
    *("tasks_per_step", "rollouts_per_task", "refills", "rollouts_per_batch", "epochs", "failures"),
    *("lr", "clip_ratio_low", "clip_ratio_high"),
}
"""Of the keys of `algorithm`, those that mean something where the learner is a toy."""


def _check_toy(config: Config) -> None:
    """A key that the toy learner would not read. Raises ConfigError."""
    default = AlgorithmConfig()
    for name, value in asdict(config.algorithm).items():
        if name not in _TOY_READS and value != asdict(default)[name]:
            raise ConfigError(f"algorithm.{name}={value}: a toy model's learner does not read it; leave it out")
    if config.credit.method == "gae" or config.credit.scale == "batch":
        raise ConfigError("credit: a toy model has no critic and does not normalise over a step; choose others")
    if config.algorithm.clip_ratio_low != config.algorithm.clip_ratio_high:
        raise ConfigError("algorithm.clip_ratio_low and _high: a toy model's learner has one bound for both")


def _lowest(config: Config, compares: bool) -> tuple[tuple[str, float, float], ...]:
    """Key, value, and the least that it may be."""
    algorithm, serving, learner = config.algorithm, config.serving, config.learner
    return (
        ("steps", config.steps, 0),
        ("eval_every", config.eval_every, 0),
        ("checkpoint_every", config.checkpoint_every, 0),
        ("algorithm.tasks_per_step", algorithm.tasks_per_step, 1),
        ("algorithm.epochs", algorithm.epochs, 1),
        ("algorithm.refills", algorithm.refills, 0),
        ("algorithm.rollouts_per_task", algorithm.rollouts_per_task, 2 if compares else 1),
        ("algorithm.importance_cap", algorithm.importance_cap, 1),
        ("algorithm.kl_coef", algorithm.kl_coef, 0),
        ("critic.warmup_steps", config.critic.warmup_steps, 0),
        ("critic.clip_range", config.critic.clip_range, 0),
        ("rollout.workers", config.rollout.workers, 1),
        ("rollout.concurrency", config.rollout.concurrency, 1),
        ("buffer.fsync_interval_s", config.buffer.fsync_interval_s, 0.001),
        ("buffer.segment_mib", config.buffer.segment_mib, 1),
        ("buffer.max_disk_gib", config.buffer.max_disk_gib, 2 * config.buffer.segment_mib / 1024),
        ("buffer.memory_gib", config.buffer.memory_gib, 0),
        ("agent.max_calls", config.agent.max_calls, 1),
        ("agent.max_spans", config.agent.max_spans, 0),
        ("checkpoints_kept", config.checkpoints_kept, 0),
        ("restarts", config.restarts, 0),
        ("agent.max_attempts", config.agent.max_attempts, 1),
        ("serving.replicas", serving.replicas, 1),
        ("serving.gateways", 1 if serving.gateways is None else serving.gateways, 1),
        ("learner.processes", learner.processes, 1),
        ("learner.nodes", learner.nodes, 1),
        ("learner.threads", learner.threads, 1),
        ("serving.tensor_parallel_size", serving.tensor_parallel_size, 1),
        ("serving.kv_cache_gib", serving.kv_cache_gib, 1),
        ("model.max_len", config.model.max_len, 1),
        ("sampling.train.max_tokens", config.sampling.train.max_tokens, 1),
        ("sampling.val.max_tokens", config.sampling.val.max_tokens, 1),
    )


def _check_source(where: str, source: SourceConfig) -> None:
    """Raise ConfigError for a field that this kind does not read."""
    _one_of(f"{where}.kind", source.kind, tuple(SOURCE_FIELDS))
    used = SOURCE_FIELDS[source.kind] | {"kind"}
    for name, value in asdict(source).items():
        if name not in used and value not in (None, []):
            raise ConfigError(f"{where}.{name}={value}: not read by kind={source.kind}; remove it")


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(allowed)}")
