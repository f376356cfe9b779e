"""The config: Hydra at the edge, typed dataclasses below it.

`load(overrides)` composes conf/ and checks every key and type once; nothing below ever sees a DictConfig.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agent_lightning.errors import ConfigError


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
    """generated: rows from a function. calcx: normalised Calc-X files under data.root. jsonl: one file.
    hub: a Hugging Face data set, by id or as a local folder."""
    target: str | None = None
    """generated: "path/to/file.py:function", called with seed, num and split; returns rows with an "id"."""
    names: list[str] = field(default_factory=list)
    path: str | None = None
    name: str | None = None
    split: str | None = None
    question_field: str | None = None
    result_field: str | None = None
    num: int | None = None
    """At most this many tasks, drawn with `seed`; None: all."""
    seed: int | None = None

    def check(self, where: str) -> None:
        """Raise ConfigError for a field that this kind does not read."""
        _one_of(f"{where}.kind", self.kind, tuple(SOURCE_FIELDS))
        used = SOURCE_FIELDS[self.kind] | {"kind"}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in used and value not in (None, []):
                raise ConfigError(f"{where}.{item.name}: not read by kind={self.kind}; remove it")


@dataclass(slots=True, kw_only=True)
class DataConfig:
    root: str = "data"
    """Folder of the calcx files."""
    train: SourceConfig = field(default_factory=SourceConfig)
    val: SourceConfig = field(default_factory=SourceConfig)


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    path: str
    """A local folder or a hub id of a causal language model. Relative paths: from here, else from the project."""
    max_len: int = 1024
    """Longest conversation in tokens, prompt and reply together."""
    dtype: str = "float32"
    tool_parser: str | None = "hermes"


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
    max_calls: int = 32
    """Model calls of one rollout."""
    max_attempts: int = 2
    """Tries at a rollout whose engine failed or whose worker died."""
    trained: str = "*"
    """Names of the agents that are trained: globs, comma separated."""


@dataclass(slots=True, kw_only=True)
class AlgorithmConfig:
    tasks_per_step: int = 16
    rollouts_per_task: int = 8
    rollouts_per_batch: int | None = None
    """Rollouts of one optimiser step; null: all of the step's in one."""
    advantage_scale: str = "std"
    """std: GRPO; none: Dr. GRPO, which leaves the group's spread in."""
    lr: float = 1e-6
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    kl_coef: float = 0.0
    """Weight of the KL to the starting policy; 0 keeps no reference model."""
    failures: dict[str, float | None] = field(default_factory=dict)
    """Reward of a rollout by outcome, e.g. {timeout: null}; null masks it. See credit.FailurePolicy."""


@dataclass(slots=True, kw_only=True)
class SamplingConfig:
    """What the engine is asked for. Training: these govern. Validation: the agent's own wish comes first."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64


@dataclass(slots=True, kw_only=True)
class SamplingSplits:
    train: SamplingConfig = field(default_factory=SamplingConfig)
    val: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    workers: int = 1
    concurrency: int = 64
    """Rollouts at a time in each worker."""


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    device: str = "cpu"
    """cpu or cuda; of the policy and of the learner."""
    address: str | None = None
    """Of a running Ray cluster; null starts one here (or joins RAY_ADDRESS)."""
    replicas: int = 1
    """Copies of the policy's engine."""
    tensor_parallel_size: int = 1
    gateways: int = 1
    learner_processes: int = 1
    learner_threads: int = 2
    """On a CPU: threads of each learner process."""
    host: str = "127.0.0.1"
    port: int = 0
    """Of the gateway; 0 takes a free one."""
    max_num_seqs: int = 256
    kv_cache_gib: int = 1
    """On a CPU: memory of each engine's KV cache."""
    gpu_memory_utilization: float = 0.85
    max_tokens_per_micro_batch: int = 16384


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
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: only after the last step, and when the run is stopped."""
    runs_dir: str = "runs"
    name: str | None = None
    """Of the run's folder; null makes one from experiment, seed and time."""
    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    agent: AgentConfig
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    sampling: SamplingSplits = field(default_factory=SamplingSplits)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    verl: dict[str, Any] = field(default_factory=dict)
    """Fields of veRL's FSDPEngineConfig, untouched, for experts."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """vLLM engine arguments, untouched, for experts."""

    def check(self) -> None:
        """What types cannot say. Raises ConfigError with the key's path."""
        self.data.train.check("data.train")
        self.data.val.check("data.val")
        _one_of("agent.mode", self.agent.mode, ("async", "thread", "process", "command"))
        _one_of("algorithm.advantage_scale", self.algorithm.advantage_scale, ("std", "none"))
        _one_of("hardware.device", self.hardware.device, ("cpu", "cuda"))
        _one_of("model.dtype", self.model.dtype, ("float32", "bfloat16"))
        _one_of("tracking.wandb", self.tracking.wandb, ("offline", "online", "disabled"))
        for key, value, low in (
            ("steps", self.steps, 0),
            ("eval_every", self.eval_every, 0),
            ("checkpoint_every", self.checkpoint_every, 0),
            ("algorithm.tasks_per_step", self.algorithm.tasks_per_step, 1),
            ("algorithm.rollouts_per_task", self.algorithm.rollouts_per_task, 2),
            ("rollout.workers", self.rollout.workers, 1),
            ("rollout.concurrency", self.rollout.concurrency, 1),
            ("agent.max_calls", self.agent.max_calls, 1),
            ("agent.max_attempts", self.agent.max_attempts, 1),
            ("hardware.replicas", self.hardware.replicas, 1),
            ("hardware.gateways", self.hardware.gateways, 1),
            ("hardware.learner_processes", self.hardware.learner_processes, 1),
        ):
            if value < low:
                raise ConfigError(f"{key}={value}: must be at least {low}")
        if self.agent.reward_min >= self.agent.reward_max:
            raise ConfigError("agent.reward_min must be below agent.reward_max")
        if self.agent.timeout_s <= 0:
            raise ConfigError(f"agent.timeout_s={self.agent.timeout_s}: must be above 0")


def project_folder(name: str) -> Path:
    """A folder that ships with the project (conf, examples): in the package where it was installed, else beside it."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def resolve_path(path: str) -> str:
    """A local path from here, or else from the project's folder; anything else (a hub id) as it is."""
    if Path(path).exists():
        return str(Path(path).resolve())
    parts = Path(path).parts
    shipped = project_folder(parts[0]).joinpath(*parts[1:]) if parts and not Path(path).is_absolute() else None
    return str(shipped) if shipped is not None and shipped.exists() else path


def load(overrides: Sequence[str]) -> Config:
    """Compose conf/train.yaml with Hydra overrides. Raises ConfigError, one line, naming the key.

    Example:

        load(["experiment=calc_tiny", "steps=20", "algorithm.lr=1e-3"]).algorithm.lr  # 0.001
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    try:
        with initialize_config_dir(config_dir=str(project_folder("conf")), version_base="1.3"):
            node = compose("train", overrides=list(overrides))
    except HydraException as error:
        raise ConfigError(_explain(error)) from error
    return from_mapping(OmegaConf.to_container(node, resolve=True))


def reload(path: Path, overrides: Sequence[str]) -> Config:
    """A run's own config.yaml with dotted overrides on top: what `resume` starts from. Raises ConfigError."""
    try:
        node = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        return from_mapping(OmegaConf.to_container(node, resolve=True))
    except (OmegaConfBaseException, OSError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error


def from_mapping(values: Any) -> Config:
    """Check keys and types. Raises ConfigError naming the key's path."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), values)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    config.check()
    return config


def to_yaml(config: Config) -> str:
    """The whole config, every default written out."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_mapping(config: Config) -> dict[str, Any]:
    """The whole config as plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _one_of(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(allowed)}")


def _explain(error: Exception) -> str:
    """Hydra's message as one line, with what there is to choose from where it names options."""
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    lines = [line.strip() for cause in causes for line in str(cause).splitlines() if line.strip()]
    unique = list(dict.fromkeys(line for line in lines if "Set the environment variable" not in line))
    return "; ".join(unique)[:600]

