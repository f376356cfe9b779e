"""A run as Python values: its config, summary, metrics, rollouts and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_lightning.api import export
from agent_lightning.config.running import Dtype
from agent_lightning.run.state import complete_checkpoints
from agent_lightning.run.tracking import RunDirectory
from agent_lightning.spans.traces.export import Format

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder. Example: Run(Path("runs/first")).rollouts.query("split == 'val'").reward.mean()"""

    path: Path

    @property
    def config(self) -> Mapping[str, Any]:
        """Every key of the run's config, as nested dicts."""
        import yaml

        values: Mapping[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        return values

    @property
    def summary(self) -> Mapping[str, Any]:
        """The run in numbers, how it ended and why; empty if it has not ended."""
        path = RunDirectory(self.path).summary
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return values

    @property
    def metrics(self) -> pandas.DataFrame:
        """A row for each step, a column for each metric; of a step that was logged twice, the last values."""
        import pandas as pd

        from agent_lightning.api.viewer.folder import RunFiles

        rows = pd.DataFrame(RunFiles(self.path).metrics())
        return rows.groupby("step").last() if len(rows) else rows

    @property
    def rollouts(self) -> pandas.DataFrame:
        """A row for each rollout, with its task, reward, outcome, calls and tools (docs/experiments.md)."""
        from agent_lightning.run.archive import read_rollouts

        return read_rollouts(self.path).to_pandas()

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of the complete checkpoints, the newest last."""
        return complete_checkpoints(RunDirectory(self.path).checkpoints)

    def explain(self, rollout: str, *, tokens: bool = False) -> None:
        """Print what became of a rollout, as `agl explain` does. Raises UserError."""
        from agent_lightning.api.viewer import terminal

        terminal.show_rollout(self.path, rollout, tokens=tokens)

    def export(self, out: str | Path, *, format: Format = "jsonl") -> Path:
        """Write the rollouts as JSON lines, or as OTLP traces (`format="otlp"`), into a folder. Raises DataError."""
        export.export_rollouts(self.path, Path(out), format)
        return Path(out)

    def export_model(
        self, out: str | Path, *, step: int | None = None, dtype: Dtype | None = None, merged: bool = False
    ) -> Path:
        """Write the trained model in Hugging Face's format into a new folder: of the newest checkpoint, or of a step's.
        `dtype`: float32 or bfloat16. With LoRA it is the adapter alone, or if `merged` the model with it. Raises
        UserError."""
        export.export_model(self.path, Path(out), step=step, dtype=dtype, merged=merged)
        return Path(out)

    def view(self, out: str | Path) -> Path:
        """Write the pages of `agl view` to one HTML file. In a notebook: IPython.display.IFrame(run.view("run.html"),
        900, 600)."""
        from agent_lightning.api.viewer import command

        command.write(self.path, Path(out))
        return Path(out)


def load_run(path: str | Path) -> Run:
    """Open the folder of a run, also of one that trains. Raises UserError if there is no run."""
    return Run(RunDirectory.open(Path(path)).path)
