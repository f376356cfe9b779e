"""The view of a sweep: its progress in the terminal, the report at the end, and pictures of its runs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from agent_lightning.launch.sweeps.plan import SweepFolder, SweepPlan, TrialRecord, best_experiment, best_of
from agent_lightning.launch.sweeps.space import Choice, Distribution
from agent_lightning.run.plots import GREY, RED, new_figure, plain_axes, save
from agent_lightning.run.report import LiveBlock, duration, number, sparkline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {"running": "cyan", "done": "green", "finished": "green", "stopped": "dim", "failed": "red", "killed": "red"}


class SweepView(LiveBlock):
    """The progress of a sweep: a table that redraws itself, or a line for each change if there is no terminal."""

    def __init__(self, plan: SweepPlan, console: Console, folder: SweepFolder) -> None:
        """`folder` may hold the trials of an interrupted sweep that is resumed."""
        super().__init__(console)
        self._plan, self._folder, self._started = plan, folder, time.monotonic()
        self._records = {record.name: record for record in folder.read()}

    @property
    def records(self) -> list[TrialRecord]:
        """The newest record of each trial, by name."""
        return [self._records[name] for name in sorted(self._records)]

    def update(self, record: TrialRecord) -> None:
        """Take a trial's new record, write it to disk, and print a line if there is no table."""
        before, self._records[record.name] = self._records.get(record.name), record
        with suppress(OSError):  # a disk that is full now may have room when the sweep ends
            self._folder.write(self.records)
        if self._live is None and (before is None or (before.state, before.rewards) != (record.state, record.rewards)):
            reached = f"step {record.step}/{self._plan.steps}  held-out {number(record.last)}" if record.rewards else ""
            parts = [f"{record.name} {record.state:<8}", reached, " ".join(record.words), record.error]
            self.message("  ".join(part for part in parts if part))

    def render(self) -> RenderableType:
        records = self.records
        ended, passed = sum(record.ended for record in records), duration(time.monotonic() - self._started)
        title = Text(f"{self._plan.experiment}: {ended} of {self._plan.num_trials} trials, {passed}", style="bold")
        return Group(title, trial_table(records, self._plan.steps))


def trial_table(records: Sequence[TrialRecord], steps: int) -> Table:
    """A row for each trial: first the running trials, each group by falling held-out reward."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("trial", "state", "step", "held-out", "", "minutes", "values"):
        table.add_column(column, justify="right" if column in ("step", "held-out", "minutes") else "left")
    best = best_of(records)
    by_reward = sorted(records, key=lambda record: -record.last if math.isfinite(record.last) else math.inf)
    for record in sorted(by_reward, key=lambda record: record.state != "running"):
        values = record.error or " ".join(record.words)
        table.add_row(
            record.name,
            Text(record.state, style=STYLES.get(record.state, "")),
            f"{record.step}/{steps}",
            Text(number(record.last), style="bold green" if record is best else ""),
            sparkline([reward for _, reward in record.rewards], 8),
            f"{record.seconds / 60:.1f}",
            Text(values, style="red" if record.error else "", overflow="ellipsis", no_wrap=True),
        )
    return table


def sweep_report(plan: SweepPlan, folder: SweepFolder, records: Sequence[TrialRecord]) -> RenderableType:
    """The report at the end: the table of all trials, the best trial, and the paths of the sweep's files."""
    failed = sum(record.state == "failed" for record in records)
    lines = [f"{len(records)} trials, {failed} failed; files in {folder.path}"]
    if (best := best_of(records)) is None:
        lines.append("no trial was evaluated: see its logs/")
    else:
        lines.append(f"best: {best.name}, held-out {number(best.last)} at step {best.step}: {' '.join(best.words)}")
        lines.append(f"run it: agl train experiment={folder.best}")
    return Group(
        trial_table(records, plan.steps), Text(), *(Text(f" {line}", no_wrap=True, overflow="ignore") for line in lines)
    )


def finish_sweep(plan: SweepPlan, folder: SweepFolder, records: Sequence[TrialRecord]) -> TrialRecord | None:
    """Write the best trial as an experiment file, and draw the two pictures. None if no trial was evaluated."""
    if (best := best_of(records)) is None:
        return None
    folder.best.parent.mkdir(exist_ok=True)
    folder.best.write_text(best_experiment(plan, best))
    title = f"{plan.experiment}: {len(records)} trials"
    curves = [Curve(f"{record.name} {record.last:.3f}", record.rewards, record is best) for record in records]
    plot_curves(curves, folder.curves, title)
    values = [dict(word.partition("=")[::2] for word in record.words) for record in records]
    plot_parallel(plan.space, values, [record.last for record in records], records.index(best), folder.parallel, title)
    return best


@dataclass(frozen=True, slots=True)
class Curve:
    """The held-out reward of a run: (step, reward) of each evaluation."""

    label: str
    points: Sequence[tuple[int, float]]
    highlight: bool = False


def plot_curves(curves: Sequence[Curve], out: Path, title: str) -> None:
    """Draw the held-out rewards of several runs: thin lines, and a thick line with its label for a highlighted run."""
    figure, axes = reward_axes(curves, title)
    for curve in sorted((curve for curve in curves if curve.points), key=lambda curve: curve.highlight):
        step_N, reward_N = np.array(curve.points, np.float64).T
        color, width, alpha = (RED, 2.4, 1.0) if curve.highlight else (GREY, 1.2, 0.55)
        axes.plot(step_N, reward_N, color=color, linewidth=width, alpha=alpha, marker="o", markersize=3 + width)
        if curve.highlight:
            last = (step_N[-1], reward_N[-1])
            axes.annotate(f"  {curve.label}", last, fontsize=12, color=color, va="center", fontweight="bold")
    save(figure, out)


def reward_axes(curves: Sequence[Curve], title: str) -> tuple[Figure, Axes]:
    """An empty picture of held-out rewards by step, with room for the steps of `curves`."""
    figure = new_figure(title)
    axes = figure.add_subplot()
    plain_axes(axes, max((step for curve in curves for step, _ in curve.points), default=0.0), 0.05)
    axes.set(xlabel="step", ylabel="held-out reward")
    return figure, axes


def plot_parallel(
    space: Mapping[str, Distribution],
    trials: Sequence[Mapping[str, str]],
    rewards: Sequence[float],
    best: int,
    out: Path,
    title: str,
) -> None:
    """Draw parallel coordinates: a line for each trial through its values to its held-out reward, coloured by the
    reward, and thick for the trial number `best`."""
    from matplotlib import colormaps

    figure = new_figure(title)
    axes = figure.add_subplot()
    known = [reward for reward in rewards if math.isfinite(reward)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    scales = [_scale(distribution, [trial[key] for trial in trials]) for key, distribution in space.items()]
    ticks = [(height, f"{low + height * (high - low):.3f}") for height in (0.0, 0.5, 1.0)]
    scales.append((_between(rewards, low, high), ticks))
    for index, reward in enumerate(rewards):
        if math.isfinite(reward):
            width, alpha = (3.2, 1.0) if index == best else (1.4, 0.75)
            color = colormaps["viridis"](scales[-1][0][index] * 0.9)
            axes.plot([heights[index] for heights, _ in scales], color=color, linewidth=width, alpha=alpha)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    style: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "fontsize": 10, "va": "center"}
    for index, (_, ticks) in enumerate(scales):
        axes.axvline(index, color=GREY, linewidth=1, zorder=0)
        for height, text in ticks:
            axes.annotate(text, (index, height), bbox=box, color="#222", **style)
    axes.set_xticks(range(len(scales)), [*space, "held-out reward"], fontsize=11)
    axes.set(yticks=[], xlim=(-0.25, len(scales) - 0.7), ylim=(-0.05, 1.05))
    axes.spines[:].set_visible(False)
    save(figure, out)


def _scale(distribution: Distribution, values: Sequence[str]) -> tuple[list[float], list[tuple[float, str]]]:
    """The height of each trial's value in the picture, from 0 to 1, and the labels of the scale with their heights."""
    if isinstance(distribution, Choice):
        last = len(distribution.values) - 1
        ticks = list(zip(_between(range(last + 1), 0, last), distribution.values, strict=True))
        return [ticks[distribution.values.index(value)][0] for value in values], ticks
    transform, inverse = (math.log, math.exp) if distribution.logarithmic else (float, float)
    numbers = [transform(float(value)) for value in values]
    low, high = min(numbers), max(numbers)
    heights = (0.0, 0.5, 1.0) if high > low else (0.5,)
    return _between(numbers, low, high), [(at, f"{inverse(low + at * (high - low)):.3g}") for at in heights]


def _between(values: Sequence[float], low: float, high: float) -> list[float]:
    """`low` -> 0, `high` -> 1; 0.5 for all values if both are equal."""
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]
