"""`agl import`, `agl export` and `agl journal check`: rollouts as files of other tools, and the journal of a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import box
from rich.console import Console
from rich.table import Table

from agent_lightning.buffer import segments
from agent_lightning.buffer.codec import kind_of
from agent_lightning.buffer.ledger import Ledger
from agent_lightning.buffer.store import apply_record
from agent_lightning.config.load import project_folder, reload
from agent_lightning.config.running import Dtype
from agent_lightning.core.errors import DataError, JournalError, UserError
from agent_lightning.launch.hub import find_model
from agent_lightning.run import state, storage
from agent_lightning.run.archive import read_origins, read_trajectories
from agent_lightning.run.tracking import RunDirectory
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
        with _local(place, without="rollouts") as run:
            return _export_model(run, model, checkpoint, dtype, max_shard_size, merged)
    if checkpoint is not None or dtype is not None or merged:
        raise UserError("--checkpoint, --dtype and --merged are of --model DIR: --out writes rollouts")
    with _local(place, without="checkpoints") as run:
        path, count = export.write(read_trajectories(run), out, format, read_origins(run))
    Console().print(f"{path}: {count} rollouts")
    return 0


@contextmanager
def _local(place: str, *, without: str) -> Iterator[Path]:
    """The folder of a run; of one at a remote place a copy, without files below `without`, while the block runs."""
    with TemporaryDirectory(prefix="agl-export-") as copies:
        is_remote = storage.is_remote(place)
        yield storage.fetch(place, Path(copies), without=without) if is_remote else storage.local_root(place)


def _export_model(run: Path, target: Path, step: int | None, dtype: Dtype | None, shard_size: str, merged: bool) -> int:
    """Write the policy of a run's newest checkpoint, or of the checkpoint of `step`, in Hugging Face's format, with
    LoRA its adapter unless `merged`; in the run's `model.dtype` unless `dtype` is given."""
    from agent_lightning.learners import export as learner  # it imports torch

    directory = RunDirectory.open(run)
    config = reload(directory.config, ())
    if config.model.words:
        raise UserError(f"{run}: a toy model is a table, and has no form that Transformers would load")
    checkpoints, dtype = directory.checkpoints, dtype or config.model.dtype
    folder = state.newest_checkpoint(checkpoints) if step is None else state.checkpoint_folder(checkpoints, step)
    if step is not None and (damage := state.find_damage(folder)):
        names = ", ".join(path.name for path in state.complete_checkpoints(checkpoints))
        raise UserError(f"{damage}; complete checkpoints: {names or 'none'}")
    console, original = Console(soft_wrap=True, highlight=False), None
    try:
        original = Path(find_model(config.model.path))
    except UserError as error:
        console.print(f"{error}; config and tokenizer are taken from the checkpoint")
    if merged and not config.model.lora.rank:
        raise UserError(f"--merged: {run} was trained without LoRA; leave it out")
    number = learner.export_model(folder, original, target, dtype=dtype, shard_size=shard_size, merged=merged)
    what = "adapter" if config.model.lora.rank and not merged else "policy"
    console.print(f"{target}: the {what} after step {state.read_state(folder).step}, {number} parameters, {dtype}")
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
