"""What several runs of one experiment reached: a JSON line, and a picture of their held-out rewards.

    python scripts/seeds.py runs/calc_tiny-s0 runs/calc_tiny-s1 runs/calc_tiny-s2 --plot docs/calc_tiny.png
    python scripts/seeds.py AIR_RUN … --against OTHER_RUN …

The gain is of the last evaluation over the first, in points; the median is over the runs. With --against, also the
first evaluation at which each run is as good as its counterpart (same place in the list) at its end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from agent_lightning.run.plots import evaluations
from agent_lightning.run.report import Summary


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, held-out reward) of each evaluation."""
    return evaluations(run / "metrics.jsonl")


def describe(run: Path) -> dict[str, Any]:
    summary = Summary.read(run / "summary.json")
    return {
        "run": run.name,
        "seed": summary.seed,
        "first": round(summary.val_reward_first, 4),
        "last": round(summary.val_reward_last, 4),
        "points": round(100 * (summary.val_reward_last - summary.val_reward_first), 1),
        "steps": summary.steps,
        "minutes": round((summary.wall_s + summary.start_s) / 60, 1),
        "max_abs_logprob_gap": summary.max_abs_logprob_gap,
    }


def summary(runs: list[Path], against: list[Path]) -> dict[str, Any]:
    described = [describe(run) for run in runs]
    result: dict[str, Any] = {
        "script": "seeds",
        "experiment": Summary.read(runs[0] / "summary.json").experiment,
        "val_rows": Summary.read(runs[0] / "summary.json").val_rows,
        "runs": described,
        "median_points": statistics.median(run["points"] for run in described),
    }
    if against:
        result["against"] = [describe(run) for run in against]
        result["median_points_against"] = statistics.median(run["points"] for run in result["against"])
        pairs = zip(runs, against, strict=True)
        result["as_good_at_step"] = [first_step(curve(run), curve(other)[-1][1]) for run, other in pairs]
    return result


def first_step(points: list[tuple[int, float]], reward: float) -> int | None:
    return next((step for step, value in points if value >= reward), None)


def plot(runs: list[Path], against: list[Path], out: Path, title: str, names: list[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for group, colour, name in zip((runs, against), ("#d1495b", "#3b6fb6"), names, strict=False):
        curves = [curve(run) for run in group]
        for points in curves:
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=1.2, marker=".")
        if curves:
            rewards = [dict(points) for points in curves]
            steps = [step for step in rewards[0] if all(step in run for run in rewards)]
            middle = [statistics.median(run[step] for run in rewards) for step in steps]
            axes.plot(steps, middle, color=colour, linewidth=2.6, label=f"{name}, median of {len(group)} seeds")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("held-out reward")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="as many runs to compare with")
    parser.add_argument("--plot", type=Path, help="a PNG to write")
    parser.add_argument("--names", nargs=2, default=("held out", "against"), help="of the two groups of runs")
    options = parser.parse_args()
    result = summary(options.runs, options.against)
    if options.plot:
        plot(options.runs, options.against, options.plot, result["experiment"], list(options.names))
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
