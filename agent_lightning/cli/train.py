"""`agl train`, `agl sweep`, `agl eval` and `agl serve`, below the command line."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import Console

from agent_lightning.buffer.segments import list_segments
from agent_lightning.cli import FAILED, STOPPED
from agent_lightning.config.load import Config, load, reload, to_yaml
from agent_lightning.core import ray_private
from agent_lightning.core.errors import PartDied, UserError
from agent_lightning.core.text import one_line
from agent_lightning.core.types import Policy, Split, Task
from agent_lightning.credit.air import Air, Signal
from agent_lightning.credit.assign import CreditRules
from agent_lightning.credit.states import StateKey
from agent_lightning.launch import backend, checks, launch, placement
from agent_lightning.launch.sweeps.plan import SweepFolder, hydra_words, plan_sweep, trial_words
from agent_lightning.launch.sweeps.view import SweepView, finish_sweep, sweep_report
from agent_lightning.rollouts.agents import load as load_target
from agent_lightning.run import storage
from agent_lightning.run.loop import Loop
from agent_lightning.run.observer import RunObserver, reward_by, summarize
from agent_lightning.run.plots import plot_learning_curve
from agent_lightning.run.report import Progress, report
from agent_lightning.run.sampler import Evaluation, Sampler
from agent_lightning.run.state import (
    Plan,
    State,
    checkpoint_folder,
    complete_checkpoints,
    newest_checkpoint,
    read_state,
)
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.run.tracking import RunDirectory, new_folder, take_folder

T = TypeVar("T")
U = TypeVar("U")


async def train(overrides: Sequence[str], *, resume: str | None, supervised: bool = False) -> int:
    """`agl train` and `agl sft`: run the loop to its end, and return the exit code. `resume` is a run that goes on, as
    what it was. If a process of the run dies, the run goes on from its newest checkpoint, at most `restarts` times.
    Raises UserError, EngineError, StepFailed, PartDied."""
    if resume is None:
        config = load(with_chats(overrides) if supervised else overrides)
        make = _prepare(config, supervised)  # before there is a folder of the run
        run = _new_run(config, f"sft-{config.experiment}" if supervised else config.experiment)
        with run.lock():
            run.config.write_text(to_yaml(config))
            state = State(cursor=TaskCursor(seed=config.seed), supervised=supervised)
            return await _train(make(config=config, run=run, state=state, resumed=False))
    remote = storage.is_remote(resume)
    run = RunDirectory(storage.local_copy(resume)) if remote else RunDirectory.open(storage.local_root(resume))
    with run.lock():  # before anything is read or written: the run may be alive
        if remote:
            run = RunDirectory.open(storage.fetch(resume, run.path.parent))
        config = reload(run.config, overrides)
        state = read_state(newest_checkpoint(run.checkpoints))
        if state.step >= config.steps:
            done = f"{resume} has done its {state.step} steps"
            raise UserError(f"{done}: give steps=N with N above {state.step} to go on")
        return await _train(_prepare(config, state.supervised)(config=config, run=run, state=state, resumed=True))


def with_chats(words: Sequence[str]) -> list[str]:
    """The words of `agl sft`, with `data=jsonl` for chats in a file whatever rows the experiment reads."""
    names = {word.partition("=")[0] for word in words}
    is_file = "data.train.path" in names and not names & {"data", "data.train.kind"}
    return ["data=jsonl", *words] if is_file else list(words)


def _prepare(config: Config, supervised: bool) -> Callable[..., Attempt]:
    """Make all checks and read the data; returns what makes an attempt with them. Raises UserError."""
    if supervised:
        from agent_lightning.cli.sft import prepare

        return prepare(config)
    return partial(Attempt, tasks=checks.require(config, "train", "val").tasks)


def _new_run(config: Config, name: str) -> RunDirectory:
    """A new folder where the config says, with `name` in its name unless the config gives one. Raises UserError."""
    place = config.runs_dir
    root, is_taken = storage.local_root(place), lambda name: storage.exists(place, name)
    return RunDirectory.create(root, name, config.seed, config.name, is_taken=is_taken)


async def _train(attempt: Attempt) -> int:
    """Make an attempt, and further ones from the newest checkpoint if a process of the run dies; the exit code."""
    config, run = attempt.config, attempt.run
    place = config.runs_dir
    location = f"{place.rstrip('/')}/{run.path.name}" if storage.is_remote(place) else run.path.resolve()
    attempt.console.print(f"run folder: {location}", soft_wrap=True, highlight=False)
    for restarts_left in range(config.restarts, -1, -1):
        try:
            return await attempt.train()
        except PartDied as error:
            if not complete_checkpoints(run.checkpoints):
                raise PartDied(f"{error}; there is no checkpoint yet to go on from (checkpoint_every)") from error
            if not restarts_left:
                raise PartDied(f"{error}; go on with: agl train resume={run.path}") from error
            attempt = replace(attempt, state=read_state(newest_checkpoint(run.checkpoints)), resumed=True)
            attempt.console.print(f"{error}; going on from the checkpoint of step {attempt.state.step}")
    raise AssertionError("unreachable: the last attempt returns or raises")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt to run the loop to its end, with processes of its own."""

    config: Config
    run: RunDirectory
    state: State
    resumed: bool
    """Whether `state` is that of the newest checkpoint, and not a new one."""
    tasks: Mapping[Split, Sequence[Task]]
    console: Console = field(default_factory=Console)
    trains: bool = True
    """Whether the policy is trained; if not, it is evaluated once."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Gets the newest evaluation when the attempt has ended well."""

    async def train(self) -> int:
        """Start the processes, run the loop until it ends or a signal stops it, and end them. Returns the exit code."""
        config, run, journal = self.config, self.run, None
        if self.trains and config.buffer.journal and not self.state.supervised:
            journal = run.path / "journal" if config.buffer.path is None else Path(config.buffer.path)
            if not self.resumed and journal.is_dir() and list_segments(journal):
                place = f"buffer.path={journal}"
                raise UserError(f"{place} holds the journal of another run: resume that run, or choose another")
        steps = config.steps if self.trains else 0
        progress = Progress(
            config.experiment, steps, self.console, measure="loss" if self.state.supervised else "reward"
        )
        places: Any = {"run": run, "resumed_step": self.state.step if self.resumed else None}
        observer = RunObserver(config=config, progress=progress, rules=credit_rules(config), **places)
        progress.start()
        progress.waiting_for("start: the processes of the run")
        stop, started = asyncio.Event(), time.monotonic()
        mirror = storage.Mirror(config.runs_dir, run.path) if storage.is_remote(config.runs_dir) else None
        start_s, resumed = math.nan, self.state if self.resumed else None
        places = {"journal": journal, "resumed": resumed, "logs": run.logs}
        try:
            with _stop_signals(stop) as places["joined"], mirror.following() if mirror else nullcontext():
                try:
                    async with AsyncExitStack() as stack:
                        system = await _first(stack.enter_async_context(self.start(places)), stop.wait())
                        if isinstance(system, bool):
                            progress.stop()
                            self.console.print("stopped before it had started; nothing is changed")
                            return STOPPED
                        start_s = time.monotonic() - started
                        from agent_lightning.core.actors import head_is_lost

                        if lost := await _first(self.loop(system, observer, stop), head_is_lost()):
                            raise PartDied(f"the cluster's head at {lost} does not answer any more")
                finally:  # how the run ended is written however it ends
                    error = sys.exc_info()[1]
                    how = "failed" if error is not None else "stopped" if stop.is_set() else "finished"
                    ended: Any = {"start_s": start_s, "state": how, "error": one_line(error or "")[:1000]}
                    rows, by = len(self.tasks["val"]), observer.val_reward_by
                    summary = summarize(config, self.state, val_rows=rows, val_reward_by=by, **ended)
                    summary.write(run.summary)
        finally:
            progress.stop()
            observer.close()
        if self.trains:
            plot_learning_curve(run.metrics, run.curve, f"{config.experiment}, seed {config.seed}")
            self.console.print(report(summary, run))
        if mirror is not None:
            mirror.push()
        self.evaluations.append(observer.evaluation)
        return STOPPED if stop.is_set() else 0

    def start(self, places: Mapping[str, Any]) -> AbstractAsyncContextManager[Any]:
        """Starts the processes of the attempt, and stops them at the end of the block."""
        return launch.system(self.config, train=self.trains, workers=self.config.rollout.workers, **places)

    async def loop(self, system: Any, observer: RunObserver, stop: asyncio.Event) -> None:
        """Run the loop on what `start` has started."""
        if not self.trains:
            parts: Any = {"buffer": system.buffer, "observer": observer, "val_tasks": self.tasks["val"]}
            await Sampler(state=self.state, stop=stop, **parts).evaluate()
            return
        assert system.learner is not None
        loop = Loop(
            plan=make_plan(self.config),
            state=self.state,
            buffer=system.buffer,
            board=system.board,
            learner=system.learner,
            observer=observer,
            train_tasks=self.tasks["train"],
            val_tasks=self.tasks["val"],
            stop=stop,
        )
        if self.resumed:
            await loop.restore(checkpoint_folder(self.run.checkpoints, self.state.step))
        elif self.config.model.lora.path is not None:
            await loop.publish()  # the engines have the base model
        await loop.run()


def make_plan(config: Config) -> Plan:
    """The plan of the loop, as the config says. Raises ConfigError."""
    return Plan(
        steps=config.steps,
        algorithm=config.algorithm,
        loop=config.loop,
        eval_every=config.eval_every,
        rules=credit_rules(config),
        pad_token=0,
        row_multiple=config.learner.processes,
    )


def credit_rules(config: Config) -> CreditRules:
    """The rules of credit, as the config says. Raises ConfigError, also if a signal of AIR cannot be loaded."""
    signals = tuple(cast(Signal, load_target(target)) for target in config.air.signals)
    own_key = config.credit.state_key if ":" in config.credit.state_key else None
    return CreditRules(
        credit=config.credit,
        failures=config.algorithm.failures,
        air=Air(config.air, signals) if config.air.enabled else None,
        agents=config.agent.trained,
        reward_range=config.agent.reward_range,
        bound=config.air.bound,
        state_key=cast(StateKey, load_target(own_key)) if own_key is not None else None,
        max_tokens=config.model.max_len,
        drop_beyond=config.loop.drop_beyond,
    )


def sweep(words: Sequence[str], *, resume: str | None, multirun: bool) -> int:
    """`agl sweep`: run all trials, then write the best as an experiment file, and two pictures. `multirun` reads
    KEY=A,B as Hydra does. Returns the exit code. Raises UserError."""
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
        return STOPPED
    return 0 if best is not None else FAILED


async def _first(work: Coroutine[Any, Any, T], other: Coroutine[Any, Any, U]) -> T | U:
    """The result of whichever ends first, of `work` if both have; the other is cancelled."""
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(other)
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else ending.result()
    finally:
        working.cancel()
        ending.cancel()
        await asyncio.wait((working, ending))


@contextmanager
def _stop_signals(stop: asyncio.Event) -> Iterator[Callable[[], None]]:
    """In the block the first Ctrl-C or SIGTERM sets `stop`; a second one is handled by Python itself. Yields a
    function that installs the handlers again: Ray's core takes over SIGTERM when it starts, and would print a stack
    trace."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)

    def remove() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    def handle() -> None:
        stop.set()
        remove()

    def install() -> None:
        for number in numbers:
            loop.add_signal_handler(number, handle)

    install()
    try:
        yield install
    finally:
        remove()


async def evaluate(overrides: Sequence[str], *, split: Split, out: Path | None) -> int:
    """`agl eval`: run a model on all tasks of a split, and print its figures as JSON; write them to `out` too. Its
    folder is a run's, for `agl runs` and `agl explain`. Returns the exit code. Raises UserError, EngineError,
    StepFailed, PartDied."""
    config, started = load(overrides), time.monotonic()
    # The split "val": sampled as the held-out tasks of a run are, and never trained.
    tasks: Mapping[Split, Sequence[Task]] = {"val": checks.require(config, split).tasks[split]}
    if not tasks["val"]:
        raise UserError("data.val.path: missing; there is nothing to evaluate on")
    tracking = config.tracking.model_copy(update={"wandb": "disabled", "tensorboard": False})
    config = config.model_copy(update={"tracking": tracking})
    run, state = _new_run(config, f"eval-{config.experiment}"), State(cursor=TaskCursor(seed=config.seed))
    settings: Any = {"resumed": False, "console": Console(stderr=True), "trains": False}
    attempt = Attempt(config=config, run=run, state=state, tasks=tasks, **settings)
    with run.lock():
        run.config.write_text(to_yaml(config))
        if await attempt.train() == STOPPED:
            return STOPPED
    evaluation, group_by = attempt.evaluations[-1], config.data.val_group_by
    rollouts, by = evaluation.rollouts, reward_by(evaluation.groups, config.data)
    result: dict[str, Any] = {
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
    text = json.dumps(result, indent=1)
    if out is not None:
        out.write_text(text + "\n")
    Console().print_json(text)
    return 0


async def serve(overrides: Sequence[str]) -> int:
    """`agl serve`: gateway and policy alone, until Ctrl-C. Prints the base URLs for an agent, and where its calls are
    written. Returns the exit code."""
    config, stop, console, started = load(overrides), asyncio.Event(), Console(), time.monotonic()
    checks.require(config)  # before there is a folder
    stem = f"serve-{config.experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
    calls = new_folder(storage.local_root(config.runs_dir), stem) / "calls.jsonl"
    try:
        with _stop_signals(stop) as joined:
            async with launch.system(config, train=False, workers=0, calls=calls, joined=joined) as system:
                # A rollout that stays open: its URL and secret are the agent's.
                await system.buffer.admit(Task(task_id="serve", payload={}), split="val", num_rollouts=1)
                (lease,) = await system.buffer.lease(1, 10.0)
                key = lease.key
                url = f"{system.service.url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{lease.secret}/agent/v1"
                policy = Policy(version=0, base_url=url, model="policy", api_key="any")
                ready = f"ready after {time.monotonic() - started:.0f} s, without end; stop with Ctrl-C"
                console.print(f"serving {config.model.path} as [b]policy[/b], {ready}", soft_wrap=True)
                written = "each call with its messages, reply and tokens; spans of traces are taken and not kept"
                console.print(f"records {written}: {calls}\n", soft_wrap=True, highlight=False)
                exports = (f"export {name}={value}\n" for name, value in policy.environment().items())
                console.print("".join(exports), soft_wrap=True, highlight=False)
                await stop.wait()
    finally:
        with suppress(OSError):  # calls are in it
            calls.parent.rmdir()
    return 0
