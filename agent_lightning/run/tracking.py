"""What is kept of a run: its folder, and its numbers (JSON lines, wandb, TensorBoard).

Example:

    run = RunDirectory.create(Path("runs"), experiment="calc_x", seed=0)   # runs/calc_x-s0-20250131-093000
    tracker = Tracker([JsonLines(run.metrics), TensorBoardSink(run.logs / "tensorboard")])
    tracker.log(1, {"train/reward": 0.25})

Each sink imports its library when it is made, so importing this module costs nothing.
"""

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from agent_lightning.core.errors import UserError
from agent_lightning.run.plots import read_metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The folder of one run, and where each thing lies in it."""

    path: Path

    @classmethod
    def create(
        cls,
        root: Path,
        experiment: str,
        seed: int,
        name: str | None = None,
        *,
        taken: Callable[[str], bool] = lambda name: False,
    ) -> RunDirectory:
        """Make a new folder in `root`; an existing one, or a name that is `taken`, is never reused: -2, -3, … is
        appended.

        Example: ("runs", "calc_x", 0, None) -> runs/calc_x-s0-20250131-093000; with name "first" -> runs/first

        Raises UserError where `name` is no plain folder name or `root` cannot be written.
        """
        if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"run name {name!r}: use letters, digits, '.', '_' and '-' only")
        stem = name or f"{re.sub('[^0-9A-Za-z_.-]+', '-', experiment)}-s{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        for suffix in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):  # ends at the first free name
            if taken(stem + suffix):
                continue
            run = cls(root / (stem + suffix))
            try:
                run.path.mkdir(parents=True)
                break
            except OSError as error:
                if not run.path.exists():
                    raise UserError(f"cannot make a run folder in {root}: {error.strerror}") from error
        for folder in (run.rollouts, run.checkpoints, run.logs):
            folder.mkdir()
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The folder of an earlier run, to resume it. Raises UserError where `path` holds no run."""
        run = cls(path)
        if not run.config.is_file():
            raise UserError(f"{path} is no run: it has no {run.config.name}")
        return run

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"


class Sink(Protocol):
    """Somewhere the numbers of a step go."""

    def log(self, step: int, record: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One line a call, flushed before `log` returns; a number that is not finite is written as null.

    Example: log(3, {"train/reward": 0.5}) appends {"step": 3, "wall_s": 41.2, "train/reward": 0.5}
    `wall_s` counts the seconds the run was alive: a resumed run counts on from its last line. `resumed`: the step from
    which it goes on; lines of later ones are removed, as those steps are done again.
    """

    def __init__(self, path: Path, *, resumed: int | None = None) -> None:
        if resumed is not None and path.exists():
            _keep_until(path, resumed)
        alive_s = max((row["wall_s"] for row in read_metrics(path)), default=0.0) if path.exists() else 0.0
        self._started = time.monotonic() - alive_s
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # the process before died in the middle of a line

    def log(self, step: int, record: Mapping[str, float]) -> None:
        line = {"step": step, "wall_s": round(time.monotonic() - self._started, 3), **record}
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _keep_until(path: Path, step: int) -> None:
    """Remove the lines of later steps. Atomic."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the process before died in the middle of a line
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    half = path.with_suffix(".half")
    half.write_text("".join(kept), encoding="utf-8")
    half.replace(path)


class TensorBoardSink:
    """Scalars for TensorBoard, written without importing torch or TensorFlow. `resumed`: as of JsonLines."""

    def __init__(self, directory: Path, *, resumed: int | None = None) -> None:
        from tensorboard.summary.writer import event_file_writer

        self._writer = event_file_writer.EventFileWriter(str(directory))
        if resumed is not None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            start = SessionLog(status=SessionLog.START)  # TensorBoard forgets this step and later ones
            self._writer.add_event(Event(wall_time=time.time(), step=resumed + 1, session_log=start))

    def log(self, step: int, record: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run in the run's logs/, silent on the terminal.

    Its id is kept in logs/wandb-id, so a resumed run goes on in the same one. Steps are an ordinary metric ("step"),
    so an evaluation may be logged after a later step. Raises UserError where it cannot start.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        project: str = "agent-lightning",
        group: str | None = None,
        tags: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        mode: Literal["offline", "online", "disabled"] = "offline",
    ) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        id_file = run.logs / "wandb-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        try:
            wandb.setup(settings=settings)
            if mode == "online" and not wandb.login(prompt=False, verify=False):
                raise UserError("wandb online needs a login: run `wandb login` or set WANDB_API_KEY")
            self._run = wandb.init(
                project=project,
                group=group,
                tags=tags,
                config=dict(config or {}),
                mode=mode,
                dir=run.logs,
                name=run.path.name,
                id=id_file.read_text(),
                resume="allow" if mode == "online" else None,
                settings=settings,
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb cannot start: {' '.join(str(error).split())}") from error
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log({"step": step, **record})

    def close(self) -> None:
        self._run.finish()


class Tracker:
    """Sends each record to all sinks. A sink that fails is warned about once and dropped: the run goes on."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def log(self, step: int, record: Mapping[str, float]) -> None:
        for sink in list(self._sinks):
            if not _survives(f"stopped at step {step}", sink, partial(sink.log, step, record)):
                self._sinks.remove(sink)

    def close(self) -> None:
        for sink in self._sinks:
            _survives("did not close", sink, sink.close)
        self._sinks.clear()


def _survives(what: str, sink: Sink, action: Callable[[], None]) -> bool:
    """Whether the action succeeds. A boundary: a full disk or a lost service must not end the training."""
    try:
        action()
    except Exception as error:
        logger.warning("%s %s: %r", type(sink).__name__, what, error)
        return False
    return True
