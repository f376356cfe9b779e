"""The folder of a run, and the sinks that its metrics go to: JSON lines, TensorBoard, Weights & Biases."""

# Why not verl.utils.tracking.Tracking: it cannot continue a run. It gives wandb.init no id, group, tags, folder or mode
# (a resumed run becomes a new one), logs with wandb's own step (which refuses the repeated steps of a resumed run),
# never purges TensorBoard's later steps, imports torch for it, and one failing service stops the logging to the others.

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, Protocol

from agent_lightning.config.running import TrackingConfig
from agent_lightning.core import files
from agent_lightning.core.errors import UserError
from agent_lightning.core.text import one_line
from agent_lightning.run.plots import read_metrics

logger = logging.getLogger(__name__)


class RunDirectory:
    """The folder of a run, and the paths of its files."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self.config: Final = path / "config.yaml"
        self.metrics: Final = path / "metrics.jsonl"
        self.summary: Final = path / "summary.json"
        self.curve: Final = path / "curve.png"
        self.rollouts: Final = path / "rollouts"
        self.checkpoints: Final = path / "checkpoints"
        self.logs: Final = path / "logs"

    @classmethod
    def create(
        cls,
        root: Path,
        experiment: str,
        seed: int,
        name: str | None = None,
        *,
        is_taken: Callable[[str], bool] = lambda name: False,
    ) -> RunDirectory:
        """Make a new folder in `root`, as `new_folder` does: runs/calc_x-s0-20250131-093000; with a name, runs/name.
        Raises UserError if `name` is not a plain folder name or `root` cannot be written."""
        if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"run name {name!r}: use letters, digits, '.', '_' and '-' only")
        stem = name or f"{re.sub('[^0-9A-Za-z_.-]+', '-', experiment)}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = cls(new_folder(root, stem, is_taken))
        for folder in (run.rollouts, run.checkpoints, run.logs):
            folder.mkdir()
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open the folder of an earlier run, to read or resume it. Raises UserError if `path` holds no run."""
        run = cls(path)
        if not run.config.is_file():
            raise UserError(f"{path} is no run: it has no {run.config.name}")
        return run

    def lock(self) -> IO[bytes]:
        """Take the run for this process, as `take_folder` does."""
        return take_folder(self.path, "run")


def take_folder(folder: Path, what: str) -> IO[bytes]:
    """Lock a folder for this process, until the returned file is closed. Raises UserError if another process has it."""
    try:
        return files.lock_folder(folder, ".lock")
    except BlockingIOError as error:
        raise UserError(f"{folder}: another process is at work on this {what}; wait until it has ended") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error


def new_folder(root: Path, stem: str, is_taken: Callable[[str], bool] = lambda name: False) -> Path:
    """Make a folder in `root` that its owner alone may enter: `stem`, or `stem`-2, -3, … if it exists or its name
    `is_taken`. Raises UserError."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    while True:
        folder = root / next(name for name in names if not is_taken(name))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=0o700)  # prompts, answers and logs are in it
            return folder
        except OSError as error:
            if not folder.exists():
                raise UserError(f"cannot make a run folder in {root}: {error.strerror}") from error


class Sink(Protocol):
    """A destination of metrics."""

    def log(self, step: int, record: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """A file with a JSON line for each `log`, flushed before `log` returns. Numbers that are not finite become null.
    Example: log(3, {"train/reward": 0.5}) appends {"step": 3, "wall_s": 41.2, "train/reward": 0.5}
    `wall_s` counts the seconds that the run was alive; a resumed run continues from its last line. `resumed_step`:
    the step of the checkpoint that the run resumes from; lines of later steps are removed, since those steps run
    again."""

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        if resumed_step is not None and path.exists():
            remove_later_steps(path, resumed_step)
        alive_s = max((row["wall_s"] for row in read_metrics(path)), default=0.0) if path.exists() else 0.0
        self._started = time.monotonic() - alive_s
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # an earlier process died in the middle of a line

    def log(self, step: int, record: Mapping[str, float]) -> None:
        line = {"step": step, "wall_s": round(time.monotonic() - self._started, 3), **record}
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def remove_later_steps(path: Path, step: int) -> None:
    """Remove the lines of steps after `step` from a metrics.jsonl, and lines that are not complete."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        # An earlier process died in the middle of a line, or the disk has returned other bytes than were written.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    files.write_text(path, "".join(lines))


class TensorBoardSink:
    """Scalars for TensorBoard, written without importing torch or TensorFlow. `resumed_step`: see JsonLines."""

    def __init__(self, directory: Path, *, resumed_step: int | None = None) -> None:
        from tensorboard.summary.writer import event_file_writer

        self._writer = event_file_writer.EventFileWriter(str(directory))
        if resumed_step is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            start = SessionLog(status=SessionLog.START)  # TensorBoard then discards this step and later steps
            self._writer.add_event(Event(wall_time=time.time(), step=resumed_step + 1, session_log=start))

    def log(self, step: int, record: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def check_login(tracking: TrackingConfig) -> None:
    """Raise UserError if Weights & Biases needs a login and there is none."""
    if tracking.wandb == "online":
        import wandb

        wandb.setup(settings=wandb.Settings(silent=True, console="off"))
        if not wandb.login(prompt=False, verify=False):
            raise UserError("tracking.wandb=online needs a login: run `wandb login` or set WANDB_API_KEY")


class WandbSink:
    """A Weights & Biases run in the run's logs/, silent on the terminal. The run's id lies in logs/wandb-id, so that a
    resumed run continues the same Weights & Biases run. Steps are an ordinary metric ("step"), so that an evaluation
    may be logged after a later step. Raises UserError if Weights & Biases cannot start."""

    def __init__(self, run: RunDirectory, tracking: TrackingConfig, config: Mapping[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        id_file = run.logs / "wandb-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        try:
            wandb.setup(settings=settings)
            check_login(tracking)
            self._run = wandb.init(
                project=tracking.project,
                group=tracking.group,
                tags=tracking.tags,
                config=dict(config),
                mode=tracking.wandb,
                dir=run.logs,
                name=run.path.name,
                id=id_file.read_text(),
                resume="allow" if tracking.wandb == "online" else None,
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb cannot start: {one_line(error)}") from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log({"step": step, **record})

    def close(self) -> None:
        self._run.finish()


class Tracker:
    """Sends each record to all sinks. A sink that fails is dropped with a warning: a full disk or a lost service must
    not end the training.
    Example: Tracker([JsonLines(run.metrics), TensorBoardSink(folder)]).log(1, {"train/reward": 0.25})"""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._for_each_sink(lambda sink: sink.log(step, record), f"stopped at step {step}")

    def close(self) -> None:
        self._for_each_sink(lambda sink: sink.close(), "did not close")
        self._sinks.clear()

    def _for_each_sink(self, action: Callable[[Sink], None], problem: str) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:  # each service has errors of its own
                logger.warning("%s %s: %r", type(sink).__name__, problem, error)
                self._sinks.remove(sink)
