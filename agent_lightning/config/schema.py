"""The config of a run: its own keys, its sections, and the checks between sections.

`config.load` reads it. Everything else takes the sections that it needs, from `config.learning` and `config.running`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import Field, model_validator

from agent_lightning.config import learning, running
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
    """How often a run restarts by itself from its newest checkpoint after a process, such as a learner's, has died."""
    runs_dir: str = "runs"
    """Folder of runs, or a place that fsspec knows, such as s3://bucket/runs."""
    name: str | None = None
    """Name of the run's folder; null makes one from experiment, seed and time."""
    model: running.ModelConfig
    data: running.DataConfig = running.DataConfig()
    agent: running.AgentConfig
    algorithm: learning.AlgorithmConfig = learning.AlgorithmConfig()
    credit: learning.CreditConfig = learning.CreditConfig()
    critic: learning.CriticConfig = learning.CriticConfig()
    air: learning.AirConfig = learning.AirConfig()
    sampling: learning.SamplingSplits = learning.SamplingSplits()
    loop: running.LoopConfig = running.LoopConfig()
    buffer: running.BufferConfig = running.BufferConfig()
    rollout: running.RolloutConfig = running.RolloutConfig()
    serving: running.ServingConfig = running.ServingConfig()
    learner: running.LearnerConfig = running.LearnerConfig()
    hardware: running.HardwareConfig = running.HardwareConfig()
    tracking: running.TrackingConfig = running.TrackingConfig()
    verl: dict[str, Any] = Field(default_factory=dict)
    """Fields of veRL's FSDPEngineConfig, passed on as they are, for experts."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """vLLM engine arguments, passed on as they are, for experts."""

    @property
    def destination(self) -> str:
        """The folder of the run if `name` is given, else the folder in which it is made."""
        return f"{self.runs_dir.rstrip('/')}/{self.name}" if self.name else self.runs_dir

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations; all steps if only the first and the last policy are evaluated."""
        return self.eval_every or self.steps

    @property
    def fixed_gateways(self) -> int | None:
        """Number of gateways; None: one on each node. Seeded calls are counted where they arrive: in one gateway."""
        return 1 if self.sampling.seeded else self.serving.gateways

    @model_validator(mode="before")
    @classmethod
    def _choose_rule(cls, values: Any) -> Any:
        """Fill in serving.on_weight_update if it is null: the engines read their own section alone."""
        if not isinstance(values, dict):
            return values
        loop, serving = values.get("loop") or {}, values.get("serving") or {}
        if not isinstance(loop, dict) or not isinstance(serving, dict) or serving.get("on_weight_update"):
            return values
        rule = "wait" if str(loop.get("max_lag", 0)) == "0" else "keep"
        return values | {"serving": serving | {"on_weight_update": rule}}

    def _check_lengths(self) -> None:
        """Raise ConfigError for limits that leave no room for each other."""
        longest = self.model.max_len
        for split, sampling in (("train", self.sampling.train), ("val", self.sampling.val)):
            if sampling.max_tokens >= longest:
                raise ConfigError(
                    f"sampling.{split}.max_tokens={sampling.max_tokens}: must be below model.max_len={longest}, which "
                    "is for prompt and reply together"
                )
        if self.learner.max_tokens_per_micro_batch < longest:
            raise ConfigError(
                f"learner.max_tokens_per_micro_batch={self.learner.max_tokens_per_micro_batch}: must be at least "
                f"model.max_len={longest}, for the longest row"
            )

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.model.words:
            self.algorithm.check_toy()
            if self.credit.method == "gae" or self.credit.scale == "batch":
                raise ConfigError("credit: a toy model has no critic and does not normalise over a step; choose others")
        unread = self.credit.method != "gae" and self.critic != learning.CriticConfig()
        learning.refuse_unread("critic", unread, "only credit.method=gae has a critic")
        if self.credit.emitted == "ignored" and self.agent.reward is None:
            raise ConfigError(
                "credit.emitted=ignored: the agent is not trusted, so agent.reward must score what it does"
            )
        if self.credit.compares:
            self.algorithm.check_groups(self.credit.pass_at)
        if self.sampling.seeded and self.serving.gateways not in (None, 1):
            raise ConfigError("sampling.seeded: serving.gateways must be 1, as each counts what it is asked by itself")
        self.loop.check_method(self.credit.method, seeded=self.sampling.seeded)
        self.loop.check_memory(self.buffer, self.algorithm.rollouts_per_step, self.model.max_len)
        self.hardware.check_use(self.serving, self.learner)
        self._check_lengths()
        if not self.model.words and self.sampling.train.temperature < 0.01:  # vLLM samples no colder
            raise ConfigError(
                f"sampling.train.temperature={self.sampling.train.temperature}: must be at least 0.01 in training, or "
                "all rollouts of a group are the same; sampling.val.temperature=0 evaluates greedily"
            )
        if self.learner.max_logprob_gap is not None and self.sampling.train.top_p < 1 and not self.model.words:
            raise ConfigError(
                f"sampling.train.top_p={self.sampling.train.top_p}: must be 1, as the learner does not know which "
                "tokens are left out; learner.max_logprob_gap=null trains all the same, on other probabilities"
            )
        return self
