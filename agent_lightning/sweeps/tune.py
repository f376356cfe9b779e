"""A sweep on Ray Tune: the only module that knows ray.tune. Tune chooses values and who goes on; each trial is an
`agl train` that an actor of Tune's watches (`trials.py`), in the one cluster that all trials share."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator

from agent_lightning.core import ray_private
from agent_lightning.core.errors import UserError
from agent_lightning.run.plots import evaluations
from agent_lightning.sweeps.plan import SweepPlan, TrialRecord
from agent_lightning.sweeps.space import Between, Choice, Distribution, sampled_words
from agent_lightning.sweeps.trials import PROGRAM, Trial, is_done, last_log_line, log_path, newest_run

SEAT = "sweep_seat"
"""A resource of a cluster that is started for a sweep, one for each trial that it is to hold at a time."""
POINTER = "run.json"
"""A checkpoint of Tune's is only this: whose run it is, and the step."""


class TrialActor(tune.Trainable):
    """What Tune drives: a trial's next evaluation, its checkpoint, and its end."""

    def setup(self, config: dict[str, Any], **make: Any) -> None:
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray's, for an actor that computes in its own process
        self._make = make
        # Others are the only ones that go on from it: a trial itself does from whatever its run has.
        self._copied = make["plan"].settings.scheduler == "pbt"
        self._trial = self._new(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The actor's next trial: starting another actor would take longer than some trials."""
        self._trial.stop()
        self._trial = self._new(new_config)
        return True

    def _new(self, config: dict[str, Any]) -> Trial:
        made = dict(self._make)
        words = made.pop("plan").words(config)
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        return Trial(name=Path(self.logdir).name, words=words, environment=environment, **made)

    def step(self) -> dict[str, Any]:
        result = self._trial.next_result()
        values = {"step": result.step, "reward": result.reward, "finished": result.finished}
        return values | {"done": True} if result.finished else values

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        run, step = self._trial.wait_for_checkpoint() if self._copied else self._trial.position()
        (Path(checkpoint_dir) / POINTER).write_text(json.dumps({"run": str(run), "step": step}))

    def load_checkpoint(self, checkpoint: str) -> None:
        pointer = json.loads((Path(checkpoint) / POINTER).read_text())
        self._trial.adopt(Path(pointer["run"]), pointer["step"])

    def cleanup(self) -> None:
        self._trial.stop()


_LISTENERS: dict[Path, Callable[[TrialRecord], None]] = {}
"""Who is told of a sweep's trials, by its folder: Tune pickles its callbacks, and a terminal cannot be."""


class _Watch(tune.Callback):
    """Tells of every trial that started, was evaluated, or ended."""

    def __init__(self, plan: SweepPlan, sweep: Path) -> None:
        self._plan, self._sweep = plan, sweep
        self._started: dict[str, float] = {}

    def _changed(self, record: TrialRecord) -> None:
        _LISTENERS[self._sweep](record)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._started.setdefault(trial.trial_id, time.monotonic())
        self._changed(self._record(trial, "running"))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._changed(self._record(trial, "running"))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run = newest_run(self._sweep, Path(trial.local_path).name)
        self._changed(self._record(trial, "done" if is_done(run) else "stopped"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._changed(self._record(trial, "failed"))

    def _record(self, trial: Any, state: str) -> TrialRecord:
        name = Path(trial.local_path).name
        run = newest_run(self._sweep, name)
        started = self._started.get(trial.trial_id, time.monotonic())
        return TrialRecord(
            name=name,
            words=sampled_words(self._plan.space, trial.config),
            state=state,
            run=run.name,
            rewards=tuple(evaluations(run / "metrics.jsonl")),
            error=last_log_line(self._sweep, name) if state == "failed" else None,
            seconds=round(time.monotonic() - started, 1),
        )


def run(
    plan: SweepPlan,
    sweep: Path,
    *,
    concurrent: int,
    seats: bool,
    resume: bool,
    changed: Callable[[TrialRecord], None],
    program: Sequence[str] = PROGRAM,
) -> None:
    """Run all trials; Ctrl-C and SIGTERM stop them, each with a checkpoint. Ray runs already, where `seats` with SEAT.

    A trial's placement group holds the actor that watches it; its run asks for its own. Raises UserError where the
    sweep cannot be gone on with, and for a population that a joined cluster cannot hold at once.
    """
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
    tuner = _restored(plan, sweep, trainable) if resume else _new(plan, sweep, trainable, concurrent)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the trials' own last lines say why they failed
    terminated = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    _LISTENERS[sweep] = changed
    try:
        tuner.fit()
    finally:
        signal.signal(signal.SIGTERM, terminated)
        del _LISTENERS[sweep]


def _new(plan: SweepPlan, sweep: Path, trainable: Any, concurrent: int) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        param_space={} if plan.settings.search == "bayes" else _domains(plan),
        tune_config=_tune_config(plan, sweep, concurrent),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(sweep),
            callbacks=[_Watch(plan, sweep)],
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )


def _restored(plan: SweepPlan, sweep: Path, trainable: Any) -> tune.Tuner:
    folder = sweep / "tune"
    if not tune.Tuner.can_restore(str(folder)):
        raise UserError(f"{sweep} was interrupted before its first trial: start it anew")
    space = {} if plan.settings.search == "bayes" else _domains(plan)
    return tune.Tuner.restore(str(folder), trainable, resume_unfinished=True, param_space=space)


def _tune_config(plan: SweepPlan, sweep: Path, concurrent: int) -> tune.TuneConfig:
    settings = plan.settings
    search: Any = None
    if settings.search == "bayes":
        from ray.tune.search.optuna import OptunaSearch

        search = OptunaSearch(space=_domains(plan), metric="reward", mode="max", seed=settings.seed)
    else:
        # Of a population each has a turn: only the seats bound how many run at a time.
        most = 0 if settings.scheduler == "pbt" else concurrent
        search = BasicVariantGenerator(random_state=settings.seed, max_concurrent=most)
    return tune.TuneConfig(
        metric="reward",
        mode="max",
        search_alg=search,
        scheduler=_scheduler(plan),
        num_samples=1 if settings.search == "grid" else plan.num_trials,
        max_concurrent_trials=concurrent if settings.search == "bayes" else None,
        reuse_actors=True,
        trial_dirname_creator=_Names(sweep),
    )


class _Names:
    """trial-000, trial-001, … in the order in which Tune makes them; a log that is there is a name that is taken."""

    def __init__(self, sweep: Path) -> None:
        self._sweep = sweep

    def __call__(self, trial: Any) -> str:
        number = len(list((self._sweep / "logs").glob("trial-*.log")))
        name = f"trial-{number:03d}"
        log_path(self._sweep, name).touch(exist_ok=False)
        return name


def _scheduler(plan: SweepPlan) -> Any:
    settings = plan.settings
    if settings.scheduler == "asha":
        return ASHAScheduler(
            time_attr="step",
            max_t=plan.steps,
            grace_period=settings.grace_steps or plan.eval_every,
            reduction_factor=settings.reduction,
        )
    if settings.scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="step",
            perturbation_interval=settings.interval_steps or plan.eval_every,
            hyperparam_mutations={
                key: list(one.values) if isinstance(one, Choice) else _domain(one) for key, one in plan.space.items()
            },
            custom_explore_fn=_Bounds(plan.space),
        )
    return None


class _Bounds:
    """PBT multiplies: back into the search space."""

    def __init__(self, space: Mapping[str, Distribution]) -> None:
        self._space = space

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        for key, one in self._space.items():
            if isinstance(one, Between):
                values[key] = one.nearest(float(values[key]))
        return values


def _domains(plan: SweepPlan) -> dict[str, Any]:
    grid = plan.settings.search == "grid"
    return {
        key: tune.grid_search(list(one.values)) if grid and isinstance(one, Choice) else _domain(one)
        for key, one in plan.space.items()
    }


def _domain(one: Distribution) -> Any:
    if isinstance(one, Choice):
        return tune.choice(list(one.values))
    if one.whole:
        return tune.randint(round(one.low), round(one.high) + 1)
    if one.step is not None:
        return tune.quniform(one.low, one.high, one.step)
    return (tune.loguniform if one.log else tune.uniform)(one.low, one.high)
