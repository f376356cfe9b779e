"""Model calls, tool calls, rewards and agents, read from the raw spans of an attempt by any instrumentor.

`fields` reads a single span; this module combines the spans of an attempt.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent_lightning.core.json_values import as_mapping
from agent_lightning.core.types import POLICY, AgentSpan, ModelCall, Reward, RolloutKey, ToolCall, ToolStatus, is_reward
from agent_lightning.credit.tools import ToolCallIndex, tool_status
from agent_lightning.spans import fields
from agent_lightning.spans.attributes import FIELDS, Kind
from agent_lightning.spans.continuations import Turn, whole_requests
from agent_lightning.spans.fields import dump, first, integer, number
from agent_lightning.spans.message_forms import to_text
from agent_lightning.spans.messages import read_tool_result
from agent_lightning.spans.tree import RawSpan, SpanTree, arguments_of

WITHOUT = "repaired: a model call without "
REASONS = {
    "a span id for the second time": "the one with the most attributes is kept",
    "a time that is not a number": "the span's start or end is infinite or no number",
    "a reward that is not a finite number": "nothing can be learned from it",
    "a reward beyond 1e15": "float32, in which a step is computed, could not represent its square",
    "repaired: a parent that is its own descendant": "kept, as a span without parent",
    "repaired: a request that is not understood": "kept; its `request` is empty",
    "repaired: a reply that is not understood": "kept; its `reply` is empty",
    "repaired: an attribute's name that is not understood": "left out: too deep, or of no item of a list",
    "repaired: a part that is not understood": "left out, by its type; the rest of the messages is kept",
    "repaired: a part that is not text": "kept in OpenAI's form, by its type: an image, a sound, a file",
    f"{WITHOUT}messages": "kept; by the attributes that hold messages and are in no table, if there are such",
    f"{WITHOUT}a request": "kept; its `request` is empty",
    f"{WITHOUT}a reply": "kept; its `reply` is empty",
    "repaired: a conversation without its beginning": "kept, but for no training: the server has kept what was before",
    "repaired: a model call around its tools": "kept, but for no training: the calls inside are no spans",
    "repaired: token ids out of any vocabulary": "kept without tokens: an id is not in [0, 2^31)",
    "repaired: log-probabilities missing": "kept; those of its tokens that are not known are NaN",
}
"""Every reason for which `read_spans` refuses or repairs a span, and its meaning. Repaired spans are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContent:
    """The content of an attempt's raw spans, in the order of time. A `parent_id` is the id of a kept span, or ""."""

    calls: tuple[ModelCall, ...] = ()
    """Calls with source "trace", without tokens unless the trace has them. `call_id` is the reply's id if the span has
    one, else the span's id."""
    tools: tuple[ToolCall, ...] = ()
    rewards: tuple[Reward, ...] = ()
    agents: tuple[AgentSpan, ...] = ()
    refused: Mapping[str, int] = field(default_factory=Counter)
    """Reason (see REASONS) -> number of spans that were left out, or repaired. Some end in a name: "… (name)"."""
    usage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """`call_id` -> number of tokens of the prompt and of the reply, as the trace counts them."""
    partial: frozenset[str] = frozenset()
    """`call_id` of the calls of whose messages something is missing: nothing can be learned from these."""


def read_spans(spans: Sequence[RawSpan], key: RolloutKey) -> TraceContent:
    """The model calls, tool calls, rewards and agents among the spans of one attempt, in the order of their start.

    Nested spans of the same model call become a single call with the fields of both. The order of `spans` does not
    matter. Never raises, whatever the attributes hold.

    Example:

        chat = RawSpan(span_id="1", name="chat", started_at=0.0, ended_at=1.0, attributes={
            "gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o",
            "gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "hi", "gen_ai.completion.0.content": "Hello!"})
        read_spans([chat], key).calls[0].reply  # '{"role": "assistant", "content": "Hello!"}'
    """
    refused: Counter[str] = Counter()
    unique: dict[str, RawSpan] = {}
    for span in spans:
        if not (math.isfinite(span.started_at) and math.isfinite(span.ended_at)):
            refused["a time that is not a number"] += 1
            continue
        if span.span_id in unique:
            refused["a span id for the second time"] += 1
            span = max(span, unique[span.span_id], key=lambda same: (len(same.attributes), repr(same)))
        unique[span.span_id] = span
    if unread := sum(fields.unread_names(span.attributes) for span in unique.values()):
        refused["repaired: an attribute's name that is not understood"] = unread
    tree = SpanTree(list(unique.values()), refused)
    calls, about_calls = _calls(tree, key, refused)
    tools, rewards = _tools(tree, key, calls), _rewards(tree, key, refused)
    agents = tuple(
        AgentSpan(
            key=key,
            span_id=tree.kept_id[span.span_id],
            parent_id=tree.parent_of(span),
            name=fields.agent_name_of(span.name, span.attributes),
            started_at=span.started_at,
            ended_at=max(span.started_at, span.ended_at),
        )
        for span in tree.of(Kind.AGENT)
    )
    # At most 20 different names, as an agent may send any: the other reasons lose their names.
    names, few = [reason for reason in +refused if reason.endswith(")")][:20], Counter[str]()
    for reason, count in (+refused).items():
        few[reason if reason in names else reason.partition(" (")[0]] += count
    return TraceContent(calls=tuple(calls), tools=tools, rewards=rewards, agents=agents, refused=few, **about_calls)


def _identified(tree: SpanTree) -> list[RawSpan]:
    """The spans of model calls, with the fields of all spans of the same call. Enters their ids into `tree.kept_id`."""
    by_reply: dict[str, RawSpan] = {}
    for span in tree.of(Kind.CALL):
        same_call = tree.same_event(span)
        reply_ids = (fields.stated_or_replied(same.attributes, "reply id", "id") for same in same_call)
        reply_id = next(filter(None, reply_ids), "")
        reply_id = "" if reply_id in tree.by_id else reply_id
        earlier = by_reply.get(reply_id)
        if earlier is not None and span.started_at < earlier.ended_at:
            # Two instrumentors of one library describe the same event.
            tree.kind[span.span_id] = Kind.OTHER
            tree.wrappers.setdefault(earlier.span_id, []).extend(same_call)
            tree.wrappers.pop(span.span_id, None)
        elif earlier is None and reply_id:
            by_reply[reply_id] = span
    # A call whose reply repeats the id of an earlier reply keeps its span's id: some servers never change the id.
    names = {span.span_id: reply_id for reply_id, span in by_reply.items()}
    for span in tree.of(Kind.CALL):
        for same in tree.same_event(span):
            tree.kept_id[same.span_id] = names.get(span.span_id, span.span_id)
    return tree.of(Kind.CALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReadCall:
    """The span of a model call, with the fields of all spans that describe the call."""

    span: RawSpan
    turn: Turn
    own_request: str
    own_reply: str
    is_whole: bool


def _read_call(tree: SpanTree, span: RawSpan, refused: Counter[str]) -> _ReadCall:
    accounts = [same.attributes for same in tree.same_event(span)]
    joined = tree.joined(span)
    own_names = "request's own text", "reply's own text"
    own_request, own_reply = (str(first(joined.attributes, name) or "") for name in own_names)
    request = fields.request_of(accounts, Counter() if own_request else refused)
    # If a call failed, a missing reply is no fault of the trace.
    lost = Counter[str]() if own_reply or span.error else refused
    reply, is_whole = fields.reply_of(accounts, request.messages, lost)
    has_request = bool(own_request or request.messages) or fields.has_any(accounts, "request")
    has_reply = bool(own_reply or reply) or fields.has_any(accounts, "reply")
    if not (has_request and has_reply) and not span.error:
        reason = WITHOUT + ("a reply" if has_request else "a request" if has_reply else "messages")
        refused.update([fields.named(reason, name) for name in fields.unread_messages(accounts)] or [reason])
    turn = Turn(call_id=tree.kept_id[span.span_id], request=request, reply=reply)
    is_whole = is_whole and request.is_whole
    return _ReadCall(span=joined, turn=turn, own_request=own_request, own_reply=own_reply, is_whole=is_whole)


def _calls(tree: SpanTree, key: RolloutKey, refused: Counter[str]) -> tuple[list[ModelCall], dict[str, Any]]:
    """The model calls, and the fields of TraceContent about them."""
    calls: list[ModelCall] = []
    usage: dict[str, tuple[int, int]] = {}
    partial: set[str] = set()
    around_tools = {tree.event_above(span.span_id) for span in tree.of(Kind.TOOL)}
    read = [_read_call(tree, span, refused) for span in _identified(tree)]
    for call, (messages, is_whole) in zip(read, whole_requests([call.turn for call in read]), strict=True):
        span, call_id, reply = call.span, call.turn.call_id, call.turn.reply
        is_around = span.span_id in around_tools and reply is not None and "tool_calls" not in reply
        if not call.own_request:
            refused["repaired: a conversation without its beginning"] += not is_whole
            refused["repaired: a model call around its tools"] += is_around
            partial |= set() if is_whole and call.is_whole and not is_around else {call_id}
        prompt_T, response_T, logprob_T = fields.tokens_of(span.attributes, refused)
        names = (span.attributes[name] for name in ("gen_ai.agent.name", "agent.name") if name in span.attributes)
        agent = str(next(names, "") or fields.langchain_agent(span.attributes))
        if not agent and (above := tree.agent_above(span)) is not None:
            agent = fields.agent_name_of(above.name, above.attributes)
        model = fields.stated_or_replied(span.attributes, "model", "model")
        calls.append(
            ModelCall(
                key=key,
                call_id=call_id,
                agent=agent,
                policy_version=-1,
                prompt_T=prompt_T,
                response_T=response_T,
                logprob_T=logprob_T,
                finish_reason=fields.finish_reason_of(span.attributes),
                started_at=span.started_at,
                ended_at=max(span.started_at, span.ended_at),
                request=call.own_request or (dump(messages) if messages else ""),
                reply=call.own_reply or (dump(reply) if reply else ""),
                span_id=span.span_id,
                parent_id=tree.parent_of(span),
                model="" if model == POLICY and "agl.policy_version" in span.attributes else model,
                error=span.error,
                source="trace",
                offered=tuple(map(dump, call.turn.request.tools)),
            )
        )
        counts = integer(first(span.attributes, "prompt tokens")), integer(first(span.attributes, "reply tokens"))
        if any(counts):
            usage[call_id] = counts
    return calls, {"usage": usage, "partial": frozenset(partial)}


def _tools(tree: SpanTree, key: RolloutKey, calls: Sequence[ModelCall]) -> tuple[ToolCall, ...]:
    requested, starts = ToolCallIndex(calls), [call.started_at for call in calls]
    tools = []
    for span in map(tree.joined, tree.of(Kind.TOOL)):
        given = first(span.attributes, "result")
        if given is None and any(name in span.attributes for name in FIELDS["result"]):
            given = ""
        message = read_tool_result(given) or {}
        identity = str(first(span.attributes, "tool call id") or message.get("tool_call_id") or "")
        name = str(first(span.attributes, "tool") or message.get("name") or span.name.removeprefix("execute_tool "))
        cause, status = str(first(span.attributes, "requesting call") or ""), first(span.attributes, "status")
        before = bisect_right(starts, span.started_at)
        arguments = arguments_of(span)
        match = requested.take(identity, name, arguments, before, cause)
        arguments = match.arguments if match else arguments
        result = to_text(given) if given is not None else match.result or None if match else None
        seen = tool_status(arguments, f"error: {span.error}" if span.error else result)
        tools.append(
            ToolCall(
                key=key,
                span_id=tree.kept_id[span.span_id],
                parent_id=tree.parent_of(span),
                call_id=cause or (match.call_id if match else calls[before - 1].call_id if before else ""),
                tool_call_id=match.tool_call_id if match else identity,
                name=name,
                arguments=arguments,
                # Our own span of a tool has its result, which may be empty.
                result=result or ("" if status else span.error),
                status=ToolStatus(status) if status in list(ToolStatus) else seen,
                started_at=span.started_at,
                ended_at=max(span.started_at, span.ended_at),
                source="trace",
            )
        )
    return tuple(tools)


def _rewards(tree: SpanTree, key: RolloutKey, refused: Counter[str]) -> tuple[Reward, ...]:
    rewards = []
    for span in tree.of(Kind.REWARD):
        about = str(first(span.attributes, "what a reward is about") or "")
        if "agl.reward.value" in span.attributes:
            parts = [{"name": first(span.attributes, "reward's name"), "value": span.attributes["agl.reward.value"]}]
        else:
            parts = fields.unflattened(span.attributes, "agentlightning.reward.")
        for index, part in enumerate(map(as_mapping, parts)):
            value = number(part.get("value"))
            if refusal := reward_refusal(value):
                refused[refusal] += 1
                continue
            rewards.append(
                Reward(
                    key=key,
                    span_id=f"{first(span.attributes, 'span id') or span.span_id}{f'/{index}' if index else ''}",
                    name=str(part.get("name") or "reward"),
                    value=value,
                    about=tree.kept_id.get(about, about),
                    at=span.started_at,
                )
            )
    return tuple(rewards)


def reward_refusal(value: float) -> str:
    """The reason (see REASONS) for which a number cannot be a reward; "" if it can."""
    if is_reward(value):
        return ""
    return "a reward beyond 1e15" if math.isfinite(value) else "a reward that is not a finite number"
