"""The loop's observer: terminal, metrics, rollouts on disk and checkpoint folders, of one run directory."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from agent_lightning.config.load import Config, to_mapping
from agent_lightning.core.types import Group
from agent_lightning.run import checkpoint
from agent_lightning.run.archive import RolloutWriter
from agent_lightning.run.report import Progress, RolloutCounts, StepSeconds, Summary
from agent_lightning.run.state import State
from agent_lightning.run.tracking import JsonLines, RunDirectory, Sink, TensorBoardSink, Tracker, WandbSink

logger = logging.getLogger(__name__)


class RunObserver:
    """Writes a run down while it happens."""

    def __init__(self, *, config: Config, run: RunDirectory, progress: Progress, step: int | None = None) -> None:
        """`step`: of the checkpoint from which the run goes on; what was written of later ones is of no run."""
        self._config = config
        self._run = run
        self._progress = progress
        self._writer: RolloutWriter | None = RolloutWriter(run.rollouts)
        sinks: list[Sink] = [JsonLines(run.metrics, resumed=step)]
        if config.tracking.tensorboard:
            sinks.append(TensorBoardSink(run.logs / "tensorboard", resumed=step))
        if config.tracking.wandb != "disabled":
            sinks.append(
                WandbSink(
                    run,
                    project=config.tracking.project,
                    group=config.tracking.group,
                    tags=config.tracking.tags,
                    config=to_mapping(config),
                    mode=cast(Any, config.tracking.wandb),
                )
            )
        self._tracker = Tracker(sinks)
        self.val_reward_by: Mapping[str, float] = {}
        """Of the newest evaluation, by the values of data.strata."""

    def waiting_for(self, text: str) -> None:
        self._progress.waiting_for(text)

    def rollouts(self, step: int, version: int, groups: Sequence[Group]) -> None:
        field = self._config.data.strata
        if field is not None and all(one.key.split == "val" for group in groups for one in group.trajectories):
            self.val_reward_by = reward_by(groups, field)
            self._tracker.log(step, {f"val/reward/{name}": reward for name, reward in self.val_reward_by.items()})
        if self._writer is None:
            return
        try:
            self._writer.write(step, version, groups)
        except OSError as error:
            # A full disk must not end the run; the weights and metrics may still fit.
            logger.warning("rollouts are no longer written: %s", error)
            self._writer = None

    def evaluated(self, step: int, reward: float, rows: int) -> None:
        self._tracker.log(step, {"val/reward": reward, "val/rows": float(rows)})
        self._progress.evaluated(step, reward, rows)

    def step(self, step: int, record: Mapping[str, float]) -> None:
        self._tracker.log(step, record)
        self._progress.step(step, record)

    def checkpoint(self, state: State, *, force: bool) -> Path | None:
        every = self._config.checkpoint_every
        if not force and not (every and state.step % every == 0):
            return None
        return checkpoint.folder_of(self._run.checkpoints, state.step)

    def saved(self, folder: Path, state: State) -> None:
        checkpoint.write_state(folder, state)
        checkpoint.prune(self._run.checkpoints, self._config.checkpoints_kept)

    def close(self) -> None:
        self._tracker.close()


def reward_by(groups: Sequence[Group], field: str) -> dict[str, float]:
    """Mean reward by the values of a field of the tasks: {"easy": 0.5, "hard": 0.1}. What failed counts as 0."""
    rewards: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        rewards[str(group.task.payload.get(field))] += [one.reward or 0.0 for one in group.trajectories]
    return {name: sum(rewards[name]) / len(rewards[name]) for name in sorted(rewards)}


def summarise(
    config: Config, state: State, *, val_rows: int, val_reward_by: Mapping[str, float], start_s: float
) -> Summary:
    """A run's outcome in numbers, from the loop's state."""
    rewards = [reward for _, reward in state.val_rewards] or [math.nan]
    steps = max(1, state.step)
    seconds = {name: state.seconds[name] / steps for name in ("total", "generate", "update", "publish", "other")}
    return Summary(
        experiment=config.experiment,
        seed=config.seed,
        steps=state.step,
        wall_s=state.wall_s,
        val_reward_first=rewards[0],
        val_reward_last=rewards[-1],
        val_reward_best=max(rewards),
        val_reward_by=dict(val_reward_by),
        val_rows=val_rows,
        rollouts=RolloutCounts(
            admitted=state.admitted, trained=state.trained, dropped=dict(state.dropped), failed=dict(state.failed)
        ),
        sampled_tokens=state.sampled_tokens,
        trained_tokens=state.trained_tokens,
        max_abs_logprob_gap=state.gap_max if state.gap_count else math.nan,
        mean_abs_logprob_gap=state.gap_total / state.gap_count if state.gap_count else math.nan,
        step_s=StepSeconds(**seconds),
        versions=state.version,
        start_s=start_s,
    )
