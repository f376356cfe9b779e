"""The sections that say how the policy learns: algorithm, credit, critic, intermediate rewards, sampling."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from agent_lightning.config.section import AtLeast0, AtLeast1, NotNegative, Positive, Section, Share
from agent_lightning.core.errors import ConfigError

Loss = Literal["vanilla", "gspo", "cispo"]
KlPlace = Literal["loss", "reward"]
KlKind = Literal["k1", "abs", "k2", "k3"]
ImportanceSampling = Literal["none", "token", "sequence", "decoupled", "icepop", "geometric"]
Method = Literal["identical", "return_to_go", "same_state", "gae"]
Scale = Literal["std", "none", "batch"]
Baseline = Literal["mean", "leave_one_out", "none"]
AdvantageLevel = Literal["token", "call"]
AirForm = Literal["sum", "potential"]
AirEvent = Literal[
    "ok", "error", "invalid_arguments", "timeout", "empty", "unanswered", "repeated", "unparsed", "cut"
]  # fmt: skip
"""How a tool call went (core.types.ToolStatus); the same action again; or what was wrong with a reply."""
Resample = Literal["resample"]
Failure = float | None | Resample
"""A reward; null, which masks the rollout; or resample, which tries it again, and masks it after the last try."""


class FailuresConfig(Section):
    """The treatment of a failed rollout, by its outcome: a number is its reward, null leaves it out of its group
    and of training, and resample tries it again, at most agent.max_attempts times, before it is left out."""

    agent_error: Failure = 0.0
    """The agent raised an error, or its process ended with one."""
    tool_error: Failure = "resample"
    """The agent raised an error that agent.tool_errors blames on a tool or a service."""
    timeout: Failure = 0.0
    """The rollout took longer than agent.timeout_s."""
    no_model_call: Failure = 0.0
    """The agent returned without a single call of the policy."""
    overlong_prompt: Failure = 0.0
    """A prompt did not fit into model.max_len."""
    engine_error: Failure = "resample"
    """The engine failed to answer a call."""
    too_many_calls: Failure = 0.0
    """The agent made more model calls than agent.max_calls."""
    bad_reward: Failure = 0.0
    """The agent gives its own reward (agent.reward is null), and that is no finite number, or none."""
    scorer_error: Failure = None
    """The reward function agent.reward raised an error, took too long, or returned no reward."""
    unscored: Failure = None
    """The reward function agent.reward returned None: it has no opinion."""
    worker_lost: Failure = "resample"
    """The worker that ran the rollout died."""
    cancelled: float | None = None
    """The run stopped, or the rollout's group was given up."""
    truncated: float | Literal["resample", "keep"] | None = "keep"
    """The rollout finished, but a reply was cut at the length limit; keep leaves it the reward that it earned."""

    @property
    def resampled(self) -> frozenset[str]:
        """The failures that get another attempt."""
        return frozenset(name for name, treatment in self if treatment == "resample")

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                raise ConfigError(f"algorithm.failures.{name}: not a failure; use one of {', '.join(cls.model_fields)}")
        return values


_TOY_LEARNER_READS: Final = {
    *("tasks_per_step", "rollouts_per_task", "dynamic_sampling_rounds", "rollouts_per_batch", "epochs", "failures"),
    *("lr", "clip_ratio_low", "clip_ratio_high"),
}
"""The keys of `algorithm` that have an effect on a toy model."""


class AlgorithmConfig(Section):
    """How much a step samples, and how the policy is trained on it."""

    tasks_per_step: AtLeast1 = 16
    """Tasks of one step."""
    rollouts_per_task: AtLeast1 = 8
    """Rollouts of each task; they form the group whose rewards are compared."""
    dynamic_sampling_rounds: AtLeast0 = 0
    """At most this many more rounds of rollouts in a step, to replace groups that give nothing to train on (DAPO)."""
    rollouts_per_batch: AtLeast1 | None = None
    """Rollouts of one optimiser step; null: all rollouts of the step."""
    epochs: AtLeast1 = 1
    """How often a step's batches are trained on; the clip keeps later epochs near the policy that sampled."""
    loss: Loss = "vanilla"
    """veRL's policy loss: vanilla (PPO-clip), gspo, or cispo."""
    lr: NotNegative = 1e-6
    """Learning rate of the policy."""
    lr_warmup_steps: AtLeast0 = 0
    """Optimiser steps over which the learning rate grows from 0."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or cosine, which decays to 0 over the run."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    clip_grad: Positive = 1.0
    """Norm to which the gradient is clipped."""
    clip_ratio_low: NotNegative = 0.2
    """The probability ratio of new to old policy is clipped at 1 - clip_ratio_low."""
    clip_ratio_high: NotNegative = 0.2
    """The probability ratio of new to old policy is clipped at 1 + clip_ratio_high."""
    kl_coef: NotNegative = 0.0
    """Weight of the KL divergence from the starting policy; 0 keeps no reference model."""
    kl_in: KlPlace = "loss"
    """Where the KL counts: loss adds it to the loss, reward subtracts it from the reward of each token."""
    kl_kind: KlKind | None = None
    """veRL's estimator of the KL; null: k3 in the loss, k1 in the reward."""
    importance_sampling: ImportanceSampling = "none"
    """Correction of the difference between the engine, or an older version, and the policy before the step, which the
    ratio of PPO-clip then begins from; it costs a forward pass. Weights of the advantages, policy / engine: token and
    sequence are truncated at the cap, decoupled is not; icepop drops tokens, and geometric rows, outside 1/cap to cap.
    """
    importance_sampling_cap: Annotated[float, Field(ge=1)] = 2.0
    """The ratio at which importance sampling is truncated, or a token or row dropped; geometric wants about 1.01."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 computes no entropy."""
    failures: FailuresConfig = FailuresConfig()

    @property
    def chats_per_step(self) -> int:
        """Chats of a step of supervised training."""
        return self.tasks_per_step

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts of one step, without those of dynamic sampling."""
        return self.tasks_per_step * self.rollouts_per_task

    @property
    def has_reference(self) -> bool:
        """Whether the learner keeps the starting policy, for the KL divergence from it."""
        return self.kl_coef > 0

    @property
    def batches_per_step(self) -> int:
        """Batches of one step; each is one optimiser step in each epoch."""
        return -(-self.rollouts_per_step // (self.rollouts_per_batch or self.rollouts_per_step))

    def check_groups(self, pass_at: int) -> None:
        """Raise ConfigError for groups of a single rollout, which has no other to be compared with, or of so few that
        they have no `pass_at` rollouts with different best ones."""
        if self.rollouts_per_task <= pass_at:
            why = "to compare them" if pass_at == 1 else f"to compare the best of credit.pass_at={pass_at}"
            raise ConfigError(
                f"algorithm.rollouts_per_task={self.rollouts_per_task}: must be at least {pass_at + 1}, {why}"
            )

    def check_toy(self) -> None:
        """Raise ConfigError for a key that the learner of a toy model does not read."""
        for name, value in self.model_dump(exclude_defaults=True).items():
            if name not in _TOY_LEARNER_READS:
                raise ConfigError(f"algorithm.{name}={value}: a toy model's learner does not read it; leave it out")
        if self.clip_ratio_low != self.clip_ratio_high:
            raise ConfigError("algorithm.clip_ratio_low and _high: a toy model's learner has one bound for both")

    @model_validator(mode="after")
    def _check_read(self) -> AlgorithmConfig:
        refuse_unread("algorithm.kl_in", self.kl_in != "loss" and not self.kl_coef, "algorithm.kl_coef is 0")
        refuse_unread("algorithm.kl_kind", self.kl_kind is not None and not self.kl_coef, "algorithm.kl_coef is 0")
        kind = self.importance_sampling
        unread = self.importance_sampling_cap != 2 and kind in ("none", "decoupled")
        refuse_unread("algorithm.importance_sampling_cap", unread, f"algorithm.importance_sampling is {kind}")
        return self


class CreditConfig(Section):
    """How rewards become the advantage of each model call; docs/credit.md has the formulas."""

    method: Method = "identical"
    """identical: every call has its rollout's advantage (LightningRL); return_to_go: a call has what it and later calls
    earned; same_state: identical, and calls in the same state are compared (GiGPO); gae: a critic (PPO)."""
    scale: Scale = "std"
    """Divisor of advantages: std of the group (GRPO), none (Dr. GRPO); batch: whitened over the step (REINFORCE++)."""
    baseline: Baseline = "mean"
    """Subtracted from a reward: mean of the group; leave_one_out: mean of the others (RLOO, with scale=none); none."""
    pass_at: AtLeast1 = 1
    """Rollouts of a group of which the best counts: above 1, groups that mostly succeed teach little (pass@k training).
    Only identical reads it."""
    pass_at_steps: AtLeast1 | None = None
    """Steps after which `pass_at` is 1: what the policy found by then, it becomes sure of. null: it stays."""
    discount: Share = 1.0
    """Discount for each model call, of return_to_go and same_state; for each step of gae."""
    state_weight: NotNegative = 1.0
    """Weight of the advantage among calls in the same state; only same_state reads it."""
    state_key: str = "shown"
    """What the same state is, of one agent: shown: what it was shown last, such as a tool's result; tools: the tools
    used so far, with their results; prompt: the entire prompt; or "path/to/file.py:function" of your own, from an
    attempt to a key for each of its calls. Only same_state reads it."""
    emitted: Literal["bounded", "trusted", "ignored"] = "bounded"
    """Rewards that an agent emits about its own calls and tools: bounded: with those of air within air.bound, so that
    they cannot outweigh the final reward; trusted: as they are; ignored: not at all, and agent.reward must be set."""
    reward_weights: dict[str, float] = Field(default_factory=dict)
    """Weights of the rewards that an agent emits about its calls and tools, by name; a name that is not here has 1."""
    gae_lambda: Share = 0.95
    """GAE's lambda: 0 trusts the critic after one step, 1 only the rewards; only gae reads it."""
    gae_level: AdvantageLevel = "token"
    """What a step of gae is: a token, or a model call, whose tokens then share its advantage; only gae reads it."""

    @property
    def compares(self) -> bool:
        """Whether rollouts are compared with others of their group, which takes at least two of them."""
        return self.method != "gae" and self.baseline != "none"

    @property
    def is_per_group(self) -> bool:
        """Whether a group's advantages come from the group alone: a group without spread then gives nothing."""
        return self.method != "gae" and self.scale != "batch"

    @model_validator(mode="after")
    def _check(self) -> CreditConfig:
        method = self.method
        if method == "gae" and (self.scale == "std" or self.baseline != "mean"):
            raise ConfigError("credit.method=gae: needs credit.scale=batch or none, and no other credit.baseline")
        if self.baseline == "none" and self.scale == "std":
            raise ConfigError("credit.baseline=none: needs credit.scale=batch or none; std is of the group")
        if self.pass_at > 1 and (method != "identical" or self.scale == "batch" or self.baseline != "mean"):
            needed = "credit.method=identical, credit.baseline=mean and credit.scale=std or none"
            raise ConfigError(f"credit.pass_at={self.pass_at}: needs {needed}")
        if self.discount != 1 and method == "identical":
            raise ConfigError("credit.discount: credit.method=identical does not read it; choose another method")
        if self.state_weight != 1 and method != "same_state":
            raise ConfigError(f"credit.state_weight: credit.method={method} does not read it; only same_state does")
        if method != "same_state" and self.state_key != "shown":
            raise ConfigError(f"credit.state_key: credit.method={method} does not read it; only same_state does")
        if self.state_key not in ("shown", "tools", "prompt") and ":" not in self.state_key:
            raise ConfigError(
                f"credit.state_key={self.state_key}: use shown, tools, prompt, or path/to/file.py:function"
            )
        for key, changed in (("gae_lambda", self.gae_lambda != 0.95), ("gae_level", self.gae_level != "token")):
            refuse_unread(f"credit.{key}", changed and method != "gae", "only credit.method=gae does")
        return self


class CriticConfig(Section):
    """The critic of credit.method=gae: a copy of the model with a value head."""

    lr: NotNegative | None = None
    """Learning rate of the critic; null: ten times algorithm.lr."""
    clip_range: NotNegative = 0.5
    """How far a value may move in a step before its loss stops pulling."""
    warmup_steps: AtLeast0 = 0
    """First steps of the run in which only the critic is trained."""


class RuleConfig(Section):
    """A rule of air: what an event of a rollout is worth.

    Example: RuleConfig(on="error", tool="sql*", match="no such table", value=-0.1, cap=0.2)
    """

    on: AirEvent
    """The event."""
    value: float
    """Reward of the call that caused the event."""
    cap: float
    """Most that the rule may give or take in a rollout, without a sign."""
    tool: str = "*"
    """Glob over tool names."""
    match: str = ""
    """Regular expression that is searched for in the event's text; case does not matter."""

    @model_validator(mode="after")
    def _check(self) -> RuleConfig:
        if not self.cap >= abs(self.value) > 0:
            raise ConfigError(f"air.rules: on={self.on}: needs a value that is not 0 and a cap of at least its size")
        if self.on == "repeated" and self.value > 0:
            raise ConfigError("air.rules: on=repeated: the value must be below 0, or repeating an action would pay")
        try:
            re.compile(self.match)
        except re.error as error:
            raise ConfigError(f"air.rules: match={self.match}: not a regular expression ({error})") from error
        return self


DEFAULT_RULES: Final = (
    RuleConfig(on="ok", value=0.1, cap=0.3),
    RuleConfig(on="error", value=-0.05, cap=0.1),
    RuleConfig(on="invalid_arguments", value=-0.1, cap=0.2),
    RuleConfig(on="timeout", value=-0.05, cap=0.1),
    RuleConfig(on="repeated", value=-0.05, cap=0.1),
    RuleConfig(on="unparsed", value=-0.1, cap=0.2),
    RuleConfig(on="cut", value=-0.1, cap=0.2),
)
"""For a final reward of range 1. An empty or missing result does not tell who is to blame, so it is worth nothing."""


class AirConfig(Section):
    """Automatic intermediate rewards, from what the tools did; docs/credit.md has the formulas."""

    enabled: bool = False
    """Whether calls get intermediate rewards; credit=air turns them on, with a credit method that uses them."""
    form: AirForm = "sum"
    """sum adds the rewards; potential is a shaping that leaves the best policy the best."""
    bound: Positive = 0.3
    """Most that all rules together, and rewards that the agent emits, may give or take in a rollout, as a share of the
    final reward's range; below 0.5."""
    rules: tuple[RuleConfig, ...] = DEFAULT_RULES
    """The first rule that applies to an event counts. A list given here replaces the default rules."""
    signals: tuple[str, ...] = ()
    """Functions of your own, "path/to/file.py:function", from an attempt's calls to a reward for each."""

    @model_validator(mode="after")
    def _check(self) -> AirConfig:
        if self.bound >= 0.5:
            why = "from half of the final reward's range on, a failed rollout could be worth more than a good one"
            raise ConfigError(f"air.bound={self.bound}: must be above 0 and below 0.5: {why}")
        if not self.enabled and (self.form, self.rules, self.signals) != ("sum", DEFAULT_RULES, ()):
            raise ConfigError("air: its keys are set but it is off; add air.enabled=true, or credit=air")
        return self


class SamplingConfig(Section):
    """The sampling parameters of one split's model calls."""

    temperature: NotNegative = 1.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: only the likeliest tokens whose probabilities add up to this are sampled."""
    max_tokens: AtLeast1 = 64
    """Longest reply of a call, in tokens."""


class SamplingSplits(Section):
    """The sampling parameters of model calls.

    train: these govern. What an agent asks for (temperature, seed, penalties, ...) is replaced, or left out.
    val: what the agent asks for comes first, and these fill the gaps.
    In both the smaller max_tokens wins. It is the same for every wire format (docs/gateway.md).
    """

    train: SamplingConfig = SamplingConfig()
    val: SamplingConfig = SamplingConfig(temperature=0.0)
    seeded: bool = False
    """Whether each training call has its own seed, made of the run's seed, the rollout, the request and its repeat
    count: a rollout that runs again samples the same tokens, up to the engine's arithmetic. It forces one gateway."""


def refuse_unread(key: str, unread: bool, why: str) -> None:
    """Raise ConfigError for a key that is set but has no effect: that is a mistake."""
    if unread:
        raise ConfigError(f"{key}: set, but nothing reads it: {why}")
