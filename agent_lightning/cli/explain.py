"""`agl explain` and `agl runs`: what became of a rollout, call by call and token by token, from a run's own files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from agent_lightning.core.errors import DataError
from agent_lightning.core.types import ModelCall, Task, Trajectory
from agent_lightning.credit.air import observed_events
from agent_lightning.credit.assign import CallCredit
from agent_lightning.run.archive import read_rollouts
from agent_lightning.run.report import Summary, duration, number
from agent_lightning.run.tracking import RunDirectory

BAR = 24
"""Characters of the waterfall."""
SAID = 100
"""Characters of a reply that are shown."""


def explain(rollout: Trajectory, task: Task, credits: Sequence[CallCredit] | None) -> RenderableType:
    """The spans of a rollout as a waterfall, its rewards, and where its tokens went.

    `credits` are of its calls, in order; None for a held-out rollout, which is never trained.
    """
    head = Text.assemble((rollout.key.rollout_id, "bold"), f"  attempt {rollout.key.attempt}  task {rollout.task_id}  ")
    head.append(rollout.outcome.value, style="green" if rollout.reward else "yellow")
    head.append(f"  reward {number(rollout.reward if rollout.reward is not None else math.nan)}")
    parts: list[RenderableType] = [head, Text(_cut(json.dumps(dict(task.payload), default=str)), style="dim")]
    if rollout.error:
        parts.append(Text(rollout.error, style="red"))
    parts.append(_waterfall(rollout))
    for reason, count in rollout.refused_spans.items():
        parts.append(Text(f"{count} spans of its trace: {reason}", style="yellow"))
    if credits is not None:
        parts += [_credits(rollout, credits), ledger(credits)]
    if rollout.output:
        parts.append(Text(f"output: {_cut(rollout.output)}"))
    return Lines(*parts)


def _waterfall(rollout: Trajectory) -> Table:
    """Every span with its place in time, under the span that it is a part of."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("at", "", "seconds", "span", "said"):
        right = column in ("at", "seconds")
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "span", overflow="fold")
    whole = max(rollout.ended_at - rollout.started_at, 1e-9)
    for row in sorted(_bars(rollout), key=lambda row: row.started_at):
        at, spent = row.started_at - rollout.started_at, row.ended_at - row.started_at
        start = min(BAR - 1, max(0, round(BAR * at / whole)))
        bar = " " * start + "━" * max(1, min(BAR - start, round(BAR * spent / whole)))
        name = Text("  " * row.depth + row.name, style=row.style)
        table.add_row(f"{at:.2f}", Text(bar, style=row.style), f"{spent:.2f}", name, row.said)
    return table


@dataclass(frozen=True, slots=True)
class _Bar:
    started_at: float
    ended_at: float
    depth: int
    name: str
    style: str
    said: Text


def _bars(rollout: Trajectory) -> Iterator[_Bar]:
    above = {agent.span_id: agent.parent_id for agent in rollout.agents}
    above |= {tool.span_id: tool.parent_id for tool in rollout.tools}
    above |= {call.call_id: call.parent_id for call in rollout.calls}
    above |= {call.span_id: call.parent_id for call in rollout.calls if call.span_id}

    def depth(parent_id: str) -> int:
        line: set[str] = set()
        while parent_id in above and parent_id not in line:
            line.add(parent_id)
            parent_id = above[parent_id]
        return len(line)

    for agent in rollout.agents:
        name = f"agent  {agent.name}"
        yield _Bar(agent.started_at, agent.ended_at, depth(agent.parent_id), name, "bold", Text())
    for call in rollout.calls:
        until = "" if call.last_version is None else f"-{call.last_version}"
        version = f"v{call.policy_version}{until}" if call.source == "gateway" else call.model
        name = f"model  {call.agent}  {version}"
        yield _Bar(call.started_at, call.ended_at, depth(call.parent_id), name, "cyan", _said(call))
    for tool in rollout.tools:
        style = "green" if tool.status == "ok" else "yellow"
        said = Text(_cut(f"{tool.arguments} -> {tool.result}"))
        name = f"tool  {tool.name}  {tool.status.value}"
        yield _Bar(tool.started_at, tool.ended_at, depth(tool.parent_id), name, style, said)
    for reward in rollout.rewards:
        name = f"reward  {reward.name} {reward.value:+g}"
        yield _Bar(reward.at, reward.at, 0, name, "magenta", Text(f"about {reward.about or 'the rollout'}"))


def _credits(rollout: Trajectory, credits: Sequence[CallCredit]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("call", "events", "given", "return", "advantage", "tokens", "status"):
        table.add_column(column, justify="left" if column in ("events", "status") else "right")
    found = observed_events(rollout)
    for t, one in enumerate(credits):
        kinds = ", ".join(event.kind for event in found if event.call == t)
        style = "green" if one.advantage > 0 else "red" if one.advantage < 0 else ""
        table.add_row(
            str(t),
            kinds,
            f"{one.intermediate:+.3f}" if one.intermediate else "",
            number(one.return_to_go),
            Text(f"{one.advantage:+.3f}" if math.isfinite(one.advantage) else "by the critic", style=style),
            str(one.tokens),
            one.status,
        )
    return table


def ledger(credits: Sequence[CallCredit]) -> Text:
    """Sampled tokens = trained + dropped, with the reasons; calls of unselected agents are shown beside.

    Example: "tokens: 31 sampled = 20 trained + 11 overlong_sample; 7 not selected"
    """
    tokens_of: Counter[str] = Counter()
    for one in credits:
        tokens_of[one.status] += one.tokens
    beside = tokens_of.pop("not selected", 0)
    terms = [f"{tokens_of.pop('trained', 0)} trained", *(f"{tokens} {reason}" for reason, tokens in tokens_of.items())]
    total = sum(one.tokens for one in credits) - beside
    return Text(f"tokens: {total} sampled = {' + '.join(terms)}" + (f"; {beside} not selected" if beside else ""))


def coloured(calls: Sequence[ModelCall], credits: Sequence[CallCredit], tokenizer: Path) -> RenderableType:
    """What was sampled, one line a call, green where the advantage is positive and red where it is negative.

    A token that the policy found unlikely (probability below 0.5) is underlined. `tokenizer`: a tokenizer.json. Raises
    DataError where it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        read = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises nothing more exact
        raise DataError(f"{tokenizer}: cannot be read as a tokenizer ({error})") from error
    lines = []
    for call, one in zip(calls, credits, strict=True):
        colour = "green" if one.advantage > 0 else "red" if one.advantage < 0 else "dim"
        line = Text(f"{one.advantage:+.3f}  " if math.isfinite(one.advantage) else "")
        for token, logprob in zip(call.response_T.tolist(), call.logprob_T.tolist(), strict=True):
            text = read.decode([token], skip_special_tokens=False).replace("\n", "⏎")
            line.append(text, style=f"{colour} underline" if logprob < math.log(0.5) else colour)
        lines.append(line)
    return Lines(*lines)


def list_runs(root: Path) -> Table:
    """The runs in a folder, oldest first. Raises DataError where there is none."""
    runs = sorted(
        (p.parent for p in root.glob("*/config.yaml")), key=lambda p: p.joinpath("config.yaml").stat().st_mtime
    )
    if not runs:
        raise DataError(f"no runs in {root}; give the folder that runs_dir= named, or a run")
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("run", "experiment", "seed", "steps", "held out", "time"):
        table.add_column(column, justify="left" if column in ("run", "experiment") else "right")
    for path in runs:
        run = RunDirectory(path)
        if not run.summary.exists():
            table.add_row(path.name, "", "", "", "not finished", "")
            continue
        one = Summary.read(run.summary)
        rewards = f"{number(one.val_reward_first)} -> {number(one.val_reward_last)}"
        table.add_row(path.name, one.experiment, str(one.seed), str(one.steps), rewards, duration(one.wall_s))
    return table


def list_rollouts(
    run: Path, *, split: str, outcome: str | None, min_reward: float, max_reward: float, limit: int
) -> RenderableType:
    """Rollouts of a run that fit, in the order they were written. Raises DataError where the run has none at all."""
    columns = ["rollout_id", "split", "step", "outcome", "reward", "num_calls", "error", "output"]
    rows = read_rollouts(run).select(columns).to_pylist()
    # A rollout without a reward fits where no bound was asked for.
    unbounded = min_reward == -math.inf and max_reward == math.inf
    fit = [
        row
        for row in rows
        if row["split"] == split
        and outcome in (None, row["outcome"])
        and (unbounded if row["reward"] is None else min_reward <= row["reward"] <= max_reward)
    ]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("rollout", "step", "outcome", "reward", "calls", "what it said"):
        table.add_column(column, justify="right" if column in ("step", "reward", "calls") else "left")
    for row in fit[:limit]:
        reward = number(math.nan if row["reward"] is None else row["reward"])
        said = _cut(row["error"] or row["output"])
        table.add_row(row["rollout_id"], str(row["step"]), row["outcome"], reward, str(row["num_calls"]), Text(said))
    outcomes = ", ".join(f"{count:,} {name}" for name, count in Counter(row["outcome"] for row in fit).most_common())
    return Lines(table, Text(f"{len(fit):,} of {len(rows):,} rollouts{': ' if fit else ''}{outcomes}", style="dim"))


def _said(call: ModelCall) -> Text:
    """A reply in a line; where it only asks for tools, nothing: they stand below."""
    try:
        reply = json.loads(call.reply)
        said = str(reply.get("content") or "") if isinstance(reply, dict) else ""
    except ValueError:
        said = call.reply
    return Text(_cut(said) + (f"  [{call.finish_reason}]" if call.finish_reason == "length" else ""))


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SAID else line[: SAID - 1] + "…"
