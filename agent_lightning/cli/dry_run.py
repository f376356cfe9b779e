"""`agl train … --dry-run`: the plan of a run on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent_lightning.config.load import Config
from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import Split
from agent_lightning.launch import backend, placement
from agent_lightning.launch.checks import Inspection, cluster_is_own


def assumed(text: str) -> list[placement.Resources]:
    """The nodes of a cluster to plan for: "2x8" -> two nodes of eight GPUs, with CPUs enough. Raises ConfigError."""
    nodes, _, gpus = text.partition("x")
    if not (nodes.isdecimal() and gpus.isdecimal()):
        raise ConfigError(f"--assume {text}: give NODESxGPUS, such as 2x8")
    return [{"CPU": 1024.0, "GPU": float(gpus)}] * int(nodes)


def show(inspection: Inspection, console: Console) -> None:
    """Print the plan, and what is missing."""
    config = inspection.config
    table = Table.grid(padding=(0, 2))
    for name, text in _plan(inspection):
        table.add_row(name, escape(text))
    console.print(f"[b]{escape(config.experiment)}[/b], seed {config.seed}: nothing is started\n")
    console.print(table)
    for line in inspection.missing:
        console.print(f"[yellow]missing[/yellow]  {escape(line)}", soft_wrap=True, highlight=False)
    if not inspection.missing:
        console.print("[green]ready[/green]    nothing is missing")


def _plan(inspection: Inspection) -> list[tuple[str, str]]:
    config, nodes = inspection.config, inspection.nodes
    serving, rollout = config.serving, config.rollout
    gateways = "one a node" if serving.gateways is None else str(serving.gateways)
    lines = [("model", inspection.model or config.model.path)]
    lines += [("data", f"{split}: {_tasks(inspection, split)}") for split in inspection.splits]
    lines += [
        ("agent", f"{config.agent.target} ({config.agent.mode})"),
        ("actors", f"{rollout.workers} rollout workers x {rollout.concurrency} rollouts, buffer, policy board"),
        ("", f"{serving.replicas} policy replicas, gateways: {gateways}, learner of {config.learner.processes}"),
    ]
    for group in backend.choose(config).groups():
        bundle = " ".join(f"{number:g} {kind}" for kind, number in group.bundles[0].items())
        where = ", each on one node" if group.one_node else ""
        lines.append(("placement", f"{group.number} x {group.what}: {len(group.bundles)} x [{bundle}]{where}"))
    lines += _arithmetic(config)
    if inspection.size is not None:
        lines += _memory(config, inspection.size)
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    where = "one started here" if cluster_is_own(config) else (config.hardware.address or "RAY_ADDRESS")
    lines.append(("cluster", f"{where}: {len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"))
    lines.append(("runs", config.runs_dir))
    return lines


def _tasks(inspection: Inspection, split: Split) -> str:
    if split in inspection.tasks:
        return f"{len(inspection.tasks[split]):,} tasks"
    if any(line.startswith(f"data.{split}:") for line in inspection.missing):
        return "not found"
    source = inspection.config.data.train if split == "train" else inspection.config.data.val
    return f"{source.path}, split {source.split}, from the hub"


def _arithmetic(config: Config) -> list[tuple[str, str]]:
    algorithm = config.algorithm
    rollouts, batches = algorithm.rollouts_per_step, algorithm.batches_per_step
    step = f"{algorithm.tasks_per_step} tasks x {algorithm.rollouts_per_task} rollouts = {rollouts} rollouts a step"
    updates = f"{batches} batches x {algorithm.epochs} epochs = {batches * algorithm.epochs} optimiser steps a step"
    places = config.rollout.workers * config.rollout.concurrency
    total = f"{config.steps} steps: {config.steps * rollouts:,} rollouts; {min(places, rollouts)} at a time"
    return [("batch", step), ("", updates), ("", total)]


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
