"""What trains, evaluates, sweeps and serves, in the process that calls it: `agl` and a process of `calls` do."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from agent_lightning.api.attempt import Attempt, stop_signals
from agent_lightning.config.load import Config, load, reload, to_yaml
from agent_lightning.core import ray_private
from agent_lightning.core.errors import PartDied, RunFailed, Stopped, UserError
from agent_lightning.core.types import Policy, Split, Task
from agent_lightning.launch import backend, checks, launch, placement
from agent_lightning.launch.sweeps.plan import SweepFolder, hydra_words, plan_sweep, trial_words
from agent_lightning.launch.sweeps.view import SweepView, finish_sweep, sweep_report
from agent_lightning.run import storage
from agent_lightning.run.observer import reward_by
from agent_lightning.run.state import State, complete_checkpoints, newest_checkpoint, read_state
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.run.tracking import RunDirectory, new_folder, take_folder


async def train(words: Sequence[str], *, resume: str | None = None, supervised: bool = False) -> Path:
    """Run the loop to its end, and return the run's folder. `words` are overrides of the config; `resume` is a run that
    goes on, as what it was. If a process of the run dies, the run goes on from its newest checkpoint, at most
    `restarts` times. Raises UserError, EngineError, StepFailed, PartDied, and Stopped after a signal."""
    if resume is None:
        config = load(with_chats(words) if supervised else words)
        make = _prepare(config, supervised)  # before there is a folder of the run
        run = _new_run(config, f"sft-{config.experiment}" if supervised else config.experiment)
        with run.lock():
            run.config.write_text(to_yaml(config))
            state = State(cursor=TaskCursor(seed=config.seed), supervised=supervised)
            return await _train(make(config=config, run=run, place=config.runs_dir, state=state, resumed=False))
    remote = storage.is_remote(resume)
    run = RunDirectory(storage.local_copy(resume)) if remote else RunDirectory.open(storage.local_root(resume))
    with run.lock():  # before anything is read or written: the run may be alive
        if remote:
            run = RunDirectory.open(storage.fetch(resume, run.path.parent))
        config = reload(run.config, words)
        state = read_state(newest_checkpoint(run.checkpoints))
        if state.step >= config.steps:
            done = f"{resume} has done its {state.step} steps"
            raise UserError(f"{done}: give steps=N with N above {state.step} to go on")
        make = _prepare(config, state.supervised)
        return await _train(make(config=config, run=run, place=config.runs_dir, state=state, resumed=True))


def with_chats(words: Sequence[str]) -> list[str]:
    """Overrides for supervised training, with `data=jsonl` for chats in a file whatever rows the experiment reads."""
    names = {word.partition("=")[0] for word in words}
    is_file = "data.train.path" in names and not names & {"data", "data.train.kind"}
    return ["data=jsonl", *words] if is_file else list(words)


def _prepare(config: Config, supervised: bool) -> Callable[..., Attempt]:
    """Make all checks and read the data; returns what makes an attempt with them. Raises UserError."""
    if supervised:
        from agent_lightning.api.supervised import prepare

        return prepare(config)
    return partial(Attempt, tasks=checks.require(config, "train", "val").tasks)


def _new_run(config: Config, name: str) -> RunDirectory:
    """A new folder where the config says, with `name` in its name unless the config gives one. Raises UserError."""
    place = config.runs_dir
    root, is_taken = storage.local_root(place), lambda name: storage.exists(place, name)
    return RunDirectory.create(root, name, config.seed, config.name, is_taken=is_taken)


async def _train(attempt: Attempt) -> Path:
    """Make an attempt, and further ones from the newest checkpoint if a process of the run dies; the run's folder."""
    config, run = attempt.config, attempt.run
    place = attempt.place
    location = f"{place.rstrip('/')}/{run.path.name}" if storage.is_remote(place) else run.path.resolve()
    attempt.console.print(f"run folder: {location}", soft_wrap=True, highlight=False)
    for restarts_left in range(config.restarts, -1, -1):
        try:
            await attempt.train()
            return run.path
        except PartDied as error:
            if not complete_checkpoints(run.checkpoints):
                raise PartDied(f"{error}; there is no checkpoint yet to go on from (checkpoint_every)") from error
            if not restarts_left:
                raise PartDied(f"{error}; go on with: agl train resume={run.path}") from error
            attempt = replace(attempt, state=read_state(newest_checkpoint(run.checkpoints)), resumed=True)
            attempt.console.print(f"{error}; going on from the checkpoint of step {attempt.state.step}")
    raise AssertionError("unreachable: the last attempt returns or raises")


async def evaluate(words: Sequence[str], *, split: Split = "val", console: Console | None = None) -> dict[str, Any]:
    """Run a model on all tasks of a split, without training, and return its figures. Its folder is a run's, for
    `agl runs` and `agl explain`. Progress goes to `console`. Raises UserError, EngineError, StepFailed, PartDied,
    Stopped."""
    config, started = load(words), time.monotonic()
    # The split "val": sampled as the held-out tasks of a run are, and never trained.
    tasks: Mapping[Split, Sequence[Task]] = {"val": checks.require(config, split).tasks[split]}
    if not tasks["val"]:
        raise UserError("data.val.path: missing; there is nothing to evaluate on")
    tracking = config.tracking.model_copy(update={"wandb": "disabled", "tensorboard": False})
    config = config.model_copy(update={"tracking": tracking})
    run, state = _new_run(config, f"eval-{config.experiment}"), State(cursor=TaskCursor(seed=config.seed))
    settings: Any = {"resumed": False, "console": console or Console(), "trains": False}
    attempt = Attempt(config=config, run=run, place=config.runs_dir, state=state, tasks=tasks, **settings)
    with run.lock():
        run.config.write_text(to_yaml(config))
        await attempt.train()
    evaluation, group_by = attempt.evaluations[-1], config.data.val_group_by
    rollouts, by = evaluation.rollouts, reward_by(evaluation.groups, config.data)
    return {
        "model": config.model.path,
        "experiment": config.experiment,
        "split": split,
        "rows": len(rollouts),
        "reward": evaluation.reward,
        **({f"reward_by_{group_by or 'set'}": by} if by else {}),
        **({"reward_parts": evaluation.parts} if evaluation.parts else {}),
        "outcomes": dict(Counter(rollout.outcome.value for rollout in rollouts)),
        "calls_per_rollout": sum(len(rollout.calls) for rollout in rollouts) / len(rollouts),
        "seconds": round(time.monotonic() - started, 2),
        "run": str(run.path),
    }


async def sweep(words: Sequence[str], *, resume: str | None = None, multirun: bool = False) -> Path:
    """Run all trials, then write the best as an experiment file, and two pictures; returns the sweep's folder.
    `multirun` reads KEY=A,B as Hydra does. Raises UserError, RunFailed if no trial ended well, and Stopped after a
    signal."""
    console = Console()
    if resume is not None and words:
        raise UserError(f"{words[0]}: a resumed sweep keeps what it was asked for; leave it out")
    folder = SweepFolder.open(Path(resume)) if resume is not None else None
    command = folder.command() if folder is not None else hydra_words(words) if multirun else words
    plan, config = plan_sweep(command)
    if not checks.require(config, "train", "val").tasks["val"]:
        raise UserError("data.val.path: missing; a sweep compares held-out rewards")
    folder = folder or SweepFolder.create(Path(config.runs_dir), plan)
    lock = take_folder(folder.path, "sweep")
    plan = replace(plan, fixed=(*plan.fixed, *trial_words(plan, folder.path.name)))
    # These imports take seconds, so they come after the checks that refuse a config at once.
    from agent_lightning.core import actors
    from agent_lightning.launch.sweeps import tune

    ray_private.prepare_environment()
    trial = placement.total(backend.choose(config).groups())
    trial["CPU"] = trial.get("CPU", 0.0) + 1  # the actor that watches it
    concurrent = plan.settings.concurrent or max(1, (os.cpu_count() or 1) // 2)
    cpus = math.ceil(concurrent * trial["CPU"]) if config.hardware.device == "cpu" else None
    own = actors.init_ray(config.hardware.address, cpus, resources={tune.SEAT: concurrent})
    if plan.settings.concurrent is None and (not own or cpus is None):
        concurrent = actors.room_for(trial)
    view = SweepView(plan, console, folder)
    view.start()
    try:
        tune.run(plan, folder.path, concurrent=concurrent, seats=own, resume=resume is not None, update=view.update)
    finally:
        view.stop()
        folder.write(view.records)
        lock.close()
        actors.shutdown_ray()
    best = finish_sweep(plan, folder, view.records)
    console.print(sweep_report(plan, folder, view.records), crop=False)
    if sum(record.ended for record in view.records) < plan.num_trials:
        console.print(f" stopped; go on with: agl sweep resume={folder.path}", soft_wrap=True)
        raise Stopped
    if best is None:
        raise RunFailed(f"no trial of {folder.path} ended well")
    return folder.path


async def serve(words: Sequence[str], *, ready: Callable[[Policy], None] | None = None) -> None:
    """Serve gateway and policy alone until a signal. Prints the base URLs for an agent and where its calls are written,
    then calls `ready`. Raises UserError, EngineError."""
    config, stop, console, started = load(words), asyncio.Event(), Console(), time.monotonic()
    checks.require(config)  # before there is a folder
    stem = f"serve-{config.experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
    calls = new_folder(storage.local_root(config.runs_dir), stem) / "calls.jsonl"
    try:
        with stop_signals(stop) as joined:
            async with launch.system(config, train=False, workers=0, calls=calls, joined=joined) as system:
                # A rollout that stays open: its URL and secret are the agent's.
                await system.buffer.admit(Task(task_id="serve", payload={}), split="val", num_rollouts=1)
                (lease,) = await system.buffer.lease(1, 10.0)
                key = lease.key
                url = f"{system.service.url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{lease.secret}/agent/v1"
                policy = Policy(version=0, base_url=url, model="policy", api_key="any")
                after = f"ready after {time.monotonic() - started:.0f} s, without end; stop with Ctrl-C"
                console.print(f"serving {config.model.path} as [b]policy[/b], {after}", soft_wrap=True)
                written = "each call with its messages, reply and tokens; spans of traces are taken and not kept"
                console.print(f"records {written}: {calls}\n", soft_wrap=True, highlight=False)
                exports = (f"export {name}={value}\n" for name, value in policy.environment().items())
                console.print("".join(exports), soft_wrap=True, highlight=False)
                if ready is not None:
                    ready(policy)
                await stop.wait()
    finally:
        with suppress(OSError):  # calls are in it
            calls.parent.rmdir()
