"""Sweeps on Ray Tune. Their runs only write the files of a run (tests/support/short_run.py)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent_lightning.core import actors as cluster
from agent_lightning.core.ray_private import prepare_environment
from agent_lightning.launch.sweeps import tune as tuning
from agent_lightning.launch.sweeps.plan import SweepFolder, SweepPlan, TrialRecord, best_of, plan_sweep, trial_words
from agent_lightning.run.plots import evaluations

pytestmark = pytest.mark.stack
PROGRAM = (sys.executable, str(Path(__file__).parents[1] / "support" / "short_run.py"))
FIXED = ["experiment=toy", "steps=8", "eval_every=2"]


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    prepare_environment()
    cluster.init_ray(None, 4, resources={tuning.SEAT: 2})
    yield
    cluster.shutdown_ray()


def run(
    folder: SweepFolder, plan: SweepPlan, *, resume: bool = False, listener: Callable[[TrialRecord], None] | None = None
) -> dict[str, TrialRecord]:
    """The newest record of each trial."""
    plan = replace(plan, fixed=(*plan.fixed, *trial_words(plan, "group")))
    records: dict[str, TrialRecord] = {}

    def update(record: TrialRecord) -> None:
        records[record.name] = record
        if listener is not None:
            listener(record)

    tuning.run(plan, folder.path, concurrent=2, seats=True, resume=resume, update=update, program=PROGRAM)
    return records


@pytest.mark.slow
def test_asha_stops_the_worse_trials_and_a_failed_trial_ends_no_other(tmp_path: Path) -> None:
    plan, _ = plan_sweep(
        [*FIXED, "sweep=asha", "sweep.reduction=2", "algorithm.lr=uniform(1,3)", "seed=choice(14,14,13)"]
    )
    plan = replace(plan, settings=plan.settings.model_copy(update={"trials": 8}))
    records = run(SweepFolder.create(tmp_path, plan), plan)
    states = [record.state for record in records.values()]
    assert len(states) == 8
    assert {"done", "stopped", "failed"} == set(states)
    best = best_of(list(records.values()))
    assert best is not None
    assert best.step == 8
    for record in records.values():
        assert (record.error is not None) == (record.state == "failed") == ("seed=13" in record.words)
        assert record.state != "stopped" or record.step < 8 or record.last < best.last


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    plan, _ = plan_sweep([*FIXED, "sweep=grid", "algorithm.lr=choice(1,2)", "seed=range(0,2)"])
    records = run(SweepFolder.create(tmp_path, plan), plan)
    assert sorted(record.words for record in records.values()) == [
        (f"algorithm.lr={lr}", f"seed={seed}") for lr in (1, 2) for seed in (0, 1)
    ]


@pytest.mark.slow
def test_an_interrupted_sweep_continues_where_it_was(tmp_path: Path) -> None:
    plan, _ = plan_sweep([*FIXED, "sweep.trials=4", "algorithm.lr=uniform(1,3)", "seed=choice(14)"])
    folder = SweepFolder.create(tmp_path, plan)

    def interrupt(record: TrialRecord) -> None:
        if record.step == 2 and threading.current_thread() is threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)

    first = run(folder, plan, listener=interrupt)
    assert any(not record.ended for record in first.values())
    second = run(folder, plan, resume=True)
    everything = first | second
    assert sorted(everything) == [f"trial-{number:03d}" for number in range(4)]
    assert all(record.state == "done" and record.step == 8 for record in everything.values())


@pytest.mark.slow
def test_in_population_based_training_the_worst_trials_continue_from_the_best(tmp_path: Path) -> None:
    plan, _ = plan_sweep([*FIXED, "sweep=pbt", "sweep.trials=4", "algorithm.lr=loguniform(0.1,9)"])
    folder = SweepFolder.create(tmp_path, plan)
    records = run(folder, plan)
    assert [record.state for record in records.values()] == ["done"] * 4
    copies = list(folder.path.glob("trial-*-2"))
    assert copies
    for copy in copies:
        points = evaluations(copy / "metrics.jsonl")
        assert [step for step, _ in points] == [0, 2, 4, 6, 8]
        lr = points[-1][1] / 8  # this run's own value, not that of the run it continues
        assert 0.001 <= lr <= 0.09


@pytest.mark.slow
def test_a_bayesian_sweep_draws_near_good_values(tmp_path: Path) -> None:
    plan, _ = plan_sweep([*FIXED, "sweep=bayes", "sweep.trials=16", "algorithm.lr=uniform(0,9)"])
    records = run(SweepFolder.create(tmp_path, plan), plan)
    rewards = [records[name].last for name in sorted(records)]
    assert len(rewards) == 16
    assert sum(rewards[10:]) / 6 > sum(rewards[:10]) / 10
