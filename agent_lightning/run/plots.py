"""Reads metrics.jsonl, and draws the learning curve of a run."""

from __future__ import annotations

import json
import math
from functools import partial
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
    Lines that are not JSON are left out: a killed process can leave half a line. Raises DataError if there is no
    file."""
    if not path.is_file():
        raise DataError(f"no metrics at {path}")
    rows: dict[int, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            values = {name: math.nan if value is None else float(value) for name, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError, OverflowError):
            continue
        if math.isfinite(values.get("step", math.nan)):
            rows.setdefault(int(values["step"]), {"wall_s": 0.0}).update(values)
    return [rows[step] for step in sorted(rows)]


def evaluations(path: Path) -> list[tuple[int, float]]:
    """(step, held-out reward) of each evaluation in a metrics.jsonl; empty if the file does not exist yet."""
    rows = read_metrics(path) if path.is_file() else []
    return [(int(row["step"]), row["val/reward"]) for row in rows if "val/reward" in row]


def plot_learning_curve(metrics: Path, out: Path, title: str) -> None:
    """Draw the file `metrics` (metrics.jsonl) as a PNG of 1200 x 700 pixels at `out`. Above: the rewards of training
    and of the held-out tasks, or the losses of supervised training. Below: the log-probability gap, and the time
    of a step by phase. Series that were never logged are left out. Raises DataError if there is no
    metrics file.
    Example: plot_learning_curve(run.metrics, run.curve, title="calc_x, seed 0")"""
    rows = read_metrics(metrics)
    figure = new_figure(title)
    grid = figure.add_gridspec(2, 2, height_ratios=(2.3, 1))
    loss = any("train/loss" in row for row in rows)  # supervised training has no engine, and no gap
    panels = (
        (grid[0, :], 0.08, partial(draw_curve, "loss" if loss else "reward"), "nats" if loss else "reward", ""),
        (grid[1, 0], 0.02, _draw_gap, "nats", "log-probability gap, engine to trainer"),
        (grid[1, :] if loss else grid[1, 1], 0.02, _draw_seconds, "seconds", "time of a step"),
    )
    for cell, margin, draw, unit, panel_title in panels[:: 2 if loss else 1]:
        axes = figure.add_subplot(cell)
        plain_axes(axes, max((row["step"] for row in rows), default=0.0), margin)
        draw(axes, rows)
        axes.set_title(panel_title, fontsize=11, loc="left")
        axes.set(xlabel="step", ylabel=unit)
        if not (labels := axes.get_legend_handles_labels()[1]):
            axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center", va="center", color=GREY)
        elif panel_title:  # the panel is small: its legend is a row above
            spacing = {"handlelength": 1.2, "columnspacing": 1.2, "borderpad": 0.1, "ncols": len(labels)}
            axes.legend(frameon=False, fontsize=10, loc="lower right", bbox_to_anchor=(1.01, 0.98), **spacing)
        else:
            axes.legend(frameon=False, fontsize=10, loc="best")
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
    Example: smooth([1, 3, nan, 5], 2) -> [1, 2, 3, 5]"""
    parts = (value_N[max(0, end - window) : end] for end in range(1, len(value_N) + 1))
    known = (part[np.isfinite(part)] for part in parts)
    return np.array([part.mean() if part.size else math.nan for part in known], np.float64)


def _series(rows: list[dict[str, float]], name: str) -> tuple[Series, Series]:
    """The steps and values of a metric, without steps at which it is not a finite number."""
    known = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    pair_N2 = np.array(known, dtype=np.float64).reshape(-1, 2)
    return pair_N2[:, 0], pair_N2[:, 1]


def draw_curve(measure: str, axes: Axes, rows: list[dict[str, float]]) -> None:
    """Draw training and held-out "reward" or "loss", each with its 95 % interval if the metrics have it."""
    step_N, train_N = _series(rows, f"train/{measure}")
    window = max(3, math.ceil(len(train_N) / 15))
    if len(train_N) > window:
        axes.plot(step_N, train_N, color=BLUE, alpha=0.3, linewidth=1.0, label="train, each step")
        axes.plot(step_N, smooth(train_N, window), color=BLUE, linewidth=2.2, label=f"train, mean of {window} steps")
        _draw_band(axes, rows, f"train/{measure}", BLUE, window)
    elif len(train_N):
        axes.plot(step_N, train_N, color=BLUE, linewidth=2.2, marker=".", label="train")
        _draw_band(axes, rows, f"train/{measure}", BLUE)
    step_N, val_N = _series(rows, f"val/{measure}")
    if len(val_N):
        style: dict[str, Any] = {"markersize": 7.0, "markeredgecolor": "white", "linewidth": 1.6}
        axes.plot(step_N, val_N, color=RED, marker="o", zorder=4, label="held out", **style)
        _draw_band(axes, rows, f"val/{measure}", RED)
    # The last value is written on the right of its point and the first on the left, away from the curve.
    text: dict[str, Any] = {"va": "center", "fontsize": 13, "fontweight": "bold", "color": RED}
    for index, offset, align in ((-1, 9, "left"), (0, -9, "right"))[: len(val_N)]:
        point = (step_N[index], val_N[index])
        axes.annotate(f"{point[1]:.3f}", point, (offset, 0), textcoords="offset points", ha=align, **text)
    axes.margins(y=0.12)
    if min((*train_N, *val_N), default=-1.0) >= 0:
        axes.set_ylim(bottom=0)  # a curve that begins elsewhere makes each gain look large


def _draw_band(axes: Axes, rows: list[dict[str, float]], name: str, color: str, window: int = 1) -> None:
    """Draw the 95 % interval of a metric, or of its mean over the last `window` steps, as a band with bars at its ends:
    a single point has no band. Steps are independent of each other: variances of a mean add up."""
    known = {row["step"]: row.get(f"{name}_ci95", math.nan) for row in rows}
    step_N, mean_N = _series(rows, name)
    half_N = np.array([known[step] for step in step_N])
    if np.isfinite(half_N).any():
        count_N = np.minimum(np.arange(len(half_N)) + 1, window)
        mean_N, half_N = smooth(mean_N, window), np.sqrt(smooth(half_N**2, window) / count_N)
        low_N, high_N, label = mean_N - half_N, mean_N + half_N, "95 % interval" if color == RED else None  # once
        axes.fill_between(step_N, low_N, high_N, color=color, alpha=0.13, linewidth=0, label=label)
        axes.vlines(step_N[[0, -1]], low_N[[0, -1]], high_N[[0, -1]], color=color, alpha=0.4)


def _draw_gap(axes: Axes, rows: list[dict[str, float]]) -> None:
    for kind, color in (("max", GREY), ("mean", BLUE)):
        step_N, gap_N = _series(rows, f"logprob_gap/{kind}_abs")
        above_N = gap_N > 0  # a logarithmic axis cannot show zero
        if above_N.any():
            dots = "." if len(step_N) <= MAX_BARS else ""
            axes.plot(step_N[above_N], gap_N[above_N], color=color, linewidth=1.3, marker=dots, label=kind)
    if axes.lines:
        axes.set_yscale("log")


def _draw_seconds(axes: Axes, rows: list[dict[str, float]]) -> None:
    timed = [row for row in rows if any(math.isfinite(row.get(f"time/{name}", math.nan)) for name in PHASES)]
    if not timed:
        return
    # Bars thinner than a pixel are invisible: in a long run a bar is the mean of several steps.
    bars = np.array_split(np.arange(len(timed)), min(len(timed), MAX_BARS))
    edge_B = np.array([*(timed[bar[0]]["step"] for bar in bars), timed[-1]["step"] + 1]) - 0.5
    below_B = np.zeros(len(bars))
    for name, color in PHASES.items():
        seconds_N = np.nan_to_num(np.array([row.get(f"time/{name}", 0.0) for row in timed]))
        top_B = below_B + np.array([seconds_N[bar].mean() for bar in bars])
        axes.stairs(top_B, edge_B, baseline=below_B, fill=True, color=color, label=name)
        below_B = top_B
    axes.set_ylim(bottom=0)


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
