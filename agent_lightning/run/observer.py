"""The observer of a run: it shows the loop's progress and writes metrics, rollouts and checkpoints into the folder."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_lightning.config.load import Config, to_mapping
from agent_lightning.config.running import DataConfig
from agent_lightning.core.errors import UserError
from agent_lightning.core.types import Floats, Group
from agent_lightning.credit.assign import CreditRules
from agent_lightning.run.archive import RolloutWriter
from agent_lightning.run.live import from_environment
from agent_lightning.run.report import Progress, RolloutCounts, StepSeconds, Summary
from agent_lightning.run.sampler import Evaluation, count_failures
from agent_lightning.run.state import State, checkpoint_folder, prune_checkpoints, write_state
from agent_lightning.run.tracking import JsonLines, RunDirectory, Sink, TensorBoardSink, Tracker, WandbSink

logger = logging.getLogger(__name__)


class RunObserver:
    """Passes the reports of `Loop` to the terminal (`Progress`), the metric sinks, and the files of the run folder."""

    def __init__(
        self,
        *,
        config: Config,
        run: RunDirectory,
        progress: Progress,
        rules: CreditRules,
        resumed_step: int | None = None,
    ) -> None:
        """`rules` say what each call is worth. `resumed_step`: the step of the checkpoint that the run resumes from;
        metrics of later steps are removed."""
        self._config, self._run, self._progress, self._rules = config, run, progress, rules
        self._writer: RolloutWriter | None = RolloutWriter(run.rollouts)
        tracking = config.tracking
        sinks: list[Sink] = [JsonLines(run.metrics, resumed_step=resumed_step)]
        if tracking.tensorboard:
            sinks.append(TensorBoardSink(run.logs / "tensorboard", resumed_step=resumed_step))
        if tracking.wandb != "disabled":
            sinks.append(WandbSink(run, tracking, to_mapping(config)))
        self._tracker = Tracker(sinks)
        self._live = from_environment(run.path.name)
        self.evaluation = Evaluation(())  # the newest
        self.val_reward_by: Mapping[str, float] = {}
        """The held-out reward of the newest evaluation, by the values of the field `data.val_group_by`."""

    def waiting_for(self, text: str) -> None:
        self._progress.waiting_for(text)

    def record_rollouts(
        self, step: int, version: int, groups: Sequence[Group], logprobs: Mapping[tuple[str, str], Floats] | None = None
    ) -> None:
        """Write rollouts to disk, and send them where OpenTelemetry's variables say."""
        if self._live is not None:
            self._live.send(step, groups)
        if self._writer is None:
            return
        try:
            self._writer.write(step, version, groups, self._rules, logprobs)
        except OSError as error:
            # A full disk must not end the run; the weights and metrics may still fit.
            logger.warning("rollouts are no longer written: %s", error)
            self._writer = None

    def record_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Log and show the held-out reward, its parts, its values by set and `data.val_group_by`, and failures."""
        self._check_folder()
        self.evaluation = evaluation
        self.val_reward_by = reward_by(evaluation.groups, self._config.data)
        reward, ci95, rows = evaluation.reward, evaluation.ci95, len(evaluation.rewards)
        record = {"val/reward": reward, "val/reward_ci95": ci95, "val/rows": float(rows)}
        record |= {f"val/reward/{name}": reward for name, reward in self.val_reward_by.items()}
        record |= {f"val/reward_part/{name}": value for name, value in evaluation.parts.items()}
        record |= {
            f"val/failed/{outcome}": float(count) for outcome, count in count_failures(evaluation.rollouts).items()
        }
        self._tracker.log(step, record)
        self._progress.show_evaluation(step, reward, rows, evaluation.failures, ci95)

    def record_loss(self, step: int, nats: float, chats: int) -> None:
        """Log and show the loss of the held-out chats."""
        self._check_folder()
        self._tracker.log(step, {"val/loss": nats, "val/rows": float(chats)})
        self._progress.show_evaluation(step, nats, chats)

    def record_step(self, step: int, record: Mapping[str, float]) -> None:
        self._check_folder()
        self._tracker.log(step, {**record, **(self._live.counts() if self._live is not None else {})})
        self._progress.show_step(step, record)

    def checkpoint_folder(self, state: State, *, force: bool) -> Path | None:
        """The checkpoint's folder every `checkpoint_every` steps (0: never), and whenever `force` is set; else None."""
        every = self._config.checkpoint_every
        due = force or (every and state.step % every == 0)
        return checkpoint_folder(self._run.checkpoints, state.step) if due else None

    def complete_checkpoint(self, folder: Path, state: State) -> None:
        write_state(folder, state)
        prune_checkpoints(self._run.checkpoints, self._config.checkpoints_kept)

    def _check_folder(self) -> None:
        """Raise UserError if the run's folder has been removed: nothing of what follows could be kept."""
        if not self._run.config.exists():
            raise UserError(f"{self._run.path} was removed or renamed while the run wrote into it: the run has ended")

    def close(self) -> None:
        self._tracker.close()
        if self._live is not None:
            self._live.close()


def reward_by(groups: Sequence[Group], data: DataConfig) -> dict[str, float]:
    """The mean reward for each value of the field `data.val_group_by`, and for each set of `data.val_sets`, over what
    `Evaluation.rewards` counts. Example: {"easy": 0.5, "hard": 0.1}"""
    groups_of: defaultdict[str, list[Group]] = defaultdict(list)
    for group in groups:
        name = group.task.task_id.partition("/")[0]
        names = {name} & data.val_sets.keys()
        names |= {str(group.task.payload.get(data.val_group_by))} if data.val_group_by is not None else set()
        for name in names:
            groups_of[name].append(group)
    return {name: Evaluation(groups_of[name]).reward for name in sorted(groups_of)}


def summarize(
    config: Config, state: State, /, *, val_rows: int, val_reward_by: Mapping[str, float], start_s: float, **ended: Any
) -> Summary:
    """The summary of a run in numbers, from the loop's state; `ended` has its `state` and `error`."""
    rewards = [reward for _, reward in state.val_rewards] or [math.nan]
    losses = [nats for _, nats in state.val_losses] or [math.nan]
    ci95 = [dict(state.val_ci95).get(step, math.nan) for step, _ in state.val_rewards] or [math.nan]
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
        val_ci95_first=ci95[0],
        val_ci95_last=ci95[-1],
        val_loss_first=losses[0],
        val_loss_last=losses[-1],
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
        **ended,
    )
