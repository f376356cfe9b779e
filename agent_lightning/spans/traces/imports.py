"""Import of traces of other systems: as rollouts, and as chats with which a model can be fine-tuned first."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_lightning.core.files import write_text
from agent_lightning.core.types import RolloutKey, ToolCall, Trajectory
from agent_lightning.credit.tools import canonical_arguments, tool_calls
from agent_lightning.spans.conventions import read_spans
from agent_lightning.spans.message_forms import definitions
from agent_lightning.spans.messages import begins_midway, read_reply, read_request
from agent_lightning.spans.traces.export import to_line
from agent_lightning.spans.traces.formats import FileTrace, read_bytes, read_traces

REASONS = {
    "a trace without model calls": "there is nothing to learn from it",
    "a rollout for the second time": "its id and attempt were read before",
}
"""Every reason for which this module refuses a rollout, and its meaning."""
_UNFINISHED = ("length", "content_filter", "error")
"""Finish reasons of replies that are not complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A rollout that was read from a file."""

    trajectory: Trajectory
    partial: frozenset[str] = frozenset()
    """`call_id` of the calls of whose messages something is missing."""
    num_tokens: int = 0
    """Number of tokens of all prompts and replies, as far as the trace counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The content of a file."""

    path: Path
    formats: tuple[str, ...]
    rollouts: tuple[Imported, ...]
    refused: Mapping[str, int]
    """Reason -> number of lines, records or spans that were refused or repaired."""


def read_files(paths: Sequence[Path]) -> list[Report]:
    """Read trace files into rollouts; rollouts of other systems get the next free group numbers, in order.

    The content of a file is read, or counted as refused. Raises DataError if a file cannot be opened.

    Example: read_files([Path("trace.json")])[0].rollouts[0].trajectory.calls
    """
    files = [(path, *read_traces(read_bytes(path))) for path in paths]
    known = {source.key.group for _, _, traces, _ in files for source in traces if source.key}
    numbers = (number for number in range(10**9) if number not in known)
    taken: set[RolloutKey] = set()
    reports = []
    for path, formats, traces, refused in files:
        rollouts = []
        for source in traces:
            key = source.key or RolloutKey(split="train", group=next(numbers), index=0)
            rollout = _import(source, key, refused)
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
    """Write rollouts.jsonl and sft.jsonl into the folder `out`. Returns the number of lines of each."""
    out.mkdir(parents=True, exist_ok=True)
    rollouts = [rollout for report in reports for rollout in report.rollouts]
    chats = list(conversations(rollouts))
    write_text(out / "rollouts.jsonl", "".join(f"{to_line(rollout.trajectory)}\n" for rollout in rollouts))
    write_text(out / "sft.jsonl", "".join(f"{json.dumps(chat, ensure_ascii=False)}\n" for chat in chats))
    return len(rollouts), len(chats)


def conversations(rollouts: Sequence[Imported]) -> Iterator[dict[str, Any]]:
    """Chats for fine-tuning: each finished conversation once, with the reward of its rollout if there is one.

    A conversation that another conversation continues is left out, and so is a call that failed, was cut at a limit, or
    of whose messages the trace has only a part.

    Example: two calls of an agent, the second of which continues the first, give
    {"messages": [{"role": "user", …}, …, {"role": "assistant", …}], "tools": […]} once.
    """
    rows: dict[str, dict[str, Any]] = {}
    continued: set[str] = set()
    for rollout in rollouts:
        for call in rollout.trajectory.calls:
            request = read_request(call.request)
            reply = read_reply(call.reply, request[0]) if request else None
            if request is None or reply is None or call.error or call.finish_reason in _UNFINISHED:
                continue
            if call.call_id in rollout.partial or begins_midway(request[0]):
                continue
            messages = [{**message, "content": message["content"] or ""} for message in (*request[0], reply)]
            for message in messages:
                message.pop("status", None)
            tools = definitions(call.offered) or request[1]
            texts = list(map(_compared, messages))
            ends = [end for end in range(1, len(texts)) if messages[end - 1]["role"] == "assistant"]
            continued.update("\n".join(texts[:end]) for end in ends)
            row = {"messages": messages} | ({"tools": tools} if tools else {})
            reward = rollout.trajectory.reward
            rows.setdefault("\n".join(texts), row | ({} if reward is None else {"reward": reward}))
    yield from (row for text, row in rows.items() if text not in continued)


def _compared(message: Mapping[str, Any]) -> str:
    """A message as text that is equal if two messages mean the same, however their arguments are written."""
    arguments = [canonical_arguments(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    uses = [(call["id"], call["function"]["name"]) for call in message.get("tool_calls", ())]
    return json.dumps([{**message, "tool_calls": uses}, arguments], sort_keys=True)


def _import(source: FileTrace, key: RolloutKey, refused: Counter[str]) -> Imported:
    if source.trajectory is not None:
        tokens = sum(call.prompt_T.size + call.response_T.size for call in source.trajectory.calls)
        return Imported(trajectory=source.trajectory, num_tokens=tokens)
    traced = read_spans(source.spans, key)
    refused.update(traced.refused)
    # Requests and replies may show tool calls that have no span; our own export has a span for each.
    shown = {(tool.call_id, tool.tool_call_id) for tool in traced.tools}
    requested = () if source.key else tool_calls(traced.calls)
    unseen = [tool for tool in requested if (tool.call_id, tool.tool_call_id) not in shown]
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
    tokens = sum(counted.values())
    return Imported(trajectory=trajectory, partial=traced.partial, num_tokens=tokens)
