"""What `agl train`, `agl eval` and `agl serve` do, below the command line."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import Console

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.segments import listed
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.load import Config, load, reload, to_yaml
from agent_lightning.core import ray_private
from agent_lightning.core.errors import PartDied, StepFailed, UserError
from agent_lightning.core.types import Group, Split, Task
from agent_lightning.credit.air import Air, Rule, Signal
from agent_lightning.credit.failures import FailurePolicy
from agent_lightning.credit.rules import CreditRules, Estimator
from agent_lightning.launch import backend, checks, launch, placement
from agent_lightning.rollouts.agents import load as load_target
from agent_lightning.rollouts.supervise import watch
from agent_lightning.run import storage
from agent_lightning.run.loop import Loop
from agent_lightning.run.observer import RunObserver, reward_by, summarize
from agent_lightning.run.plots import plot_learning_curve
from agent_lightning.run.report import Progress, Summary, report
from agent_lightning.run.state import Plan, State, complete_checkpoints, newest_checkpoint, read_state
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.run.tracking import RunDirectory
from agent_lightning.sweeps.plan import SweepFolder, plan_sweep, trial_words
from agent_lightning.sweeps.view import SweepView, finish_sweep, sweep_report

T = TypeVar("T")

FAILED = 1
STOPPED = 130
"""Exit code of a run that was stopped by a signal, after its checkpoint."""


async def train(overrides: Sequence[str], *, resume: str | None) -> int:
    """Run the loop to its end; the exit code. Raises UserError, EngineError, StepFailed, PartDied."""
    console = Console()
    config, run, state = _open(overrides, resume)
    loaded = checks.require(config, ("train", "val"))
    if run is None:
        run = _create(config)
    console.print(f"run folder: {_whereabouts(config, run)}", soft_wrap=True, highlight=False)
    restored = resume is not None
    for left in range(config.restarts, -1, -1):
        try:
            return await _train(config, run, state, loaded, console, restored=restored)
        except PartDied as error:
            found = complete_checkpoints(run.checkpoints)
            if not found:
                raise PartDied(f"{error}; there is no checkpoint yet to go on from (checkpoint_every)") from error
            if not left:
                raise PartDied(f"{error}; go on with: agl train resume={run.path}") from error
            state, restored = read_state(found[-1]), True
            console.print(f"{error}; going on from the checkpoint of step {state.step}")
    raise AssertionError("unreachable: the last turn returns or raises")


async def _train(
    config: Config,
    run: RunDirectory,
    state: State,
    loaded: Mapping[Split, Sequence[Task]],
    console: Console,
    *,
    restored: bool,
) -> int:
    """From start to end with one set of processes; `restored`: from the newest checkpoint, whose state this is."""
    progress = Progress(config.experiment, steps=config.steps, console=console)
    journal = _journal(config, run, restored)
    observer = RunObserver(config=config, run=run, progress=progress, resumed_step=state.step if restored else None)
    progress.start()
    progress.waiting_for("start: Ray, the policy's engine, the learner")
    stopped = asyncio.Event()
    started = time.monotonic()
    mirror = storage.Mirror(config.runs_dir, run.path) if storage.is_remote(config.runs_dir) else None
    try:
        with _signals(stopped) as install, mirror.following() if mirror else nullcontext():
            async with AsyncExitStack() as stack:
                resumed = state if restored else None
                starting = launch.system(
                    config, train=True, workers=config.rollout.workers, journal=journal, resumed=resumed
                )
                system = await _unless(stopped, stack.enter_async_context(starting))
                if system is None:
                    progress.stop()
                    console.print("stopped before it had started; nothing is changed")
                    return STOPPED
                install()
                start_s = time.monotonic() - started
                loop = _loop(config, state, system, observer, loaded, stopped)
                if restored:
                    await loop.restore(newest_checkpoint(run.checkpoints))
                await loop.run()
    finally:
        progress.stop()
        observer.close()
    summary = summarize(
        config, state, val_rows=len(loaded["val"]), val_reward_by=observer.val_reward_by, start_s=start_s
    )
    _close_run(config, run, summary, console)
    if mirror is not None:
        mirror.push()
    return STOPPED if stopped.is_set() else 0


def _loop(
    config: Config,
    state: State,
    system: launch.System,
    observer: RunObserver,
    loaded: Mapping[Split, Sequence[Task]],
    stopped: asyncio.Event,
) -> Loop:
    assert system.learner is not None
    return Loop(
        plan=make_plan(config),
        state=state,
        buffer=system.buffer,
        board=system.board,
        learner=system.learner,
        observer=observer,
        train_tasks=loaded["train"],
        val_tasks=loaded["val"],
        stop=stopped,
    )


def _create(config: Config) -> RunDirectory:
    """A new run's folder. Raises UserError where it cannot be made."""
    place = config.runs_dir
    root = storage.local_root(place)
    run = RunDirectory.create(
        root, config.experiment, config.seed, config.name, is_taken=lambda name: storage.exists(place, name)
    )
    run.config.write_text(to_yaml(config))
    return run


def _whereabouts(config: Config, run: RunDirectory) -> str:
    if storage.is_remote(config.runs_dir):
        return f"{config.runs_dir.rstrip('/')}/{run.path.name}"
    return str(run.path.resolve())


def _open(overrides: Sequence[str], resume: str | None) -> tuple[Config, RunDirectory | None, State]:
    if resume is None:
        config = load(overrides)
        return config, None, State(cursor=TaskCursor(seed=config.seed))
    path = storage.fetch(resume, storage.local_root(resume)) if storage.is_remote(resume) else Path(resume)
    run = RunDirectory.open(path)
    config = reload(run.config, overrides)
    state = read_state(newest_checkpoint(run.checkpoints))
    if state.step >= config.steps:
        raise UserError(f"{resume} has done its {state.step} steps: give steps=N with N above {state.step} to go on")
    return config, run, state


def _journal(config: Config, run: RunDirectory, resume: bool) -> Path | None:
    """The journal's folder; None where there is to be none. Raises UserError where it is another run's."""
    if not config.buffer.journal:
        return None
    folder = run.path / "journal" if config.buffer.path is None else Path(config.buffer.path)
    if not resume and folder.is_dir() and listed(folder):
        raise UserError(f"buffer.path={folder} holds the journal of another run: resume that run, or choose another")
    return folder


def make_plan(config: Config) -> Plan:
    """What the loop is told. Raises ConfigError."""
    algorithm = config.algorithm
    return Plan(
        steps=config.steps,
        tasks_per_step=algorithm.tasks_per_step,
        rollouts_per_task=algorithm.rollouts_per_task,
        dynamic_sampling_rounds=algorithm.dynamic_sampling_rounds,
        rollouts_per_batch=algorithm.rollouts_per_batch,
        epochs=algorithm.epochs,
        eval_every=config.eval_every,
        rules=credit_rules(config),
        pad_token=0,
        row_multiple=config.learner.processes,
    )


def credit_rules(config: Config) -> CreditRules:
    """Raises ConfigError, also where a signal of AIR cannot be loaded."""
    air = None
    if config.air.enabled:
        air = Air(
            rules=tuple(Rule(**rule.model_dump()) for rule in config.air.rules),
            bound=config.air.bound,
            form=config.air.form,
            signals=tuple(cast(Signal, load_target(target)) for target in config.air.signals),
        )
    credit = config.credit
    return CreditRules(
        agents=config.agent.trained,
        failures=FailurePolicy.of(config.algorithm.failures.model_dump()),
        estimator=Estimator(
            method=credit.method,
            scale=credit.scale,
            baseline=credit.baseline,
            discount=credit.discount,
            state_weight=credit.state_weight,
        ),
        air=air,
        reward_weights=dict(config.credit.reward_weights),
        reward_range=config.agent.reward_range,
        max_tokens=config.model.max_len,
    )


def _close_run(config: Config, run: RunDirectory, summary: Summary, console: Console) -> None:
    summary.write(run.summary)
    plot_learning_curve(run.metrics, run.curve, f"{config.experiment}, seed {config.seed}")
    console.print(report(summary, run))


def sweep(words: Sequence[str], *, resume: Path | None) -> int:
    """`agl sweep`: trials to their end, then the best one as an experiment file, and two pictures. Raises UserError."""
    console = Console()
    if resume is not None and words:
        raise UserError(f"{words[0]}: a resumed sweep keeps what it was asked for; leave it out")
    folder = SweepFolder.open(resume) if resume is not None else None
    plan, config = plan_sweep(folder.command() if folder is not None else words)
    checks.require(config, ("train", "val"))
    folder = folder or SweepFolder.create(Path(config.runs_dir), plan)
    plan = replace(plan, fixed=(*plan.fixed, *trial_words(plan, folder.path.name)))
    # Ray's own imports take seconds: after what can be refused at once.
    from agent_lightning.core import actors as cluster
    from agent_lightning.sweeps import tune as tuning

    ray_private.prepare_environment()
    # One CPU beside what the run takes: of the actor that watches it.
    taken = placement.total(backend.choose(config).groups())
    taken["CPU"] = taken.get("CPU", 0.0) + 1
    at_once = plan.settings.concurrent or max(1, (os.cpu_count() or 1) // 2)
    cpus = math.ceil(at_once * taken["CPU"]) if config.hardware.device == "cpu" else None
    own = cluster.init_ray(config.hardware.address, cpus, resources={tuning.SEAT: at_once})
    if plan.settings.concurrent is None and (not own or cpus is None):
        at_once = cluster.room_for(taken)
    view = SweepView(plan, console, folder.read())
    view.start()
    try:
        tuning.run(plan, folder.path, concurrent=at_once, seats=own, resume=resume is not None, update=view.update)
    finally:
        view.stop()
        folder.write(view.records)
        cluster.shutdown_ray()
    best = finish_sweep(plan, folder, view.records)
    console.print(sweep_report(plan, folder, view.records, best))
    if sum(one.ended for one in view.records) < plan.num_trials:
        console.print(f" stopped; go on with: agl sweep resume={folder.path}", soft_wrap=True)
        return STOPPED
    return 0 if best is not None else FAILED


async def _unless(stopped: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None where a signal comes first, and the work is cancelled."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return None
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.wait((working,))


@contextmanager
def _signals(stopped: asyncio.Event) -> Iterator[Callable[[], None]]:
    """The first Ctrl-C or SIGTERM asks for a clean stop; a second one falls through to Python's own handling. Yields
    what asks for them again: Ray's core takes SIGTERM when it starts, and would print a stack trace before a stop."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def remove() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    def stop() -> None:
        stopped.set()
        remove()

    def install() -> None:
        for number in numbers:
            loop.add_signal_handler(number, stop)

    install()
    try:
        yield install
    finally:
        remove()


async def evaluate(overrides: Sequence[str], *, split: Split, out: Path | None) -> int:
    """Any model on any task set: prints a table's worth of JSON, and writes it where `out` says."""
    config = load(overrides)
    loaded = checks.require(config, (split,))[split]
    async with launch.system(config, train=False, workers=config.rollout.workers) as system:
        started = time.monotonic()
        for task in loaded:
            # As validation: greedy unless sampling.val or the agent says otherwise, and never trained.
            await system.buffer.admit(task, split="val", num_rollouts=1)
        groups = await _taken(system.buffer, len(loaded))
        seconds = time.monotonic() - started
    rollouts = [trajectory for group in groups for trajectory in group.trajectories]
    rewards, strata = [rollout.reward or 0.0 for rollout in rollouts], config.data.val_group_by
    result: dict[str, Any] = {
        "model": config.model.path,
        "experiment": config.experiment,
        "split": split,
        "rows": len(rewards),
        "reward": sum(rewards) / len(rewards),
        **({f"reward_by_{strata}": reward_by(groups, strata)} if strata else {}),
        "outcomes": dict(Counter(rollout.outcome.value for rollout in rollouts)),
        "calls_per_rollout": sum(len(rollout.calls) for rollout in rollouts) / len(rollouts),
        "seconds": round(seconds, 2),
    }
    text = json.dumps(result, indent=1)
    if out is not None:
        out.write_text(text + "\n")
    Console().print_json(text)
    return 0


async def _taken(buffer: Buffer, num_groups: int) -> list[Group]:
    """The groups of an evaluation. Raises StepFailed where its rollouts cannot go on."""
    taking = asyncio.ensure_future(take_groups(buffer, num_groups, split="val"))
    watching = asyncio.ensure_future(watch(buffer, lambda stats: None))
    try:
        await asyncio.wait((taking, watching), return_when=asyncio.FIRST_COMPLETED)
        if taking.done():
            return taking.result()
        raise StepFailed(watching.result())
    finally:
        taking.cancel()
        watching.cancel()


async def serve(overrides: Sequence[str]) -> int:
    """Gateway and policy alone, until Ctrl-C: prints base URLs for one's own agent."""
    config = load(overrides)
    stopped = asyncio.Event()
    console = Console()
    started = time.monotonic()
    with _signals(stopped) as install:
        async with launch.system(config, train=False, workers=0) as system:
            install()
            took = time.monotonic() - started
            # One rollout that stays open: whatever is called under its URL is recorded like a rollout's calls.
            await system.buffer.admit(Task(task_id="serve", payload={}), split="val", num_rollouts=1)
            (lease,) = await system.buffer.lease(1, 10.0)
            key = lease.key
            url = f"{system.service.url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{lease.secret}/agent/v1"
            console.print(f"serving {config.model.path} as [b]policy[/b], ready after {took:.0f} s; stop with Ctrl-C\n")
            exports = (f"OPENAI_BASE_URL={url}", "OPENAI_API_KEY=any", f"ANTHROPIC_BASE_URL={url.removesuffix('/v1')}")
            console.print("".join(f"export {text}\n" for text in exports), soft_wrap=True, highlight=False)
            await stopped.wait()
    return 0
