"""A sweep on Ray Tune, which draws values and decides which trials continue; no other module imports ray.tune. Each
trial is an `agl train` process that a Tune actor watches (`trials.py`), and all trials share a cluster."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import schedulers
from ray.tune.search import BasicVariantGenerator

from agent_lightning.core import ray_private
from agent_lightning.core.errors import UserError
from agent_lightning.launch.sweeps.plan import SweepPlan, TrialRecord
from agent_lightning.launch.sweeps.space import Choice, Distribution, Numbers, sampled_words
from agent_lightning.launch.sweeps.trials import PROGRAM, Trial, is_done, last_log_line, log_path, newest_run
from agent_lightning.run.plots import evaluations

SEAT = "sweep_seat"
"""A resource of a cluster that is started for a sweep: a unit for each trial that may run at the same time."""
POINTER = "run.json"
"""The only file in Tune's checkpoints. It names a trial's run and a step; the run has the real checkpoint."""


class TrialActor(tune.Trainable):
    """The actor that Tune drives: it reports a trial's evaluations, and saves, loads and ends the trial."""

    def setup(self, config: dict[str, Any], *, plan: SweepPlan, **arguments: Any) -> None:
        """`config`: Tune's values for the searched keys. `arguments`: those of `Trial` that all trials share."""
        # Ray limits the threads of an actor's own computations; the trial's process is to use its cores.
        os.environ.pop("OMP_NUM_THREADS", None)
        self._plan, self._arguments = plan, arguments
        self._trial = self._make_trial(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in the same actor: starting another actor would take longer than some trials."""
        self._trial.stop()
        self._trial = self._make_trial(new_config)
        return True

    def _make_trial(self, config: dict[str, Any]) -> Trial:
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        name, words = Path(self.logdir).name, self._plan.words(config)
        return Trial(name=name, words=words, environment=environment, **self._arguments)

    def step(self) -> dict[str, Any]:
        result = self._trial.next_result()
        return asdict(result) | ({"done": True} if result.finished else {})

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        # Only PBT copies this checkpoint, into another trial. A trial resumes itself from its own run's folder.
        if self._plan.settings.scheduler == "pbt":
            self._trial.wait_for_checkpoint()
        pointer = {"run": str(self._trial.run), "step": self._trial.last_step}
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint: str) -> None:
        pointer = json.loads((Path(checkpoint) / POINTER).read_text())
        self._trial.adopt(Path(pointer["run"]), pointer["step"])

    def cleanup(self) -> None:
        self._trial.stop()


_LISTENERS: dict[Path, Callable[[TrialRecord], None]] = {}
"""The function that takes the trials' records, by the sweep's folder. It may hold a terminal, which Tune, which pickles
its callbacks, could not pickle."""


class _RecordTrials(tune.Callback):
    """Makes a record of each trial that started, was evaluated, or ended, and passes it to the sweep's listener."""

    def __init__(self, plan: SweepPlan, sweep: Path) -> None:
        self._plan, self._sweep = plan, sweep
        self._started: dict[str, float] = {}

    def on_trial_start(self, *, trial: Any, **info: Any) -> None:
        self._started.setdefault(trial.trial_id, time.monotonic())
        self._record(trial, "running")

    def on_trial_result(self, *, trial: Any, **info: Any) -> None:
        self._record(trial, "running")

    def on_trial_complete(self, *, trial: Any, **info: Any) -> None:
        run = newest_run(self._sweep, Path(trial.local_path).name)
        self._record(trial, "done" if is_done(run) else "stopped")

    def on_trial_error(self, *, trial: Any, **info: Any) -> None:
        self._record(trial, "failed")

    def _record(self, trial: Any, state: str) -> None:
        name = Path(trial.local_path).name
        run = newest_run(self._sweep, name)
        started = self._started.get(trial.trial_id, time.monotonic())
        _LISTENERS[self._sweep](
            TrialRecord(
                name=name,
                words=sampled_words(self._plan.space, trial.config),
                state=state,
                run=run.name,
                rewards=tuple(evaluations(run / "metrics.jsonl")),
                error=last_log_line(self._sweep, name) if state == "failed" else None,
                seconds=round(time.monotonic() - started, 1),
            )
        )


def run(
    plan: SweepPlan,
    sweep: Path,
    *,
    concurrent: int,
    seats: bool,
    resume: bool,
    update: Callable[[TrialRecord], None],
    program: Sequence[str] = PROGRAM,
) -> None:
    """Run all trials, and pass their records to `update`. Ctrl-C and SIGTERM stop them, each with a checkpoint. Ray
    must run, with the resource `SEAT` if `seats` is set. Tune's placement group for a trial holds the actor that
    watches it; the trial's run requests its own resources. Raises UserError if there is nothing to `resume`, or if
    the cluster cannot hold a population at the same time."""
    if plan.settings.scheduler == "pbt" and not seats and concurrent < plan.num_trials:
        raise UserError(
            f"sweep.trials={plan.num_trials}: the cluster has room for {concurrent} at a time, and a population runs "
            "together; take fewer, or a larger cluster"
        )
    sweep = sweep.resolve()
    os.environ |= ray_private.TUNE_ENVIRONMENT
    trainable = tune.with_resources(
        tune.with_parameters(TrialActor, plan=plan, sweep=sweep, folder=Path.cwd(), program=program),
        tune.PlacementGroupFactory([{"CPU": 1, SEAT: 1} if seats else {"CPU": 1}], strategy="PACK"),
    )
    tuner = _tuner(plan, sweep, trainable, concurrent=concurrent, resume=resume)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial's record has its last line
    terminated = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    _LISTENERS[sweep] = update
    try:
        tuner.fit()
    finally:
        signal.signal(signal.SIGTERM, terminated)
        del _LISTENERS[sweep]


def _tuner(plan: SweepPlan, sweep: Path, trainable: Any, *, concurrent: int, resume: bool) -> tune.Tuner:
    settings, folder = plan.settings, sweep / "tune"
    grid, bayes = settings.search == "grid", settings.search == "bayes"
    domains = {
        key: tune.grid_search(list(space.values)) if grid and isinstance(space, Choice) else _domain(space)
        for key, space in plan.space.items()
    }
    param_space = {} if bayes else domains
    if resume:
        if not tune.Tuner.can_restore(str(folder)):
            raise UserError(f"{sweep} was interrupted before its first trial: start it anew")
        return tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, param_space=param_space)
    if bayes:
        from ray.tune.search.optuna import OptunaSearch

        search: Any = OptunaSearch(space=domains, metric="reward", mode="max", seed=settings.seed)
    else:
        # In a population the trials take turns, and the seats alone limit how many run at the same time.
        most = 0 if settings.scheduler == "pbt" else concurrent
        search = BasicVariantGenerator(random_state=settings.seed, max_concurrent=most)
    tune_config = tune.TuneConfig(
        metric="reward",
        mode="max",
        search_alg=search,
        scheduler=_scheduler(plan),
        num_samples=1 if grid else plan.num_trials,
        max_concurrent_trials=concurrent if bayes else None,
        reuse_actors=True,
        trial_dirname_creator=partial(_name_trial, sweep),
    )
    record, no_retries = _RecordTrials(plan, sweep), tune.FailureConfig(max_failures=0)
    run_config = tune.RunConfig(
        name=folder.name, storage_path=str(sweep), callbacks=[record], verbose=0, failure_config=no_retries
    )
    return tune.Tuner(trainable, param_space=param_space, tune_config=tune_config, run_config=run_config)


def _name_trial(sweep: Path, trial: Any) -> str:
    """Name trials trial-000, trial-001, … in the order in which Tune makes them; an existing log marks a used name."""
    name = f"trial-{len(list((sweep / 'logs').glob('trial-*.log'))):03d}"
    log_path(sweep, name).touch(exist_ok=False)
    return name


def _scheduler(plan: SweepPlan) -> Any:
    settings = plan.settings
    if settings.scheduler == "asha":
        grace = settings.grace_steps or plan.interval
        return schedulers.ASHAScheduler(
            time_attr="step", max_t=plan.steps, grace_period=grace, reduction_factor=settings.reduction
        )
    if settings.scheduler == "pbt":
        return schedulers.PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=settings.interval_steps or plan.interval,
            hyperparam_mutations={
                key: list(distribution.values) if isinstance(distribution, Choice) else _domain(distribution)
                for key, distribution in plan.space.items()
            },
            custom_explore_fn=partial(_move_into_space, plan.space),
        )
    return None


def _move_into_space(space: Mapping[str, Distribution], values: dict[str, Any]) -> dict[str, Any]:
    """PBT multiplies values by 0.8 or 1.2; this moves them to the nearest values of the search space."""
    numbers = {key: distribution for key, distribution in space.items() if isinstance(distribution, Numbers)}
    return values | {key: distribution.nearest(float(values[key])) for key, distribution in numbers.items()}


def _domain(distribution: Distribution) -> Any:
    if isinstance(distribution, Choice):
        return tune.choice(list(distribution.values))
    draws = [tune.uniform, tune.quniform, tune.loguniform, tune.qloguniform]
    draws += [tune.randint, tune.qrandint, tune.lograndint, tune.qlograndint]
    draw = {function.__name__: function for function in draws}[distribution.name]
    return draw(*map(int if distribution.integers else float, distribution.arguments))
