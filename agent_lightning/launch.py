"""From a config to a running system and back to nothing: Ray, service, learner, rollout workers."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from agent_lightning import tasks
from agent_lightning.agents import Mode, load
from agent_lightning.buffer import Buffer
from agent_lightning.client import check_instrumentors
from agent_lightning.config import Config, SourceConfig, resolve_path
from agent_lightning.errors import ConfigError, PartDied, UserError
from agent_lightning.journal import Fsync, JournalConfig
from agent_lightning.learners.base import Learner
from agent_lightning.policy import PolicyBoard
from agent_lightning.rollout import AgentSpec, RolloutWorker
from agent_lightning.state import State
from agent_lightning.supervise import Workers
from agent_lightning.types import Split, Task

if TYPE_CHECKING:
    from agent_lightning.learners.verl import LearnerConfig
    from agent_lightning.serving.app import MakeReplica, Service

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class System:
    """What runs. `learner` is None where nothing is trained."""

    buffer: Buffer
    board: PolicyBoard
    service: Service
    learner: Learner | None
    run_secret: bytes


def load_tasks(config: Config, split: Split) -> list[Task]:
    """The tasks of a split, as the config says. Raises DataError, ConfigError."""
    source = config.data.train if split == "train" else config.data.val
    loaded = _load(config, source, f"data.{split}")
    if source.num is not None and source.kind != "generated":
        loaded = tasks.sample(loaded, source.num, source.seed or 0)
    if not loaded:
        raise ConfigError(f"data.{split}: there are no tasks")
    return loaded


def _load(config: Config, source: SourceConfig, where: str) -> list[Task]:
    if source.kind == "calcx":
        return tasks.load_calcx(config.data.root, source.names)
    if source.kind == "generated":
        if source.target is None or source.num is None:
            raise ConfigError(f"{where}: kind=generated needs target and num")
        rows = cast(Any, load(source.target))
        root = {"root": config.data.root} if "root" in inspect.signature(rows).parameters else {}
        return tasks.make(rows, seed=source.seed or 0, num=source.num, split=source.split or "train", **root)
    if source.path is None:
        raise ConfigError(f"{where}.path: kind={source.kind} needs it")
    if source.kind == "jsonl":
        return tasks.load_jsonl(source.path)
    return tasks.load_hub(
        source.path,
        name=source.name,
        split=source.split or "train",
        question_field=source.question_field or "question",
        result_field=source.result_field or "result",
    )


def model_folder(config: Config) -> str:
    """Of the config's model; a toy one has none, and its name is returned. Raises UserError."""
    return config.model.path if config.model.words else find_model(config.model.path)


def find_model(path: str) -> str:
    """A folder with a model in it, or a hub id that can be reached. Raises UserError."""
    found = resolve_path(path)
    if Path(found).is_dir():
        if not (Path(found) / "config.json").exists():
            raise UserError(f"model.path={path}: {found} has no config.json; point to a folder in Hugging Face format")
        return found
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"model.path={path}: no such folder; give a folder in Hugging Face format, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"model.path={path}: neither a local folder nor reachable on the hub ({type(error).__name__}: {first})"
        ) from error


def check_memory(config: Config) -> None:
    """The KV caches must fit in memory. Raises UserError."""
    if config.hardware.device != "cpu" or config.model.words:
        return
    available = _available_gib()
    wanted = config.hardware.replicas * config.hardware.kv_cache_gib
    if wanted > available:
        raise UserError(
            f"hardware.kv_cache_gib={config.hardware.kv_cache_gib} for each of {config.hardware.replicas} replicas "
            f"needs {wanted} GiB, but {available:.1f} GiB of memory are free: lower it, or hardware.replicas"
        )


def check_port(config: Config) -> None:
    """Serve's proxy would retry a port in use for a long time and then fail without saying so. Raises UserError."""
    host, port = config.hardware.host, config.hardware.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            message = f"hardware.port={port} cannot be used on {host} ({error.strerror}): choose another, or 0 for any"
            raise UserError(message) from error


def _available_gib() -> float:
    import psutil

    return float(psutil.virtual_memory().available) / 2**30


@asynccontextmanager
async def system(
    config: Config, *, train: bool, workers: int, journal: Path | None = None, resumed: State | None = None
) -> AsyncIterator[System]:
    """Start everything, and stop it again however the block ends. `journal`: the buffer's folder, where it keeps one;
    `resumed`: the checkpoint from which the run goes on. Raises UserError, EngineError, JournalError, PartDied."""
    model = model_folder(config)
    check_memory(config)
    check_port(config)
    # Ray's own imports take seconds: after what can be refused at once.
    from agent_lightning import cluster
    from agent_lightning.serving import app

    hardware = config.hardware
    port = hardware.port or app.free_port(hardware.host)
    prepare_environment()
    cpus = hardware.replicas * hardware.tensor_parallel_size + hardware.learner_processes * 3 + 1
    async with AsyncExitStack() as stack:
        own = await asyncio.to_thread(cluster.init_ray, hardware.address, cpus if hardware.device == "cpu" else None)
        stack.callback(cluster.shutdown_ray)
        run_secret = secrets.token_bytes(32)
        buffer = await _start_buffer(config, run_secret, journal, resumed)
        board = cluster.spawn(PolicyBoard)
        name = f"agl-{secrets.token_hex(3)}"
        serving = asyncio.to_thread(
            app.start,
            name=name,
            config=_serving(config, model, port),
            gateway=_gateway(config, model, run_secret),
            recorder=buffer,
            board=board,
            replica=_toy_replica(config),
        )
        learning = asyncio.to_thread(_build_learner, config, model) if train else _nothing()
        # Both to their end, also where one fails: a thread that outlived Ray would start a new one.
        service, learner = await asyncio.gather(serving, learning, return_exceptions=True)
        if isinstance(service, BaseException):
            raise service
        if isinstance(learner, BaseException):
            raise learner
        if not own:  # one's own cluster ends with all that is in it; Serve would take half a minute
            stack.callback(service.stop)
        await app.wait_until_healthy(service.url, timeout=60.0)
        await _start_workers(config, buffer, service, workers, stack)
        try:
            yield System(buffer=buffer, board=board, service=service, learner=learner, run_secret=run_secret)
        except cluster.ActorDied as error:
            raise PartDied(f"a process of the run has died: {cluster.who_died(error)}") from error


async def _start_buffer(config: Config, run_secret: bytes, journal: Path | None, resumed: State | None) -> Buffer:
    """Raises JournalError where the journal cannot be read or written."""
    from agent_lightning import cluster

    kept = None if journal is None else journal_config(config, journal)
    buffer = cluster.spawn(
        Buffer,
        restarts=kept is not None,
        run_secret=run_secret,
        retries=config.retries(),
        breaker=config.breaker(),
        max_calls=config.agent.max_calls,
        max_spans=config.agent.max_spans,
        first_group=resumed.next_group if resumed is not None else None,
        journal=kept,
        memory_bytes=int(config.buffer.memory_gib * 2**30),
    )
    if resumed is not None and kept is not None:
        there = await buffer.resume(resumed.step, resumed.next_group)
        logger.warning("resumed from step %d: the journal has %d rollouts that need not run again", resumed.step, there)
    return buffer


def journal_config(config: Config, folder: Path) -> JournalConfig:
    buffer = config.buffer
    return JournalConfig(
        path=folder.absolute(),
        fsync=cast(Fsync, buffer.fsync),
        fsync_interval_s=buffer.fsync_interval_s,
        segment_bytes=buffer.segment_mib * 2**20,
        max_bytes=int(buffer.max_disk_gib * 2**30),
    )


async def _nothing() -> None:
    return None


def prepare_environment() -> None:
    """Settings that Ray's processes inherit from ours; one that is set already is kept."""
    from agent_lightning.serving.app import SERVE_ENVIRONMENT, free_port

    quiet = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "TOKENIZERS_PARALLELISM": "false"}
    # Fixed by default: a second run on the machine could not start its proxy.
    ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port("0.0.0.0")) for name in ("METRICS", "STATS")}
    for key, value in (SERVE_ENVIRONMENT | quiet | ports).items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def _toy_replica(config: Config) -> MakeReplica | None:
    """What makes a replica of a toy model; None for any other."""
    if not config.model.words:
        return None
    from agent_lightning.toy_run import ToyReplica

    return partial(ToyReplica, tuple(config.model.words), config.seed, config.model.max_len)


def _build_learner(config: Config, model: str) -> Learner:
    if config.model.words:
        from agent_lightning.toy import ToyLanguage
        from agent_lightning.toy_run import SharedToyLearner

        algorithm, temperature = config.algorithm, config.sampling.train.temperature
        language = ToyLanguage(tuple(config.model.words))
        return SharedToyLearner(language, lr=algorithm.lr, clip_ratio=algorithm.clip_ratio_low, temperature=temperature)
    from agent_lightning.learners.verl import VerlLearner

    return VerlLearner(learner_config(config, model))


def learner_config(config: Config, model: str) -> LearnerConfig:
    """What the learner is told."""
    from agent_lightning.learners.verl import CriticSettings, LearnerConfig

    algorithm, credit, hardware = config.algorithm, config.credit, config.hardware
    rollouts = algorithm.tasks_per_step * algorithm.rollouts_per_task
    batches = -(-rollouts // (algorithm.rollouts_per_batch or rollouts))
    critic = CriticSettings(
        lr=10 * algorithm.lr if config.critic.lr is None else config.critic.lr,
        clip_range=config.critic.clip_range,
        warmup_steps=config.critic.warmup_steps,
        discount=credit.discount,
        trace=credit.gae_lambda,
        over=cast(Any, credit.gae_over),
    )
    return LearnerConfig(
        model_path=model,
        device=cast(Any, hardware.device),
        world_size=hardware.learner_processes,
        num_threads=hardware.learner_threads,
        dtype=cast(Any, config.model.dtype),
        seed=config.seed,
        loss=cast(Any, algorithm.loss),
        lr=algorithm.lr,
        lr_warmup_steps=algorithm.lr_warmup_steps,
        lr_schedule=cast(Any, algorithm.lr_schedule),
        total_steps=config.steps * algorithm.epochs * batches,
        weight_decay=algorithm.weight_decay,
        clip_grad=algorithm.clip_grad,
        clip_ratio_low=algorithm.clip_ratio_low,
        clip_ratio_high=algorithm.clip_ratio_high,
        kl_coef=algorithm.kl_coef,
        kl_in=cast(Any, algorithm.kl_in),
        kl_kind=algorithm.kl_kind,
        importance=cast(Any, algorithm.importance),
        importance_cap=algorithm.importance_cap,
        normalise=credit.scale == "batch",
        critic=critic if credit.method == "gae" else None,
        entropy_coef=algorithm.entropy_coef,
        temperature=config.sampling.train.temperature,
        max_tokens_per_micro_batch=hardware.max_tokens_per_micro_batch,
        verl=config.verl,
    )


def _serving(config: Config, model: str, port: int) -> Any:
    from agent_lightning.serving.app import ServingConfig

    hardware = config.hardware
    return ServingConfig(
        model_path=model,
        device=cast(Any, hardware.device),
        replicas=hardware.replicas,
        tensor_parallel_size=hardware.tensor_parallel_size,
        gateways=hardware.gateways,
        host=hardware.host,
        port=port,
        dtype=config.model.dtype,
        max_model_len=config.model.max_len,
        max_num_seqs=hardware.max_num_seqs,
        kv_cache_gib=hardware.kv_cache_gib,
        replica_cpus=0.01 if config.model.words else 1,
        gpu_memory_utilization=hardware.gpu_memory_utilization,
        tool_parser=config.model.tool_parser,
        seed=config.seed,
        engine=config.vllm,
    )


def vocab_size(model: str) -> int:
    """Of a model's folder; where it does not say, that of any."""
    path = Path(model) / "config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    return int((known.get("text_config") or known).get("vocab_size") or 2**31)


def _gateway(config: Config, model: str, run_secret: bytes) -> Any:
    from agent_lightning.serving.gateway import GatewayConfig

    sampling = {"train": asdict(config.sampling.train), "val": asdict(config.sampling.val)}
    agent = config.agent
    timeout_s = agent.timeout_s / 2 if agent.call_timeout_s is None else agent.call_timeout_s
    return GatewayConfig(
        model="policy",
        run_secret=run_secret,
        sampling=cast(Any, sampling),
        seed=config.seed if config.sampling.seeded else None,
        vocab_size=vocab_size(model),
        call_timeout_s=timeout_s,
    )


def agent_spec(config: Config) -> AgentSpec:
    agent = config.agent
    return AgentSpec(
        target=agent.target,
        mode=cast(Mode, agent.mode),
        reward_target=agent.reward,
        reward_range=(agent.reward_min, agent.reward_max),
        timeout_s=agent.timeout_s,
        concurrency=config.rollout.concurrency,
        tool_errors=tuple(agent.tool_errors),
        instrumentors=tuple(agent.instrument),
    )


async def _start_workers(config: Config, buffer: Buffer, service: Service, number: int, stack: AsyncExitStack) -> None:
    from agent_lightning import cluster

    spec = agent_spec(config)

    def make(name: str) -> RolloutWorker:
        return cluster.spawn(
            RolloutWorker,
            options={"scheduling_strategy": "SPREAD"},
            buffer=buffer,
            agent=spec,
            policy_url=service.url,
            model="policy",
            worker=name,
        )

    workers = Workers(make, number=number, buffer=buffer, kill=cluster.kill, hung_s=config.rollout.hung_s)
    running = asyncio.create_task(workers.run())

    async def stop() -> None:
        await workers.stop()
        await asyncio.wait((running,))

    stack.push_async_callback(stop)


def preflight(config: Config, splits: Sequence[Split]) -> dict[Split, list[Task]]:
    """What can be checked before anything starts: agent, reward, model, memory, port, tasks. Raises UserError."""
    from agent_lightning.agents import check

    check(config.agent.target, cast(Mode, config.agent.mode))
    check_instrumentors(config.agent.instrument)
    if config.agent.reward is not None:
        load(config.agent.reward)
    model_folder(config)
    check_memory(config)
    check_port(config)
    return {split: load_tasks(config, split) for split in splits}
