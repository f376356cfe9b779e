"""What the viewer reads of a run's folder: its state, its metrics, and an index of its rollouts. It writes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import yaml

from agent_lightning.core.errors import AgentLightningError, DataError, UserError
from agent_lightning.core.text import error_line
from agent_lightning.credit.assign import CallCredit, CreditRules
from agent_lightning.launch.sweeps.plan import SweepFolder, best_of
from agent_lightning.run.archive import read_credits, read_group
from agent_lightning.run.index import RolloutIndex
from agent_lightning.run.tracking import RunDirectory

if TYPE_CHECKING:
    from agent_lightning.core.types import Group
    from agent_lightning.credit.assign import CallCredit

T = TypeVar("T")


class RunFiles:
    """A run's folder, read again whenever its files have changed.

    Example: RunFiles(Path("runs/calc_tiny-s0")).metrics()[-1]["val/reward"] -> 0.65
    """

    def __init__(self, path: Path) -> None:
        self.directory: Final = RunDirectory(path)
        self.name: Final = path.name
        self.index: Final = RolloutIndex(self.directory.rollouts)
        self._metrics: tuple[tuple[int, int], list[dict[str, float]]] = ((0, 0), [])

    def config(self) -> Mapping[str, Any]:
        """The values of config.yaml; empty if the file cannot be read."""
        try:
            values = yaml.load(self.directory.config.read_text(encoding="utf-8"), yaml.CSafeLoader)
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return values if isinstance(values, dict) else {}

    def summary(self) -> Mapping[str, Any]:
        """The values of summary.json; empty before the run has ended."""
        try:
            values = json.loads(self.directory.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, without lines that are not complete; null is NaN."""
        if (version := _version(self.directory.metrics)) != self._metrics[0]:
            rows = []
            for line in self.directory.metrics.read_bytes().split(b"\n") if any(version) else ():
                try:
                    row = json.loads(line)
                    rows.append({k: math.nan if v is None else float(v) for k, v in row.items()})
                except (ValueError, TypeError, AttributeError):
                    continue  # the run is writing this line, or died in it
            self._metrics = version, [row for row in rows if math.isfinite(row.get("step", math.nan))]
        return self._metrics[1]

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, where it is a finite number; a step that was run again counts once."""
        values = {row["step"]: row[name] for row in self.metrics() if math.isfinite(row.get(name, math.nan))}
        return sorted(values.items())

    def state(self) -> tuple[str, str]:
        """How the run stands (running, finished, or another word of summary.json), and why it ended so."""
        summary = self.summary()
        if _is_locked(self.directory.path):
            return "running", ""
        if not summary:
            return "killed", f"it ended without a summary; go on with: agl train resume={self.directory.path}"
        return str(summary.get("state") or "finished"), str(summary.get("error") or "")

    def versions(self) -> tuple[tuple[int, int], ...]:
        """A value that changes whenever the run has written something that a page shows."""
        watched = (self.directory.metrics, self.directory.summary, self.directory.rollouts)
        return tuple(map(_version, watched))

    def group(self, rollout_id: str) -> Group:
        """Read the group of a rollout. Raises DataError if the run has no such rollout, or its file is damaged."""
        return self._read(rollout_id, read_group)

    def credits(self, group: Group, rules: CreditRules | None) -> Sequence[Sequence[CallCredit] | None]:
        """The credit of each call of a group; see `read_credits`. Raises DataError."""
        return self._read(group.trajectories[0].key.rollout_id, lambda part, _: read_credits(part, group, rules))

    def _read(self, rollout_id: str, read: Callable[[Path, str], T]) -> T:
        if (part := self.index.part_of(rollout_id.rpartition("-")[0])) is None:
            raise DataError(f"{self.name} has no rollout {rollout_id}")
        try:
            return read(part, rollout_id)
        except AgentLightningError:
            raise
        except Exception as error:  # Parquet raises what it likes where a file is damaged
            raise DataError(f"{part} cannot be read ({error_line(error)})") from error


def _version(path: Path) -> tuple[int, int]:
    """Size and time of change of a file or folder; zeros if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _is_locked(folder: Path) -> bool:
    """Whether a process has a run or a sweep. It is read from /proc: to try the lock could refuse it to a run that
    starts in this moment."""
    try:
        inodes = [path.stat().st_ino for path in (*folder.glob("journal/lock"), *folder.glob("*lock"))]
        return any(f":{inode} " in line for line in Path("/proc/locks").read_text().split("\n") for inode in inodes)
    except OSError:
        return False


def sweep_state(path: Path) -> tuple[str, str]:
    """How a sweep stands (running, stopped, finished or failed), and its trials in words."""
    folder = SweepFolder(path)
    try:
        records, count = folder.read(), folder.num_trials()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        return "damaged", error_line(error)
    ended, best = sum(record.ended for record in records), best_of(records)
    words = [f"{ended} of {count or len(records)} trials ended"]
    words += [f"{failed} failed"] if (failed := sum(record.state == "failed" for record in records)) else []
    words += [f"best {best.name} {best.last:.3f}"] if best is not None else []
    state = "finished" if best is not None else "failed"
    if _is_locked(path):
        state = "running"
    elif ended < max(count, len(records), 1):
        state, words = "stopped", [*words, f"go on with: agl sweep resume={path}"]
    return state, "; ".join(words)


@dataclass(slots=True)
class Library:
    """The runs and sweeps in a folder. The folder may itself be a run, or a sweep."""

    root: Path
    _runs: dict[Path, RunFiles] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise UserError(f"{self.root}: there is no such folder; give a run, or the folder that runs_dir= named")

    def names(self) -> list[str]:
        """Paths of the runs below the folder, the newest first: "calc_tiny-s0", "sweep-toy/trial-003"."""
        if is_run(self.root):
            return [self.root.name]
        configs = [*self.root.glob("*/config.yaml"), *self.root.glob("*/trial-*/config.yaml")]
        configs.sort(key=lambda config: -_version(config)[1])
        return [config.parent.relative_to(self.root).as_posix() for config in configs]

    def sweeps(self) -> list[str]:
        """Names of the sweeps in the folder; "." if the folder is one."""
        if is_sweep(self.root):
            return ["."]
        return sorted(path.parent.name for path in self.root.glob("*/sweep.yaml"))

    def run(self, name: str) -> RunFiles:
        """A run by its name. Raises DataError if there is none."""
        path = self.root if is_run(self.root) and name == self.root.name else self.root / name
        if ".." in Path(name).parts or not is_run(path):
            raise DataError(f"{name} is no run in {self.root}")
        return self._runs.setdefault(path, RunFiles(path))

    def sweep(self, name: str) -> Path:
        """The folder of a sweep by its name. Raises DataError if there is none."""
        if ".." in Path(name).parts or not is_sweep(path := self.root / name):
            raise DataError(f"{name} is no sweep in {self.root}")
        return path


def is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def is_sweep(path: Path) -> bool:
    return (path / "sweep.yaml").is_file()
