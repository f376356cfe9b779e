"""Checks before a run starts: one table, for a start and for a dry run.

tasks = require(config, "train", "val").tasks  # a start raises the error of the first check that fails
inspect(config).missing                        # a dry run lists all: ["port: serving.port=8000 cannot be ...", ...]
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Final, cast

from agent_lightning.config.load import Config
from agent_lightning.config.running import SourceConfig
from agent_lightning.core import ray_private
from agent_lightning.core.errors import ConfigError, UserError
from agent_lightning.core.text import one_line
from agent_lightning.core.types import Split, Task
from agent_lightning.launch import adapters, backend, engine_fields, hub, models, placement
from agent_lightning.launch.models import ModelFacts
from agent_lightning.rollouts import agents, client
from agent_lightning.run import tasks
from agent_lightning.run.storage import check_place
from agent_lightning.run.tracking import check_login


@dataclass(slots=True, kw_only=True)
class Inspection:
    """A config, and what the checks learn about the machine, the cluster and the hub that it needs."""

    config: Config
    splits: Sequence[Split]  # the splits whose tasks are read; a run that reads "train" also trains
    serves: bool = True  # whether there are engines
    trains: bool = True  # whether there is a learner
    download: bool = True  # whether models and data sets are downloaded, or only looked up on the hub
    assumed: Sequence[placement.Resources] = ()  # the resources of planned nodes, which replace those of the cluster
    nodes: Sequence[placement.Resources] = ()  # the resources of the nodes of the cluster, or the assumed ones
    model: ModelFacts | None = None  # None for a toy model, and if the model is missing
    tasks: dict[Split, list[Task]] = field(default_factory=dict)
    """The tasks of each split, except splits that are missing or stay on the hub."""
    missing: list[str] = field(default_factory=list)  # a line for each check that failed


def require(config: Config, *splits: Split, trains: bool = True) -> Inspection:
    """Make all checks of a run with tasks of these splits, or without splits those of its engine. Raises the UserError
    of the first check that fails."""
    inspection = Inspection(config=config, splits=splits, trains=trains)
    for _, check in CHECKS if splits else ENGINE_CHECKS:
        check(inspection)
    return inspection


def require_supervised(config: Config) -> Inspection:
    """Make the checks of supervised training, which has a learner alone, and read its chats. Raises UserError."""
    inspection = Inspection(config=config, splits=("train", "val"), serves=False)
    for what, check in CHECKS:
        if what not in ("agent", "memory", "port"):
            check(inspection)
    return inspection


def inspect(config: Config, assumed: Sequence[placement.Resources] = ()) -> Inspection:
    """Make all checks of a training run and note each that fails. Starts nothing, and downloads no weights or data."""
    inspection = Inspection(config=config, splits=("train", "val"), download=False, assumed=assumed)
    for what, check in CHECKS:
        try:
            check(inspection)
        except UserError as error:
            inspection.missing.append(f"{what}: {one_line(error)}")
    return inspection


def _check_reward(inspection: Inspection) -> None:
    if isinstance(inspection.config.agent.reward, str):
        agents.load(inspection.config.agent.reward)


def _check_model(inspection: Inspection) -> None:
    config = inspection.config
    if (facts := backend.choose(config).read_model()) is None:
        return
    inspection.model = facts
    lora = config.model.lora
    lines = [*models.problems(facts, config), *(models.engine_problems(facts, config) if inspection.serves else ())]
    if lora.rank and not lines and Path(facts.location).is_dir():
        lines += adapters.problems(Path(facts.location), lora)
    if lora.path is not None and not inspection.trains:
        lines.append("model.lora.path: only training begins from an adapter; serve what `agl export --merged` writes")
    if lora.path is not None and inspection.serves and config.algorithm.has_reference:
        reference = (
            "its reference would be the model without the adapter of model.lora.path, not the policy at the start"
        )
        lines.append(f"algorithm.kl_coef: {reference}; give both merged as model.path (agl export --merged, or peft)")
    if lora.dropout and inspection.serves:
        lines.append("model.lora.dropout: the sampled tokens would be trained by another policy; agl sft may have it")
    if lines:
        raise UserError("; ".join(lines))
    if inspection.download and cluster_is_own(config):  # in another cluster, each node downloads for itself
        hub.find_model(config.model.path, facts.revision)


def _check_environment(inspection: Inspection) -> None:
    if unset := [name for name in inspection.config.hardware.pass_env if name not in os.environ]:
        raise UserError(f"hardware.pass_env: {', '.join(unset)} is not set here; export it, or leave it out")


def _check_fields(inspection: Inspection) -> None:
    engine_fields.check("verl", inspection.config.verl)
    engine_fields.check("vllm", inspection.config.vllm)


def _check_port(inspection: Inspection) -> None:
    """Serve's proxy would retry a port in use for a long time, and then fail without naming it."""
    if inspection.assumed or not cluster_is_own(inspection.config):
        return  # the port is on another machine
    host, port = inspection.config.serving.host, inspection.config.serving.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            message = f"serving.port={port} cannot be used on {host} ({error.strerror}): choose another, or 0 for any"
            raise UserError(message) from error


def _check_cluster(inspection: Inspection) -> None:
    """The nodes can hold the placement groups of the run. Joins the cluster, if the run does not start its own."""
    config = inspection.config
    groups = backend.choose(config).groups(train="train" in inspection.splits, serve=inspection.serves)
    inspection.nodes = inspection.assumed or cluster_nodes(config)
    lacks = placement.missing(groups, inspection.nodes)
    if lacks:
        number = len(inspection.nodes)
        where = f"the cluster of {number} nodes" if number > 1 else "this machine"
        raise UserError(f"{where} is too small: {', '.join(lacks)}; choose another hardware=, or hardware.address=")


def _check_reach(inspection: Inspection) -> None:
    """The workers of each node must reach a gateway, or the proxy on the head."""
    serving = inspection.config.serving
    gateways = inspection.config.fixed_gateways
    setting, instead = f"serving.gateways={gateways}", "leave it null for one on each node"
    if inspection.config.sampling.seeded:
        setting, instead = "sampling.seeded=true, which has one gateway,", "leave it false"
    if inspection.serves and gateways is not None and len(inspection.nodes) > 1 and serving.host != "0.0.0.0":
        raise UserError(
            f"{setting} on {len(inspection.nodes)} nodes: workers on the others do not reach the head's proxy at "
            f"{serving.host}; {instead}, or set serving.host=0.0.0.0"
        )


def _check_tasks(split: Split, inspection: Inspection) -> None:
    """The tasks of a split can be read; a data set that a dry run would have to download must be on the hub."""
    config = inspection.config
    if split not in inspection.splits:
        return
    sources = list(_sources(config, split).values())
    on_hub = [source.path for source in sources if source.kind == "hub" and not Path(source.path or "").is_dir()]
    if inspection.download or not on_hub:
        inspection.tasks[split] = load_tasks(config, split)
    for path in on_hub if not inspection.download else ():
        hub.check_data_set(path or "")


Check = Callable[[Inspection], None]
"""A check raises UserError if the run cannot start; it may store what it has learned in the inspection."""

ENGINE_CHECKS: Final[Sequence[tuple[str, Check]]] = (
    ("config", _check_fields),
    ("config", _check_environment),
    ("model", _check_model),
    ("memory", lambda inspection: backend.choose(inspection.config).check_memory()),
    ("port", _check_port),
)
CHECKS: Final[Sequence[tuple[str, Check]]] = (
    ("agent", lambda inspection: agents.check(inspection.config.agent.target, inspection.config.agent.mode)),
    ("agent", lambda inspection: client.check_instrumentors(inspection.config.agent.instrument)),
    ("agent", _check_reward),
    *ENGINE_CHECKS,
    ("runs", lambda inspection: check_place(inspection.config.runs_dir) if "train" in inspection.splits else None),
    ("tracking", lambda inspection: check_login(inspection.config.tracking) if "train" in inspection.splits else None),
    ("cluster", _check_cluster),
    ("cluster", _check_reach),
    ("data.train", partial(_check_tasks, "train")),
    ("data.val", partial(_check_tasks, "val")),
)
"""All checks of a start, in their order, each with the word under which a dry run shows its failure."""


def load_tasks(config: Config, split: Split) -> list[Task]:
    """Load the tasks of a split from the sources that the config gives. A task of a named held-out set has the set's
    name in front of its id: "hard/val-3". Raises DataError, ConfigError."""
    loaded: list[Task] = []
    for name, source in _sources(config, split).items():
        rows = _load_source(config, split if not name else f"val_sets.{name}", source)
        loaded += [replace(task, task_id=f"{name}/{task.task_id}") for task in rows] if name else rows
    return loaded


def _sources(config: Config, split: Split) -> dict[str, SourceConfig]:
    """The sources of a split by the names of their sets; "" names data.train and data.val, which may be left out."""
    if split == "train":
        return {"": config.data.train}
    main = {"": config.data.val} if config.data.val.path or config.data.val.target else {}
    return main | config.data.val_sets


def _load_source(config: Config, key: str, source: SourceConfig) -> list[Task]:
    if source.kind == "generated":
        loaded = _generate(source, config.data.root, f"data.{key}")
    elif source.path is None:
        raise ConfigError(f"data.{key}.path: missing; give a file (.jsonl, .json, .csv, .parquet) or a hub id")
    elif source.kind == "jsonl":
        in_root = Path(config.data.root) / source.path
        loaded = tasks.load_file(in_root if in_root.exists() and not Path(source.path).exists() else source.path)
    else:
        loaded = tasks.load_hub(
            source.path,
            name=source.name,
            split=source.split or "train",
            question_field=source.question_field,
            result_field=source.result_field,
        )
    if source.num is not None and source.kind != "generated":
        loaded = tasks.sample(loaded, source.num, source.seed or 0)
    if not loaded:
        raise ConfigError(f"data.{key}: there are no tasks")
    return loaded


def _generate(source: SourceConfig, root: str, where: str) -> list[Task]:
    if source.target is None or source.num is None:
        raise ConfigError(f"{where}: kind=generated needs target and num")
    rows = cast(Any, agents.load(source.target))
    parameters = signature(rows).parameters
    if source.names and "names" not in parameters:
        raise ConfigError(f"{where}.names={list(source.names)}: not read by {source.target}; remove it")
    optional = {"root": root, "names": source.names}
    arguments = {name: value for name, value in optional.items() if name in parameters}
    return tasks.make(rows, seed=source.seed or 0, num=source.num, split=source.split or "train", **arguments)


def cluster_is_own(config: Config) -> bool:
    """Whether the run starts a cluster on this machine instead of joining one."""
    return ray_private.cluster_address(config.hardware.address) is None


def own_cpus(config: Config) -> int | None:
    """The CPUs that a cluster of this run's own declares: on a CPU as many as the run reserves, even if the machine has
    fewer; None on GPUs: as many as the machine has."""
    if config.hardware.device != "cpu":
        return None
    return math.ceil(placement.total(backend.choose(config).groups())["CPU"]) + 3


def cluster_nodes(config: Config) -> list[placement.Resources]:
    """The resources of each node of the cluster that is joined, or of this machine. Raises UserError."""
    if cluster_is_own(config):
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
        return [{"CPU": float(own_cpus(config) or os.cpu_count() or 1), "GPU": float(gpus)}]
    ray_private.use_token()
    ray_private.prepare_environment()
    from agent_lightning.core import actors

    actors.init_ray(config.hardware.address)
    actors.check_nodes()
    return [node.resources for node in actors.nodes()]
