"""The spans of one attempt from every source, as one account: an event that several sources report is one span.

Model calls come from the gateway, which has their tokens; tool calls from the agent's next request, and from the
agent's trace if its process sends one (OpenTelemetry). The richer source wins: tokens come from the gateway; times,
parents and errors of tools come from the trace.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from agent_lightning.core.errors import RewardError
from agent_lightning.core.text import error_line
from agent_lightning.core.types import DEFAULT_AGENT, AgentSpan, ModelCall, Reward, RolloutKey, ToolCall, ToolStatus
from agent_lightning.credit.tools import ToolCallIndex, reply_identity, tool_calls
from agent_lightning.spans.conventions import WITHOUT, read_spans
from agent_lightning.spans.messages import read_request
from agent_lightning.spans.tree import RawSpan, nearest

logger = logging.getLogger(__name__)

SKEW = 1.0
"""Seconds by which the clocks of gateway and agent may differ when two spans are compared."""
LOST_TRACE = "a trace that cannot be assembled"
"""The reason under which all spans of an attempt are refused if assembling them fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """The account of one attempt; each kind of span is in the order of time."""

    calls: tuple[ModelCall, ...]
    tools: tuple[ToolCall, ...]
    rewards: tuple[Reward, ...] = ()
    agents: tuple[AgentSpan, ...] = ()
    refused: Mapping[str, int] = field(default_factory=Counter)
    """Reason -> number of the trace's spans that are not part of the account."""


def assemble(key: RolloutKey, calls: Iterable[ModelCall], raw: Sequence[RawSpan]) -> Spans:
    """One account of an attempt, from the gateway's `calls` and the spans that the agent's process sent, in any order.

    A model call in the trace is the gateway's call if both have the same reply id, if the request named the span that
    it belongs to (`traceparent`), or if reply and time agree. Any other call in the trace went to another model: it is
    kept as context and never trained. A tool span in the trace is the tool call in a reply if both have the same tool
    call id, or the same name and arguments.

    Never raises. If the trace cannot be assembled, whatever the reason, the account has the gateway's calls only, and
    all spans of the trace are refused as LOST_TRACE: an agent may send anything, and must not end the run with it.

    Example: the reply of call c1 requests search({"q": "x"}), the next request has its result, and the trace has a span
    "search" with the same arguments: one ToolCall with call_id="c1", the times of the trace, and source="trace".
    """
    own = sorted(calls, key=lambda call: (call.started_at, call.call_id))
    try:
        return _merge(key, own, raw) if raw else Spans(calls=tuple(own), tools=tool_calls(own))
    except Exception as error:
        logger.warning("rollout %s attempt %d lost its trace: %s", key.rollout_id, key.attempt, error_line(error))
        return Spans(calls=tuple(own), tools=(), refused=Counter({LOST_TRACE: len(raw) or 1}))


def emitted_rewards(key: RolloutKey, raw: Sequence[RawSpan]) -> dict[str, float]:
    """The rewards that an agent emitted about its rollout: the last value of each name. Raises RewardError if the trace
    cannot be read.

    Example: format=1, answer=0, format=0.5 -> {"format": 0.5, "answer": 0}
    """
    try:
        rewards = read_spans(raw, key).rewards
    except Exception as error:
        raise RewardError(f"the agent's trace cannot be read for its reward: {error_line(error)}") from error
    return {reward.name: reward.value for reward in rewards if not reward.about}


def _merge(key: RolloutKey, own: Sequence[ModelCall], raw: Sequence[RawSpan]) -> Spans:
    traced = read_spans(raw, key)
    parents = {span.span_id: span.parent_id for span in raw}
    matches = _match_calls(own, traced.calls, parents)
    # The trace's id of a call that the gateway has too -> the gateway's id.
    renamed = {match.call_id: call_id for call_id, match in matches.items()}
    agents = [replace(agent, parent_id=renamed.get(agent.parent_id, agent.parent_id)) for agent in traced.agents]
    traced_tools = [replace(tool, parent_id=renamed.get(tool.parent_id, tool.parent_id)) for tool in traced.tools]
    agent_names = {agent.span_id: agent.name for agent in agents}
    kept_ids = {*agent_names, *(tool.span_id for tool in traced_tools)}
    agents_passed, ids_passed = dict[str, str](), dict[str, str]()

    def in_trace(call: ModelCall) -> ModelCall:
        """The call with its span and parent in the trace; the agent span above names its agent if the URL does not."""
        match = matches.get(call.call_id)
        above = match.parent_id if match is not None else call.parent_id
        agent = agent_names.get(nearest(above, parents, agent_names, agents_passed), "")
        return replace(
            call,
            agent=agent if agent and call.agent == DEFAULT_AGENT else call.agent,
            span_id=match.span_id if match is not None else "",
            parent_id=nearest(above, parents, kept_ids, ids_passed),
        )

    others = [call for call in traced.calls if call.call_id not in renamed]
    all_calls = tuple(sorted([*map(in_trace, own), *others], key=lambda call: (call.started_at, call.call_id)))
    tools, moved = _merge_tools(all_calls, traced_tools)
    # A reward may name its subject by any id that the agent's process knows.
    known = renamed | moved
    known |= {tool.tool_call_id: tool.span_id for tool in reversed(tools) if tool.tool_call_id}
    known |= {span_id: span_id for span_id in ("", *(tool.span_id for tool in tools))}
    known |= {call.call_id: call.call_id for call in all_calls}
    rewards = [replace(reward, about=known[reward.about]) for reward in traced.rewards if reward.about in known]
    # The gateway has the messages that a trace may be configured to leave out.
    refused = Counter({reason: n for reason, n in traced.refused.items() if not reason.startswith(WITHOUT)})
    if len(rewards) < len(traced.rewards):
        refused["a reward about an unknown span"] += len(traced.rewards) - len(rewards)
    return Spans(calls=all_calls, tools=tuple(tools), rewards=tuple(rewards), agents=tuple(agents), refused=refused)


def _match_calls(
    own: Sequence[ModelCall], traced: Sequence[ModelCall], parents: Mapping[str, str]
) -> dict[str, ModelCall]:
    """The gateway's call id -> the same call in the trace."""
    matches: dict[str, ModelCall] = {}
    unmatched = {call.call_id: call for call in traced}

    def match(call: ModelCall, candidate: ModelCall | None) -> None:
        if candidate is not None and call.call_id not in matches and unmatched.pop(candidate.call_id, None) is not None:
            matches[call.call_id] = candidate

    by_span = {call.span_id: call for call in traced if call.span_id}
    passed: dict[str, str] = {}
    for call in own:
        match(call, unmatched.get(call.call_id))
        match(call, by_span.get(nearest(call.parent_id, parents, by_span, passed)))
    replies = {call.call_id: reply_identity(call) for call in (*own, *traced)}
    # First without skew: a busy gateway may begin a call so late that the next span with its reply is nearer.
    for skew, call in product((0.0, SKEW), own):
        if call.call_id in matches:
            continue
        at = call.started_at
        near = [c for c in unmatched.values() if c.started_at - skew <= at <= c.ended_at + skew]
        near = [candidate for candidate in near if call.ended_at - SKEW <= candidate.ended_at]
        alike = [candidate for candidate in near if replies[candidate.call_id] == replies[call.call_id]]
        # A trace may be configured to leave out the messages: then only the time tells which call a span is.
        silent = [candidate for candidate in near if replies[candidate.call_id] is None and not candidate.error]
        match(call, min(alike, key=lambda candidate: abs(candidate.started_at - at), default=None))
        match(call, silent[0] if len(silent) == 1 else None)
    for call in own:  # last, as an agent may give up a call and send it again
        # An agent that gives up, at the rollout's deadline, say, has an error where the gateway has a later reply.
        at = call.started_at  # the agent was still waiting then
        waiting = [c for c in unmatched.values() if c.started_at - SKEW <= at <= c.ended_at + SKEW]
        cut = [candidate for candidate in waiting if candidate.error and replies[candidate.call_id] is None]
        alike = [candidate for candidate in cut if candidate.request and _messages(candidate) == _messages(call)]
        silent = [candidate for candidate in cut if not candidate.request]
        match(call, min(alike, key=lambda candidate: abs(candidate.started_at - call.started_at), default=None))
        match(call, silent[0] if len(silent) == 1 else None)
    return matches


def _messages(call: ModelCall) -> object:
    """The messages of a request in OpenAI's form, however they were written."""
    request = read_request(call.request)
    return request[0] if request else None


def _merge_tools(calls: Sequence[ModelCall], traced: Sequence[ToolCall]) -> tuple[list[ToolCall], dict[str, str]]:
    """The tool calls of requests and of the trace as one list, in the order of start; and, for each tool call of a
    request that the trace has too, its span id in the request -> its span id in the trace."""
    requested, starts = ToolCallIndex(calls), [call.started_at for call in calls]
    latest_first = list(reversed(calls))
    by_id = {span_id: call.call_id for call in latest_first for span_id in (call.span_id, call.call_id) if span_id}
    by_end = sorted(latest_first, key=lambda call: call.ended_at)  # of calls with the same end the first is last
    ends = [call.ended_at for call in by_end]
    moved, tools = dict[str, str](), list[ToolCall]()
    for tool in traced:
        use = tool.tool_call_id, tool.name, tool.arguments
        # If the agent's clock is behind, a tool seems to run before the reply that requests it.
        match = requested.take(*use, bisect_right(starts, tool.started_at), "") or requested.take(*use, len(calls), "")
        if match is None:  # its cause is the call above it, or else the last call that ended before it
            before = bisect_right(ends, tool.started_at + 1e-3)
            last = by_end[before - 1].call_id if before else ""
            tools.append(replace(tool, call_id=by_id.get(tool.parent_id, last)))
            continue
        moved[match.span_id] = tool.span_id
        no_result = not tool.result and tool.status in (ToolStatus.EMPTY, ToolStatus.UNANSWERED, ToolStatus.OK)
        tools.append(
            replace(
                tool,
                call_id=match.call_id,
                tool_call_id=match.tool_call_id or tool.tool_call_id,
                name=match.name,
                arguments=match.arguments,
                result=tool.result or match.result,
                status=match.status if no_result and match.status is not ToolStatus.UNANSWERED else tool.status,
            )
        )
    return sorted([*tools, *requested.unmatched()], key=lambda tool: (tool.started_at, tool.span_id)), moved
