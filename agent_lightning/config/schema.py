"""The config of a run: its own keys, its sections, and the checks between sections.

`config.load` reads it. Everything else takes the sections that it needs, from `config.learning` and `config.running`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field, model_validator

from agent_lightning.config.learning import (
    AirConfig,
    AlgorithmConfig,
    CreditConfig,
    CriticConfig,
    SamplingSplits,
    refuse_unread,
)
from agent_lightning.config.running import (
    AgentConfig,
    BufferConfig,
    DataConfig,
    HardwareConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    ServingConfig,
    TrackingConfig,
)
from agent_lightning.config.section import AtLeast0, Section
from agent_lightning.core.errors import ConfigError

RENAMED: Final[Mapping[str, str]] = {
    "data.strata": "data.val_group_by",
    "algorithm.refills": "algorithm.dynamic_sampling_rounds",
    "algorithm.importance": "algorithm.importance_sampling",
    "algorithm.importance_cap": "algorithm.importance_sampling_cap",
    "credit.gae_over": "credit.gae_level",
    "rollout.hung_s": "rollout.unresponsive_timeout_s",
    "serving.in_flight": "serving.on_weight_update",
}
"""Old names of keys. On a command line they are refused with the new name; in the files of earlier runs and sweeps they
are read as the new key. A key stays in its section."""

MAX_SHARED_GPU: Final = 0.5
"""Share of a GPU that an engine may take if a learner process has the rest."""

_TOY_LEARNER_READS: Final = {
    *("tasks_per_step", "rollouts_per_task", "dynamic_sampling_rounds", "rollouts_per_batch", "epochs", "failures"),
    *("lr", "clip_ratio_low", "clip_ratio_high"),
}
"""The keys of `algorithm` that have an effect on a toy model."""


class Config(Section):
    """A run."""

    experiment: str
    """Name of the experiment, a file in conf/experiment; or such a file of your own."""
    seed: AtLeast0 = 0
    """Seed of the order of tasks, of the engine and of the learner."""
    steps: AtLeast0 = 50
    """Steps of the run; each samples rollouts and trains on them."""
    eval_every: AtLeast0 = 10
    """Steps between evaluations on data.val; 0: only before the first step and after the last."""
    checkpoint_every: AtLeast0 = 10
    """Steps between checkpoints, the first before any step; a run that is killed resumes from the newest. 0: only after
    the last step, and when the run is stopped."""
    checkpoints_kept: AtLeast0 = 2
    """Number of newest checkpoints that are kept; 0 keeps all."""
    restarts: AtLeast0 = 3
    """How often a run restarts by itself from its newest checkpoint, after a process that it needs, such as the
    learner's, has died."""
    runs_dir: str = "runs"
    """Folder of runs, or a place that fsspec knows, such as s3://bucket/runs."""
    name: str | None = None
    """Name of the run's folder; null makes one from experiment, seed and time."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    agent: AgentConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    credit: CreditConfig = CreditConfig()
    critic: CriticConfig = CriticConfig()
    air: AirConfig = AirConfig()
    sampling: SamplingSplits = SamplingSplits()
    buffer: BufferConfig = BufferConfig()
    rollout: RolloutConfig = RolloutConfig()
    serving: ServingConfig = ServingConfig()
    learner: LearnerConfig = LearnerConfig()
    hardware: HardwareConfig = HardwareConfig()
    tracking: TrackingConfig = TrackingConfig()
    verl: dict[str, Any] = Field(default_factory=dict)
    """Fields of veRL's FSDPEngineConfig, passed on as they are, for experts."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments, passed on as they are, for experts."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        """Raise ConfigError for sections that contradict each other, or that nothing reads."""
        if self.model.words:
            self._check_toy()
        if self.credit.method != "gae":
            refuse_unread("critic", self.critic != CriticConfig(), "only credit.method=gae has a critic")
        if self.algorithm.rollouts_per_task < 2 and self.credit.compares:
            key = f"algorithm.rollouts_per_task={self.algorithm.rollouts_per_task}"
            raise ConfigError(f"{key}: must be at least 2, to compare them")
        if self.sampling.seeded and self.serving.gateways not in (None, 1):
            raise ConfigError("sampling.seeded: serving.gateways must be 1, as each counts what it is asked by itself")
        self._check_hardware()
        return self

    def _check_toy(self) -> None:
        """Raise ConfigError for a key that the learner of a toy model does not read."""
        for name, value in self.algorithm.model_dump(exclude_defaults=True).items():
            if name not in _TOY_LEARNER_READS:
                raise ConfigError(f"algorithm.{name}={value}: a toy model's learner does not read it; leave it out")
        if self.credit.method == "gae" or self.credit.scale == "batch":
            raise ConfigError("credit: a toy model has no critic and does not normalise over a step; choose others")
        if self.algorithm.clip_ratio_low != self.algorithm.clip_ratio_high:
            raise ConfigError("algorithm.clip_ratio_low and _high: a toy model's learner has one bound for both")

    def _check_hardware(self) -> None:
        """Raise ConfigError for what the hardware cannot do, and for keys that it makes meaningless."""
        serving, default = self.serving, ServingConfig()
        on_cpu = self.hardware.device == "cpu"
        if self.hardware.placement == "together":
            if serving.tensor_parallel_size > 1:
                raise ConfigError(
                    "serving.tensor_parallel_size: must be 1 where hardware.placement=together shares each GPU"
                )
            if serving.gpu_memory_utilization > MAX_SHARED_GPU:
                raise ConfigError(
                    f"serving.gpu_memory_utilization={serving.gpu_memory_utilization}: at most {MAX_SHARED_GPU} where "
                    "hardware.placement=together leaves the learner the rest of each GPU"
                )
        changed = serving.gpu_memory_utilization != default.gpu_memory_utilization
        refuse_unread("serving.gpu_memory_utilization", on_cpu and changed, "hardware.device is cpu")
        changed = serving.kv_cache_gib != default.kv_cache_gib
        refuse_unread("serving.kv_cache_gib", not on_cpu and changed, "hardware.device is cuda")
        changed = self.learner.threads != LearnerConfig().threads
        refuse_unread("learner.threads", not on_cpu and changed, "hardware.device is cuda")
