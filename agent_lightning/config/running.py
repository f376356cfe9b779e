"""The sections that say what runs, and where: tasks, model, agent, and the processes around them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from agent_lightning.config.learning import refuse_unread
from agent_lightning.config.section import AtLeast0, AtLeast1, NotNegative, Positive, Section
from agent_lightning.core.errors import ConfigError, UserError
from agent_lightning.core.types import OnWeightUpdate

Agent = Callable[..., object]
AgentMode = Literal["async", "thread", "process", "command"]
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
Fsync = Literal["always", "interval", "never"]
WandbMode = Literal["offline", "online", "disabled"]

SOURCE_FIELDS: Final = {
    "generated": {"target", "names", "num", "seed", "split"},
    "jsonl": {"path", "num", "seed"},
    "hub": {"path", "name", "split", "question_field", "result_field", "num", "seed"},
}
"""The keys that each kind of source reads."""
FILE_ENDS: Final = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


class SourceConfig(Section):
    """The tasks of one split. A key that the kind of source does not read must be left out."""

    kind: Literal["generated", "jsonl", "hub"] = "jsonl"
    """generated: rows from a function; jsonl: a file, by its end JSON lines, JSON, CSV, TSV or Parquet, also veRL's
    layout; hub: a Hugging Face data set, also if the path is neither a file nor ends as one."""
    target: str | None = None
    """generated: "file.py:function", called with seed, num, split, and root and names if taken; rows have an "id"."""
    names: tuple[str, ...] = ()
    """generated: parts of the data, such as [mawps_train] of Calc-X, for a function that takes names."""
    path: str | None = None
    """jsonl: the file, from here or from data.root; hub: its id or folder. data.val: null holds nothing out."""
    name: str | None = None
    """hub: the data set's configuration."""
    split: str | None = None
    """generated, hub: the split that is read; null: train."""
    question_field: str | None = None
    """hub: the column that the agent gets as question; null: the columns stay as they are."""
    result_field: str | None = None
    """hub: the column that the agent gets as result, as text; null: the columns stay as they are."""
    num: AtLeast0 | None = None
    """At most this many tasks, drawn with `seed`; null: all."""
    seed: AtLeast0 | None = None
    """Seed of the drawing, or of the generating function; null: 0."""

    @model_validator(mode="before")
    @classmethod
    def _find_kind(cls, values: Any) -> Any:
        """Take a path such as "openai/gsm8k" for a data set of the hub. Raise ConfigError for an earlier kind."""
        kind, path = (values.get("kind"), str(values.get("path") or "")) if isinstance(values, dict) else (None, "")
        if kind == "calcx":
            raise ConfigError("kind=calcx is now data=calcx_mawps; its parts are data.train.names and data.val.names")
        looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.removesuffix(".gz").endswith(FILE_ENDS)
        if kind in (None, "jsonl") and looks_like_id and not Path(path).is_file():
            return values | {"kind": "hub"}
        return values


class DataConfig(Section):
    """The tasks that are trained on, and those that are held out."""

    root: str = "data"
    """Folder of the files that a generating function reads, and of files that are not here."""
    val_group_by: str | None = None
    """A field of the held-out tasks, such as difficulty: their reward is also reported for each of its values."""
    train: SourceConfig = SourceConfig()
    val: SourceConfig = SourceConfig()
    val_sets: dict[str, SourceConfig] = Field(default_factory=dict)
    """Further held-out sets by name, such as {hard: {path: hard.csv}}: each has its own reward, and the held-out reward
    is the mean over the rows of all."""

    @model_validator(mode="after")
    def _check_sources(self) -> DataConfig:
        named = ((f"val_sets.{name}", source) for name, source in self.val_sets.items())
        for split, source in (("train", self.train), ("val", self.val), *named):
            for name, value in source.model_dump(mode="json", exclude={"kind"}).items():
                if name not in SOURCE_FIELDS[source.kind] and value not in (None, []):
                    raise ConfigError(f"data.{split}.{name}={value}: not read by kind={source.kind}; remove it")
        return self


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685): the parameters stay as they are, and W + alpha / rank * B A is trained."""

    rank: AtLeast0 = 0
    """Rank of the adapters; 0: all parameters are trained."""
    alpha: AtLeast1 = 32
    """Scale of the adapters, which is divided by the rank."""
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers with an adapter, such as [q_proj, v_proj]; all-linear: all but the output head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that `agl sft` drops in training."""
    path: str | None = None
    """Folder of an adapter in peft's format, from which training begins, with its alpha and targets."""

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        for name, unread in (("path", self.path), ("dropout", self.dropout), ("targets", self.targets != "all-linear")):
            refuse_unread(f"model.lora.{name}", bool(unread) and not self.rank, "model.lora.rank is 0")
        return self


class ModelConfig(Section):
    """The policy that is trained."""

    path: str
    """Folder or hub id of a causal language model; a relative path is from here, or else from the project's folder."""
    commit: str | None = None
    """Commit, branch or tag of a model on the hub; null: its newest commit. Every node takes the same commit."""
    max_len: AtLeast1 = 1024
    """Longest conversation in tokens, prompt and reply together."""
    words: tuple[str, ...] = ()
    """The vocabulary of a toy model: a table of logits with its own engine and learner; `path` is then only a name."""
    dtype: Dtype = "float32"
    """Number format of the computation: float32 or bfloat16. The learner keeps parameters in float32."""
    tool_parser: str | None = "hermes"
    """vLLM's parser of the model's tool calls; null: none."""
    completions_only: bool = False
    """Whether the agent uses v1/completions alone, so that the model needs no chat template."""
    lora: LoraConfig = LoraConfig()


class RetryConfig(Section):
    """How often and how soon failed rollouts are tried again."""

    budget: Annotated[float, Field(ge=0, allow_inf_nan=True)] = 1.0
    """Most retries among the groups in progress, as a share of their rollouts: a broken tool must not multiply work."""
    backoff_s: NotNegative = 1.0
    """The wait before the second attempt is drawn from 0 to this many seconds; the limit doubles with each attempt."""
    backoff_max_s: NotNegative = 60.0
    """Longest wait before an attempt, in seconds."""


class BreakerConfig(Section):
    """Stops a run whose rollouts all fail for the same reason, and names the reason."""

    window: AtLeast0 = 64
    """Number of latest attempts that are compared; 0 turns this off."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of them with the same error that stops the run; far below 0.9, a policy that is still bad would stop it."""


class AgentConfig(Section):
    """The agent: what runs for each task, how it is scored, and its limits."""

    target: str | Agent
    """"path/to/file.py:function", "package.module:function", or a command line; in Python also the function itself."""
    mode: AgentMode = "async"
    """How the agent runs: async (a coroutine), thread, process, or command."""
    reward: str | Agent | None = None
    """"path/to/file.py:function" or a function, called with (task, output); null: the agent returns its reward."""
    reward_min: float = 0.0
    """Lowest reward; a reward below it stops the run."""
    reward_max: float = 1.0
    """Highest reward; a reward above it stops the run."""
    part_weights: dict[str, float] = Field(default_factory=dict)
    """Weights of the parts of a reward that is a mapping, by name; if empty, each part has the weight 1."""
    timeout_s: Positive = 120.0
    """Seconds for one rollout, its scoring included."""
    call_timeout_s: Positive | None = None
    """Seconds for one model call, after which the engine is to blame and not the agent; null: half of timeout_s."""
    max_calls: AtLeast1 = 32
    """Most model calls of one rollout."""
    max_spans: AtLeast0 = 10_000
    """Most OpenTelemetry spans that the agent's side may send for one rollout."""
    max_recorded_mib: Positive = 64.0
    """Most MiB that the buffer records of one rollout, also of what is sent again. Then it refuses calls and spans."""
    instrument: tuple[str, ...] = ()
    """OpenTelemetry instrumentors to turn on in the agent's process, by entry point, such as [langchain]."""
    max_attempts: AtLeast1 = 3
    """Most attempts at a rollout whose failure is resampled; see algorithm.failures."""
    tool_errors: tuple[str, ...] = ()
    """Globs of agent errors that its tools or services are to blame for, such as ["*ConnectionError*", "*429*"]: the
    rollout then ends as tool_error, which is resampled, instead of agent_error."""
    retry: RetryConfig = RetryConfig()
    breaker: BreakerConfig = BreakerConfig()
    trained: str = "*"
    """Names of the agents that are trained: globs, separated by commas."""

    @property
    def reward_range(self) -> float:
        """Width of the range of valid rewards."""
        return self.reward_max - self.reward_min

    @model_validator(mode="after")
    def _check(self) -> AgentConfig:
        if self.instrument and self.mode == "command":
            raise ConfigError("agent.instrument: a command sets up its own; its environment says where traces go")
        if (self.call_timeout_s or 0) > self.timeout_s:
            raise ConfigError(f"agent.call_timeout_s={self.call_timeout_s}: must be at most timeout_s={self.timeout_s}")
        if self.reward_min >= self.reward_max:
            raise ConfigError("agent.reward_min must be below agent.reward_max")
        return self


class BufferConfig(Section):
    """The buffer's journal, and how much the buffer may take. docs/reliability.md says which setting survives what."""

    journal: bool = True
    """Whether training keeps a journal; if false, a buffer that dies takes the run with it."""
    path: str | None = None
    """Folder of the journal, on a local or a shared disk; null: journal/ in the run's folder."""
    fsync: Fsync = "interval"
    """When a record is acknowledged: always: when it is on the disk; interval: when the kernel has it, which puts it on
    the disk within fsync_interval_s; never: when the kernel has it."""
    fsync_interval_s: Annotated[float, Field(ge=0.001)] = 1.0
    """Most seconds between two syncs to the disk, of fsync=interval."""
    segment_mib: Positive = 64.0
    """Size of one file of the journal, in MiB."""
    max_disk_gib: Positive = 20.0
    """Size of the journal, in GiB, at which new rollouts and calls are refused; rollouts that run may end."""
    memory_gib: NotNegative = 2.0
    """Memory for the spans of ended rollouts, in GiB; further spans are read back from the journal."""

    @model_validator(mode="after")
    def _check(self) -> BufferConfig:
        changed = self.model_dump(exclude_defaults=True).keys() - {"journal"}
        refuse_unread("buffer", not self.journal and bool(changed), "buffer.journal is false")
        unread = self.fsync_interval_s != 1 and self.fsync != "interval"
        refuse_unread("buffer.fsync_interval_s", unread, "of fsync=interval")
        if self.max_disk_gib < (low := 2 * self.segment_mib / 1024):
            raise ConfigError(f"buffer.max_disk_gib={self.max_disk_gib}: must be at least {low}")
        return self


class LoopConfig(Section):
    """How far rollouts and training overlap (docs/async.md)."""

    max_lag: AtLeast0 = 0
    """Most updates by which the policy that is trained may be newer than a version that sampled a trained token. 0:
    generate, train and publish in turn; from 1 on they overlap. If engine and learner share a processor, only the time
    in which rollouts wait for their tools overlaps with training."""
    drop_beyond: AtLeast0 | None = None
    """A group with a token that is more than this many updates old is dropped as stale, which is a bias against slow
    tasks; null: no group is dropped for its age."""

    @model_validator(mode="after")
    def _check(self) -> LoopConfig:
        if self.drop_beyond is not None and self.drop_beyond >= self.max_lag:
            bound = f"no token is more than loop.max_lag={self.max_lag} updates old"
            raise ConfigError(f"loop.drop_beyond={self.drop_beyond}: {bound}; leave it out")
        return self

    @property
    def overlaps(self) -> bool:
        """Whether rollouts and training overlap."""
        return self.max_lag > 0

    def check_method(self, method: str, *, seeded: bool) -> None:
        """Raise ConfigError for a method of credit, or for seeded sampling, that needs rollouts of one version."""
        if self.max_lag and method == "gae":
            why = "credit.method=gae needs rollouts of one version, since its critic values the newest policy"
            raise ConfigError(f"loop.max_lag={self.max_lag}: {why}; set loop.max_lag=0, or a method without a critic")
        if self.max_lag and seeded:
            why = "sampling.seeded repeats a run, which needs steps of one version"
            raise ConfigError(f"loop.max_lag={self.max_lag}: {why}; leave one of them out")

    def check_memory(self, buffer: BufferConfig, rollouts_per_step: int, max_len: int) -> None:
        """Raise ConfigError for more rollouts at a time than the buffer has room for. `max_len`: most tokens of one; a
        token takes at least 8 bytes, for its id and its log-probability."""
        rollouts = rollouts_per_step * (self.max_lag + 1)
        needed, room = rollouts * max_len * 8 / 2**30, buffer.memory_gib + buffer.journal * buffer.max_disk_gib
        if self.max_lag and needed > room:
            why = f"{rollouts:,} rollouts at a time may need {needed:,.1f} GiB, and the buffer has {room:g}"
            raise ConfigError(f"loop.max_lag={self.max_lag}: {why}; lower it, or raise buffer.memory_gib")


class RolloutConfig(Section):
    """The processes that run agents."""

    workers: AtLeast1 = 1
    """Number of workers, spread over the nodes; a node that joins later gets as many as the others have on average."""
    concurrency: AtLeast1 = 64
    """Rollouts that each worker runs at a time."""
    unresponsive_timeout_s: Positive = 60.0
    """Seconds without an answer, because an agent blocks its event loop, after which a worker is replaced."""


class ServingConfig(Section):
    """The policy's engines, and the gateway in front of them."""

    replicas: AtLeast1 = 1
    """Number of engines, each with a copy of the policy."""
    tensor_parallel_size: AtLeast1 = 1
    """GPUs of each engine."""
    gateways: AtLeast1 | None = None
    """Number of gateways, behind a proxy; null: one on each node, also a later one, which its workers call directly."""
    host: str = "127.0.0.1"
    """Address on which the gateway listens, on each node. 0.0.0.0 lets in agents from other machines."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the gateway; 0 takes a free one. If Ray Serve runs already, its port is used."""
    max_num_seqs: AtLeast1 = 256
    """Most sequences that an engine samples at a time."""
    on_weight_update: OnWeightUpdate | None = None
    """What happens to unfinished calls when new weights arrive. wait: the update waits until they end; restart: the new
    weights answer them from the start; keep: they continue with the new weights, and both versions are recorded. null:
    keep if loop.max_lag is above 0, else wait."""
    kv_cache_gib: AtLeast1 = 1
    """Memory of each engine's KV cache on a CPU, in GiB."""
    threads: AtLeast1 = 1
    """Threads of each engine on a CPU. More pay with models of about 100 million parameters and more."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that an engine takes."""

    def check_memory(self, free_gib: float) -> None:
        """Raise UserError if the KV caches of all replicas on a CPU need more than this memory."""
        if (needed := self.replicas * self.kv_cache_gib) > free_gib:
            raise UserError(
                f"serving.kv_cache_gib={self.kv_cache_gib} for each of {self.replicas} replicas "
                f"needs {needed} GiB, but {free_gib:.1f} GiB of memory are free: lower it, or serving.replicas"
            )


class LearnerConfig(Section):
    """The processes that train the policy."""

    processes: AtLeast1 = 1
    """Number of training processes; FSDP shards the model over them."""
    nodes: AtLeast1 = 1
    """Number of nodes over which they are spread; `processes` is a multiple of it."""
    threads: AtLeast1 = 2
    """Threads of each process on a CPU."""
    max_tokens_per_micro_batch: AtLeast1 = 16384
    """Most tokens of one forward and backward pass."""
    max_logprob_gap: Positive | Literal["by_dtype"] | None = "by_dtype"
    """The run stops before an optimiser step if the log-probabilities of engine and learner differ by more than this on
    average over a step's tokens. by_dtype: 0.001 for float32, 0.05 for bfloat16 (docs/models.md); null: never."""

    @model_validator(mode="after")
    def _check(self) -> LearnerConfig:
        if self.processes % self.nodes:
            raise ConfigError(f"learner.processes={self.processes}: must be a multiple of learner.nodes={self.nodes}")
        return self


MAX_SHARED_GPU: Final = 0.5
"""Share of a GPU that an engine may take if a learner process has the rest."""


class HardwareConfig(Section):
    """The machines, and how engines and learner share them."""

    device: Device = "cpu"
    """Device of the policy and of the learner: cpu or cuda."""
    placement: Literal["apart", "together"] = "apart"
    """apart: engines and learner have GPUs of their own; together: each learner process shares a GPU with an engine."""
    address: str | None = None
    """Address of a running Ray cluster; null starts Ray here, or joins RAY_ADDRESS."""
    pass_env: tuple[str, ...] = ()
    """Names of environment variables that a running cluster gets from here, besides HF_HOME, HF_TOKEN, HF_ENDPOINT."""

    @model_validator(mode="after")
    def _check(self) -> HardwareConfig:
        if self.device == "cpu" and self.placement == "together":
            raise ConfigError("hardware.placement=together: shares GPUs, and hardware.device=cpu has none")
        return self

    def check_use(self, serving: ServingConfig, learner: LearnerConfig) -> None:
        """Raise ConfigError for what the hardware cannot do, and for keys that it makes meaningless."""
        share, default = serving.gpu_memory_utilization, ServingConfig()
        if self.placement == "together":
            where = "where hardware.placement=together"
            if serving.tensor_parallel_size > 1:
                raise ConfigError(f"serving.tensor_parallel_size: must be 1 {where} shares each GPU")
            if share > MAX_SHARED_GPU:
                limit = f"at most {MAX_SHARED_GPU} {where} leaves the learner the rest of each GPU"
                raise ConfigError(f"serving.gpu_memory_utilization={share}: {limit}")
        on_cpu, why = self.device == "cpu", f"hardware.device is {self.device}"
        refuse_unread("serving.gpu_memory_utilization", on_cpu and share != default.gpu_memory_utilization, why)
        refuse_unread("serving.kv_cache_gib", not on_cpu and serving.kv_cache_gib != default.kv_cache_gib, why)
        refuse_unread("serving.threads", not on_cpu and serving.threads != default.threads, why)
        refuse_unread("learner.threads", not on_cpu and learner.threads != LearnerConfig().threads, why)


class TrackingConfig(Section):
    """Where metrics go besides the run's own files."""

    wandb: WandbMode = "offline"
    """Weights & Biases: offline (`wandb sync` sends it later), online, or disabled."""
    project: str = "agent-lightning"
    """Project in Weights & Biases."""
    group: str | None = None
    """Group of runs in Weights & Biases."""
    tags: tuple[str, ...] = ()
    """Tags in Weights & Biases."""
    tensorboard: bool = True
    """Whether TensorBoard files are written."""
