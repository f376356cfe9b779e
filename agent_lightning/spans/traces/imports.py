"""Traces of other systems -> rollouts, and chats to warm-start a model with."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_lightning.core.types import RolloutKey, ToolCall, Trajectory
from agent_lightning.credit.tools import tool_calls
from agent_lightning.spans.conventions import read
from agent_lightning.spans.messages import answer, conversation
from agent_lightning.spans.traces.export import to_line
from agent_lightning.spans.traces.files import Source, contents, sources

REASONS = {
    "a trace without model calls": "there is nothing to learn from it",
    "a rollout for the second time": "its id and attempt were read before",
}
"""Every reason that this module counts, and what it means."""
_UNFINISHED = ("length", "content_filter", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A rollout that was read."""

    trajectory: Trajectory
    offered: Mapping[str, str] = field(default_factory=dict)
    """`call_id` -> JSON text of the tools that its request offered."""
    num_tokens: int = 0
    """Of all prompts and replies, as far as the trace counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a file."""

    path: Path
    formats: tuple[str, ...]
    rollouts: tuple[Imported, ...]
    refused: Mapping[str, int]
    """Reason -> how many lines, records or spans were refused or repaired."""


def read_files(paths: Sequence[Path]) -> list[Report]:
    """Read trace files into rollouts; those that are not ours get the next free group numbers, in order.

    Raises DataError for a file that cannot be opened; whatever is in one is read, or counted as refused.

    Example: read_files([Path("trace.json")])[0].rollouts[0].trajectory.calls
    """
    found = [(path, *sources(contents(path))) for path in paths]
    known = {source.key.group for _, _, traces, _ in found for source in traces if source.key}
    numbers = (number for number in range(10**9) if number not in known)
    taken: set[RolloutKey] = set()
    reports = []
    for path, formats, traces, refused in found:
        rollouts = []
        for source in traces:
            key = source.key or RolloutKey(split="train", group=next(numbers), index=0)
            rollout = _imported(source, key, refused)
            if key in taken:
                refused["a rollout for the second time"] += 1
            elif not rollout.trajectory.calls:
                refused["a trace without model calls"] += 1
            else:
                taken.add(key)
                rollouts.append(rollout)
        reports.append(Report(path=path, formats=formats, rollouts=tuple(rollouts), refused=+refused))
    return reports


def write(reports: Sequence[Report], out: Path) -> tuple[int, int]:
    """Write rollouts.jsonl and sft.jsonl into the folder `out`: how many lines each has."""
    out.mkdir(parents=True, exist_ok=True)
    rollouts = [rollout for report in reports for rollout in report.rollouts]
    chats = list(conversations(rollouts))
    lines = [to_line(rollout.trajectory) for rollout in rollouts]
    (out / "rollouts.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    texts = [json.dumps(chat, ensure_ascii=False) for chat in chats]
    (out / "sft.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return len(rollouts), len(chats)


def conversations(rollouts: Sequence[Imported]) -> Iterator[dict[str, Any]]:
    """Chats to warm-start a model with: every finished conversation once, and none that another one carries on; with
    the reward of its rollout where that has one.

    Left out are calls that failed, were cut at a limit, or whose messages the trace does not have.

    Example: two calls of an agent, the second of which continues the first, give
    {"messages": [{"role": "user", …}, …, {"role": "assistant", …}], "tools": […]} once.
    """
    rows: dict[str, dict[str, Any]] = {}
    begun: set[str] = set()
    for rollout in rollouts:
        for call in rollout.trajectory.calls:
            asked = conversation(call.request)
            said = answer(call.reply, asked[0]) if asked else None
            if asked is None or said is None or call.error or call.finish_reason in _UNFINISHED:
                continue
            messages = [{**message, "content": message["content"] or ""} for message in (*asked[0], said)]
            tools = json.loads(rollout.offered.get(call.call_id, "[]")) or asked[1]
            texts = [json.dumps(message, sort_keys=True) for message in messages]
            begun.update(
                "\n".join(texts[:end]) for end in range(1, len(texts)) if messages[end - 1]["role"] == "assistant"
            )
            row = {"messages": messages} | ({"tools": tools} if tools else {})
            reward = rollout.trajectory.reward
            rows.setdefault("\n".join(texts), row | ({} if reward is None else {"reward": reward}))
    yield from (row for text, row in rows.items() if text not in begun)


def _imported(source: Source, key: RolloutKey, refused: Counter[str]) -> Imported:
    if source.whole is not None:
        tokens = sum(call.prompt_T.size + call.response_T.size for call in source.whole.calls)
        return Imported(trajectory=source.whole, num_tokens=tokens)
    traced = read(source.spans, key)
    refused.update(traced.refused)
    # What no span shows, the requests and replies themselves may; a rollout of ours left with all of its tools.
    shown = {(tool.call_id, tool.tool_call_id) for tool in traced.tools}
    asked = () if source.key else tool_calls(traced.calls)
    unseen = [tool for tool in asked if (tool.call_id, tool.tool_call_id) not in shown]
    tools: list[ToolCall] = sorted([*traced.tools, *unseen], key=lambda tool: tool.started_at)
    times = [time for span in source.spans for time in (span.started_at, span.ended_at) if math.isfinite(time)]
    trajectory = Trajectory(
        key=key,
        task_id=source.task_id or source.name,
        calls=traced.calls,
        reward=source.reward,
        outcome=source.outcome,
        error=source.error,
        output=source.output,
        started_at=min(times, default=0.0),
        ended_at=max(times, default=0.0),
        tools=tuple(tools),
        rewards=traced.rewards,
        agents=traced.agents,
    )
    counted = {call.call_id: call.prompt_T.size + call.response_T.size for call in traced.calls if call.response_T.size}
    counted |= {call_id: sum(numbers) for call_id, numbers in traced.usage.items()}
    return Imported(trajectory=trajectory, offered=traced.offered, num_tokens=sum(counted.values()))
