"""A trial of a sweep: `agl train …` in a process of its own, watched through the files that the run writes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from agent_lightning.config.load import load, to_yaml
from agent_lightning.core.errors import AgentLightningError
from agent_lightning.core.text import last_line
from agent_lightning.run.plots import evaluations
from agent_lightning.run.state import STATE_FILE, checkpoint_folder, complete_checkpoints
from agent_lightning.run.tracking import RunDirectory, remove_later_steps

PROGRAM = (sys.executable, "-m", "agent_lightning")
POLL_SECONDS = 0.3
STOP_SECONDS = 90.0
"""Time that a run has to write its checkpoint after SIGTERM; then it is killed."""


class TrialFailed(AgentLightningError):
    """A trial's run ended with an error. The message has the last line of its log."""


@dataclass(frozen=True, slots=True)
class Result:
    """An evaluation of a trial."""

    step: int
    reward: float
    finished: bool
    """Whether the run has done all of its steps and has ended."""


@dataclass(slots=True, kw_only=True)
class Trial:
    """Runs a trial, from its newest checkpoint if it has any; the process starts with the first `next_result`."""

    sweep: Path
    name: str
    words: Sequence[str]
    """The overrides of `agl train`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are added to those of this process."""
    folder: Path | None = None
    """The working directory; None: that of this process."""
    program: Sequence[str] = PROGRAM
    """The command that stands for `agl`."""
    run: Path = field(init=False)
    last_step: int = field(init=False, default=-1)
    """The step of the newest evaluation that `next_result` returned."""
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.run = newest_run(self.sweep, self.name)
        self.words = (*self.words, f"runs_dir={self.sweep}")

    def next_result(self) -> Result:
        """Wait for the run's next evaluation. Raises TrialFailed if the run ends without one."""
        process = self._process or self._start()
        while True:
            ended = process.poll() is not None
            for step, reward in evaluations(self.run / "metrics.jsonl"):
                # The last evaluation counts once the run has ended, since its checkpoint is written after it.
                if step > self.last_step and (ended or step < steps_of(self.run)):
                    self.last_step = step
                    return Result(step, reward, finished=ended and step >= steps_of(self.run))
            if ended:
                last = last_log_line(self.sweep, self.name)
                raise TrialFailed(f"{self.run.name} ended with exit code {process.returncode}: {last}")
            time.sleep(POLL_SECONDS)

    def wait_for_checkpoint(self) -> None:
        """Wait until the run has a checkpoint of `last_step`. Raises TrialFailed."""
        state = checkpoint_folder(RunDirectory(self.run).checkpoints, self.last_step) / STATE_FILE
        while not state.exists():
            if self._process is not None and self._process.poll() is not None and not state.exists():
                raise TrialFailed(f"{self.run.name} has no checkpoint of step {self.last_step}")
            time.sleep(POLL_SECONDS)

    def adopt(self, source_run: Path, step: int) -> None:
        """Continue from a checkpoint of another trial's run, in a new run with this trial's own values."""
        self.last_step = step
        if source_run == self.run:
            return
        source, run = RunDirectory(source_run), RunDirectory.create(self.sweep, self.name, 0, self.name)
        run.config.write_text(to_yaml(load([*self.words, f"name={run.path.name}"])))
        checkpoint = checkpoint_folder(source.checkpoints, step)
        shutil.copytree(checkpoint, run.checkpoints / checkpoint.name)
        shutil.copy(source.metrics, run.metrics)
        remove_later_steps(run.metrics, step)
        self.run = run.path

    def stop(self) -> None:
        """Send SIGTERM, on which the run writes a checkpoint and a summary; kill it if it does not end."""
        if self._process is None:
            return
        self._process.terminate()  # does nothing if the process has ended
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        run = RunDirectory(self.run)
        if run.summary.exists() and is_done(self.run):
            command = ["true"]  # the run had ended before the sweep was interrupted
        elif complete_checkpoints(run.checkpoints):
            command = [*self.program, "train", f"resume={self.run}"]
        else:
            if self.run.exists():  # a run without a checkpoint: the next run gets a folder of its own
                self.run = self.sweep / f"{self.name}-{_run_number(self.run) + 1}"
            command = [*self.program, "train", *self.words, f"name={self.run.name}"]
        with log_path(self.sweep, self.name).open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C reaches the sweep only, which then stops its trials
            )
        return self._process


def steps_of(run: Path) -> int:
    """The number of steps that a run is to do, from its config."""
    return int(yaml.safe_load((run / "config.yaml").read_text())["steps"])


def is_done(run: Path) -> bool:
    """Whether the last step of a run was evaluated."""
    return any(step >= steps_of(run) for step, _ in evaluations(run / "metrics.jsonl"))


def log_path(sweep: Path, name: str) -> Path:
    """The file of a trial's terminal output."""
    return sweep / "logs" / f"{name}.log"


def last_log_line(sweep: Path, name: str) -> str:
    """The last line of a trial's terminal output."""
    log = log_path(sweep, name)
    return last_line(log.read_text(errors="replace") if log.is_file() else "") or "its log is empty"


def newest_run(sweep: Path, name: str) -> Path:
    """The folder of a trial's newest run: trial-003, or trial-003-2 if it exists."""
    runs = [run for run in (sweep / name, *sweep.glob(f"{name}-*")) if run.is_dir()]
    return max(runs, key=_run_number, default=sweep / name)


def _run_number(run: Path) -> int:
    """trial-003-2 -> 2, trial-003 -> 1."""
    return int(run.name.split("-")[2]) if run.name.count("-") == 2 else 1
