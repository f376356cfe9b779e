"""The terminal output of a run: progress while it trains, and a short report when it ends; and its `Summary`."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from agent_lightning.core import files
from agent_lightning.core.errors import UserError
from agent_lightning.core.text import one_line
from agent_lightning.run.tracking import RunDirectory

LEVELS = "▁▂▃▅▇"
FAILED = "rollouts/failed/"
"""A record counts the step's failed rollouts under this prefix and the outcome: "rollouts/failed/timeout"."""
DROPPED = "rollouts/dropped/"
"""The same for rollouts that were not trained, by the reasons of `credit.assign.Credit`."""
DROPPED_BECAUSE = {
    "no_spread": "in groups of equal rewards",
    "no_selected_call": "without a reply of a trained agent",
    "overlong_sample": "longer than model.max_len",
    "stale": "older than loop.drop_beyond allows",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCounts:
    """Counts over all training rollouts of a run."""

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    """By reason: {"stale": 3}."""
    failed: Mapping[str, int]
    """By outcome: {"timeout": 2}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """The mean seconds of a step, and of its phases."""

    total: float
    generate: float
    update: float
    publish: float
    other: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The outcome of a run in numbers; NaN if nothing was measured."""

    experiment: str
    seed: int
    steps: int
    wall_s: float
    val_reward_first: float
    val_reward_last: float
    val_rows: int
    rollouts: RolloutCounts
    sampled_tokens: int
    trained_tokens: int
    max_abs_logprob_gap: float
    mean_abs_logprob_gap: float
    step_s: StepSeconds
    versions: int
    """Policy versions published."""
    start_s: float
    """Seconds from the start to the first answer of the policy service."""
    val_reward_best: float
    val_reward_by: Mapping[str, float] = field(default_factory=dict)
    """The last held-out reward, by the values of the field `data.val_group_by` and by set."""
    val_ci95_first: float = math.nan  # half the width of the 95 % interval of val_reward_first
    val_ci95_last: float = math.nan
    val_loss_first: float = math.nan  # of the held-out chats of supervised training, in nats a token
    val_loss_last: float = math.nan
    state: Literal["finished", "stopped", "failed"] = "finished"
    error: str = ""
    """Why the run failed, as one line."""

    @property
    def supervised(self) -> bool:
        """Whether the run was supervised training on chats."""
        return self.rollouts.trained > 0 and not self.sampled_tokens

    @property
    def held_out(self) -> str:
        """The held-out reward before and after, or the loss: "0.312 ±0.050 -> 0.455 ±0.053"."""
        if self.supervised:
            return f"{number(self.val_loss_first)} -> {number(self.val_loss_last)}"
        before = with_interval(self.val_reward_first, self.val_ci95_first)
        return f"{before} -> {with_interval(self.val_reward_last, self.val_ci95_last)}"

    def write(self, path: Path) -> None:
        """Write JSON, with null for NaN."""
        values = json.loads(json.dumps(asdict(self)), parse_constant=lambda constant: None)
        files.write_text(path, json.dumps(values, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read what `write` wrote. Raises UserError if the file is not a summary."""
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text, object_hook=lambda row: {k: math.nan if v is None else v for k, v in row.items()})
            parts = {"rollouts": RolloutCounts(**values["rollouts"]), "step_s": StepSeconds(**values["step_s"])}
            return cls(**values | parts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no summary of a run: {one_line(error)}") from error


def report(summary: Summary, run: RunDirectory) -> RenderableType:
    """The report at the end: the held-out reward before and after, what the run did, and the paths of its files."""
    gain = 100 * (summary.val_reward_last - summary.val_reward_first)
    measure = "loss" if summary.supervised else "reward"
    headline = Text(f" held-out {measure}  {summary.held_out}", style="bold")
    if math.isfinite(gain):
        headline.append(f"  {gain:+.1f} points", style="bold green" if gain > 0 else "bold red" if gain < 0 else "bold")
    rows_text = f"{summary.val_rows:,} rows" + (", ±: 95 % interval" if "±" in summary.held_out else "")
    best = Text(f" best {number(summary.val_reward_best)}, {rows_text}", style="dim")
    counts, seconds = summary.rollouts, summary.step_s
    none = "none trained: the policy is as it was"
    trained = f"{summary.trained_tokens:,} trained" if summary.trained_tokens else none
    rollouts = f"{counts.admitted:,} admitted, {counts.trained:,} trained, {sum(counts.dropped.values()):,} dropped"
    rollouts += f": {format_counts(counts.dropped)}" if any(counts.dropped.values()) else ""
    phases = ", ".join(f"{name} {number(value, 1)}" for name, value in asdict(seconds).items() if name != "total")
    rows = {
        "steps": f"{summary.steps:,} in {duration(summary.wall_s)}; service ready after {duration(summary.start_s)}",
        "rollouts": rollouts,
        "failed": format_counts(counts.failed) or "none",
        "tokens": f"{summary.sampled_tokens:,} sampled, {trained}",
        "log-prob gap": f"mean {tiny(summary.mean_abs_logprob_gap)}, max {tiny(summary.max_abs_logprob_gap)}",
        "time per step": f"{number(seconds.total, 1)} s: {phases}",
        "policy": f"{summary.versions:,} versions published",
        "files": str(run.path),
    }
    if summary.supervised:
        rows = {name: rows[name] for name in ("steps", "time per step", "files")}
        rows |= {"chats": f"{counts.trained:,} learnt", "tokens": trained}
    if summary.val_reward_by:
        rewards = ", ".join(f"{name} {number(reward)}" for name, reward in summary.val_reward_by.items())
        rows = {"held-out": rewards} | rows
    table = Table.grid(Column(style="cyan", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in rows.items():
        table.add_row(f" {name}", Text(value))
    descriptions = {run.config: "what was run", run.summary: "these numbers", run.metrics: "every step"}
    descriptions |= {run.curve: "learning curve", run.rollouts: "every rollout (Parquet)"}
    descriptions |= {run.checkpoints: "to resume from", run.logs: "logs"}
    for path, description in descriptions.items():
        if path.is_file() or any(path.glob("*")):
            table.add_row("", f"{path.name:<13} {description}")
    table.add_row(" next", f"agl view {run.path}")
    title = Text(f" {summary.experiment}, seed {summary.seed}", style="bold")
    return Group(title, Text(), headline, *([best] if math.isfinite(gain) else []), Text(), table)


def format_counts(counts: Mapping[str, int]) -> str:
    """{"bad_reward": 1, "timeout": 3} -> "timeout 3, bad_reward 1", without counts of 0."""
    return ", ".join(f"{name} {count:,}" for name, count in Counter(counts).most_common() if count)


def number(value: float, digits: int = 3) -> str:
    """0.25 -> "0.250"; NaN -> "-"."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"


def with_interval(mean: float, half_width: float) -> str:
    """A mean and its 95 % interval: "0.455 ±0.053", or "0.455" if the interval is unknown."""
    return number(mean) + (f" ±{number(half_width)}" if math.isfinite(mean + half_width) else "")


def untrained(record: Mapping[str, float]) -> str:
    """Why a step has trained nothing, in words; "" if it has trained something.
    Examples: "all 16 groups had equal rewards"; "of 32 rollouts 24 in groups of equal rewards, 8 masked: timeout" """
    if record.get("tokens/trained", 1):
        return "" if record.get("learner/grad_norm", 1) else "the gradient was zero"
    dropped = Counter({name.removeprefix(DROPPED): int(n) for name, n in record.items() if name.startswith(DROPPED)})
    if [*+dropped] == ["no_spread"]:
        return f"all {record.get('rollouts/groups', 0):,.0f} groups had equal rewards"
    words = {reason: reason.replace("masked_", "masked: ") for reason in dropped} | DROPPED_BECAUSE
    reasons = ", ".join(f"{count:,} {words[reason]}" for reason, count in (+dropped).most_common())
    return f"of {dropped.total():,} rollouts {reasons or 'none'}"


def tiny(value: float) -> str:
    """3.2e-7 -> "3.2e-07"; 0 -> "0"; NaN -> "-"."""
    return f"{value:.1e}" if value and math.isfinite(value) else "0" if value == 0 else "-"


def lag_text(record: Mapping[str, float]) -> str:
    """The age of a step's tokens in updates, its slow rollouts, and who waited; "" if all tokens were new.
    Example: "0.8, max 2; rollouts p50 9 s, p99 31 s; idle: engines 0 s, learner 4 s"
    """
    names = ("rollout_p50", "rollout_p99", "engine_idle", "learner_idle")
    p50, p99, engines, learner = (duration(record.get(f"time/{name}", math.nan)) for name in names)
    lag = f"{number(record.get('lag/mean', math.nan), 1)}, max {record.get('lag/max', 0):.0f}"
    text = f"{lag}; rollouts p50 {p50}, p99 {p99}; idle: engines {engines}, learner {learner}"
    return text if record.get("lag/max") else ""


def duration(seconds: float) -> str:
    """42.3 -> "42 s"; 192 -> "3:12"; 3723 -> "1:02:03"; NaN -> "-"."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}" if minutes else f"{rest} s"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of `values` as at most `width` characters; a character shows the mean of an equal part of the values.
    Example: sparkline([0, 1, 2, 3, 4], 5) -> "▁▂▃▅▇"
    """
    known = [value for value in values if math.isfinite(value)]
    size = min(width, len(known))
    edges = [index * len(known) // size for index in range(size + 1)] if size else []
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    top = len(LEVELS) - 1
    return "".join(LEVELS[round(top * (mean - low) / span) if span else top // 2] for mean in means)


class LiveBlock(ABC):
    """A block of text that redraws itself; if the output is not a terminal, only its messages are printed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None

    @abstractmethod
    def render(self) -> RenderableType:
        """Render the block with the current values."""

    def start(self) -> None:
        # FORCE_COLOR makes a console interactive even on a pipe, which has no cursor to move: the file decides.
        if self.console.is_interactive and self.console.file.isatty():
            self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4)
            self._live.start()

    def stop(self) -> None:
        """Stop redrawing; the last state of the block stays on the screen. May be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def message(self, text: str) -> None:
        """Print a line above the block."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Progress(LiveBlock):
    """Progress while training: a block that redraws itself, or plain lines if the output is not a terminal."""

    def __init__(
        self,
        experiment: str,
        steps: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        measure: Literal["reward", "loss"] = "reward",
    ) -> None:
        super().__init__(console or Console())
        self._experiment, self._steps, self._clock, self._measure = experiment, steps, clock, measure
        self._started_at = self._waiting_since = self._stepped_at = clock()
        self._step, self._steps_here, self._waiting = 0, 0, ""
        self._record: Mapping[str, float] = {}
        self._train: list[float] = []
        self._val: list[tuple[int, float, int]] = []
        self._failed: Counter[str] = Counter()

    def start(self) -> None:
        self._started_at = self._waiting_since = self._stepped_at = self._clock()
        super().start()

    def stop(self) -> None:
        self._waiting = ""
        super().stop()

    def waiting_for(self, text: str) -> None:
        """Show what the run waits for, such as "generate: 41/64 rollouts"; its seconds count from a new first word."""
        if text.split(" ")[:1] != self._waiting.split(" ")[:1]:
            self._waiting_since = self._clock()
        self._waiting = text

    def show_step(self, step: int, record: Mapping[str, float]) -> None:
        """Show the metrics of the step that has ended, such as "train/reward"; `step` steps are done."""
        self._step, self._record, self._stepped_at = step, record, self._clock()
        self._steps_here += 1
        self._train.append(record.get(f"train/{self._measure}", math.nan))
        failed = {name.removeprefix(FAILED): int(n) for name, n in record.items() if name.startswith(FAILED) and n > 0}
        self._failed.update(failed)
        if self._live is None:
            parts = [f"step {step}/{self._steps}", f"train {number(self._train[-1])}"]
            parts += [f"{number(record.get('time/step', math.nan), 1)} s", self._speed()]
            parts += [f"gap {tiny(record.get('logprob_gap/mean_abs', math.nan))}"] * (self._measure == "reward")
            parts += [f"lag {lag}"] if (lag := lag_text(record)) else []
            parts += [f"failed: {format_counts(failed)}"] if failed else []
            parts += [f"trained nothing: {reason}"] if (reason := untrained(record)) else []
            self.message("  ".join([*parts, f"left {duration(self._left_s())}"]))

    def show_evaluation(self, step: int, reward: float, rows: int, failures: str = "", ci95: float = math.nan) -> None:
        """Show the held-out reward after `step` steps, half the width of its interval, and its failures in words."""
        self._val.append((step, reward, rows))
        if self._live is None:
            loss = "" if self._measure == "reward" else " loss"
            self.message(f"step {step}/{self._steps}  held-out{loss} {with_interval(reward, ci95)} on {rows:,} rows")
        if failures:
            self.message(f"  {failures}")

    def render(self) -> RenderableType:
        now = self._clock()
        times = duration(now - self._started_at) + (f", {duration(self._left_s())} left" if self._steps_here else "")
        line = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 1), expand=True)
        line.add_row(f"{self._step}/{self._steps}", ProgressBar(total=self._steps, completed=self._step), times)
        spark = "" if self.console.options.ascii_only else sparkline(self._train, 24)
        held_out = "-"
        if self._val:
            (_, first, rows), (step, last, _) = self._val[0], self._val[-1]
            gain = f"{last - first:+.3f} " if math.isfinite(last - first) else ""
            held_out = f"{number(first)} -> {number(last)}  {gain}at step {step}"
            if len(self._val) == 1:
                held_out = f"{number(first)}  {rows:,} rows"
        value = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        table = Table.grid(Column(style="cyan", no_wrap=True), value, padding=(0, 2), expand=True)
        table.add_row("step", line)
        table.add_row(f"train {self._measure}", f"{number(self._train[-1] if self._train else math.nan)}  {spark}")
        table.add_row(f"val {self._measure}", held_out)
        table.add_row("sampled" if self._measure == "reward" else "learnt", self._speed())
        if lag := lag_text(self._record):
            table.add_row("lag", lag)
        if reason := untrained(self._record):
            table.add_row("trained", Text(f"nothing: {reason}", style="yellow"))
        waited = f"  {duration(now - self._waiting_since)}" if self._waiting else ""
        table.add_row("now", Text(f"{self._waiting or '-'}{waited}"))
        table.add_row("failed", Text(format_counts(self._failed) or "none", style="yellow" if self._failed else ""))
        width = min(self.console.width, 88)
        return Panel(table, title=Text(self._experiment, style="bold"), title_align="left", width=width, style="none")

    def _speed(self) -> str:
        seconds = self._record.get("time/step", math.nan)
        tokens = self._record.get("tokens/sampled" if self._measure == "reward" else "tokens/trained", math.nan)
        tokens_per_s = tokens / seconds if seconds > 0 else math.nan
        return f"{number(tokens_per_s, 0)} tokens/s"

    def _left_s(self) -> float:
        """Seconds for the remaining steps at the mean pace of the steps that this process has done."""
        if not self._steps_here:
            return math.nan
        pace_s = (self._stepped_at - self._started_at) / self._steps_here
        return max(0.0, pace_s * (self._steps - self._step) - (self._clock() - self._stepped_at))
