"""Reads metrics.jsonl, and draws the learning curve of a run.

Example:

    plot_learning_curve(run.metrics, run.curve, title="calc_x, seed 0")
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agent_lightning.core.errors import DataError
from agent_lightning.core.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = NDArray[np.float64]

BLUE, RED, GREY = "#3b6fb6", "#d1495b", "#5f6b7a"
PHASES = {"generate": "#3b6fb6", "update": "#e9a23b", "publish": "#3f9c76", "other": "#c3cad4"}
MAX_BARS = 100


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read a metrics.jsonl: a row for each step, in order. Lines of the same step are merged, and later values win.

    Example: {"step": 1, "a": 2} and {"step": 1, "b": null} -> [{"step": 1.0, "wall_s": 0.0, "a": 2.0, "b": nan}]

    Lines that are not JSON are left out: a killed process can leave half a line. Raises DataError if there is no file.
    """
    if not path.is_file():
        raise DataError(f"no metrics at {path}")
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = {name: math.nan if value is None else float(value) for name, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError):
            continue
        if "step" in values:
            rows.setdefault(int(values["step"]), {"wall_s": 0.0}).update(values)
    return [rows[step] for step in sorted(rows)]


def evaluations(path: Path) -> list[tuple[int, float]]:
    """(step, held-out reward) of each evaluation in a metrics.jsonl; empty if the file does not exist yet."""
    rows = read_metrics(path) if path.is_file() else []
    return [(int(row["step"]), row["val/reward"]) for row in rows if "val/reward" in row]


def plot_learning_curve(metrics: Path, out: Path, title: str) -> None:
    """Draw the file `metrics` (metrics.jsonl) as a PNG of 1200 x 700 pixels at `out`.

    Above: the rewards of training and of the held-out tasks. Below: the log-probability gap, and the time of a step by
    phase. Series that were never logged are left out. Raises DataError if there is no metrics file.
    """
    rows = read_metrics(metrics)
    figure = new_figure(title)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.3, 1))
    reward, gap, seconds = (figure.add_subplot(cell) for cell in (grid[0, :], grid[1, 0], grid[1, 1]))
    for axes, margin in ((reward, 0.08), (gap, 0.02), (seconds, 0.02)):
        plain_axes(axes, max((row["step"] for row in rows), default=0.0), margin)
    _draw_reward(reward, rows)
    _draw_gap(gap, rows)
    _draw_seconds(seconds, rows)
    save(figure, out)


def new_figure(title: str) -> Figure:
    """A figure of 1200 x 700 pixels with its own canvas: unlike pyplot, it touches no global backend or display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(12, 7), dpi=100, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15, fontweight="bold", x=0.012, ha="left")
    return figure


def save(figure: Figure, out: Path) -> None:
    """Write a figure as a PNG."""
    with replacing(out) as unfinished:
        figure.savefig(unfinished, format="png")


def smooth(value_N: Series, window: int) -> Series:
    """The mean over the last `window` positions, without the values that are not finite.

    Example: smooth([1, 3, nan, 5], 2) -> [1, 2, 3, 5]
    """
    known_N = np.isfinite(value_N)
    total_N = np.concatenate([[0.0], np.cumsum(np.where(known_N, value_N, 0.0))])
    count_N = np.concatenate([[0], np.cumsum(known_N)])
    end_N = np.arange(1, len(value_N) + 1)
    start_N = np.maximum(end_N - window, 0)
    number_N = count_N[end_N] - count_N[start_N]
    mean_N: Series = np.full(len(value_N), math.nan)
    np.divide(total_N[end_N] - total_N[start_N], number_N, out=mean_N, where=number_N > 0)
    return mean_N


def _series(rows: list[dict[str, float]], name: str) -> tuple[Series, Series]:
    """The steps and values of a metric, without steps at which it is not a finite number."""
    known = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    pair_N2 = np.array(known, dtype=np.float64).reshape(-1, 2)
    return pair_N2[:, 0], pair_N2[:, 1]


def _draw_reward(axes: Axes, rows: list[dict[str, float]]) -> None:
    step_N, train_N = _series(rows, "train/reward")
    window = max(3, math.ceil(len(train_N) / 15))
    if len(train_N) > window:
        axes.plot(step_N, train_N, color=BLUE, alpha=0.3, linewidth=1.0, label="train, each step")
        axes.plot(step_N, smooth(train_N, window), color=BLUE, linewidth=2.2, label=f"train, mean of {window} steps")
    elif len(train_N):
        axes.plot(step_N, train_N, color=BLUE, linewidth=2.2, marker=".", label="train")
    step_N, val_N = _series(rows, "val/reward")
    if len(val_N):
        style: dict[str, Any] = {"markersize": 7.0, "markeredgecolor": "white", "linewidth": 1.6}
        axes.plot(step_N, val_N, color=RED, marker="o", zorder=4, label="held-out tasks", **style)
        _number(axes, step_N[-1], val_N[-1], side=1)
        if len(val_N) > 1:
            _number(axes, step_N[0], val_N[0], side=-1)
    axes.set_ylabel("reward")
    axes.set_xlabel("step")
    axes.margins(y=0.12)
    _legend_or_note(axes)


def _number(axes: Axes, step: float, value: float, side: int) -> None:
    """Write a value beside its point, on the left (`side` -1) or on the right (1), away from the curve."""
    style: dict[str, Any] = {"va": "center", "fontsize": 13, "fontweight": "bold", "color": RED}
    offset, side_of_text = (9 * side, 0), "left" if side > 0 else "right"
    axes.annotate(f"{value:.3f}", (step, value), offset, textcoords="offset points", ha=side_of_text, **style)


def _draw_gap(axes: Axes, rows: list[dict[str, float]]) -> None:
    for kind, color in (("max", GREY), ("mean", BLUE)):
        step_N, gap_N = _series(rows, f"logprob_gap/{kind}_abs")
        above_N = gap_N > 0  # a logarithmic axis cannot show zero
        if above_N.any():
            dots = "." if len(step_N) <= MAX_BARS else ""
            axes.plot(step_N[above_N], gap_N[above_N], color=color, linewidth=1.3, marker=dots, label=kind)
    if axes.lines:
        axes.set_yscale("log")
    axes.set_title("log-probability gap, engine to trainer", fontsize=11, loc="left")
    axes.set_ylabel("nats")
    axes.set_xlabel("step")
    _legend_or_note(axes, above=True)


def _draw_seconds(axes: Axes, rows: list[dict[str, float]]) -> None:
    timed = [row for row in rows if any(math.isfinite(row.get(f"time/{name}", math.nan)) for name in PHASES)]
    if timed:
        # Bars thinner than a pixel are invisible: in a long run a bar is the mean of several steps.
        bars = np.array_split(np.arange(len(timed)), min(len(timed), MAX_BARS))
        first_step_B = [timed[bar[0]]["step"] for bar in bars]
        edge_B = np.array([*first_step_B, timed[-1]["step"] + 1]) - 0.5
        below_B = np.zeros(len(bars))
        for name, color in PHASES.items():
            seconds_N = np.nan_to_num(np.array([row.get(f"time/{name}", 0.0) for row in timed]))
            top_B = below_B + np.array([seconds_N[bar].mean() for bar in bars])
            axes.stairs(top_B, edge_B, baseline=below_B, fill=True, color=color, label=name)
            below_B = top_B
        axes.set_ylim(bottom=0)
    axes.set_title("time of a step", fontsize=11, loc="left")
    axes.set_ylabel("seconds")
    axes.set_xlabel("step")
    _legend_or_note(axes, above=True)


def plain_axes(axes: Axes, last_step: float, margin: float) -> None:
    """Style axes over steps: a light grid, integer ticks, and a `margin` on both sides, as a share of the width."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(True, color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa4b1")
    axes.tick_params(colors=GREY, labelsize=10)
    last_step = max(last_step, 1.0)
    axes.set_xlim(-margin * last_step - 0.5, last_step * (1 + margin) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend_or_note(axes: Axes, above: bool = False) -> None:
    """Add a legend, inside or in a row `above` the panel; an empty panel gets a note instead."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=GREY)
    elif above:
        spacing = {"handlelength": 1.2, "columnspacing": 1.2, "borderpad": 0.1}
        corner = (1.01, 0.98)
        axes.legend(frameon=False, fontsize=10, loc="lower right", bbox_to_anchor=corner, ncols=len(labels), **spacing)
    else:
        axes.legend(frameon=False, fontsize=10, loc="best")
