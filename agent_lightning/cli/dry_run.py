"""`agl train … --dry-run` and `agl config …`: what would happen and with which values. Starts nothing."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent_lightning.config.load import Config, resolve_path
from agent_lightning.config.sources import sources
from agent_lightning.core.errors import ConfigError, UserError
from agent_lightning.core.types import Split
from agent_lightning.launch import placement
from agent_lightning.launch.preflight import check_memory, check_reach, cluster_is_own, cluster_nodes, load_tasks
from agent_lightning.rollouts.agents import Mode, check, load
from agent_lightning.rollouts.client import check_instrumentors
from agent_lightning.run.storage import check_place

HUB_SECONDS = 4.0
"""For a hub to answer: a dry run tells, and does not wait."""


@dataclass(slots=True, kw_only=True)
class DryRun:
    """What was found, for `show`."""

    config: Config
    nodes: Sequence[placement.Resources]
    missing: list[str] = field(default_factory=list)
    """What a real start would refuse, a line each."""
    tasks: dict[Split, str] = field(default_factory=dict)
    model: str = ""
    size: placement.ModelSize | None = None

    @property
    def asked(self) -> list[placement.BundleGroup]:
        return placement.groups(self.config)


def assumed(text: str) -> list[placement.Resources]:
    """ "2x8" -> two nodes of eight GPUs, with CPUs enough. Raises ConfigError."""
    nodes, _, gpus = text.partition("x")
    if not (nodes.isdecimal() and gpus.isdecimal()):
        raise ConfigError(f"--assume {text}: give NODESxGPUS, such as 2x8")
    return [{"CPU": 1024.0, "GPU": float(gpus)}] * int(nodes)


def examine(config: Config, assume: str | None = None) -> DryRun:
    """Look at everything that a run needs. Raises UserError only for what no machine could mend: the config."""
    missing: list[str] = []

    def attempt(what: str, look: Callable[[], Any]) -> Any:
        try:
            return look()
        except UserError as error:
            missing.append(f"{what}: {' '.join(str(error).split())}")
            return None

    nodes = assumed(assume) if assume else attempt("cluster", lambda: cluster_nodes(config))
    found = DryRun(config=config, nodes=nodes or [], missing=missing)
    if nodes:
        missing += [f"cluster: {line}" for line in placement.missing(found.asked, nodes)]
        attempt("cluster", partial(check_reach, config, len(nodes)))
    agent = config.agent
    attempt("agent", lambda: check(agent.target, cast(Mode, agent.mode)))
    attempt("agent", lambda: check_instrumentors(agent.instrument))
    if agent.reward is not None:
        attempt("agent", lambda: load(cast(str, agent.reward)))
    attempt("memory", lambda: check_memory(config))
    attempt("runs", lambda: check_place(config.runs_dir))
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        found.tasks[split] = attempt(f"data.{split}", partial(_tasks, config, split)) or "not found"
    found.model = "a toy one" if config.model.words else config.model.path
    if not config.model.words:
        description = attempt("model", lambda: _model_config(config.model.path))
        if description is not None:
            found.size = attempt("model", lambda: _size(description))
    return found


def _tasks(config: Config, split: Split) -> str:
    source = config.data.train if split == "train" else config.data.val
    if source.kind != "hub" or Path(cast(str, source.path)).is_dir():
        return f"{len(load_tasks(config, split)):,} tasks"
    from huggingface_hub import HfApi

    _check_hub()
    try:
        HfApi().dataset_info(cast(str, source.path), timeout=HUB_SECONDS)
    except Exception as error:  # a hub that cannot be reached fails in many ways
        raise UserError(f"{source.path}: not reachable from here ({type(error).__name__})") from error
    return f"{source.path}, split {source.split}, from the hub"


def _model_config(path: str) -> dict[str, Any]:
    """The model's own config.json; of a hub model, that file alone. Raises UserError."""
    folder = Path(resolve_path(path))
    if folder.is_dir() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        from agent_lightning.launch.preflight import find_model

        file = Path(find_model(path)) / "config.json"
    else:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json")
        if isinstance(cached, str):
            return cast(dict[str, Any], json.loads(Path(cached).read_text()))
        _check_hub()
        try:
            file = Path(hf_hub_download(path, "config.json", etag_timeout=HUB_SECONDS))
        except Exception as error:  # as above
            raise UserError(f"{path}: not reachable from here ({type(error).__name__}); no estimate") from error
    return cast(dict[str, Any], json.loads(file.read_text()))


def _check_hub() -> None:
    """The hub's own client tries for half a minute. Raises UserError."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname or "huggingface.co"
    try:
        socket.create_connection((host, 443), timeout=HUB_SECONDS).close()
    except OSError as error:
        raise UserError(f"{host} cannot be reached from here ({error})") from error


def _size(description: dict[str, Any]) -> placement.ModelSize:
    try:
        return placement.ModelSize.of(description)
    except KeyError as error:
        raise UserError(f"its config.json has no {error}; no estimate") from error


def show(found: DryRun, console: Console) -> None:
    """The plan on the terminal."""
    config = found.config
    table = Table.grid(padding=(0, 2))
    for name, text in _plan(found):
        table.add_row(name, escape(text))
    console.print(f"[b]{escape(config.experiment)}[/b], seed {config.seed}: nothing is started\n")
    console.print(table)
    for line in found.missing:
        console.print(f"[yellow]missing[/yellow]  {escape(line)}", soft_wrap=True, highlight=False)
    if not found.missing:
        console.print("[green]ready[/green]    nothing is missing")


def _plan(found: DryRun) -> list[tuple[str, str]]:
    config, nodes = found.config, found.nodes
    serving, rollout = config.serving, config.rollout
    gateways = "one a node" if serving.gateways is None else str(serving.gateways)
    lines = [("model", found.model)]
    lines += [("data", f"{split}: {text}") for split, text in found.tasks.items()]
    lines += [
        ("agent", f"{config.agent.target} ({config.agent.mode})"),
        ("actors", f"{rollout.workers} rollout workers x {rollout.concurrency} rollouts, buffer, policy board"),
        ("", f"{serving.replicas} policy replicas, gateways: {gateways}, learner of {config.learner.processes}"),
    ]
    for group in found.asked:
        one = " ".join(f"{number:g} {kind}" for kind, number in group.bundles[0].items())
        where = ", each on one node" if group.one_node else ""
        lines.append(("placement", f"{group.number} x {group.what}: {len(group.bundles)} x [{one}]{where}"))
    lines += _arithmetic(config)
    if found.size is not None:
        lines += _memory(config, found.size)
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    where = "one started here" if cluster_is_own(config) else (config.hardware.address or "RAY_ADDRESS")
    lines.append(("cluster", f"{where}: {len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"))
    lines.append(("runs", config.runs_dir))
    return lines


def _arithmetic(config: Config) -> list[tuple[str, str]]:
    algorithm = config.algorithm
    rollouts = algorithm.tasks_per_step * algorithm.rollouts_per_task
    batches = -(-rollouts // (algorithm.rollouts_per_batch or rollouts))
    step = f"{algorithm.tasks_per_step} tasks x {algorithm.rollouts_per_task} rollouts = {rollouts} rollouts a step"
    updates = f"{batches} batches x {algorithm.epochs} epochs = {batches * algorithm.epochs} optimiser steps a step"
    places = config.rollout.workers * config.rollout.concurrency
    whole = f"{config.steps} steps: {config.steps * rollouts:,} rollouts; {min(places, rollouts)} at a time"
    return [("batch", step), ("", updates), ("", whole)]


def _memory(config: Config, size: placement.ModelSize) -> list[tuple[str, str]]:
    memory = placement.memory(config, size)
    per_gib = 1 / memory.kv_per_token
    lines = [
        ("memory", f"model: {size.parameters / 1e6:,.1f}M parameters (estimated, as all of these)"),
        ("", f"learner: {memory.learner:.2f} GiB in each of {config.learner.processes} processes, activations on top"),
        ("", f"engine: {memory.engine_weights:.2f} GiB of weights, KV cache {per_gib:,.0f} tokens a GiB"),
        ("", f"{config.serving.max_num_seqs} conversations of {config.model.max_len}: {memory.kv_wanted:.2f} GiB"),
    ]
    if config.hardware.device == "cpu":
        held = config.serving.kv_cache_gib * per_gib
        lines.append(("", f"serving.kv_cache_gib={config.serving.kv_cache_gib} holds {held:,.0f} tokens"))
    return lines


def show_config(overrides: Sequence[str], *, changed: bool, console: Console) -> int:
    """`agl config`: every key, its value, and where that is from. Raises ConfigError."""
    table = Table("key", "value", "from")
    for key, (value, source) in sources(overrides)[1].items():
        if not changed or source != "default":
            table.add_row(key, escape(str(value)), source)
    console.print(table)
    return 0
