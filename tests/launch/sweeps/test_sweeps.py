"""Sweeps without Ray Tune: the search space, refusals before anything starts, trials, and the files of a sweep."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from agent_lightning.config.load import load
from agent_lightning.core.errors import UserError
from agent_lightning.launch.sweeps.plan import (
    SweepFolder,
    TrialRecord,
    best_experiment,
    best_of,
    hydra_words,
    plan_sweep,
    trial_words,
)
from agent_lightning.launch.sweeps.space import Choice, Numbers, parse_words, sampled_words
from agent_lightning.launch.sweeps.trials import Trial, TrialFailed
from agent_lightning.launch.sweeps.view import Curve, SweepView, finish_sweep, plot_curves, plot_parallel
from agent_lightning.run.plots import evaluations

PROGRAM = (sys.executable, str(Path(__file__).parents[2] / "support" / "short_run.py"))
COMMAND = ["experiment=toy", "sweep=asha", "eval_every=2", "algorithm.lr=loguniform(1,9)", "seed=choice(0,1)"]


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("choice(a,b)", Choice(("a", "b"))),
        ("choice([1,2],'x,y')", Choice(("[1,2]", "'x,y'"))),
        ("range(0,4)", Choice(("0", "1", "2", "3"))),
        ("range(0.1,0.4,0.1)", Choice(("0.1", "0.2", "0.3"))),
        ("uniform(0,1)", Numbers("uniform", (0, 1))),
        ("loguniform(1e-4,3e-3)", Numbers("loguniform", (1e-4, 3e-3))),
        ("quniform(0,1,0.25)", Numbers("quniform", (0, 1, 0.25))),
        ("randint(1,5)", Numbers("randint", (1, 5))),
        ("qlograndint(2,64,2)", Numbers("qlograndint", (2, 64, 2))),
    ],
)
def test_a_distribution_is_read(text: str, distribution: Choice | Numbers) -> None:
    assert parse_words(["steps=3", f"a.b={text}"]) == (("steps=3",), {"a.b": distribution})


def test_the_config_is_checked_with_the_bounds_of_numbers_and_with_every_choice() -> None:
    assert Numbers("uniform", (0, 1)).check_values() == ("0", "1")
    assert Numbers("randint", (1, 5)).check_values() == ("1", "4")
    assert Numbers("qrandint", (2, 8, 2)).check_values() == ("2", "8")
    assert Choice(("a", "b", "c")).check_values() == ("a", "b", "c")


def test_reading_a_search_space_imports_no_ray() -> None:
    script = (
        "import sys; from agent_lightning.launch.sweeps.space import parse_words; parse_words(['a=qrandint(2,8,2)']); "
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_trials_words_can_be_typed() -> None:
    space = parse_words(["a=loguniform(1e-4,1)", "b=randint(1,9)", "c=choice(x,y)"])[1]
    assert sampled_words(space, {"a": 0.00031234567, "b": 3, "c": "y"}) == ("a=0.000312346", "b=3", "c=y")


def test_a_value_comes_back_into_its_space() -> None:
    assert Numbers("randint", (1, 5)).nearest(7.3) == 4
    assert Numbers("qrandint", (2, 8, 2)).nearest(5.2) == 6
    assert Numbers("quniform", (0, 1, 0.25)).nearest(0.4) == 0.5
    assert Numbers("loguniform", (1e-4, 1)).nearest(1.2) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("algorithm.lrr=uniform(1,2)", "algorithm.lrr: no such key; did you mean algorithm.lr?"),
        ("algorithm.lr=normal(1,2)", "there is no distribution normal"),
        ("algorithm.lr=uniform(2,1)", "the first number must be below the second"),
        ("algorithm.lr=loguniform(0,1)", "above 0"),
        ("algorithm.lr=uniform(1)", "write uniform(LOW,HIGH)"),
        ("algorithm.lr=quniform(0,1)", "write quniform(LOW,HIGH,STEP), in numbers"),
        ("algorithm.lr=quniform(0,1,0.3)", "must be multiples of the third"),
        ("algorithm.lr=qloguniform(0,1,0.1)", "above 0"),
        ("seed=qrandint(0,5,2.5)", "in whole numbers"),
        ("algorithm.tasks_per_step=randint(0,9)", "algorithm.tasks_per_step=0: must be at least 1"),
        ("seed=uniform(0.5,1)", "seed=0.5: must be a whole number"),
        ("credit=choice(identical,airr)", "credit=airr: unknown"),
        ("seed=choice(0,1) seed=2", "seed: given twice"),
        ("seed=2", "needs something to search"),
        ("seed=choice(0,1) name=x", "name: a sweep names"),
        ("seed=choice(0,1) sweep=best", "sweep=best: unknown; choose one of asha, bayes, grid, pbt, random"),
        ("seed=choice(0,1) sweep.trails=2", "sweep.trails: no such key"),
        ("seed=choice(0,1) sweep.trials=0", "sweep.trials=0: must be at least 1"),
        ("seed=choice(0,1) sweep.grace_steps=2", "only sweep.scheduler=asha reads it"),
        ("seed=choice(0,1) sweep=grid sweep.trials=2", "leave it out"),
        ("algorithm.lr=uniform(1,2) sweep=grid", "a grid needs choice(…) or range(…)"),
        ("seed=range(0,300) sweep=grid", "the grid has 300 combinations"),
        ("steps=choice(5,10) sweep=asha eval_every=1", "steps and eval_every cannot be searched"),
        ("seed=choice(0,1) sweep=asha eval_every=0", "eval_every: asha compares trials on their way"),
        ("seed=choice(0,1) sweep=pbt sweep.trials=1", "a population has at least 2"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_line(words: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        plan_sweep(["experiment=toy", *words.split()])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_short_run_can_be_swept() -> None:
    assert plan_sweep(["experiment=toy", "steps=1", "seed=choice(0,1)"])[0].num_trials == 16


def test_hydras_own_sweeps_are_a_grid() -> None:
    words = hydra_words(["experiment=toy", "algorithm.lr=2.0,4.0", "seed=range(0,3)"])
    assert words == ["experiment=toy", "algorithm.lr=choice(2.0,4.0)", "seed=choice(0,1,2)", "sweep=grid"]
    assert plan_sweep(words)[0].num_trials == 6
    assert hydra_words(["seed=0,1", "sweep=random"]) == ["seed=choice(0,1)", "sweep=random"]


def test_the_trials_of_a_sweep_are_one_group_and_of_pbt_have_checkpoints() -> None:
    plan, _ = plan_sweep(["experiment=toy", "seed=choice(0,1)", "sweep=pbt", "eval_every=2"])
    assert trial_words(plan, "sweep-1") == ("tracking.group=sweep-1", "checkpoint_every=2")


def record(number: int, *rewards: float, state: str = "done", lr: str = "2") -> TrialRecord:
    name = f"trial-{number:03d}"
    points = tuple((2 * index, reward) for index, reward in enumerate(rewards))
    return TrialRecord(name=name, words=(f"algorithm.lr={lr}", "seed=1"), state=state, run=name, rewards=points)


def test_the_best_trial_did_not_fail_and_among_equals_has_the_most_steps() -> None:
    records = [record(0, 0.1, 0.5), record(1, 0.1, 0.4, 0.5), record(2, 0.9, state="failed"), record(3)]
    assert best_of(records) is records[1]
    assert best_of(records[2:]) is None


def test_the_best_config_is_an_experiment_that_trains_the_same(tmp_path: Path) -> None:
    plan, _ = plan_sweep([*COMMAND, "credit=choice(identical,air)"])
    best = TrialRecord(name="trial-001", words=("algorithm.lr=2.5", "seed=1", "credit=air"), rewards=((2, 0.5),))
    file = tmp_path / "experiment" / "best.yaml"
    file.parent.mkdir()
    file.write_text(best_experiment(plan, best))
    ours = load([f"experiment={file}"])
    assert ours.experiment == "toy_best"
    assert ours.model_copy(update={"experiment": "toy"}) == load([*plan.fixed, *best.words])


def test_a_sweep_writes_its_trials_its_best_experiment_and_two_pictures(tmp_path: Path) -> None:
    plan, _ = plan_sweep(COMMAND)
    folder = SweepFolder.create(tmp_path, plan)
    view = SweepView(plan, Console(file=(tmp_path / "output").open("w"), width=80), folder)
    for trial_record in (record(0, 0.1, 0.5), record(1, 0.1, 0.7, lr="3"), record(2, state="failed", lr="4")):
        view.update(trial_record)
        assert folder.read() == view.records, "a sweep that is killed now has its trials"
    assert folder.num_trials() == plan.num_trials
    assert SweepFolder.open(folder.path).read() == view.records
    assert folder.command() == COMMAND
    # The words of an earlier sweep may name keys as they were called then.
    folder.command_file.write_text("command: ['algorithm.refills=choice(0,1)', 'seed=1']\n")
    assert folder.command() == ["algorithm.dynamic_sampling_rounds=choice(0,1)", "seed=1"]
    assert finish_sweep(plan, folder, view.records) == record(1, 0.1, 0.7, lr="3")
    for picture in (folder.curves, folder.parallel):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_pictures_of_few_and_equal_values_are_drawn(tmp_path: Path) -> None:
    plot_curves([Curve("a", []), Curve("b", [(0, 0.5)], highlight=True)], tmp_path / "a.png", "a")
    space = {"lr": Numbers("uniform", (1, 2)), "x": Choice(("a",))}
    plot_parallel(space, [{"lr": "1", "x": "a"}] * 2, [0.5, float("nan")], 0, tmp_path / "b.png", "b")
    assert (tmp_path / "a.png").stat().st_size > 0 < (tmp_path / "b.png").stat().st_size


def trial(sweep: Path, *words: str, name: str = "trial-000") -> Trial:
    (sweep / "logs").mkdir(exist_ok=True)
    return Trial(sweep=sweep, name=name, words=("steps=4", "eval_every=2", *words), program=PROGRAM)


def test_a_trial_reports_each_evaluation_and_its_end(tmp_path: Path) -> None:
    only = trial(tmp_path, "algorithm.lr=2")
    results = [only.next_result() for _ in range(3)]
    assert [(result.step, result.reward) for result in results] == [(0, 0.0), (2, 0.04), (4, 0.08)]
    assert [result.finished for result in results] == [False, False, True]


def test_a_failed_trial_is_reported_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    failing = trial(tmp_path, "algorithm.lr=2", "seed=13")
    failing.next_result()
    with pytest.raises(TrialFailed, match="trial-000 ended with exit code 1: agl: the engine broke down"):
        failing.next_result()


def test_a_stopped_trial_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    stopped = trial(tmp_path, "algorithm.lr=2", "seed=14")
    stopped.next_result()
    stopped.stop()
    again = trial(tmp_path, "algorithm.lr=2", "seed=14")
    while not (result := again.next_result()).finished:
        pass
    assert result.step == 4
    assert [folder.name for folder in tmp_path.glob("trial-*")] == ["trial-000"]


def test_a_trial_continues_from_the_checkpoint_of_a_better_trial_in_a_new_run(tmp_path: Path) -> None:
    good = trial(tmp_path, "experiment=toy", "algorithm.lr=3", "checkpoint_every=2")
    good.next_result()
    good.next_result()
    worse = trial(tmp_path, "experiment=toy", "algorithm.lr=2", name="trial-001")
    worse.next_result()
    worse.stop()
    other = trial(tmp_path, "experiment=toy", "algorithm.lr=4", name="trial-001")
    good.wait_for_checkpoint()
    other.adopt(good.run, good.last_step)
    result = other.next_result()
    good.stop()
    assert (result.step, result.reward, result.finished) == (4, 0.16, True)
    assert other.run.name == "trial-001-2"
    assert evaluations(other.run / "metrics.jsonl") == [(0, 0.0), (2, 0.06), (4, 0.16)]
