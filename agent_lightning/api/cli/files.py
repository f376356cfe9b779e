"""`agl import`, `agl export` and `agl journal check`: rollouts as files of other tools, and the journal of a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from agent_lightning.api import export as api
from agent_lightning.buffer import segments
from agent_lightning.buffer.codec import kind_of
from agent_lightning.buffer.ledger import Ledger
from agent_lightning.buffer.store import apply_record
from agent_lightning.config.load import project_folder
from agent_lightning.config.running import Dtype
from agent_lightning.core.errors import DataError, JournalError, UserError
from agent_lightning.spans.traces import export, imports


def init_project(folder: Path) -> int:
    """`agl init`: write agent, reward, data, experiment and runtime environment of a new project, which run as they
    are. Raises UserError if the folder holds something."""
    name = re.sub(r"\W+", "_", folder.resolve().name)
    template = project_folder("examples") / "project"
    console = Console(soft_wrap=True, highlight=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; give a new folder")
        (folder / "experiment").mkdir()
        for part in [*template.glob("*.*"), *template.glob("*/*.yaml")]:
            target = folder / str(part.relative_to(template)).replace("project", name)
            text = part.read_text().replace("experiment: project", f"experiment: {name}")
            target.write_text(text.replace("project.yaml", f"{name}.yaml"))
            console.print(str(target))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    experiment = f"experiment=experiment/{name}.yaml"
    console.print(f"\nnow: cd {folder}\n     agl try {experiment} --toy\n     agl train {experiment}")
    return 0


def import_traces(files: Sequence[Path], out: Path) -> int:
    """`agl import`: write rollouts.jsonl and sft.jsonl to `out`, and print what was read. Raises DataError."""
    reports = imports.read_files(files)
    if not any(report.rollouts for report in reports):
        reasons = sum((Counter(report.refused) for report in reports), Counter[str]())
        raise DataError(f"no rollouts in {', '.join(map(str, files))}: {_counted(reasons) or 'there is nothing in it'}")
    num_rollouts, num_chats = imports.write(reports, out)
    table = Table("file", "format", box=box.SIMPLE)
    for name in ("rollouts", "model calls", "tool calls", "rewards", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("refused or repaired")
    for report in reports:
        trajectories = [rollout.trajectory for rollout in report.rollouts]
        numbers = [
            len(trajectories),
            sum(len(trajectory.calls) for trajectory in trajectories),
            sum(len(trajectory.tools) for trajectory in trajectories),
            sum(len(trajectory.rewards) + (trajectory.reward is not None) for trajectory in trajectories),
            sum(rollout.num_tokens for rollout in report.rollouts),
        ]
        table.add_row(report.path.name, ", ".join(report.formats) or "?", *map(str, numbers), _counted(report.refused))
    console = Console()
    console.print(table)
    console.print(f"{out / 'rollouts.jsonl'}: {num_rollouts} rollouts; {out / 'sft.jsonl'}: {num_chats} conversations")
    return 0


def export_run(
    place: str,
    *,
    out: Path,
    format: export.Format,
    model: Path | None,
    checkpoint: int | None,
    dtype: Dtype | None,
    max_shard_size: str,
    merged: bool,
) -> int:
    """`agl export`: write the rollouts of a run to the folder `out`, as a file for other tools; or with `model`, its
    trained model to that folder. The run is a folder, or at a remote place. Raises DataError, UserError."""
    if model is not None:
        settings: Any = {"step": checkpoint, "dtype": dtype, "shard_size": max_shard_size, "merged": merged}
        line = api.export_model(place, model, **settings)
    elif checkpoint is not None or dtype is not None or merged:
        raise UserError("--checkpoint, --dtype and --merged are of --model DIR: --out writes rollouts")
    else:
        line = api.export_rollouts(place, out, format)
    Console(soft_wrap=True, highlight=False).print(line)
    return 0


def check_journal(path: Path) -> int:
    """`agl journal check`: read a journal and print what it holds. A torn end, which a crash leaves, is no damage.
    Raises UserError if it is damaged, made by a newer version, or no journal; the message names file and byte."""
    folder = path / "journal" if (path / "journal").is_dir() else path
    journal = segments.list_segments(folder) if folder.is_dir() else []
    if not journal:
        raise UserError(f"{path} holds no journal: give a run's folder, or a folder of segments")
    kinds, last, error = Counter[str](), None, None
    ledger = Ledger(keeps_taken=True, memory_bytes=0)
    try:
        for last in segments.segment_readers(folder):
            for location, payload in last.records():
                apply_record(ledger, payload, location, folder)
                kinds[kind_of(payload)] += 1
    except JournalError as damage:
        error = damage
    console = Console(soft_wrap=True, highlight=False)
    size = sum(segment.path.stat().st_size for segment in journal)
    console.print(f"{folder}: {len(journal)} segments, {size} bytes, {kinds.total()} records")
    for kind, number in sorted(kinds.items()):
        console.print(f"  {kind:14} {number}")
    for stage in ("open", "taken", "trained", "orphaned"):
        groups = [group for group in ledger.groups.values() if group.stage == stage]
        phases = _counted(Counter(rollout.phase for group in groups for rollout in group.rollouts))
        console.print(f"{stage:8} {len(groups)} groups{': rollouts ' + phases if phases else ''}")
    if error is not None:
        raise UserError(str(error)) from error
    if last is not None and last.torn:
        console.print(f"{last.segment.path} has a torn end of {last.torn} bytes at byte {last.end}: it will be cut")
    console.print("ok")
    return 0


def _counted(numbers: Mapping[str, int]) -> str:
    """Example: "2 finished, 1 open"."""
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items()))
