"""The config's nouns: one dataclass for each section, and what types cannot say of their values.

Every key of the config tree is a field here, with its default. Not frozen: OmegaConf refuses to merge into frozen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from agent_lightning.buffer.breaker import Breaker
from agent_lightning.credit.air import DEFAULT_RULES, Air, Form, Rule, Signal
from agent_lightning.credit.estimators import Baseline, Scale
from agent_lightning.credit.failures import FailurePolicy, Retries
from agent_lightning.credit.rules import Estimator, Method

SOURCE_FIELDS = {
    "generated": {"target", "num", "seed", "split"},
    "calcx": {"names", "num", "seed"},
    "jsonl": {"path", "num", "seed"},
    "hub": {"path", "name", "split", "question_field", "result_field", "num", "seed"},
}
"""The kinds of source, and the fields that each reads."""


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """Tasks of one split. A field that the kind does not read must be left out."""

    kind: str = "jsonl"
    """generated: rows with an "id" from a function. calcx: normalised Calc-X files under data.root. jsonl: one file.
    hub: a Hugging Face data set, by id or as a local folder."""
    target: str | None = None
    """generated: "path/to/file.py:function", called with seed, num, split and, where it takes one, root."""
    names: list[str] = field(default_factory=list)
    path: str | None = None
    name: str | None = None
    split: str | None = None
    question_field: str | None = None
    result_field: str | None = None
    num: int | None = None
    """At most this many tasks, drawn with `seed`; None: all."""
    seed: int | None = None


@dataclass(slots=True, kw_only=True)
class DataConfig:
    root: str = "data"
    """Folder of the calcx files, and of what a generating function reads."""
    strata: str | None = None
    """A field of the held-out tasks, such as difficulty: their reward is reported for each of its values too."""
    train: SourceConfig = field(default_factory=SourceConfig)
    val: SourceConfig = field(default_factory=SourceConfig)


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    path: str
    """A local folder or a hub id of a causal language model. Relative paths: from here, else from the project."""
    max_len: int = 1024
    """Longest conversation in tokens, prompt and reply together."""
    words: list[str] = field(default_factory=list)
    """What a toy model can say: a table of logits with its own engine and learner; `path` is then only a name."""
    dtype: str = "float32"
    tool_parser: str | None = "hermes"


@dataclass(slots=True, kw_only=True)
class RetryConfig:
    """How often and how soon rollouts are made again."""

    budget: float = 1.0
    """Most retries among the groups in work, as a share of their rollouts."""
    backoff_s: float = 1.0
    """Most seconds before the second attempt, drawn at random; twice as many before each later one."""
    backoff_max_s: float = 60.0


@dataclass(slots=True, kw_only=True)
class BreakerConfig:
    """Stop a step at once where its rollouts fail alike, and name what they fail of."""

    window: int = 64
    """Latest attempts that are looked at; 0 turns it off."""
    share: float = 0.9
    """Of them with the same error. A policy that is still bad makes its agents fail too: not far below this."""


@dataclass(slots=True, kw_only=True)
class AgentConfig:
    target: str
    """"path/to/file.py:function", "package.module:function", or a command line."""
    mode: str = "async"
    """async, thread, process, or command."""
    reward: str | None = None
    """"path/to/file.py:function" called with (task, output); null: the agent returns its reward."""
    reward_min: float = 0.0
    reward_max: float = 1.0
    timeout_s: float = 120.0
    """Of one rollout, its scoring included."""
    call_timeout_s: float | None = None
    """Of one model call, after which the engine is to blame and not the agent; null: half of timeout_s."""
    max_calls: int = 32
    """Model calls of one rollout."""
    max_spans: int = 10_000
    """Spans that the agent's side may send of one rollout (OpenTelemetry)."""
    instrument: list[str] = field(default_factory=list)
    """OpenTelemetry instrumentors to turn on where the agent runs, by their entry points' names, e.g. [langchain]."""
    max_attempts: int = 3
    """Tries at a rollout whose end is to be resampled; see algorithm.failures."""
    tool_errors: list[str] = field(default_factory=list)
    """Globs of the agent's errors that its tools or services are to blame for, e.g. ["*ConnectionError*", "*429*"]:
    the rollout ends as tool_error, which is resampled, instead of agent_error."""
    retry: RetryConfig = field(default_factory=RetryConfig)
    breaker: BreakerConfig = field(default_factory=BreakerConfig)
    trained: str = "*"
    """Names of the agents that are trained: globs, comma separated."""


@dataclass(slots=True, kw_only=True)
class AlgorithmConfig:
    tasks_per_step: int = 16
    rollouts_per_task: int = 8
    refills: int = 0
    """More rounds of rollouts in a step, to make up for groups that give nothing to train on."""
    rollouts_per_batch: int | None = None
    """Rollouts of one optimiser step; null: all of the step's in one."""
    epochs: int = 1
    """Times that a step's batches are trained on; the clip keeps the later ones near the policy that sampled."""
    loss: str = "vanilla"
    """veRL's policy loss: vanilla (PPO-clip), gspo, or cispo."""
    lr: float = 1e-6
    lr_warmup_steps: int = 0
    lr_schedule: str = "constant"
    """constant, or cosine: after the warm-up down to zero over the run."""
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    kl_coef: float = 0.0
    """Weight of the KL to the starting policy; 0 keeps no reference model."""
    kl_in: str = "loss"
    """loss, or reward: each token is charged for it."""
    kl_kind: str | None = None
    """veRL's estimator: k1, abs, k2 or k3; null: k3 in the loss, k1 in the reward."""
    importance: str = "none"
    """Truncated importance sampling between engine and learner: none, token, or sequence. Costs a forward pass."""
    importance_cap: float = 2.0
    entropy_coef: float = 0.0
    failures: dict[str, Any] = field(default_factory=dict)
    """What becomes of a rollout by outcome, e.g. {timeout: null, truncated: resample}: a number is its reward, null
    masks it, resample makes it again. See docs/credit.md."""


@dataclass(slots=True, kw_only=True)
class CreditConfig:
    """Rewards to advantages; the formulas are in estimators.py."""

    method: str = "identical"
    """identical, return_to_go, same_state, or gae: by a critic (PPO)."""
    scale: str = "std"
    """std: GRPO; none: Dr. GRPO, which leaves the group's spread in; batch: over the whole step (REINFORCE++)."""
    baseline: str = "mean"
    """mean: of the group; leave_one_out: of the other rollouts (RLOO, with scale=none); none."""
    discount: float = 1.0
    """Per model call, of return_to_go and same_state; per step of gae."""
    state_weight: float = 1.0
    """Of the advantage within a state; only same_state reads it."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Of rewards that an agent emits about its calls and tools, by name; 1 where a name is not here, 0 ignores it."""
    gae_lambda: float = 0.95
    gae_over: str = "token"
    """What a step of gae is: token, or call."""


@dataclass(slots=True, kw_only=True)
class CriticConfig:
    """Of credit.method=gae: a copy of the model with a value head."""

    lr: float | None = None
    """null: ten times algorithm.lr."""
    clip_range: float = 0.5
    """How far a value may move in a step before its loss stops pulling."""
    warmup_steps: int = 0
    """First steps of the run in which the critic alone is trained."""


@dataclass(slots=True, kw_only=True)
class RuleConfig:
    """What an event is worth; see air.Rule."""

    on: str
    value: float
    cap: float
    tool: str = "*"
    match: str = ""


@dataclass(slots=True, kw_only=True)
class AirConfig:
    """Automatic intermediate rewards; see air.Air."""

    enabled: bool = False
    form: str = "sum"
    """sum, or potential: shaping that leaves the best policy the best."""
    bound: float = 0.3
    """Most that they give or take in a rollout, as a share of the final reward's range."""
    rules: list[RuleConfig] = field(default_factory=lambda: [RuleConfig(**asdict(rule)) for rule in DEFAULT_RULES])
    """The first that applies to an event counts. A list given here replaces the default rules."""
    signals: list[str] = field(default_factory=list)
    """Functions of one's own, "path/to/file.py:function": an attempt's calls -> a reward for each."""


SAMPLING_RULE = """\
train: these govern. What an agent asks for (temperature, seed, penalties, ...) is replaced, or left out.
val: what the agent asks for comes first, and these fill the gaps.
In both the smaller max_tokens wins. It is the same for every wire format (docs/gateway.md)."""


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """What the engine is asked for, by SAMPLING_RULE."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64


@dataclass(slots=True, kw_only=True)
class SamplingSplits:
    train: SamplingConfig = field(default_factory=SamplingConfig)
    val: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    seeded: bool = False
    """Each call of training has its own seed, made of `seed`, the rollout, and what is asked how often: a rollout that
    is run again samples the same, as far as the engine's arithmetic allows. There is then one gateway."""


@dataclass(slots=True, kw_only=True)
class BufferConfig:
    """What the buffer acknowledges outlives it; docs/reliability.md says what survives what."""

    journal: bool = True
    """Of training; false: a buffer that dies takes the run with it."""
    path: str | None = None
    """Folder of the journal, local or shared; null: journal/ in the run's folder."""
    fsync: str = "interval"
    """always, interval, or never: see journal.FSYNC."""
    fsync_interval_s: float = 1.0
    segment_mib: int = 64
    max_disk_gib: float = 20.0
    """At this size new rollouts and calls are refused, and what runs may end."""
    memory_gib: float = 2.0
    """Spans of rollouts that have ended, beyond which they are read back from the journal."""


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    workers: int = 1
    """In all, spread over the nodes; a node that joins later has as many as the others have on average."""
    concurrency: int = 64
    """Rollouts at a time in each worker."""
    hung_s: float = 60.0
    """Seconds without an answer, because an agent blocks its event loop, after which a worker is replaced."""


@dataclass(slots=True, kw_only=True)
class ServingConfig:
    """The policy's engines, and the gateway in front of them."""

    replicas: int = 1
    """Copies of the policy's engine."""
    tensor_parallel_size: int = 1
    """GPUs of each copy."""
    gateways: int | None = None
    """null: one on each node, also on one that joins later."""
    host: str = "127.0.0.1"
    """Where the gateway listens, on each node: workers use their own node's. 0.0.0.0 lets in agents from elsewhere."""
    port: int = 0
    """Of the gateway; 0 takes a free one. Where Ray Serve runs already, its port is used."""
    max_num_seqs: int = 256
    in_flight: str = "wait"
    """What becomes of a call that an update of the weights finds unfinished. wait: the update waits for its end;
    restart: it is made again by the new version; keep: it goes on with the new version, and both are recorded."""
    kv_cache_gib: int = 1
    """On a CPU: memory of each engine's KV cache."""
    gpu_memory_utilization: float = 0.85


@dataclass(slots=True, kw_only=True)
class LearnerConfig:
    """The processes that train the policy."""

    processes: int = 1
    nodes: int = 1
    """On how many nodes they are; `processes` is a multiple of it."""
    threads: int = 2
    """On a CPU: of each process."""
    max_tokens_per_micro_batch: int = 16384


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    device: str = "cpu"
    """cpu or cuda; of the policy and of the learner."""
    placement: str = "apart"
    """apart: engines and learner have GPUs of their own; together: each learner process shares its with an engine."""
    address: str | None = None
    """Of a running Ray cluster; null starts one here (or joins RAY_ADDRESS)."""


@dataclass(slots=True, kw_only=True)
class TrackingConfig:
    wandb: str = "offline"
    """offline, online, or disabled."""
    project: str = "agent-lightning"
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    tensorboard: bool = True


@dataclass(slots=True, kw_only=True)
class Config:
    """A whole run."""

    experiment: str
    seed: int = 0
    steps: int = 50
    eval_every: int = 10
    """Steps between evaluations on data.val; 0: before and after only."""
    checkpoint_every: int = 10
    """Steps between checkpoints, the first before any step; a run that is killed is resumed from the newest.
    0: only after the last step, and when the run is stopped."""
    checkpoints_kept: int = 2
    """The newest ones; 0 keeps all."""
    restarts: int = 3
    """Times that a run goes on by itself from its newest checkpoint, where a process that it cannot do without has
    died, such as the learner's."""
    runs_dir: str = "runs"
    """A folder, or a place that fsspec knows, such as s3://bucket/runs."""
    name: str | None = None
    """Of the run's folder; null makes one from experiment, seed and time."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    agent: AgentConfig
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    air: AirConfig = field(default_factory=AirConfig)
    sampling: SamplingSplits = field(default_factory=SamplingSplits)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    verl: dict[str, Any] = field(default_factory=dict)
    """Fields of veRL's FSDPEngineConfig, untouched, for experts."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """vLLM engine arguments, untouched, for experts."""

    def estimator(self) -> Estimator:
        """Raises ConfigError."""
        credit = self.credit
        return Estimator(
            method=cast(Method, credit.method),
            scale=cast(Scale, credit.scale),
            baseline=cast(Baseline, credit.baseline),
            discount=credit.discount,
            state_weight=credit.state_weight,
        )

    def failures(self) -> FailurePolicy:
        """Raises ConfigError."""
        return FailurePolicy.of(self.algorithm.failures)

    def retries(self) -> Retries:
        """Raises ConfigError."""
        return Retries(
            max_attempts=self.agent.max_attempts, resampled=self.failures().resampled, **asdict(self.agent.retry)
        )

    def breaker(self) -> Breaker:
        """Raises ConfigError."""
        return Breaker(**asdict(self.agent.breaker))

    def air_rules(self, signals: Sequence[Signal] = ()) -> Air:
        """Whether or not it is enabled. Raises ConfigError."""
        air = self.air
        return Air(
            rules=tuple(Rule(**asdict(rule)) for rule in air.rules),
            bound=air.bound,
            form=cast(Form, air.form),
            signals=tuple(signals),
        )
