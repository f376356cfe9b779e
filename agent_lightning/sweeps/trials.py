"""A trial of a sweep: `agl train …` in a process of its own, watched through the files that a run writes.

    trial = Trial(sweep=Path("runs/sweep-x"), name="trial-000", words=("experiment=calc_tiny", "algorithm.lr=0.001"))
    while not (result := trial.next_result()).finished:   # {"step": 0, "reward": 0.42}, …
        ...
    trial.stop()

Whatever happens to it, the sweep goes on: a run that ends with an error raises TrialFailed with its last line.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from agent_lightning.config.load import load, to_yaml
from agent_lightning.core.errors import AgentLightningError
from agent_lightning.run import checkpoint
from agent_lightning.run.plots import evaluations
from agent_lightning.run.tracking import RunDirectory

PROGRAM = (sys.executable, "-m", "agent_lightning.cli")
POLL_SECONDS = 0.3
STOP_SECONDS = 90.0
"""Between asking a run to stop, when it writes a checkpoint, and ending it."""


class TrialFailed(AgentLightningError):
    """A trial's run ended with an error. The message is its last line."""


@dataclass(frozen=True, slots=True)
class Result:
    """An evaluation of a trial."""

    step: int
    reward: float
    finished: bool
    """The run has ended by itself."""


class Trial:
    """Starts with the first `next_result`; goes on from its own newest checkpoint where there is one."""

    def __init__(
        self,
        *,
        sweep: Path,
        name: str,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        program: Sequence[str] = PROGRAM,
    ) -> None:
        """`environment`: beside this process's. `folder`: where the command is given; None: here. `program`: `agl`."""
        self._sweep, self._name = sweep, name
        self._words = (*words, f"runs_dir={sweep}")
        self._environment = dict(environment or {})
        self._folder = folder
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._seen = -1
        self.run = newest_run(sweep, name)

    def next_result(self) -> Result:
        """Wait for the run's next evaluation, or its end. Raises TrialFailed."""
        if self._process is None:
            self._start()
        while True:
            ended = self._code() is not None
            for step, reward in evaluations(self.run / "metrics.jsonl"):
                # The last one counts when the run has closed its books, and not a second before its checkpoint.
                if step > self._seen and (ended or step < self._steps()):
                    self._seen = step
                    return Result(step, reward, finished=ended and step >= self._steps())
            if ended:
                raise TrialFailed(f"{self.run.name} ended with exit code {self._code()}: {last_line(self.log)}")
            time.sleep(POLL_SECONDS)

    def seen(self) -> tuple[Path, int]:
        """The run, and the step of its last evaluation."""
        return self.run, self._seen

    def saved(self) -> tuple[Path, int]:
        """The run, and the step of its last evaluation, once that has a checkpoint. Raises TrialFailed."""
        folder = checkpoint.folder_of(RunDirectory(self.run).checkpoints, self._seen)
        while not (folder / checkpoint.STATE).exists():
            if self._code() is not None and not (folder / checkpoint.STATE).exists():
                raise TrialFailed(f"{self.run.name} has no checkpoint of step {self._seen}")
            time.sleep(POLL_SECONDS)
        return self.run, self._seen

    def adopt(self, other: Path, step: int) -> None:
        """Go on from another trial's checkpoint, in a new run with this trial's own values."""
        if other == self.run:  # its own: it only goes on
            self._seen = step
            return
        theirs = RunDirectory(other)
        run = RunDirectory.create(self._sweep, self._name, 0, self._name)
        run.config.write_text(to_yaml(load([*self._words, f"name={run.path.name}"])))
        copied = checkpoint.folder_of(theirs.checkpoints, step)
        shutil.copytree(copied, run.checkpoints / copied.name)
        lines = theirs.metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and yaml.safe_load(line)["step"] <= step]
        run.metrics.write_text("".join(kept))
        self.run, self._seen = run.path, step

    def stop(self) -> None:
        """Ask the run to stop, which leaves a checkpoint and a summary; end it where it does not."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def log(self) -> Path:
        """What the run says on its terminal."""
        return log_of(self._sweep, self._name)

    def _start(self) -> None:
        run = RunDirectory(self.run)
        started = self.run.is_dir() and any((one / checkpoint.STATE).exists() for one in run.checkpoints.glob("*"))
        if not started:
            self.run = _free(self._sweep, self._name)
        words = [f"resume={self.run}"] if started else [*self._words, f"name={self.run.name}"]
        if started and run.summary.exists() and is_done(self.run):
            words = []  # it had ended before the sweep was interrupted
        command = [*self._program, "train", *words] if words else ["true"]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                cwd=self._folder,
                start_new_session=True,  # Ctrl-C is for the sweep, which then stops its trials
            )

    def _code(self) -> int | None:
        return self._process.poll() if self._process is not None else None

    def _steps(self) -> int:
        return steps_of(self.run)


def steps_of(run: Path) -> int:
    """That a run is to do, by its own config."""
    return int(yaml.safe_load((run / "config.yaml").read_text())["steps"])


def is_done(run: Path) -> bool:
    """Whether its last step was evaluated."""
    return any(step >= steps_of(run) for step, _ in evaluations(run / "metrics.jsonl"))


def log_of(sweep: Path, name: str) -> Path:
    return sweep / "logs" / f"{name}.log"


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def newest_run(sweep: Path, name: str) -> Path:
    """The folder of a trial's newest run: trial-003, or trial-003-2 after it."""
    return max(_runs(sweep, name), key=_number, default=sweep / name)


def _free(sweep: Path, name: str) -> Path:
    """The name that RunDirectory.create will find free."""
    taken = [_number(one) for one in _runs(sweep, name)]
    return sweep / (f"{name}-{max(taken) + 1}" if taken else name)


def _runs(sweep: Path, name: str) -> list[Path]:
    return [one for one in (sweep / name, *sweep.glob(f"{name}-*")) if one.is_dir()]


def _number(run: Path) -> int:
    """trial-003-2 -> 2, trial-003 -> 1."""
    return int(run.name.split("-")[2]) if run.name.count("-") == 2 else 1
