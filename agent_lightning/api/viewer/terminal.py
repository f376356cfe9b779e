"""`agl runs` and `agl explain`: the runs in a folder, the rollouts of a run, and all about one rollout."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from agent_lightning.api.viewer.decode import Decode, decoder_of
from agent_lightning.api.viewer.folder import RunFiles, sweep_state
from agent_lightning.api.viewer.pages import run_row
from agent_lightning.api.viewer.rollout import spans, turns
from agent_lightning.config.load import reload
from agent_lightning.core.errors import DataError
from agent_lightning.core.text import one_line
from agent_lightning.core.types import ModelCall, Task, Trajectory
from agent_lightning.credit.air import observed_events
from agent_lightning.credit.assign import CallCredit
from agent_lightning.launch.sweeps.view import STYLES
from agent_lightning.run.archive import read_credits, read_group, read_rollouts
from agent_lightning.run.report import duration, number, with_interval
from agent_lightning.run.state import credit_rules
from agent_lightning.run.tracking import RunDirectory

BAR_WIDTH = 24  # most characters of the bars that show when a span began and how long it took
MESSAGE_LENGTH = 2000  # characters that are shown of a message
TEXT_WIDTH = 100  # characters that are shown of a reply, a tool's result or an error


def show_runs(path: Path, split: str, outcome: str | None, rewards: tuple[float, float], limit: int) -> int:
    """`agl runs`: the runs in a folder, or at most `limit` rollouts of a run. Raises UserError. A rollout is listed if
    its split, outcome (None: any) and reward (lowest, highest) fit; a rollout without a reward is listed if no bound is
    given."""
    if not (path / "config.yaml").is_file():
        Console().print(list_runs(path))
        return 0
    columns = ["rollout_id", "split", "step", "outcome", "reward", "num_calls", "error", "output"]
    rows = read_rollouts(path).select(columns).to_pylist()
    listed = [row for row in rows if row["split"] == split and outcome in (None, row["outcome"])]
    if rewards != (-math.inf, math.inf):
        listed = [row for row in listed if row["reward"] is not None and rewards[0] <= row["reward"] <= rewards[1]]
    table = _table("rollout", "step", "outcome", "reward", "calls", "reply", right=("step", "reward", "calls"))
    for row in listed[:limit]:
        reward = number(math.nan if row["reward"] is None else row["reward"])
        text = Text(_cut(row["error"] or row["output"]))
        table.add_row(row["rollout_id"], str(row["step"]), row["outcome"], reward, str(row["num_calls"]), text)
    outcomes = Counter(row["outcome"] for row in listed).most_common()
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes)
    total = f"{len(listed):,} of {len(rows):,} rollouts{': ' if listed else ''}{counts}"
    Console().print(Lines(table, Text(total, style="dim")))
    return 0


def show_rollout(run: Path, rollout_id: str, *, tokens: bool) -> int:
    """`agl explain`: what happened in a rollout, and with `tokens` also the sampled text. Raises UserError."""
    config = reload(RunDirectory.open(run).config, [])
    group = read_group(run, rollout_id)
    index = [trajectory.key.rollout_id for trajectory in group.trajectories].index(rollout_id)
    rollout = group.trajectories[index]
    credits = read_credits(run, group, credit_rules(config))[index]
    console = Console()
    console.print(explain(rollout, group.task, credits, console.width))
    if tokens and credits is not None:
        console.print(coloured(rollout.calls, credits, decoder_of(config.model)))
    return 0


def list_runs(root: Path) -> RenderableType:
    """The runs and sweeps in a folder, oldest first, and why they ended so. Raises DataError if it has none."""
    paths = sorted([*root.glob("*/config.yaml"), *root.glob("*/sweep.yaml")], key=lambda path: path.stat().st_mtime)
    if not paths:
        raise DataError(f"no runs in {root}; give the folder that runs_dir= named, or a run")
    right = ("seed", "steps", "time")
    table, notes = _table("run", "experiment", "seed", "steps", "held out", "time", "state", right=right), []
    for column in table.columns[1:]:
        column.no_wrap = True
    for path in paths:
        run = RunFiles(path.parent)
        if path.name == "sweep.yaml":
            state, why = sweep_state(path.parent)
            cells = [""] * 5
        else:
            row, (state, why) = run_row(run.name, run), run.state()
            before = f"{number(row.first)} -> " if len(run.series(f"val/{row.measure}")) > 1 else ""
            held_out = f"{'loss ' * (row.measure == 'loss')}{before}{with_interval(row.last, row.half_width)}"
            alive_s = max((values.get("wall_s", 0.0) for values in run.metrics()), default=math.nan)
            cells = [row.experiment, str(run.config().get("seed", "")), f"{row.steps}/{row.of_steps}"]
            cells += [held_out if math.isfinite(row.last) else "-", duration(alive_s)]
        table.add_row(Text(run.name, overflow="fold"), *cells, Text(state, style=STYLES.get(state, "")))
        notes += [Text(f"{run.name}: {why}", style="dim")] if why else []
    return Lines(table, *notes)


def explain(rollout: Trajectory, task: Task, credits: Sequence[CallCredit] | None, width: int = 100) -> RenderableType:
    """The spans of a rollout as a waterfall, its rewards, and which of its tokens were trained. `credits` holds the
    credit of each call, in order; None for a held-out rollout, which is never trained. `width` is the console's."""
    head = Text.assemble((rollout.key.rollout_id, "bold"), f"  attempt {rollout.key.attempt}  task {rollout.task_id}  ")
    head.append(rollout.outcome.value, style="green" if rollout.reward else "yellow")
    head.append(f"  reward {number(rollout.reward if rollout.reward is not None else math.nan)}")
    parts: list[RenderableType] = [head, Text(_cut(json.dumps(dict(task.payload), default=str)), style="dim")]
    if rollout.error:
        parts.append(Text(rollout.error, style="red"))
    if rollout.trace:
        parts.append(Text(rollout.trace, style="yellow"))
    if rollout.reward_parts:
        parts.append(Text(f"parts: {', '.join(f'{name} {value:g}' for name, value in rollout.reward_parts.items())}"))
    parts += [_waterfall(rollout, width), *_messages(rollout)]
    for reason, count in rollout.refused_spans.items():
        parts.append(Text(f"{count} spans of its trace: {reason}", style="yellow"))
    if credits is not None:
        parts += [_credits(rollout, credits), token_counts(credits)]
    if rollout.output:
        parts.append(Text(f"output: {_cut(rollout.output)}"))
    if rollout.printed:
        parts += [Text("printed:", style="dim"), Text(rollout.printed.rstrip())]
    return Lines(*parts)


def _messages(rollout: Trajectory) -> Iterator[Text]:
    """The messages that the model saw and wrote, each once, cut to what a person reads."""
    for turn in turns(rollout, None):
        for message in (*turn.new, turn.reply):
            tools = "".join(f" {name}({arguments})" for name, arguments in message.tools)
            text = message.text if len(message.text) <= MESSAGE_LENGTH else f"{message.text[:MESSAGE_LENGTH]}…"
            yield Text.assemble((f"{message.role:<10}", "cyan"), f"{text}{tools}")


def _waterfall(rollout: Trajectory, width: int) -> Table:
    """Every span with its place in time, under the span that it is a part of; a line each, so that bars stay under
    each other: replies are cut at the console's width, and the messages below have all of them."""
    table = _table("at", "", "seconds", "span", "reply", right=("at", "seconds"))
    bar_width = max(6, min(BAR_WIDTH, (width - 40) // 3))
    for column in table.columns:
        column.no_wrap = column.header != "reply"  # the column that gives way where the console is narrow
    total = max(rollout.ended_at - rollout.started_at, 1e-9)
    for span in spans(rollout):
        tool = "yellow" if span.failed else "green"
        style = {"agent": "bold", "model": "cyan", "tool": tool, "reward": "magenta"}[span.kind]
        start = min(bar_width - 1, round(bar_width * span.x / 100))
        bar = " " * start + "━" * max(1, min(bar_width - start, round(bar_width * span.width / 100)))
        name = Text(f"{'  ' * span.depth}{span.kind}  {span.name}  {span.badge}".rstrip(), style=style)
        at, seconds = f"{total * span.x / 100:.2f}", f"{span.seconds:.2f}"
        reply = Text(_cut(span.detail), no_wrap=True, overflow="ellipsis")
        table.add_row(at, Text(bar, style=style), seconds, name, reply)
    return table


def _credits(rollout: Trajectory, credits: Sequence[CallCredit]) -> Table:
    right = ("call", "given", "return", "advantage", "tokens")
    table = _table("call", "events", "given", "return", "advantage", "tokens", "status", right=right)
    events = observed_events(rollout)
    for t, credit in enumerate(credits):
        style = "green" if credit.advantage > 0 else "red" if credit.advantage < 0 else ""
        table.add_row(
            str(t),
            ", ".join(event.kind for event in events if event.call == t),
            f"{credit.intermediate:+.3f}" if credit.intermediate else "",
            number(credit.return_to_go),
            Text(f"{credit.advantage:+.3f}" if math.isfinite(credit.advantage) else "by the critic", style=style),
            str(credit.tokens),
            credit.status,
        )
    return table


def token_counts(credits: Sequence[CallCredit]) -> Text:
    """Sampled tokens = trained + dropped ones with the reasons; apart from them, those of agents that are not trained.
    Example: "tokens: 31 sampled = 20 trained + 11 overlong_sample; 7 not selected"
    """
    tokens: Counter[str] = Counter()
    for credit in credits:
        tokens[credit.status] += credit.tokens
    unselected, trained = tokens.pop("not selected", 0), tokens.pop("trained", 0)
    terms = [f"{trained} trained", *(f"{count} {reason}" for reason, count in tokens.items())]
    text = f"tokens: {trained + tokens.total()} sampled = {' + '.join(terms)}"
    return Text(f"{text}; {unselected} not selected" if unselected else text)


def coloured(calls: Sequence[ModelCall], credits: Sequence[CallCredit], decode: Decode) -> RenderableType:
    """The sampled text, a line for each call: green if its advantage is positive, red if it is negative. Tokens that
    were unlikely (probability below 0.5) are underlined."""
    lines = []
    for call, credit in zip(calls, credits, strict=True):
        colour = "green" if credit.advantage > 0 else "red" if credit.advantage < 0 else "dim"
        line = Text(f"{credit.advantage:+.3f}  " if math.isfinite(credit.advantage) else "")
        for token, logprob in zip(call.response_T.tolist(), call.logprob_T.tolist(), strict=True):
            text = decode(token).replace("\n", "⏎")
            line.append(text, style=f"{colour} underline" if logprob < math.log(0.5) else colour)
        lines.append(line)
    return Lines(*lines)


def _table(*columns: str, right: Sequence[str]) -> Table:
    """A table without lines, with the columns in `right` set to the right."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _cut(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"
