"""The spans of one attempt from every source, as one account: the same event seen twice is one span. Pure.

Model calls come from the gateway, which has their tokens; tool calls from the agent's next request, and from a trace
where the agent's side sends one (OpenTelemetry). The richer source wins: tokens are the gateway's, times, parents and
errors of tools are the trace's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from agent_lightning.core.types import DEFAULT_AGENT, AgentSpan, ModelCall, Reward, RolloutKey, ToolCall, ToolStatus
from agent_lightning.credit.tools import reply_identity, tool_calls
from agent_lightning.spans.conventions import read
from agent_lightning.spans.tool_index import Asked
from agent_lightning.spans.tree import RawSpan

SKEW = 1.0
"""Seconds by which the clocks of gateway and agent may differ where two spans are held to be one event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """All that was seen of one attempt, each kind in the order in which it happened."""

    calls: tuple[ModelCall, ...]
    tools: tuple[ToolCall, ...]
    rewards: tuple[Reward, ...] = ()
    agents: tuple[AgentSpan, ...] = ()
    refused: Mapping[str, int] = field(default_factory=Counter)
    """Reason -> spans of a trace that are not among the above."""


def assemble(key: RolloutKey, calls: Iterable[ModelCall], raw: Sequence[RawSpan]) -> Spans:
    """One account of an attempt, from the gateway's `calls` and the spans that the agent's side sent, in any order.

    A model call in the trace is the gateway's where they have the reply's id in common, or where the request said
    which span it belongs to (`traceparent`), or where reply and time agree; otherwise it is a call of another model:
    kept as context, never trained. A tool in the trace is one that a reply asked for where they have the call's id in
    common, or name and arguments.

    Example: the reply of call c1 asks for search({"q": "x"}), the next request has its result, and the trace has a span
    "search" with the same arguments: one ToolCall with call_id="c1", the times of the trace, and source="trace".
    """
    own = sorted(calls, key=lambda call: (call.started_at, call.call_id))
    if not raw:
        return Spans(calls=tuple(own), tools=tool_calls(own))
    traced = read(raw, key)
    above = {span.span_id: span.parent_id for span in raw}
    twins = _twins(own, traced.calls, above)
    # What the trace calls by its own id is from here on called by the gateway's.
    renamed = {twin.call_id: call_id for call_id, twin in twins.items()}
    agents = [replace(agent, parent_id=renamed.get(agent.parent_id, agent.parent_id)) for agent in traced.agents]
    ran = [replace(tool, parent_id=renamed.get(tool.parent_id, tool.parent_id)) for tool in traced.tools]
    names = {agent.span_id: agent.name for agent in agents}
    kept = {*names, *(tool.span_id for tool in ran)}
    others = [call for call in traced.calls if call.call_id not in renamed]
    everything = sorted(
        [*(_placed(call, twins.get(call.call_id), names, kept, above) for call in own), *others],
        key=lambda call: (call.started_at, call.call_id),
    )
    tools, moved = _merge_tools(everything, ran)
    # A reward may name the thing it is about by any id that the agent's side knows it by.
    known = renamed | moved
    known |= {tool.tool_call_id: tool.span_id for tool in reversed(tools) if tool.tool_call_id}
    known |= {span_id: span_id for span_id in ("", *(tool.span_id for tool in tools))}
    known |= {call.call_id: call.call_id for call in everything}
    rewards = [replace(one, about=known[one.about]) for one in traced.rewards if one.about in known]
    refused = Counter(traced.refused)
    if len(rewards) < len(traced.rewards):
        refused["a reward about an unknown span"] += len(traced.rewards) - len(rewards)
    return Spans(
        calls=tuple(everything), tools=tuple(tools), rewards=tuple(rewards), agents=tuple(agents), refused=refused
    )


def emitted(rewards: Sequence[Reward]) -> float | None:
    """The reward that an agent emitted about its whole rollout: the last one named "reward", or else the sum of the
    last one of each name; None where there is none.

    Example: format=1, answer=0, format=0.5 -> 0.5
    """
    last = {one.name: one.value for one in rewards if not one.about}
    return last.get("reward", math.fsum(last.values()) if last else None)


def _twins(own: Sequence[ModelCall], traced: Sequence[ModelCall], above: Mapping[str, str]) -> dict[str, ModelCall]:
    """The gateway's call id -> the same call in the trace."""
    twins: dict[str, ModelCall] = {}
    left = {call.call_id: call for call in traced}

    def pair(call: ModelCall, twin: ModelCall | None) -> None:
        if twin is not None and call.call_id not in twins and left.pop(twin.call_id, None) is not None:
            twins[call.call_id] = twin

    of_span = {call.span_id: call for call in traced if call.span_id}
    for call in own:
        pair(call, left.get(call.call_id))
        pair(call, next((of_span[span] for span in _line(call.parent_id, above) if span in of_span), None))
    replies = {call.call_id: reply_identity(call) for call in (*own, *traced)}
    for call in own:
        near = [twin for twin in left.values() if _overlap(call, twin)]
        alike = [twin for twin in near if replies[twin.call_id] == replies[call.call_id]]
        # A trace may be told to leave out what was said: then the time alone must say which call it is.
        silent = [twin for twin in near if replies[twin.call_id] is None and not twin.error]
        pair(call, min(alike, key=lambda twin: abs(twin.started_at - call.started_at), default=None))
        pair(call, silent[0] if len(silent) == 1 else None)
    return twins


def _overlap(call: ModelCall, twin: ModelCall) -> bool:
    return twin.started_at - SKEW <= call.started_at and call.ended_at <= twin.ended_at + SKEW


def _line(span_id: str, above: Mapping[str, str]) -> list[str]:
    """A span and those above it; a circle ends where it began."""
    line: list[str] = []
    while span_id and span_id not in line:
        line.append(span_id)
        span_id = above.get(span_id, "")
    return line


def _placed(
    call: ModelCall, twin: ModelCall | None, names: Mapping[str, str], kept: Collection[str], above: Mapping[str, str]
) -> ModelCall:
    """The gateway's call with its place in the trace; the agent span above names it where the URL does not."""
    line = _line(twin.parent_id if twin is not None else call.parent_id, above)
    name = next((names[span] for span in line if span in names), "")
    return replace(
        call,
        agent=name or call.agent if call.agent == DEFAULT_AGENT else call.agent,
        span_id=twin.span_id if twin is not None else "",
        parent_id=next((span for span in line if span in kept), ""),
    )


def _merge_tools(calls: Sequence[ModelCall], traced: Sequence[ToolCall]) -> tuple[list[ToolCall], dict[str, str]]:
    """One list, in the order of start; and old span id -> new one, of what became a part of another."""
    asked, starts = Asked(calls), [call.started_at for call in calls]
    moved, tools = dict[str, str](), list[ToolCall]()
    for tool in traced:
        use = tool.tool_call_id, tool.name, tool.arguments
        # Where the agent's clock is behind, a tool may seem to have run before it was asked for.
        found = asked.take(*use, bisect_right(starts, tool.started_at), "") or asked.take(*use, len(calls), "")
        if found is None:
            tools.append(replace(tool, call_id=_cause(tool, calls)))
        else:
            moved[found.span_id] = tool.span_id
            tools.append(_richer(found, tool))
    return sorted([*tools, *asked.left()], key=lambda one: (one.started_at, one.span_id)), moved


def _richer(asked: ToolCall, traced: ToolCall) -> ToolCall:
    """A tool that a reply asked for and that the trace saw run."""
    untold = not traced.result and traced.status in (ToolStatus.EMPTY, ToolStatus.UNANSWERED, ToolStatus.OK)
    return replace(
        traced,
        call_id=asked.call_id,
        tool_call_id=asked.tool_call_id or traced.tool_call_id,
        name=asked.name,
        arguments=asked.arguments,
        result=traced.result or asked.result,
        status=asked.status if untold and asked.status is not ToolStatus.UNANSWERED else traced.status,
    )


def _cause(tool: ToolCall, calls: Sequence[ModelCall]) -> str:
    """The call above the tool, or else the last one that was answered before it ran; "" where none was."""
    for call in calls:
        if tool.parent_id and tool.parent_id in (call.span_id, call.call_id):
            return call.call_id
    before = [call for call in calls if call.ended_at <= tool.started_at + 1e-3]
    return max(before, key=lambda call: call.ended_at).call_id if before else ""
