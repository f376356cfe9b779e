"""The training loop. A step generates rollouts, trains on them, and publishes the new weights; some steps evaluate.

generate   admit tasks, wait for complete groups     ends with the last rollout of the step, or with `stop`
train      credit -> samples -> batches -> update    ends with the optimiser's last step
publish    new weights to every replica              ends when every replica serves the new version
evaluate   one rollout for each held-out task        runs between steps, so a single version answers every call

With `loop.max_lag` above 0, groups of later steps are in flight meanwhile; docs/async.md proves how old their tokens
can become.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol

from agent_lightning.buffer.taken import Deadlines
from agent_lightning.core.errors import StepFailed
from agent_lightning.core.metrics import interval, keep_most_counted, merge, values
from agent_lightning.core.types import Batch, Group, Split, Task
from agent_lightning.credit import assign, batching
from agent_lightning.credit.samples import by_call
from agent_lightning.credit.staleness import overlap_metrics
from agent_lightning.learners.base import Learner, Update, Weights
from agent_lightning.run.sampler import RUN_STOPPED, STEP_FAILED, Sampler, check_failures, count_failures
from agent_lightning.run.state import STATE_FILE, InFlight, Plan, State, check_conservation

MAX_NAMES: Final = 64
"""Names of emitted rewards, of parts of a reward, and reasons for refused spans, in the record of a step."""


class Board(Protocol):
    """The part of the PolicyBoard that the loop uses."""

    async def publish(self, weights: Weights, timeout: float) -> int: ...
    async def versions(self) -> dict[str, int]: ...


@dataclass(slots=True, kw_only=True)
class Loop(Sampler):
    """The parts of a run and its progress. If `stop` is set, the step is abandoned, and `run` returns after a
    checkpoint.

    With loop.max_lag=0 training is on-policy: the rollouts of a step start after its policy version is live on every
    replica, and end before the next version is published. The loop knows protocols only, so it runs the same on plain
    objects in one process and on Ray actors.
    """

    plan: Plan
    board: Board
    learner: Learner
    train_tasks: Sequence[Task]
    _saved: tuple[int, Mapping[Split, int]] | None = None
    """The step of the newest checkpoint, and the numbers of the buffer's next groups at that time."""
    _idle_s: float = 0.0  # `Stats.idle_s` when the last step was recorded

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
            await self.give_up((), RUN_STOPPED)
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
        update = Update(metrics={})
        if batches:
            self.observer.waiting_for(f"update: {len(samples)} rows")
            update = await self.learner.update(batches, epochs=self.plan.algorithm.epochs)
            clock.lap("update")
            await self.publish()
            clock.lap("publish")
        await self._record_step(groups, version, credits, batches, update, clock)
        return True

    async def _gather_groups(self) -> tuple[list[Group], list[assign.Credit]] | None:
        """Take the step's groups and assign their credit; None if the run was stopped. Raises StepFailed. Groups
        without a sample to train on are replaced by other groups, in at most `algorithm.dynamic_sampling_rounds`
        further rounds: dynamic sampling of DAPO, arXiv 2503.14476 section 3.2."""
        groups: list[Group] = []
        credits: list[assign.Credit] = []
        state, algorithm = self.state, self.plan.algorithm
        size = missing = algorithm.tasks_per_step
        for _ in range(1 + algorithm.dynamic_sampling_rounds):
            # Groups of this step that will not be trained make room for as many others.
            await self._admit(len(groups) - (size - missing))
            taken, newest = {group.group_id for group in groups}, state.version - self.plan.loop.max_lag
            slack = {group.group_id: group.version - newest for group in state.in_flight if group.group_id not in taken}
            deadlines = Deadlines(slack=slack, groups_per_step=size)
            new_groups = await self.gather(missing, split="train", deadlines=deadlines, kept=groups)
            if new_groups is None:
                return None
            groups += new_groups
            try:
                check_failures(groups, "step")
            except StepFailed:
                await self.give_up(groups, STEP_FAILED)
                raise
            for group in new_groups:
                credits.append(assign.assign(group, self.plan.rules.at(state.step + 1), state.version))
            missing = size - sum(bool(credit.samples) for credit in credits)
            if missing == 0:
                break
        return groups, credits

    async def _admit(self, extra: int) -> None:
        """Admit groups at the current version, while fewer are in flight than the steps up to `loop.max_lag` updates
        ahead will train, and `extra`; never more than the run's remaining steps will."""
        state, algorithm = self.state, self.plan.algorithm
        if not state.in_flight:
            self._before = replace(state.cursor), [*state.redo]
        steps = max(1, min(self.plan.loop.max_lag + 1, self.plan.steps - state.step))
        room = max(0, algorithm.tasks_per_step * steps + extra - len(state.in_flight))
        redo = {task.task_id: task for task in self.train_tasks if task.task_id in state.redo[:room]}
        tasks = [redo[task_id] for task_id in state.redo[:room] if task_id in redo]
        state.redo = state.redo[room:]
        tasks += state.cursor.next(self.train_tasks, room - len(tasks))
        for task in tasks:
            number = algorithm.rollouts_per_task
            group_id = await self.buffer.admit(task, split="train", num_rollouts=number)
            state.in_flight.append(InFlight(group_id, state.version, number, task.task_id))
            state.admitted += number

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
        stats = await self.buffer.stats()
        in_buffer = stats.waiting + stats.running + stats.complete
        if self.state.in_flight and not in_buffer:  # without a journal, the buffer has lost what was in flight
            self.state.dropped[RUN_STOPPED] += sum(group.num_rollouts for group in self.state.in_flight)
            self.state.redo = [group.task_id for group in self.state.in_flight] + self.state.redo
            self.state.in_flight = []

    async def _record_step(
        self,
        groups: list[Group],
        version: int,
        credits: list[assign.Credit],
        batches: Sequence[Batch],
        update: Update,
        clock: Clock,
    ) -> None:
        """Count the step, whose rollouts are of policy `version`, in buffer and state, and log its metrics."""
        state = self.state
        state.step += 1
        trained = sum(credit.trained_rollouts for credit in credits)
        dropped = _sum_counts(credit.dropped_rollouts for credit in credits)
        await self.buffer.advance(trained=trained, dropped=dropped)
        taken, self._before = {group.group_id for group in groups}, None
        state.in_flight = [group for group in state.in_flight if group.group_id not in taken]
        rollouts = [rollout for group in groups for rollout in group.trajectories]
        failed = count_failures(rollouts)
        sampled_tokens = sum(credit.sampled_tokens for credit in credits)
        samples = [sample for credit in credits for sample in credit.samples]
        trained_tokens = sum(int(sample.mask_T.sum()) for sample in samples)
        state.trained += trained
        state.dropped.update(dropped)
        state.failed.update(failed)
        state.sampled_tokens += sampled_tokens
        state.trained_tokens += trained_tokens
        state.dropped_tokens.update(_sum_counts(credit.dropped_tokens for credit in credits))
        metrics = merge(*(credit.metrics for credit in credits), update.metrics)
        for prefix in ("emitted/", "reward_part/"):
            metrics = keep_most_counted(metrics, prefix, MAX_NAMES)
        record = values(metrics)
        record["train/reward"] = record.pop("reward")
        # Rollouts of a task are not independent of each other: the interval is that of the means of the groups.
        record["train/reward_ci95"] = interval(values(credit.metrics)["reward"] for credit in credits)[1]
        if "logprob_gap/mean_abs" in record:
            state.gap_total += record["logprob_gap/mean_abs"] * trained_tokens
            state.gap_count += trained_tokens
            state.gap_max = max(state.gap_max, record["logprob_gap/max_abs"])
        record |= {"tokens/sampled": sampled_tokens, "tokens/trained": trained_tokens, "policy/version": version}
        record |= {"rollouts/groups": len(groups), "rollouts/trained": trained}
        record |= {"rollouts/retried": sum(rollout.key.attempt for rollout in rollouts)}
        record |= {f"rollouts/dropped/{reason}": count for reason, count in dropped.items()}
        record |= {f"rollouts/failed/{outcome}": count for outcome, count in failed.items()}
        refused = _sum_counts(rollout.refused_spans for rollout in rollouts)
        record |= {f"spans/refused/{reason}": count for reason, count in refused.most_common(MAX_NAMES)}
        record |= overlap_metrics(rollouts, samples, version) | {"time/learner_idle": clock.seconds["generate"]}
        idle_before, self._idle_s = self._idle_s, (await self.buffer.stats()).idle_s
        record["time/engine_idle"] = max(0.0, self._idle_s - idle_before)
        learnt = batching.unpack(samples, batches[: len(update.logprobs)], update.logprobs)
        logprobs = by_call(learnt, rollouts, self.plan.rules.agents)
        self.observer.record_rollouts(state.step, version, groups, logprobs)
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
