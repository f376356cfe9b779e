"""Reports on several runs of a benchmark."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.api.cli import benchmarks
from agent_lightning.config.load import load, to_yaml
from agent_lightning.core.errors import UserError
from agent_lightning.rollouts.agents import load as load_target
from agent_lightning.run.report import RolloutCounts, StepSeconds, Summary
from agent_lightning.run.tracking import JsonLines, RunDirectory

MakeRun = Callable[..., Path]
Benchmark: Any = load_target("benchmarks/reproduce/report.py:Benchmark")
write_report: Any = load_target("benchmarks/reproduce/report.py:write_report")


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A finished run of the toy experiment: its seed, and its last held-out reward."""

    def make(seed: int, last: float, experiment: str = "toy") -> Path:
        run = RunDirectory.create(tmp_path, experiment, seed, f"{experiment}-{seed}")
        run.config.write_text(to_yaml(load(["experiment=toy", f"seed={seed}"])))
        metrics = JsonLines(run.metrics)
        for step, reward in ((0, 0.25), (5, 0.5), (10, last)):
            metrics.log(step, {"val/reward": reward})
        Summary(
            experiment=experiment,
            seed=seed,
            steps=10,
            wall_s=60.0,
            val_reward_first=0.25,
            val_reward_last=last,
            val_rows=16,
            rollouts=RolloutCounts(admitted=1, trained=1, dropped={}, failed={}),
            sampled_tokens=1,
            trained_tokens=1,
            max_abs_logprob_gap=0.0,
            mean_abs_logprob_gap=0.0,
            step_s=StepSeconds(total=1.0, generate=1.0, update=0.0, publish=0.0, other=0.0),
            versions=10,
            start_s=30.0,
            val_reward_best=last,
        ).write(run.summary)
        return run.path

    return make


def test_a_report_has_the_spread_the_published_figures_and_how_it_was_run(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run(seed, last) for seed, last in ((0, 0.6), (1, 0.7), (2, 0.8))]
    out = tmp_path / "report"
    assert benchmarks.reproduce("spider", scale="tiny", seeds=[0], runs=runs, out=out, overrides=[]) == 0
    text = (out / "report.md").read_text()
    for wanted in (
        "**Held-out reward at the end: 0.700 ± 0.100** (mean and standard deviation of 3 seeds, 16 rows); "
        "median gain +45.0 points.",
        "| 1 | 0.250 | 0.700 | 0.700 | +45.0 | 10 | 1:00 | 30 s |",
        "| Llama-3.2-3B-Instruct, one and two GPUs | 0.518 | 0.664 | reference project 0.1.2",
        "| learning rate | 8, constant, 0 steps of warm-up |",
        "| ray | 2.60.0 |",
        "cores",
        str(runs[2]),
    ):
        assert wanted in text
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_without_published_figures_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    write_report(Benchmark.read("calc_x"), "paper", [make_run(0, 0.5)], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "arXiv 2508.03680 shows curves of the reward for this experiment, and gives no figures." in text
    assert "**Held-out reward at the end: 0.500**" in text


def test_runs_of_several_experiments_are_no_report(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is of other, .* of toy"):
        write_report(
            Benchmark.read("calc_x"), "tiny", [make_run(0, 0.5), make_run(1, 0.5, "other")], tmp_path / "report"
        )


@pytest.mark.parametrize("name", benchmarks.names())
def test_the_experiments_of_a_benchmark_compose(name: str) -> None:
    experiments = Benchmark.read(name).experiments
    assert load([f"experiment={experiments['tiny']}"]).hardware.device == "cpu"
    config = load([f"experiment={experiments['paper']}"])
    assert config.hardware.device == "cuda"
    assert (config.algorithm.tasks_per_step, config.algorithm.rollouts_per_task) == (32, 4)
