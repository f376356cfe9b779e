"""The training loop. A step generates rollouts, trains on them, and publishes the new weights; some steps evaluate.

generate   admit tasks, wait for complete groups     ends with the last rollout of the step, or with `stop`
train      credit -> samples -> batches -> update    ends with the optimiser's last step
publish    new weights to every replica              ends when every replica serves the new version
evaluate   one rollout for each held-out task        runs between steps, so a single version answers every call
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from agent_lightning.buffer.taken import TakenGroup, take_groups
from agent_lightning.core.errors import StepFailed
from agent_lightning.core.metrics import Metrics, keep_most_counted, merge, values
from agent_lightning.core.types import Group, Outcome, Split, Task, Trajectory
from agent_lightning.credit import assign, batching
from agent_lightning.learners.base import Learner, Weights
from agent_lightning.rollouts.supervise import WatchedBuffer, watch
from agent_lightning.run.state import STATE_FILE, Plan, State, check_conservation

MAX_NAMES: Final = 64
"""Names of emitted rewards, of parts of a reward, and reasons for refused spans, in the record of a step."""
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
    async def take(self, num_groups: int, *, split: Split) -> list[TakenGroup]: ...
    async def advance(self, *, trained: int, dropped: Mapping[str, int]) -> None: ...
    async def cancel(self, reason: str) -> int: ...
    async def milestone(self, step: int) -> None: ...
    async def forget_before(self, step: int) -> None: ...


class Board(Protocol):
    """The part of the PolicyBoard that the loop uses."""

    async def publish(self, weights: Weights, timeout: float) -> int: ...
    async def versions(self) -> dict[str, int]: ...


class Observer(Protocol):
    """The loop's reporter: it shows progress, records metrics and rollouts, and decides when to checkpoint."""

    def waiting_for(self, text: str) -> None:
        """Show what the run waits for now, such as "generate: 41/64 rollouts"; the first word names the phase."""

    def record_rollouts(self, step: int, version: int, groups: Sequence[Group]) -> None: ...
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

    async def generate(self, tasks: Sequence[Task], *, split: Split, num_rollouts: int) -> list[Group] | None:
        """Admit the tasks and wait for their complete groups; None if the run was stopped meanwhile. Raises StepFailed
        if most rollouts fail for the same reason, a reward does not fit the config, or no worker can be kept alive."""
        for task in tasks:
            await self.buffer.admit(task, split=split, num_rollouts=num_rollouts)
        phase, total = ("generate" if split == "train" else "evaluate"), len(tasks) * num_rollouts
        self.state.admitted += total if split == "train" else 0
        taking = asyncio.ensure_future(take_groups(self.buffer, len(tasks), split=split))
        stopping = asyncio.ensure_future(self.stop.wait())
        ended_before = (await self.buffer.stats()).ended
        show = self.observer.waiting_for
        progress = watch(self.buffer, lambda stats: show(f"{phase}: {stats.ended - ended_before}/{total} rollouts"))
        watching = asyncio.ensure_future(progress)
        try:
            await asyncio.wait((taking, stopping, watching), return_when=asyncio.FIRST_COMPLETED)
            # `watch` ends, with a description of the trouble, if the rollouts cannot succeed.
            trouble = watching.result() if watching.done() and not stopping.done() else ""
            if taking.done():
                trouble = trouble or (await self.buffer.stats()).trouble  # of the last rollouts
                if not trouble:
                    return taking.result()
            await self.buffer.cancel(trouble or "the run was stopped")
            groups = await taking
            await self.abandon(groups, split, STEP_FAILED if trouble else RUN_STOPPED)
            if trouble:
                raise StepFailed(f"{phase}: {trouble}")
            return None
        finally:
            for waiting in (taking, stopping, watching):
                waiting.cancel()

    async def evaluate(self) -> float:
        """The mean reward over the held-out tasks, with a rollout for each; NaN if there are none, or if the run was
        stopped meanwhile. Raises StepFailed, also if all of several rollouts fail, or none could be scored."""
        groups = await self.generate(self.val_tasks, split="val", num_rollouts=1) if self.val_tasks else None
        if groups is None:
            return math.nan
        self.observer.record_rollouts(self.state.step, self.state.version, groups)
        evaluation = Evaluation(groups)
        if len(groups) > 1 or not evaluation.rewards:  # that a single agent fails says nothing
            check_failures(groups, "evaluation")
        self.state.val_rewards.append((self.state.step, evaluation.reward))
        self.observer.record_evaluation(self.state.step, evaluation)
        return evaluation.reward

    async def abandon(self, groups: Sequence[Group], split: Split, reason: str) -> None:
        """Count the rollouts of groups that will not be trained. Those of a step or evaluation that failed are kept on
        disk: they say why."""
        if reason == STEP_FAILED:
            self.observer.record_rollouts(self.state.step + (split == "train"), self.state.version, groups)
        if split == "train" and (num_rollouts := sum(len(group.trajectories) for group in groups)):
            await self.buffer.advance(trained=0, dropped={reason: num_rollouts})
            self.state.dropped[reason] += num_rollouts


def check_failures(groups: Sequence[Group], what: str) -> None:
    """Raise StepFailed if all rollouts of a "step" or an "evaluation" failed: then there is nothing to learn from, and
    no reward to report."""
    rollouts = [rollout for group in groups for rollout in group.trajectories]
    if rollouts and count_failures(rollouts).total() == len(rollouts):
        raise StepFailed(f"all {len(rollouts)} rollouts of the {what} failed: {_why(rollouts)}")


@dataclass(slots=True, kw_only=True)
class Loop(Sampler):
    """The parts of a run and its progress. If `stop` is set, the step is abandoned, and `run` returns after a
    checkpoint.

    Training is on-policy: the rollouts of a step start after its policy version is live on every replica, and end
    before the next version is published. The loop knows protocols only, so it runs the same on plain objects in one
    process and on Ray actors.
    """

    plan: Plan
    board: Board
    learner: Learner
    train_tasks: Sequence[Task]
    _saved: tuple[int, Mapping[Split, int]] | None = None
    """The step of the newest checkpoint, and the numbers of the buffer's next groups at that time."""

    async def run(self) -> State:
        """Run to the last step, or until `stop` is set. Raises StepFailed, EngineError."""
        started = time.monotonic() - self.state.wall_s
        if not self.state.val_rewards:
            await self.save()  # so that a run that is killed in its first step can be resumed
            await self.evaluate()
        while self.state.step < self.plan.steps and not self.stop.is_set():
            try:
                if not await self.step():
                    break
            except StepFailed:
                await self.save(force=True)
                raise
            if self.plan.evaluates_after(self.state.step):
                await self.evaluate()
            self.state.wall_s = time.monotonic() - started
            await self.save(force=self.state.step == self.plan.steps)
        if self.stop.is_set():
            await self.save(force=True)
        check_conservation(self.state)
        return self.state

    async def step(self) -> bool:
        """Run a step: generate, train, publish. False if the step was abandoned because the run stops."""
        clock, version = Clock(), self.state.version
        if (gathered := await self._gather_groups()) is None:
            return False
        clock.lap("generate")
        groups, credits = gathered
        samples = [sample for credit in credits for sample in credit.samples]
        size, multiple = self.plan.algorithm.rollouts_per_batch, self.plan.row_multiple
        batches = batching.pack(samples, rollouts_per_batch=size, pad_token=self.plan.pad_token, row_multiple=multiple)
        clock.lap("other")
        update_metrics: Metrics = {}
        if batches:
            self.observer.waiting_for(f"update: {len(samples)} rows")
            update_metrics = await self.learner.update(batches, epochs=self.plan.algorithm.epochs)
            clock.lap("update")
            await self.publish()
            clock.lap("publish")
        await self._record_step(groups, version, credits, update_metrics, clock)
        return True

    async def _gather_groups(self) -> tuple[list[Group], list[assign.Credit]] | None:
        """Generate the step's groups and assign their credit; None if the run was stopped. Raises StepFailed. Groups
        without a sample to train on are replaced by groups of new tasks, in at most `algorithm.dynamic_sampling_rounds`
        further rounds: dynamic sampling of DAPO, arXiv 2503.14476 section 3.2."""
        groups: list[Group] = []
        credits: list[assign.Credit] = []
        # An abandoned step takes no tasks: the resumed run draws the same tasks again.
        cursor_before, algorithm = replace(self.state.cursor), self.plan.algorithm
        missing = algorithm.tasks_per_step
        for _ in range(1 + algorithm.dynamic_sampling_rounds):
            tasks = self.state.cursor.next(self.train_tasks, missing)
            try:
                new_groups = await self.generate(tasks, split="train", num_rollouts=algorithm.rollouts_per_task)
                groups += new_groups or []
                check_failures(groups if new_groups else [], "step")
            except StepFailed:
                self.state.cursor = cursor_before
                await self.abandon(groups, "train", STEP_FAILED)
                raise
            if new_groups is None:
                self.state.cursor = cursor_before
                await self.abandon(groups, "train", RUN_STOPPED)
                return None
            credits += [assign.assign(group, self.plan.rules) for group in new_groups]
            missing = algorithm.tasks_per_step - sum(bool(credit.samples) for credit in credits)
            if missing == 0:
                break
        return groups, credits

    async def publish(self) -> None:
        """Publish the learner's weights and wait until every replica serves them."""
        self.observer.waiting_for("publish")
        weights = await self.learner.publish()
        await self.board.publish(weights, self.plan.publish_timeout_s)
        self.state.version = weights.version

    async def save(self, *, force: bool = False) -> None:
        """Save a checkpoint if the observer has a folder for it and the run has changed since the last checkpoint. An
        abandoned step changes no weights but uses group numbers, which a resumed run must not use again: then the state
        alone is written, into the checkpoint of the same step."""
        if (folder := self.observer.checkpoint_folder(self.state, force=force)) is None:
            return
        current = self.state.step, dict((await self.buffer.stats()).next_group)
        if current == self._saved:
            return
        self.state.next_group = current[1]
        self.observer.waiting_for("checkpoint")
        # Before the checkpoint is complete: the journal must have a milestone for every complete checkpoint.
        await self.buffer.milestone(self.state.step)
        if self._saved is None or self._saved[0] != self.state.step:
            (folder / STATE_FILE).unlink(missing_ok=True)  # of a damaged checkpoint that the resumed run had left
            await self.learner.save(folder)
        self.observer.complete_checkpoint(folder, self.state)
        self._saved = current
        await self.buffer.forget_before(self.state.step)

    async def restore(self, folder: Path) -> None:
        """Restore the learner from a checkpoint, and publish its weights under the version that they had."""
        self._saved = self.state.step, dict(self.state.next_group)
        await self.learner.restore(folder, max(0, self.state.version - 1))
        if self.state.version:  # at version 0 the engines have these weights already
            await self.publish()

    async def _record_step(
        self, groups: list[Group], version: int, credits: list[assign.Credit], update_metrics: Metrics, clock: Clock
    ) -> None:
        """Count the step, whose rollouts are of policy `version`, in buffer and state, and log its metrics."""
        state = self.state
        state.step += 1
        trained = sum(credit.trained_rollouts for credit in credits)
        dropped = _sum_counts(credit.dropped_rollouts for credit in credits)
        await self.buffer.advance(trained=trained, dropped=dropped)
        rollouts = [rollout for group in groups for rollout in group.trajectories]
        failed = count_failures(rollouts)
        sampled_tokens = sum(credit.sampled_tokens for credit in credits)
        trained_tokens = sum(int(sample.mask_T.sum()) for credit in credits for sample in credit.samples)
        state.trained += trained
        state.dropped.update(dropped)
        state.failed.update(failed)
        state.sampled_tokens += sampled_tokens
        state.trained_tokens += trained_tokens
        state.dropped_tokens.update(_sum_counts(credit.dropped_tokens for credit in credits))
        metrics = merge(*(credit.metrics for credit in credits), update_metrics)
        for prefix in ("emitted/", "reward_part/"):
            metrics = keep_most_counted(metrics, prefix, MAX_NAMES)
        record = values(metrics)
        record["train/reward"] = record.pop("reward")
        if "logprob_gap/mean_abs" in record:
            state.gap_total += record["logprob_gap/mean_abs"] * trained_tokens
            state.gap_count += trained_tokens
            state.gap_max = max(state.gap_max, record["logprob_gap/max_abs"])
        record |= {"tokens/sampled": sampled_tokens, "tokens/trained": trained_tokens, "policy/version": version}
        record |= {"rollouts/trained": trained, "rollouts/retried": sum(rollout.key.attempt for rollout in rollouts)}
        record |= {f"rollouts/dropped/{reason}": count for reason, count in dropped.items()}
        record |= {f"rollouts/failed/{outcome}": count for outcome, count in failed.items()}
        refused = _sum_counts(rollout.refused_spans for rollout in rollouts)
        record |= {f"spans/refused/{reason}": count for reason, count in refused.most_common(MAX_NAMES)}
        self.observer.record_rollouts(state.step, version, groups)
        clock.lap("other")
        state.seconds.update(clock.seconds)
        record |= {f"time/{'step' if name == 'total' else name}": spent for name, spent in clock.seconds.items()}
        self.observer.record_step(state.step, record)


class Clock:
    """The seconds of a step by phase, and in total."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("total", "generate", "update", "publish", "other"), 0.0)
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to the phase `name` and to the total."""
        before, self._last = self._last, time.monotonic()
        for phase in (name, "total"):
            self.seconds[phase] += self._last - before


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    return sum((Counter(count) for count in counts), Counter())
