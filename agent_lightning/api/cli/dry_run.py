"""`agl train … --dry-run`: the plan of a run on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent_lightning.api.cli import USER_ERROR
from agent_lightning.config.load import Config, load, reload
from agent_lightning.core.errors import ConfigError
from agent_lightning.launch import backend, checks, placement
from agent_lightning.run import storage
from agent_lightning.run.tracking import RunDirectory


def dry_run(overrides: Sequence[str], assume: str | None, resume: str | None = None) -> int:
    """Print the plan of a new run, or of the run `resume` that goes on, for the cluster `assume` ("2x8"), and what it
    misses. Returns the exit code. Raises ConfigError, and UserError if there is no such run."""
    config = load(overrides) if resume is None else _resumed(resume, overrides)
    inspection = checks.inspect(config, assumed(assume) if assume else ())
    show(inspection, Console())
    return USER_ERROR if inspection.missing else 0


def _resumed(place: str, overrides: Sequence[str]) -> Config:
    """The config of an earlier run, with overrides on top. Raises UserError."""
    with TemporaryDirectory(prefix="agl-") as folder:
        if storage.is_remote(place):
            return reload(storage.fetch(f"{place.rstrip('/')}/config.yaml", Path(folder)), overrides)
    return reload(RunDirectory.open(storage.local_root(place)).config, overrides)


def assumed(text: str) -> list[placement.Resources]:
    """The nodes of a cluster to plan for: "2x8" -> two nodes of eight GPUs, with CPUs enough. Raises ConfigError."""
    nodes, _, gpus = text.partition("x")
    if not (nodes.isdecimal() and gpus.isdecimal()):
        raise ConfigError(f"--assume {text}: give NODESxGPUS, such as 2x8")
    return [{"CPU": 1024.0, "GPU": float(gpus)}] * int(nodes)


def show(inspection: checks.Inspection, console: Console) -> None:
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


def _plan(inspection: checks.Inspection) -> Iterator[tuple[str, str]]:
    config, nodes = inspection.config, inspection.nodes
    algorithm, rollout, serving, processes = config.algorithm, config.rollout, config.serving, config.learner.processes
    yield "model", "a toy one" if config.model.words else str(inspection.model or config.model.path)
    for split in inspection.splits:
        source = config.data.train if split == "train" else config.data.val
        tasks = f"{source.path}, split {source.split}, from the hub"
        if split in inspection.tasks:
            number = len(inspection.tasks[split])
            tasks = f"{number:,} tasks" if number else "no tasks: nothing is evaluated"
        elif any(line.startswith(f"data.{split}:") for line in inspection.missing):
            tasks = "not found"
        yield "data", f"{split}: {tasks}"
    yield "agent", f"{config.agent.target} ({config.agent.mode})"
    yield "actors", f"{rollout.workers} rollout workers x {rollout.concurrency} rollouts, buffer, policy board"
    gateways = config.fixed_gateways or "one a node"
    yield "", f"{serving.replicas} policy replicas, gateways: {gateways}, learner of {processes}"
    for group in backend.choose(config).groups():
        bundle = " ".join(f"{number:g} {kind}" for kind, number in group.bundles[0].items())
        where = ", each on one node" if group.one_node else ""
        yield "placement", f"{group.number} x {group.what}: {len(group.bundles)} x [{bundle}]{where}"
    rollouts, per_task = algorithm.rollouts_per_step, algorithm.rollouts_per_task
    yield "batch", f"{algorithm.tasks_per_step} tasks x {per_task} rollouts = {rollouts} rollouts a step"
    batches, updates = algorithm.batches_per_step, algorithm.batches_per_step * algorithm.epochs
    yield "", f"{batches} batches x {algorithm.epochs} epochs = {updates} optimiser steps a step"
    at_a_time = min(rollout.workers * rollout.concurrency, rollouts)
    yield "", f"{config.steps} steps: {config.steps * rollouts:,} rollouts; {at_a_time} at a time"
    if inspection.model is not None and (size := inspection.model.size) is not None:
        memory = placement.memory(config, size)
        per_gib = 1 / memory.kv_per_token
        yield "memory", f"learner: {memory.learner:.2f} GiB in each of {processes} processes, activations on top"
        yield "", f"engine: {memory.engine_weights:.2f} GiB of weights, KV cache {per_gib:,.0f} tokens a GiB"
        yield "", f"{memory.conversations} conversations of {config.model.max_len}: {memory.kv_wanted:.2f} GiB"
        yield "", backend.choose(config).judge_memory(memory)
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    where = "one started here" if checks.cluster_is_own(config) else (config.hardware.address or "RAY_ADDRESS")
    yield "cluster", f"{where}: {len(nodes)} nodes, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs"
    yield "runs", config.destination
