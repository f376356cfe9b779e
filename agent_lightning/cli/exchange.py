"""`agl import` and `agl export`: rollouts as files of other tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from agent_lightning.core.errors import DataError
from agent_lightning.run.archive import read_trajectories
from agent_lightning.spans.traces import export, imports


def import_traces(files: Sequence[Path], out: Path) -> int:
    """`agl import`: write rollouts.jsonl and sft.jsonl to `out`, and print what was read. Raises DataError."""
    reports = imports.read_files(files)
    if not any(report.rollouts for report in reports):
        reasons = sum((Counter(report.refused) for report in reports), Counter[str]())
        raise DataError(f"no rollouts in {', '.join(map(str, files))}: {_counted(reasons) or 'there is nothing in it'}")
    num_rollouts, num_chats = imports.write(reports, out)
    console = Console()
    console.print(_table(reports))
    console.print(f"{out / 'rollouts.jsonl'}: {num_rollouts} rollouts; {out / 'sft.jsonl'}: {num_chats} conversations")
    return 0


def export_run(run: Path, out: Path, form: export.Format) -> int:
    """`agl export`: write the rollouts of a run as a file for other tools. Raises DataError."""
    path, count = export.write(read_trajectories(run), out, form)
    Console().print(f"{path}: {count} rollouts")
    return 0


def _table(reports: Sequence[imports.Report]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("file")
    table.add_column("format")
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
    return table


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
