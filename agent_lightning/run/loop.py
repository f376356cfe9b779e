"""The loop: generate, train, publish, evaluate.

    generate   admits tasks, waits for whole groups      ends with the last rollout of the step, or with `stop`
    train      credit -> samples -> batches -> update    ends with the optimiser's last step
    publish    new weights to every replica              ends when all of them answer with the new version
    evaluate   one rollout a held-out task               between steps, so one version answers all of it

On-policy: a step's rollouts start when its version is live everywhere, and none outlives its step. The loop knows
protocols only; it runs the same on plain objects in one process and on Ray actors.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from agent_lightning.core.errors import StepFailed
from agent_lightning.core.metrics import Metrics, merge, values
from agent_lightning.core.types import Group, Outcome, Split, Task
from agent_lightning.credit import assign as credit
from agent_lightning.credit import batching
from agent_lightning.credit.assign import Credit
from agent_lightning.learners.base import Learner, Weights
from agent_lightning.rollouts.supervise import WatchedBuffer, watch
from agent_lightning.run.state import Plan, State, check_conservation


class LoopBuffer(WatchedBuffer, Protocol):
    """The part of the Buffer that the loop uses."""

    async def admit(self, task: Task, *, split: Split, num_rollouts: int) -> str: ...
    async def take(self, num_groups: int, *, split: Split) -> list[Group]: ...
    async def advance(self, *, trained: int, dropped: Mapping[str, int]) -> None: ...
    async def cancel(self, reason: str) -> int: ...
    async def milestone(self, step: int) -> None: ...
    async def forget_before(self, step: int) -> None: ...


class Board(Protocol):
    """The part of the PolicyBoard that the loop uses."""

    async def publish(self, weights: Weights, timeout: float) -> int: ...
    async def versions(self) -> dict[str, int]: ...


class Observer(Protocol):
    """Who is told how the run goes: progress, metrics, rollouts on disk."""

    def waiting_for(self, text: str) -> None: ...
    def rollouts(self, step: int, version: int, groups: Sequence[Group]) -> None: ...
    def evaluated(self, step: int, reward: float, rows: int) -> None: ...
    def step(self, step: int, record: Mapping[str, float]) -> None: ...
    def checkpoint(self, state: State, *, force: bool) -> Path | None:
        """The folder to save into after this step, which may have one already, or None; `force`: there will be no
        later step."""
        ...

    def saved(self, path: Path, state: State) -> None: ...


@dataclass(slots=True, kw_only=True)
class Loop:
    """One run's parts, and where it is.

    `stop` may be set at any time: the rollouts in flight are cancelled, the step is given up, and `run` returns
    after a checkpoint.
    """

    plan: Plan
    state: State
    buffer: LoopBuffer
    board: Board
    learner: Learner
    observer: Observer
    train_tasks: Sequence[Task]
    val_tasks: Sequence[Task]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _saved: tuple[int, Mapping[Split, int]] | None = None
    """Step and groups of the newest checkpoint."""

    async def run(self) -> State:
        """Run to the last step. Raises StepFailed, EngineError."""
        started = time.monotonic() - self.state.wall_s
        if not self.state.val_rewards:
            await self.save()  # a run that is killed in its first step is resumed too
            await self.evaluate()
        while self.state.step < self.plan.steps and not self.stop.is_set():
            try:
                if not await self.step():
                    break
            except StepFailed:
                await self.save(force=True)
                raise
            self.state.wall_s = time.monotonic() - started
            last = self.state.step == self.plan.steps
            if last or (self.plan.eval_every and self.state.step % self.plan.eval_every == 0):
                await self.evaluate()
            self.state.wall_s = time.monotonic() - started
            await self.save(force=last)
        if self.stop.is_set():
            await self.save(force=True)
        check_conservation(self.state)
        return self.state

    async def step(self) -> bool:
        """One step; False where it was given up because the run stops."""
        clock = Clock()
        before, version = replace(self.state.cursor), self.state.version
        try:
            gathered = await self._gather()
        except StepFailed:
            self.state.cursor = before
            raise
        clock.lap("generate")
        if gathered is None:
            self.state.cursor = before
            return False
        groups, credits = gathered
        samples = [sample for one in credits for sample in one.samples]
        batches = batching.pack(
            samples,
            rollouts_per_batch=self.plan.rollouts_per_batch,
            pad_token=self.plan.pad_token,
            row_multiple=self.plan.row_multiple,
        )
        clock.lap("other")
        learned: Metrics = {}
        if batches:
            self.observer.waiting_for(f"update: {len(samples)} rows")
            learned = await self.learner.update(batches, epochs=self.plan.epochs)
            clock.lap("update")
            await self.publish()
            clock.lap("publish")
        await self._account(groups, version, credits, learned, clock)
        return True

    async def _gather(self) -> tuple[list[Group], list[Credit]] | None:
        """The step's groups with their credit; None where the run was stopped. Raises StepFailed.

        Groups that give nothing to train on are made up for with new tasks, in at most `plan.refills` more rounds:
        dynamic sampling of DAPO, arXiv 2503.14476 section 3.2.
        """
        groups: list[Group] = []
        credits: list[Credit] = []
        missing = self.plan.tasks_per_step
        for _ in range(1 + self.plan.refills):
            tasks = self.state.cursor.next(self.train_tasks, missing)
            try:
                more = await self.generate(tasks, split="train", num_rollouts=self.plan.rollouts_per_task)
                groups += more or []
                if more is not None:
                    _check_alive(groups)
            except StepFailed:
                await self._give_up(groups, "step_failed")
                raise
            if more is None:
                await self._give_up(groups, "run_stopped")
                return None
            credits += [credit.assign(group, self.plan.rules) for group in more]
            missing = self.plan.tasks_per_step - sum(bool(one.samples) for one in credits)
            if missing == 0:
                break
        return groups, credits

    async def _give_up(self, groups: Sequence[Group], reason: str) -> None:
        """Groups that were taken and will not be trained."""
        lost = sum(len(group.trajectories) for group in groups)
        if lost:
            await self.buffer.advance(trained=0, dropped={reason: lost})
            self.state.dropped[reason] += lost

    async def generate(self, tasks: Sequence[Task], *, split: Split, num_rollouts: int) -> list[Group] | None:
        """Whole groups of these tasks; None where the run was stopped meanwhile. Raises StepFailed where most rollouts
        fail alike."""
        for task in tasks:
            await self.buffer.admit(task, split=split, num_rollouts=num_rollouts)
        self.state.admitted += len(tasks) * num_rollouts if split == "train" else 0
        what, total = ("generate" if split == "train" else "evaluate"), len(tasks) * num_rollouts
        taking = asyncio.ensure_future(self.buffer.take(len(tasks), split=split))
        stopping = asyncio.ensure_future(self.stop.wait())
        ended = (await self.buffer.stats()).ended
        watching = asyncio.ensure_future(
            watch(
                self.buffer, lambda stats: self.observer.waiting_for(f"{what}: {stats.ended - ended}/{total} rollouts")
            )
        )
        try:
            await asyncio.wait((taking, stopping, watching), return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                return taking.result()
            failed = watching.done() and not stopping.done()
            trouble = watching.result() if failed else ""
            await self.buffer.cancel(trouble or "the run was stopped")
            cancelled = await taking
            if split == "train":
                await self._give_up(cancelled, "step_failed" if failed else "run_stopped")
            if failed:
                raise StepFailed(f"{what}: {trouble}")
            return None
        finally:
            for waiting in (taking, stopping, watching):
                waiting.cancel()

    async def publish(self) -> None:
        """Make the learner's weights the policy, everywhere."""
        self.observer.waiting_for("publish")
        weights = await self.learner.publish()
        await self.board.publish(weights, self.plan.publish_timeout_s)
        self.state.version = weights.version

    async def evaluate(self) -> float:
        """Mean reward over the held-out tasks, one rollout each; a rollout that failed counts as 0."""
        groups = await self.generate(self.val_tasks, split="val", num_rollouts=1)
        if groups is None:
            return math.nan
        rewards = [trajectory.reward or 0.0 for group in groups for trajectory in group.trajectories]
        reward = sum(rewards) / len(rewards)
        self.state.val_rewards.append((self.state.step, reward))
        self.observer.rollouts(self.state.step, self.state.version, groups)
        self.observer.evaluated(self.state.step, reward, len(rewards))
        return reward

    async def save(self, *, force: bool = False) -> None:
        """Checkpoint, where the observer has a folder for one and something has changed. A step that was given up
        changes the state alone: of its groups, those of a resumed run must know."""
        folder = self.observer.checkpoint(self.state, force=force)
        if folder is None:
            return
        now = self.state.step, dict((await self.buffer.stats()).next_group)
        if now == self._saved:
            return
        self.state.next_group = now[1]
        self.observer.waiting_for("checkpoint")
        await self.buffer.milestone(self.state.step)  # before the checkpoint is whole: there is one for each
        if self._saved is None or self._saved[0] != self.state.step:
            await self.learner.save(folder)
        self.observer.saved(folder, self.state)
        self._saved = now
        await self.buffer.forget_before(self.state.step)

    async def restore(self, folder: Path) -> None:
        """The learner as a checkpoint has it; its weights are the policy again, as the version that they were."""
        self._saved = self.state.step, dict(self.state.next_group)
        await self.learner.restore(folder, max(0, self.state.version - 1))
        if self.state.version:  # else they are what the engines start with
            await self.publish()

    async def _account(
        self, groups: list[Group], version: int, credits: list[Credit], learned: Metrics, clock: Clock
    ) -> None:
        """Close the books of a step whose rollouts are of `version`: the buffer's, the run's, and what is logged."""
        state = self.state
        state.step += 1
        trained = sum(one.trained_rollouts for one in credits)
        dropped: Counter[str] = Counter()
        for one in credits:
            dropped.update(one.dropped_rollouts)
        await self.buffer.advance(trained=trained, dropped=dropped)
        failed = _failures(groups)
        sampled = sum(one.sampled_tokens for one in credits)
        state.trained += trained
        state.dropped.update(dropped)
        state.failed.update(failed)
        state.sampled_tokens += sampled
        for one in credits:
            state.dropped_tokens.update(one.dropped_tokens)
        tokens = sum(int(sample.mask_T.sum()) for one in credits for sample in one.samples)
        state.trained_tokens += tokens
        record = values(merge(*(one.metrics for one in credits), learned))
        record["train/reward"] = record.pop("reward")
        if "logprob_gap/mean_abs" in record:
            state.gap_total += record["logprob_gap/mean_abs"] * tokens
            state.gap_count += tokens
            state.gap_max = max(state.gap_max, record["logprob_gap/max_abs"])
        record |= {"tokens/sampled": sampled, "tokens/trained": tokens, "policy/version": version}
        retried = sum(trajectory.key.attempt for group in groups for trajectory in group.trajectories)
        record |= {"rollouts/trained": trained, "rollouts/retried": retried}
        record |= {f"rollouts/dropped/{reason}": count for reason, count in dropped.items()}
        record |= {f"rollouts/failed/{outcome}": count for outcome, count in failed.items()}
        refused = sum((Counter(t.refused_spans) for group in groups for t in group.trajectories), Counter[str]())
        record |= {f"spans/refused/{reason}": count for reason, count in refused.items()}
        self.observer.rollouts(state.step, version, groups)
        seconds = clock.finish()
        state.seconds.update(seconds)
        record |= {f"time/{'step' if name == 'total' else name}": spent for name, spent in seconds.items()}
        self.observer.step(state.step, record)


@dataclass(slots=True)
class Clock:
    """Where the seconds of a step go. What no lap names is "other"."""

    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)
    laps: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] += now - self.last
        self.last = now

    def finish(self) -> dict[str, float]:
        self.lap("other")
        parts = {name: self.laps[name] for name in ("generate", "update", "publish", "other")}
        return {"total": self.last - self.started, **parts}


def _failures(groups: Sequence[Group]) -> Counter[str]:
    return Counter(
        trajectory.outcome.value
        for group in groups
        for trajectory in group.trajectories
        if trajectory.outcome is not Outcome.FINISHED
    )


def _check_alive(groups: Sequence[Group]) -> None:
    """A whole step of failures would train on nothing. Raises StepFailed with the reasons counted."""
    failed = _failures(groups)
    total = sum(len(group.trajectories) for group in groups)
    if sum(failed.values()) < total:
        return
    errors = Counter(trajectory.error for group in groups for trajectory in group.trajectories)
    counted = ", ".join(f"{count} {name}" for name, count in failed.most_common())
    raise StepFailed(f"all {total} rollouts of the step failed: {counted}. Most often: {errors.most_common(1)[0][0]}")
