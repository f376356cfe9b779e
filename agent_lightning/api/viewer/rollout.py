"""The contents of the viewer's pages about one rollout and its group: waterfall, conversation, differences."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent_lightning.api.viewer.pages import Context
from agent_lightning.core.types import Group, ModelCall, ToolCall, Trajectory
from agent_lightning.credit.assign import CallCredit

Credits = Sequence[Sequence[CallCredit] | None]
"""The credit of each call of each rollout of a group; None for rollouts that are held out, or of unknown credit."""

CARD_CHARACTERS: Final = 1500
"""Characters of a rollout's replies, before and after the first difference, that the page of its group shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRow:
    """A span as a row of the waterfall. `x` and `width` are percent of the rollout's time."""

    kind: str
    """agent, model, tool or reward."""
    name: str
    badge: str
    """A version, a status, or a value."""
    detail: str
    depth: int
    x: float
    width: float
    seconds: float
    failed: bool = False
    anchor: str = ""
    """The call's place in the conversation: "call-3"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A message of a conversation."""

    role: str
    text: str
    tools: tuple[tuple[str, str], ...] = ()
    """Name and arguments of each tool call in it."""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A model call as the model saw it: the messages that are new since the call before it, and its reply."""

    number: int
    call: ModelCall
    known: tuple[Message, ...]
    """The messages that the call before it had too."""
    new: tuple[Message, ...]
    reply: Message
    credit: CallCredit | None
    tools: tuple[ToolCall, ...]
    """The tools that the reply called and whose results no later request holds."""
    offered: tuple[str, ...]
    """Names of the tools that the request offered."""
    curl: str
    body: str


def rollout_page(group: Group, rollout_id: str, all_credits: Credits) -> Context:
    """Everything about one rollout."""
    index, rollout = find(group, rollout_id)
    credits = all_credits[index]
    siblings = [trajectory.key.rollout_id for trajectory in group.trajectories]
    return {
        "rollout": rollout,
        "task": json.dumps(dict(group.task.payload), indent=2, ensure_ascii=False, default=str),
        "spans": list(spans(rollout)),
        "turns": turns(rollout, credits),
        "credits": credits,
        "group_id": group.group_id,
        "previous": siblings[index - 1] if index else "",
        "next": siblings[index + 1] if index + 1 < len(siblings) else "",
    }


def group_page(group: Group, all_credits: Credits) -> Context:
    """The rollouts of a group side by side, the best first: reward, advantage, and the first place where the replies
    of each differ from those of the best."""
    texts = [replies(rollout) for rollout in group.trajectories]
    order = sorted(range(len(texts)), key=lambda index: -_sortable(group.trajectories[index].reward))
    best = texts[order[0]]
    cards = []
    for index in order:
        credits = all_credits[index] or ()
        advantages = {credit.advantage for credit in credits if credit.status == "trained"}
        shared = common_prefix(best, texts[index])
        cards.append(
            {
                "rollout": group.trajectories[index],
                "advantage": advantages.pop() if len(advantages) == 1 else math.nan,
                "several": len(advantages) > 1,
                "reasons": sorted({credit.status for credit in credits if credit.status != "trained"}),
                "differs": texts[index] != best,
                "shared": texts[index][:shared][-CARD_CHARACTERS:],
                "own": texts[index][shared : shared + CARD_CHARACTERS],
                "rest": max(0, len(texts[index]) - shared - CARD_CHARACTERS),
            }
        )
    return {
        "group": group,
        "cards": cards,
        "task": json.dumps(dict(group.task.payload), indent=2, ensure_ascii=False, default=str),
        "split": group.trajectories[0].key.split,
    }


def spans(rollout: Trajectory) -> Iterator[SpanRow]:
    """Every span of a rollout in the order of time, with its place under the spans that it is a part of."""
    above = {agent.span_id: agent.parent_id for agent in rollout.agents}
    above |= {tool.span_id: tool.parent_id for tool in rollout.tools}
    above |= {key: call.parent_id for call in rollout.calls for key in (call.call_id, call.span_id) if key}
    total = max(rollout.ended_at - rollout.started_at, 1e-9)

    def row(kind: str, start: float, end: float, parent: str, **values: Any) -> tuple[float, SpanRow]:
        ancestors: set[str] = set()
        while parent in above and parent not in ancestors:
            ancestors.add(parent)
            parent = above[parent]
        x = min(99.0, max(0.0, 100 * (start - rollout.started_at) / total))
        width = max(0.6, min(100 - x, 100 * (end - start) / total))
        return start, SpanRow(kind=kind, depth=len(ancestors), x=x, width=width, seconds=end - start, **values)

    rows = [
        row("agent", agent.started_at, agent.ended_at, agent.parent_id, name=agent.name, badge="", detail="")
        for agent in rollout.agents
    ]
    for number, call in enumerate(rollout.calls):
        until = "" if call.last_version is None else f"–{call.last_version}"
        badge = f"v{call.policy_version}{until}" if call.source == "gateway" else call.model
        badge += " [length]" if call.finish_reason == "length" else ""
        reply = parse_reply(call)
        detail = reply.text or ", ".join(f"{name}({arguments})" for name, arguments in reply.tools)
        values = {"name": call.agent, "badge": badge, "detail": detail[:300], "anchor": f"call-{number}"}
        rows.append(row("model", call.started_at, call.ended_at, call.parent_id, failed=bool(call.error), **values))
    for tool in rollout.tools:
        detail = f"{tool.arguments} → {tool.result}"[:300]
        tool_values: dict[str, Any] = {"name": tool.name, "badge": tool.status.value, "detail": detail}
        rows.append(
            row("tool", tool.started_at, tool.ended_at, tool.parent_id, failed=tool.status != "ok", **tool_values)
        )
    for reward in rollout.rewards:
        detail = f"about {reward.about or 'the rollout'}"
        rows.append(
            row("reward", reward.at, reward.at, "", name=reward.name, badge=f"{reward.value:+g}", detail=detail)
        )
    yield from (span for _, span in sorted(rows, key=lambda pair: pair[0]))


def turns(rollout: Trajectory, credits: Sequence[CallCredit] | None) -> list[Turn]:
    """The calls of a rollout as a conversation. A message that an earlier call of the agent had at the same place is
    known, and not shown again."""
    before: dict[str, tuple[Message, ...]] = {}
    rows = []
    for number, call in enumerate(rollout.calls):
        messages = parse_messages(call.request)
        earlier = before.get(call.agent, ())
        known = 0
        while known < min(len(messages), len(earlier)) and messages[known] == earlier[known]:
            known += 1
        reply = parse_reply(call)
        before[call.agent] = (*messages, reply)
        offered = [_definition(tool) for tool in call.offered]
        body = _body(call, offered)
        rows.append(
            Turn(
                number=number,
                call=call,
                known=messages[:known],
                new=messages[known:],
                reply=reply,
                credit=credits[number] if credits else None,
                tools=tuple(
                    tool
                    for tool in rollout.tools
                    if tool.call_id == call.call_id and not _is_sent(rollout, number, tool)
                ),
                offered=tuple(str(tool["function"].get("name")) for tool in offered),
                body=body,
                curl=_curl(body),
            )
        )
    return rows


def parse_messages(text: str) -> tuple[Message, ...]:
    """The messages of a request; a request that is not a list of messages is one message of its text."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list):
        return (Message(role="user", text=text),) if text else ()
    return tuple(_message(value) for value in values)


def parse_reply(call: ModelCall) -> Message:
    """The message that the agent received."""
    try:
        value = json.loads(call.reply)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        return Message(role="assistant", text=call.error or call.reply)
    return _message(value)


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        return Message(role="user", text=str(value))
    content = value.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        text = "\n".join(
            part if isinstance(part, str) else json.dumps(whole_part, ensure_ascii=False, default=str)
            for part, whole_part in zip(parts, content, strict=True)
        )
    else:
        text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    calls = value.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
    tools = [
        (str(function.get("name", "")), _pretty(function.get("arguments", "")))
        for function in functions
        if isinstance(function, Mapping)
    ]
    return Message(
        role=str(value.get("role", "user")),
        text=text,
        tools=tuple(tools),
        tool_call_id=str(value.get("tool_call_id") or ""),
    )


def _is_sent(rollout: Trajectory, number: int, tool: ToolCall) -> bool:
    """Whether a request after the call `number` holds the tool's result, which the conversation then shows."""
    return any(
        message.role == "tool" and message.text == tool.result
        for call in rollout.calls[number + 1 :]
        for message in parse_messages(call.request)
    )


def _pretty(arguments: Any) -> str:
    """Arguments of a tool call, indented if they are JSON with more than a line's worth."""
    try:
        text = json.dumps(json.loads(arguments), ensure_ascii=False)
        return text if len(text) < 80 else json.dumps(json.loads(arguments), indent=2, ensure_ascii=False)
    except (ValueError, TypeError):
        return str(arguments)


def _definition(text: str) -> dict[str, Any]:
    """A tool that a request offered, in OpenAI's form. Runs before December 2026 have written only its name."""
    try:
        tool = json.loads(text)
    except ValueError:
        tool = None
    return tool if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else {"function": {"name": text}}


def _body(call: ModelCall, offered: Sequence[Mapping[str, Any]]) -> str:
    """The call's messages, and the tools on offer, as an OpenAI request."""
    try:
        messages = json.loads(call.request)
    except ValueError:
        messages = [{"role": "user", "content": call.request}]
    request = {"model": call.model or "policy", "messages": messages}
    if offered:
        request["tools"] = [{"type": "function", **tool} for tool in offered]
    return json.dumps(request, indent=2, ensure_ascii=False)


def _curl(body: str) -> str:
    """A shell command that sends a request to the policy that `agl serve` serves."""
    return f'curl "$OPENAI_BASE_URL/chat/completions" -H "Content-Type: application/json" -d {shlex.quote(body)}'


def replies(rollout: Trajectory) -> str:
    """All replies of a rollout and the results of its tools, as text: what makes it differ from another."""
    lines = []
    for call in rollout.calls:
        reply = parse_reply(call)
        lines += [reply.text] if reply.text else []
        lines += [f"→ {name}({arguments})" for name, arguments in reply.tools]
        lines += [f"   = {tool.result[:300]}" for tool in rollout.tools if tool.call_id == call.call_id]
    return "\n".join(lines) or rollout.output


def common_prefix(left: str, right: str) -> int:
    """The number of characters that two texts begin with. Example: common_prefix("12+3", "12-3") -> 2"""
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(left), len(right)))


def _sortable(reward: float | None) -> float:
    return -math.inf if reward is None or math.isnan(reward) else reward


def find(group: Group, rollout_id: str) -> tuple[int, Trajectory]:
    ids = [trajectory.key.rollout_id for trajectory in group.trajectories]
    return ids.index(rollout_id), group.trajectories[ids.index(rollout_id)]
