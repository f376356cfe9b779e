"""An attempt to run the loop: it starts the processes of a run, and ends them however the loop ends."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from agent_lightning.buffer.segments import list_segments
from agent_lightning.config.load import Config
from agent_lightning.core.errors import PartDied, Stopped, UserError
from agent_lightning.core.text import one_line
from agent_lightning.core.types import Split, Task
from agent_lightning.launch import launch
from agent_lightning.run import storage
from agent_lightning.run.loop import Loop
from agent_lightning.run.observer import RunObserver, summarize
from agent_lightning.run.plots import plot_learning_curve
from agent_lightning.run.report import Progress, report
from agent_lightning.run.sampler import Evaluation, Sampler
from agent_lightning.run.state import State, checkpoint_folder, credit_rules, make_plan
from agent_lightning.run.tracking import RunDirectory

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt to run the loop to its end, with processes of its own."""

    config: Config
    run: RunDirectory
    place: str
    """Where runs are kept: a folder, or a remote place that the run's folder is mirrored to."""
    state: State
    resumed: bool
    """Whether `state` is that of the newest checkpoint, and not a new one."""
    tasks: Mapping[Split, Sequence[Task]]
    console: Console = field(default_factory=Console)
    trains: bool = True
    """Whether the policy is trained; if not, it is evaluated once."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Gets the newest evaluation when the attempt has ended well."""

    async def train(self) -> None:
        """Start the processes, run the loop until it ends or a signal stops it, and end them. Raises Stopped after a
        signal, and what the run fails by."""
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
        mirror = storage.Mirror(self.place, run.path) if storage.is_remote(self.place) else None
        start_s, resumed = math.nan, self.state if self.resumed else None
        places = {"journal": journal, "resumed": resumed, "logs": run.logs}
        try:
            with stop_signals(stop) as places["joined"], mirror.following() if mirror else nullcontext():
                try:
                    async with AsyncExitStack() as stack:
                        system = await _first(stack.enter_async_context(self.start(places)), stop.wait())
                        if isinstance(system, bool):
                            progress.stop()
                            self.console.print(text := "stopped before it had started; nothing is changed")
                            raise Stopped(text)
                        start_s = time.monotonic() - started
                        from agent_lightning.core.actors import head_is_lost

                        if lost := await _first(self.loop(system, observer, stop), head_is_lost()):
                            raise PartDied(f"the cluster's head at {lost} does not answer any more")
                finally:  # how the run ended is written however it ends
                    error = sys.exc_info()[1]
                    error = None if isinstance(error, Stopped) else error
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
        if stop.is_set():
            raise Stopped(f"stopped after step {self.state.step}; it goes on with resume={run.path}")

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
def stop_signals(stop: asyncio.Event) -> Iterator[Callable[[], None]]:
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
