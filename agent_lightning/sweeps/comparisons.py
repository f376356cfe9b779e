"""Pictures of several runs together: their held-out rewards by step, and what each value of a sweep led to.

plot_curves([Curve("trial-000", points, highlight=True), …], Path("curves.png"), title="calc_tiny: 16 trials")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agent_lightning.run.plots import BLUE, GREY, RED, new_figure, plain_axes, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Curve:
    """A run's held-out reward by step."""

    label: str
    points: Sequence[tuple[int, float]]
    highlight: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """One searched key: a number between two ends, or one of several words."""

    key: str
    values: Sequence[str]
    """Of each trial, as on its command line."""
    words: Sequence[str] | None = None
    """None: numbers."""
    log: bool = False


def plot_curves(curves: Sequence[Curve], out: Path, title: str) -> None:
    """Thin lines for all runs, a thick one with its figures for those that stand out; 1200 x 700 pixels."""
    figure = new_figure(title)
    axes = figure.add_subplot()
    plain_axes(axes, max((step for one in curves for step, _ in one.points), default=0.0), 0.05)
    for one in sorted(curves, key=lambda curve: curve.highlight):
        if not one.points:
            continue
        step_N, reward_N = np.array(one.points, np.float64).T
        color, width, alpha = (RED, 2.4, 1.0) if one.highlight else (GREY, 1.2, 0.55)
        axes.plot(step_N, reward_N, color=color, linewidth=width, alpha=alpha, marker="o", markersize=3 + width)
        if one.highlight:
            axes.annotate(
                f"  {one.label}", (step_N[-1], reward_N[-1]), fontsize=12, color=color, va="center", fontweight="bold"
            )
    axes.set_xlabel("step")
    axes.set_ylabel("held-out reward")
    save(figure, out)


def plot_spread(curves: Sequence[Curve], out: Path, title: str, published: Sequence[tuple[str, float]] = ()) -> None:
    """The runs of several seeds: each thin, their mean thick with its range; published figures as dashed lines."""
    figure = new_figure(title)
    axes = figure.add_subplot()
    plain_axes(axes, max((step for one in curves for step, _ in one.points), default=0.0), 0.05)
    for one in curves:
        step_N, reward_N = np.array(one.points, np.float64).reshape(-1, 2).T
        axes.plot(step_N, reward_N, color=BLUE, linewidth=1, alpha=0.45)
    shared = sorted(set.intersection(*(set(dict(one.points)) for one in curves))) if curves else []
    if shared:
        reward_SC = np.array([[dict(one.points)[step] for one in curves] for step in shared])
        axes.plot(
            shared, reward_SC.mean(1), color=BLUE, linewidth=2.6, marker="o", label=f"mean of {len(curves)} seeds"
        )
        axes.fill_between(shared, reward_SC.min(1), reward_SC.max(1), color=BLUE, alpha=0.15, label="lowest to highest")
    for label, value in published:
        axes.axhline(value, color=RED, linestyle="--", linewidth=1.2)
        axes.annotate(label, (0, value), color=RED, fontsize=9, va="bottom")
    axes.set_xlabel("step")
    axes.set_ylabel("held-out reward")
    axes.legend(frameon=False, fontsize=10, loc="best")
    save(figure, out)


def plot_parallel(axes: Sequence[Axis], rewards: Sequence[float], best: int | None, out: Path, title: str) -> None:
    """A line for each trial through its values to its held-out reward, coloured by it; the best one thick."""
    figure = new_figure(title)
    plot = figure.add_subplot()
    known = [reward for reward in rewards if math.isfinite(reward)]
    low, high = min(known, default=0.0), max(known, default=1.0)
    columns = [_heights(axis) for axis in axes] + [_linear(rewards, low, high)]
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for trial, reward in enumerate(rewards):
        if math.isfinite(reward):
            share = (reward - low) / (high - low) if high > low else 0.5
            width, alpha = (3.2, 1.0) if trial == best else (1.4, 0.75)
            heights = [column[trial] for column in columns]
            plot.plot(range(len(columns)), heights, color=colours(share * 0.9), linewidth=width, alpha=alpha)
    for index, axis in enumerate(axes):
        _ticks(plot, index, _marks(axis))
    reward_marks = [(place, f"{low + place * (high - low):.3f}") for place in (0.0, 0.5, 1.0)]
    _ticks(plot, len(axes), reward_marks)
    plot.set_xticks(range(len(columns)), [axis.key for axis in axes] + ["held-out reward"], fontsize=11)
    plot.set_yticks([])
    plot.set_xlim(-0.25, len(columns) - 0.7)
    plot.set_ylim(-0.05, 1.05)
    plot.spines[:].set_visible(False)
    save(figure, out)


def _heights(axis: Axis) -> list[float]:
    """Where each trial's value is between 0 and 1."""
    if axis.words is not None:
        return [_place(axis.words.index(value), len(axis.words)) for value in axis.values]
    numbers = [math.log(float(value)) if axis.log else float(value) for value in axis.values]
    return _linear(numbers, min(numbers), max(numbers))


def _linear(values: Sequence[float], low: float, high: float) -> list[float]:
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def _place(index: int, number: int) -> float:
    return index / (number - 1) if number > 1 else 0.5


def _marks(axis: Axis) -> list[tuple[float, str]]:
    """Heights of an axis that are named, and how."""
    if axis.words is not None:
        return [(_place(index, len(axis.words)), word) for index, word in enumerate(axis.words)]
    numbers = sorted(float(value) for value in axis.values)
    low, high = numbers[0], numbers[-1]
    middle = math.sqrt(low * high) if axis.log else (low + high) / 2
    return [(0.0, f"{low:.3g}"), (0.5, f"{middle:.3g}"), (1.0, f"{high:.3g}")] if high > low else [(0.5, f"{low:.3g}")]


def _ticks(plot: Axes, index: int, marks: Sequence[tuple[float, str]]) -> None:
    plot.axvline(index, color=GREY, linewidth=1, zorder=0)
    for height, text in marks:
        plot.annotate(
            text,
            (index, height),
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=10,
            color="#222",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )
