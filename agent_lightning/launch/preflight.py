"""What can be checked before a run starts: agent, model, memory, port, tasks, and whether the cluster can hold it."""

from __future__ import annotations

import inspect
import logging
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from agent_lightning.config.load import Config, SourceConfig, resolve_path
from agent_lightning.core.errors import ConfigError, UserError
from agent_lightning.core.types import Split, Task
from agent_lightning.launch import placement
from agent_lightning.rollouts.agents import Mode, check, load
from agent_lightning.rollouts.client import check_instrumentors
from agent_lightning.run import tasks
from agent_lightning.run.storage import check_place


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
    wanted = config.serving.replicas * config.serving.kv_cache_gib
    if wanted > available:
        raise UserError(
            f"serving.kv_cache_gib={config.serving.kv_cache_gib} for each of {config.serving.replicas} replicas "
            f"needs {wanted} GiB, but {available:.1f} GiB of memory are free: lower it, or serving.replicas"
        )


def check_port(config: Config) -> None:
    """Serve's proxy would retry a port in use for a long time and then fail without saying so. Raises UserError."""
    host, port = config.serving.host, config.serving.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            message = f"serving.port={port} cannot be used on {host} ({error.strerror}): choose another, or 0 for any"
            raise UserError(message) from error


def _available_gib() -> float:
    import psutil

    return float(psutil.virtual_memory().available) / 2**30


def cluster_is_own(config: Config) -> bool:
    """Whether a cluster is started here, and none is joined."""
    return (config.hardware.address or os.environ.get("RAY_ADDRESS")) in (None, "", "local")


def own_cpus(config: Config) -> int | None:
    """Of a cluster that is started here: on a CPU, as many as asked for, whether or not the machine has them."""
    if config.hardware.device != "cpu":
        return None
    return math.ceil(placement.total(placement.groups(config))["CPU"]) + 3


def check_cluster(config: Config, *, train: bool) -> None:
    """Join the cluster where there is one, and see that it can hold the run. Raises UserError."""
    found = cluster_nodes(config)
    lacks = placement.missing(placement.groups(config, train=train), found)
    if lacks:
        where = f"the cluster of {len(found)} nodes" if len(found) > 1 else "this machine"
        raise UserError(f"{where} is too small: {', '.join(lacks)}; choose another hardware=, or hardware.address=")
    check_reach(config, len(found))


def check_reach(config: Config, nodes: int) -> None:
    """See that the workers of each of so many nodes can ask a gateway, or the proxy on the head. Raises UserError."""
    gateways, host = config.serving.gateways, config.serving.host
    said, instead = f"serving.gateways={gateways}", "leave it null for one on each node"
    if config.sampling.seeded:
        gateways, said, instead = 1, "sampling.seeded=true, which has one gateway,", "leave it false"
    if gateways is not None and nodes > 1 and host != "0.0.0.0":
        raise UserError(
            f"{said} on {nodes} nodes: workers on the others do not reach the head's proxy at {host}; {instead}, "
            "or set serving.host=0.0.0.0"
        )


def cluster_nodes(config: Config) -> list[placement.Resources]:
    """What each node has; of the cluster that is joined, or of this machine. Raises UserError."""
    if cluster_is_own(config):
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
        return [{"CPU": float(own_cpus(config) or os.cpu_count() or 1), "GPU": float(gpus)}]
    use_token()
    prepare_environment()
    from agent_lightning.core import actors as cluster

    cluster.init_ray(config.hardware.address)
    cluster.check_nodes()
    return [node.resources for node in cluster.nodes()]


def use_token() -> None:
    """Show the token of this account to a cluster that is joined; before Ray is imported, which reads it once.

    `ray start` makes a cluster ask for it wherever it finds one, but does not have clients show it.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_TOKEN" in os.environ or path.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def prepare_environment() -> None:
    """Settings that Ray's processes inherit from ours; one that is set already is kept."""
    from agent_lightning.core.actors import pass_on
    from agent_lightning.serving.app import SERVE_ENVIRONMENT, free_port

    quiet = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "TOKENIZERS_PARALLELISM": "false"}
    # Fixed by default: a second run on the machine could not start its proxy, and the proxies that stand in where a run
    # has no gateway left would answer for one another's runs.
    names = ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")
    ports = {f"RAY_SERVE_{name}_PORT": str(free_port("0.0.0.0")) for name in names}
    pass_on(SERVE_ENVIRONMENT | quiet | ports)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


def preflight(config: Config, splits: Sequence[Split]) -> dict[Split, list[Task]]:
    """What can be checked before anything starts: agent, reward, model, memory, port, tasks. Raises UserError."""
    check(config.agent.target, cast(Mode, config.agent.mode))
    check_instrumentors(config.agent.instrument)
    if config.agent.reward is not None:
        load(config.agent.reward)
    model_folder(config)
    check_memory(config)
    if cluster_is_own(config):
        check_port(config)
    if "train" in splits:
        check_place(config.runs_dir)
    check_cluster(config, train="train" in splits)
    return {split: load_tasks(config, split) for split in splits}
