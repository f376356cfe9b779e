"""What a person sees of a sweep: a table that redraws itself, or a line for every change where there is no terminal."""

from __future__ import annotations

import math
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from agent_lightning.run.report import duration, number, sparkline
from agent_lightning.sweeps.plan import SweepFolder, SweepPlan, TrialRecord, best_of

STYLES = {"running": "cyan", "done": "green", "stopped": "dim", "failed": "red"}


class SweepView:
    """Keeps the newest record of every trial, and shows them."""

    def __init__(self, plan: SweepPlan, console: Console, known: list[TrialRecord]) -> None:
        self._plan, self._console = plan, console
        self._records = {one.name: one for one in known}
        self._started = time.monotonic()
        self._live: Live | None = None

    @property
    def records(self) -> list[TrialRecord]:
        return [self._records[name] for name in sorted(self._records)]

    def start(self) -> None:
        if self._console.is_interactive and self._console.file.isatty():
            self._live = Live(get_renderable=self.render, console=self._console, refresh_per_second=2)
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def changed(self, record: TrialRecord) -> None:
        before = self._records.get(record.name)
        self._records[record.name] = record
        if self._live is None and (before is None or (before.state, before.rewards) != (record.state, record.rewards)):
            held_out = (
                f"  step {record.step}/{self._plan.steps}  held-out {number(record.last)}" if record.rewards else ""
            )
            said = f"  {record.error}" if record.error else ""
            line = f"{record.name} {record.state:<8}{held_out}  {' '.join(record.words)}{said}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def render(self) -> RenderableType:
        """The table as it is now: the running ones, then the best first."""
        records = self.records
        over = [one for one in records if one.ended]
        passed = duration(time.monotonic() - self._started)
        title = Text(f"{self._plan.experiment}: {len(over)} of {self._plan.num_trials} trials, {passed}", style="bold")
        return Group(title, trial_table(records, self._plan.steps))


def trial_table(records: list[TrialRecord], steps: int) -> Table:
    """A row for each trial, the running ones first, then by what they reached."""
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("trial", "state", "step", "held-out", "", "minutes", "values"):
        table.add_column(column, justify="right" if column in ("step", "held-out", "minutes") else "left")
    best = best_of(records)
    for one in sorted(records, key=_order):
        text = Text(
            one.error or " ".join(one.words), style="red" if one.error else "", overflow="ellipsis", no_wrap=True
        )
        table.add_row(
            one.name,
            Text(one.state, style=STYLES.get(one.state, "")),
            f"{one.step}/{steps}",
            Text(number(one.last), style="bold green" if one is best else ""),
            sparkline([reward for _, reward in one.rewards], 8),
            f"{one.seconds / 60:.1f}",
            text,
        )
    return table


def sweep_report(
    plan: SweepPlan, folder: SweepFolder, records: list[TrialRecord], best: TrialRecord | None
) -> RenderableType:
    """The table of all trials, the winner, and where things are."""
    failed = sum(one.state == "failed" for one in records)
    lines = [f"{len(records)} trials, {failed} failed; files in {folder.path}"]
    if best is None:
        lines.append("no trial was evaluated: see its logs/")
    else:
        lines.append(f"best: {best.name}, held-out {number(best.last)} at step {best.step}: {' '.join(best.words)}")
        lines.append(f"run it: agl train experiment={folder.best}")
    return Group(trial_table(records, plan.steps), Text(), *(Text(f" {line}", overflow="fold") for line in lines))


def _order(one: TrialRecord) -> tuple[bool, float]:
    return one.state != "running", -one.last if math.isfinite(one.last) else math.inf
