"""Rollouts of a run, until their groups are complete: those of a training step, or of an evaluation."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from agent_lightning.buffer.buffer import Stats
from agent_lightning.buffer.taken import Deadlines, TakenGroup, take_groups
from agent_lightning.core.errors import StepFailed
from agent_lightning.core.metrics import interval
from agent_lightning.core.types import Floats, Group, Outcome, Split, Task, Trajectory
from agent_lightning.rollouts.supervise import WatchedBuffer, watch
from agent_lightning.run.state import State
from agent_lightning.run.tasks import TaskCursor

STEP_FAILED, RUN_STOPPED = "step_failed", "run_stopped"  # reasons for which all rollouts of a step are dropped
NO_SCORE = (Outcome.SCORER_ERROR, Outcome.UNSCORED)  # nobody has scored these: an evaluation's mean leaves them out


def count_failures(rollouts: Iterable[Trajectory]) -> Counter[str]:
    """The rollouts that did not finish, by outcome."""
    return Counter(rollout.outcome.value for rollout in rollouts if rollout.outcome is not Outcome.FINISHED)


def _why(rollouts: Sequence[Trajectory]) -> str:
    """How many rollouts failed with which outcome, and the most frequent error."""
    counts = ", ".join(f"{count} {name}" for name, count in count_failures(rollouts).most_common())
    errors = Counter(rollout.error for rollout in rollouts if rollout.error).most_common(1)
    return counts + (f". Most often: {errors[0][0]}" if errors else "")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The rollouts of the held-out tasks, one of each."""

    groups: Sequence[Group]

    @property
    def rollouts(self) -> list[Trajectory]:
        return [rollout for group in self.groups for rollout in group.trajectories]

    @property
    def rewards(self) -> list[float]:
        """The reward of each rollout that was scored; one that failed before it could be scored has 0."""
        return [rollout.reward or 0.0 for rollout in self.rollouts if rollout.outcome not in NO_SCORE]

    @property
    def reward(self) -> float:
        """The mean of `rewards`; NaN if there are none."""
        return sum(self.rewards) / len(self.rewards) if self.rewards else math.nan

    @property
    def ci95(self) -> float:
        """Half the width of the 95 % interval of `reward`."""
        return interval(self.rewards)[1]

    @property
    def failures(self) -> str:
        """The failed rollouts in words, such as "2 of 8 failed: 2 timeout. Most often: not done after 60 s"."""
        failed = count_failures(self.rollouts).total()
        return f"{failed} of {len(self.rollouts)} failed: {_why(self.rollouts)}" if failed else ""

    @property
    def parts(self) -> dict[str, float]:
        """The mean of each named part of the reward."""
        values: dict[str, list[float]] = {}
        for rollout in self.rollouts:
            for name, value in rollout.reward_parts.items():
                values.setdefault(name, []).append(value)
        return {name: sum(values[name]) / len(values[name]) for name in sorted(values)}


class LoopBuffer(WatchedBuffer, Protocol):
    """The part of the Buffer that the loop uses."""

    async def admit(self, task: Task, *, split: Split, num_rollouts: int) -> str: ...
    async def take(self, num_groups: int, *, split: Split, deadlines: Deadlines | None = None) -> list[TakenGroup]: ...
    async def advance(self, *, trained: int, dropped: Mapping[str, int]) -> None: ...
    async def cancel(self, reason: str) -> int: ...
    async def milestone(self, step: int) -> None: ...
    async def forget_before(self, step: int) -> None: ...


class Observer(Protocol):
    """The loop's reporter: it shows progress, records metrics and rollouts, and decides when to checkpoint."""

    def waiting_for(self, text: str) -> None:
        """Show what the run waits for now, such as "generate: 41/64 rollouts"; the first word names the phase."""

    def record_rollouts(
        self, step: int, version: int, groups: Sequence[Group], logprobs: Mapping[tuple[str, str], Floats] | None = None
    ) -> None:
        """`logprobs` has the learner's log-probabilities of calls that are trained, by the ids of rollout and call."""

    def record_evaluation(self, step: int, evaluation: Evaluation) -> None: ...
    def record_step(self, step: int, record: Mapping[str, float]) -> None: ...
    def checkpoint_folder(self, state: State, *, force: bool) -> Path | None:
        """The folder for a checkpoint of this state, which may exist already; None if no checkpoint is due. `force`:
        the run ends here, so that this checkpoint is the last."""

    def complete_checkpoint(self, folder: Path, state: State) -> None:
        """Write the state beside the learner's files, which makes the checkpoint complete."""


@dataclass(slots=True, kw_only=True)
class Sampler:
    """Runs rollouts and evaluates. `stop` may be set at any time: the running rollouts are cancelled."""

    state: State
    buffer: LoopBuffer
    observer: Observer
    val_tasks: Sequence[Task]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _before: tuple[TaskCursor, list[str]] | None = None
    """`State.cursor` and `redo` before the groups in flight were drawn; None if others have been trained since."""

    async def gather(
        self, num_groups: int, *, split: Split, deadlines: Deadlines | None = None, kept: Sequence[Group] = ()
    ) -> list[Group] | None:
        """Wait for complete groups; None if the run was stopped meanwhile. Raises StepFailed if most rollouts fail for
        the same reason, a reward does not fit the config, or no worker can be kept alive. In both cases all training
        groups in flight are given up, with those that the step has taken before (`kept`)."""
        phase = "generate" if split == "train" else "evaluate"
        taking = asyncio.ensure_future(take_groups(self.buffer, num_groups, split=split, deadlines=deadlines))
        stopping = asyncio.ensure_future(self.stop.wait())
        watching = asyncio.ensure_future(self._watch(phase, num_groups))
        try:
            await asyncio.wait((taking, stopping, watching), return_when=asyncio.FIRST_COMPLETED)
            # `watch` ends, with a description of the trouble, if the rollouts cannot succeed.
            trouble = watching.result() if watching.done() and not stopping.done() else ""
            if taking.done():
                trouble = trouble or (await self.buffer.stats()).trouble  # of the last rollouts
                if not trouble:
                    return taking.result()
            await self.buffer.cancel(trouble or "the run was stopped")
            groups, reason = await taking, STEP_FAILED if trouble else RUN_STOPPED
            if split == "train":
                await self.give_up([*kept, *groups], reason)
            else:
                self._keep_failed(groups, split, reason)
                await self.give_up((), reason)
            if trouble:
                raise StepFailed(f"{phase}: {trouble}")
            return None
        finally:
            for waiting in (taking, stopping, watching):
                waiting.cancel()

    async def _watch(self, phase: str, num_groups: int) -> str:
        """`watch` the rollouts, and show how many of those that the phase waits for have ended."""
        train = phase == "generate"
        total = num_groups * (self.state.in_flight[0].num_rollouts if train else 1)

        def ended(stats: Stats) -> int:
            """Training rollouts that are not taken, or held-out rollouts of the run."""
            others = stats.complete + stats.taken + stats.trained + sum(stats.dropped.values())
            return stats.complete if train else stats.ended - others

        def show(stats: Stats) -> None:
            self.observer.waiting_for(f"{phase}: {min(total, ended(stats) - before)}/{total} rollouts")

        before = 0 if train else ended(await self.buffer.stats())
        return await watch(self.buffer, show)

    async def evaluate(self) -> float:
        """The mean reward over the held-out tasks, with a rollout for each; NaN if there are none, or if the run was
        stopped meanwhile. Raises StepFailed, also if all of several rollouts fail, or none could be scored. No update
        is published before it returns, so one version answers every call."""
        for task in self.val_tasks:
            await self.buffer.admit(task, split="val", num_rollouts=1)
        groups = await self.gather(len(self.val_tasks), split="val") if self.val_tasks else None
        if groups is None:
            return math.nan
        self.observer.record_rollouts(self.state.step, self.state.version, groups)
        evaluation = Evaluation(groups)
        if len(groups) > 1 or not evaluation.rewards:  # that a single agent fails says nothing
            try:
                check_failures(groups, "evaluation")
            except StepFailed:
                await self.give_up((), STEP_FAILED)
                raise
        self.state.val_rewards.append((self.state.step, evaluation.reward))
        self.state.val_ci95.append((self.state.step, evaluation.ci95))
        self.observer.record_evaluation(self.state.step, evaluation)
        return evaluation.reward

    async def give_up(self, groups: Sequence[Group], reason: str) -> None:
        """End all training rollouts in flight, and drop them for the reason, with `groups`, those of them that are
        taken already. Their tasks are the first that a resumed run draws."""
        state = self.state
        if left := len(state.in_flight) - len(groups):
            await self.buffer.cancel(reason)
            groups = [*groups, *await take_groups(self.buffer, left, split="train")]
        self._keep_failed(groups, "train", reason)
        if num_rollouts := sum(len(group.trajectories) for group in groups):
            await self.buffer.advance(trained=0, dropped={reason: num_rollouts})
            state.dropped[reason] += num_rollouts
        state.redo = [group.task_id for group in state.in_flight] + state.redo
        if self._before is not None:  # nothing that was drawn since has been trained
            state.cursor, state.redo = self._before
        state.in_flight, self._before = [], None

    def _keep_failed(self, groups: Sequence[Group], split: Split, reason: str) -> None:
        """Write the rollouts of a step or evaluation that failed to disk: they say why."""
        if reason == STEP_FAILED and groups:
            self.observer.record_rollouts(self.state.step + (split == "train"), self.state.version, groups)


def check_failures(groups: Sequence[Group], what: str) -> None:
    """Raise StepFailed if all rollouts of a "step" or an "evaluation" failed: then there is nothing to learn from, and
    no reward to report."""
    rollouts = [rollout for group in groups for rollout in group.trajectories]
    if rollouts and count_failures(rollouts).total() == len(rollouts):
        raise StepFailed(f"all {len(rollouts)} rollouts of the {what} failed: {_why(rollouts)}")
