"""Spans as OpenTelemetry has them -> ours, by the attributes that instrumentors write. Pure.

`attributes` has the tables of names, `span_fields` what one span says; here is what spans say together.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agent_lightning.telemetry.asked import Asked
from agent_lightning.telemetry.attributes import FIELDS, KINDS, PRESENT, Kind
from agent_lightning.telemetry.message_forms import as_json, as_mapping, parsed, text_of
from agent_lightning.telemetry.messages import tool_result_of
from agent_lightning.telemetry.span_fields import (
    agent_name_of,
    dump,
    finish_reason_of,
    first,
    has,
    is_graph_node,
    langchain_agent,
    matches,
    model_of,
    number,
    reply_id_of,
    reply_of,
    request_of,
    tokens_of,
    unflattened,
    whole_number,
)
from agent_lightning.tools import status_of
from agent_lightning.types import AgentSpan, ModelCall, Reward, RolloutKey, ToolCall, ToolStatus

REASONS = {
    "a span id for the second time": "the one with the most attributes is kept",
    "a time that is not a number": "the span's start or end is infinite or no number",
    "a reward that is not a finite number": "nothing can be learned from it",
    "repaired: a parent that is its own descendant": "kept, as a span without parent",
    "repaired: a request that is not understood": "kept; its `request` is empty",
    "repaired: a reply that is not understood": "kept; its `reply` is empty",
    "repaired: token ids out of any vocabulary": "kept without tokens: an id is not in [0, 2^31)",
    "repaired: log-probabilities missing": "kept; those of its tokens that are not known are NaN",
}
"""Every reason that `read` counts, and what it means. Those with "repaired" are of spans that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSpan:
    """A span as it was sent: OpenTelemetry's fields, whoever wrote them."""

    span_id: str
    """16 hex digits, or any other text that is unique in its trace."""
    parent_id: str = ""
    name: str
    started_at: float
    """Unix seconds."""
    ended_at: float
    attributes: Mapping[str, Any]
    """Plain values: text, numbers, truth values, and lists of them."""
    error: str = ""
    """What went wrong, "" where its status is not an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What raw spans say, in the order in which it happened. A `parent_id` is of a span that is kept, or ""."""

    calls: tuple[ModelCall, ...] = ()
    """`source="trace"`, without tokens unless the trace has them; `call_id` is the reply's id where the span has it,
    else the span's."""
    tools: tuple[ToolCall, ...] = ()
    rewards: tuple[Reward, ...] = ()
    agents: tuple[AgentSpan, ...] = ()
    refused: Mapping[str, int] = field(default_factory=Counter)
    """Reason (see REASONS) -> how many spans are not among the above though they should be, or were repaired."""
    offered: Mapping[str, str] = field(default_factory=dict)
    """`call_id` -> JSON text of the definitions of the tools that its request offered, in OpenAI's form."""
    usage: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """`call_id` -> tokens of the prompt and of the reply, as the trace counts them."""


def read(spans: Sequence[RawSpan], key: RolloutKey) -> Traced:
    """The model calls, tool calls, rewards and agents among the spans of one attempt, in the order of their start.

    A model call that wraps another one of the same event is one call with what both say. The order in which the spans
    come does not matter. Never raises, whatever the attributes hold.

    Example:

        chat = RawSpan(span_id="1", name="chat", started_at=0.0, ended_at=1.0, attributes={
            "gen_ai.operation.name": "chat", "gen_ai.request.model": "gpt-4o",
            "gen_ai.prompt.0.role": "user", "gen_ai.prompt.0.content": "hi", "gen_ai.completion.0.content": "Hello!"})
        read([chat], key).calls[0].reply  # '{"role": "assistant", "content": "Hello!"}'
    """
    refused: Counter[str] = Counter()
    tree = _Tree(_unique(spans, refused), refused)
    calls, offered, usage = _calls(tree, key, refused)
    return Traced(
        calls=calls,
        tools=_tools(tree, key, calls),
        rewards=_rewards(tree, key, refused),
        agents=tuple(
            AgentSpan(
                key=key,
                span_id=tree.kept_id[span.span_id],
                parent_id=tree.parent_of(span),
                name=agent_name_of(span.name, span.attributes),
                started_at=span.started_at,
                ended_at=max(span.started_at, span.ended_at),
            )
            for span in tree.of(Kind.AGENT)
        ),
        refused=+refused,
        offered=offered,
        usage=usage,
    )


def kind_of(span: RawSpan) -> Kind:
    """What a span is, by its attributes.

    Example: kind_of(span with {"openinference.span.kind": "LLM"}) -> Kind.CALL
    """
    there = [kind for name, kind in PRESENT if has(span.attributes, name)]
    if Kind.REWARD in there:
        return Kind.REWARD
    for name, kinds in KINDS:
        value = span.attributes.get(name)
        if isinstance(value, str) and value in kinds:
            return kinds[value]
    if there:
        return there[0]
    if tool_result_of(first(span.attributes, "result")) is not None:
        return Kind.TOOL
    return Kind.AGENT if is_graph_node(span.name, span.attributes) else Kind.OTHER


_MAX_DEPTH = 256
"""Ancestors that are looked at: no agent is nested so deep, and a chain without end would cost its square."""


class _Tree:
    """Unique spans in the order in which they started, and which of them are kept under which id."""

    def __init__(self, spans: Sequence[RawSpan], refused: Counter[str]) -> None:
        by_id = {span.span_id: span for span in spans}
        self._parent = _parents(by_id, refused)
        depth = {identity: sum(1 for _ in self._above(identity)) for identity in by_id}
        # By start; on a tie the parent first. A child may start before its parent where clocks differ: it stays so.
        self.spans = sorted(spans, key=lambda span: (span.started_at, depth[span.span_id], span.span_id))
        self.by_id = by_id
        self.kind = {span.span_id: kind_of(span) for span in spans}
        self.wrappers: dict[str, list[RawSpan]] = {}
        """Of a model call or a tool: the spans around it that tell of the same event, the nearest first."""
        self.kept_id: dict[str, str] = {}
        self._find_wrappers()
        self._drop_idle_nodes()
        for span in self.spans:
            if self.kind[span.span_id] in (Kind.TOOL, Kind.AGENT):
                self.kept_id[span.span_id] = str(first(span.attributes, "span id") or span.span_id)
                for wrapper in self.wrappers.get(span.span_id, ()):
                    self.kept_id[wrapper.span_id] = self.kept_id[span.span_id]

    def of(self, kind: Kind) -> list[RawSpan]:
        return [span for span in self.spans if self.kind[span.span_id] is kind]

    def told_by(self, span: RawSpan) -> list[Mapping[str, Any]]:
        """Attributes of the spans around a model call or a tool that tell of the same event."""
        return [one.attributes for one in self.wrappers.get(span.span_id, ())]

    def above(self, span: RawSpan) -> Iterator[RawSpan]:
        """Its ancestors, the nearest first."""
        return (self.by_id[identity] for identity in self._above(span.span_id))

    def parent_of(self, span: RawSpan) -> str:
        """The id of the nearest ancestor that is kept, or ""."""
        own = self.kept_id.get(span.span_id)
        above = (self.kept_id.get(identity) for identity in self._above(span.span_id))
        return next((identity for identity in above if identity and identity != own), "")

    def _above(self, identity: str) -> Iterator[str]:
        for _ in range(_MAX_DEPTH):
            if not (identity := self._parent[identity]):
                return
            yield identity

    def _find_wrappers(self) -> None:
        """Of model calls inside model calls the innermost is the call; those around it alone say more about it. So it
        is with a use of a tool, of which a framework and its instrumentor may each have a span."""
        inner: dict[str, list[str]] = {}
        for span in self.of(Kind.CALL):
            for around in self.above(span):
                if self.kind[around.span_id] in (Kind.TOOL, Kind.AGENT):
                    break
                if self.kind[around.span_id] is Kind.CALL:
                    inner.setdefault(around.span_id, []).append(span.span_id)
                    break
        for wrapper in reversed([span for span in self.spans if span.span_id in inner]):
            self.kind[wrapper.span_id] = Kind.OTHER
            leaf, only = wrapper.span_id, True
            while leaf in inner and only:
                only, leaf = len(inner[leaf]) == 1, inner[leaf][0]
            if only:
                self.wrappers.setdefault(leaf, []).append(wrapper)
        for span in self.of(Kind.TOOL):
            kept = (one for one in self.above(span) if self.kind[one.span_id] is not Kind.OTHER)
            outer = next(kept, None)
            if outer is not None and self.kind[outer.span_id] is Kind.TOOL and _same_use(outer, span):
                self.kind[outer.span_id] = Kind.OTHER
                self.wrappers[span.span_id] = [outer, *self.wrappers.pop(outer.span_id, ())]

    def _drop_idle_nodes(self) -> None:
        """A graph has nodes that call no model: those are no agents."""
        busy = {around.span_id for span in self.of(Kind.CALL) for around in self.above(span)}
        for span in self.of(Kind.AGENT):
            if is_graph_node(span.name, span.attributes) and span.span_id not in busy and _stated(span) is None:
                self.kind[span.span_id] = Kind.OTHER


def _unique(spans: Sequence[RawSpan], refused: Counter[str]) -> list[RawSpan]:
    unique: dict[str, RawSpan] = {}
    for span in spans:
        if not (math.isfinite(span.started_at) and math.isfinite(span.ended_at)):
            refused["a time that is not a number"] += 1
            continue
        if span.span_id in unique:
            refused["a span id for the second time"] += 1
            span = max(span, unique[span.span_id], key=lambda one: (len(one.attributes), repr(one)))
        unique[span.span_id] = span
    return list(unique.values())


def _parents(by_id: Mapping[str, RawSpan], refused: Counter[str]) -> dict[str, str]:
    """Span -> its parent among the spans, "" where there is none; a circle is cut at its smallest id."""
    parent = {one: span.parent_id if span.parent_id in by_id else "" for one, span in by_id.items()}
    settled: set[str] = set()
    for start in by_id:
        path: dict[str, None] = {}
        at = start
        while at and at not in settled and at not in path:
            path[at] = None
            at = parent[at]
        if at in path:
            walked = list(path)
            parent[min(walked[walked.index(at) :])] = ""
            refused["repaired: a parent that is its own descendant"] += 1
        settled.update(path)
    return parent


def _identified(tree: _Tree) -> list[RawSpan]:
    """The spans that are model calls, each with all that is told of its event; their ids are known to the tree then."""
    by_reply: dict[str, RawSpan] = {}
    for span in tree.of(Kind.CALL):
        reply_id = next(filter(None, map(reply_id_of, (span.attributes, *tree.told_by(span)))), "")
        reply_id = "" if reply_id in tree.by_id else reply_id
        earlier = by_reply.get(reply_id)
        if earlier is not None and span.started_at < earlier.ended_at:
            # Two instrumentors of one library tell of the same event.
            tree.kind[span.span_id] = Kind.OTHER
            tree.wrappers.setdefault(earlier.span_id, []).extend([span, *tree.wrappers.pop(span.span_id, ())])
        elif earlier is None and reply_id:
            by_reply[reply_id] = span
    # Another call whose reply has an id that came before has its own: some servers give all replies the same one.
    names = {span.span_id: reply_id for reply_id, span in by_reply.items()}
    for span in tree.of(Kind.CALL):
        for one in (span, *tree.wrappers.get(span.span_id, ())):
            tree.kept_id[one.span_id] = names.get(span.span_id, span.span_id)
    return [_merged(span, tree.wrappers.get(span.span_id, ())) for span in tree.of(Kind.CALL)]


def _calls(
    tree: _Tree, key: RolloutKey, refused: Counter[str]
) -> tuple[tuple[ModelCall, ...], dict[str, str], dict[str, tuple[int, int]]]:
    calls, offered, usage = [], {}, {}
    for span in _identified(tree):
        call_id = tree.kept_id[span.span_id]
        own = [str(first(span.attributes, name) or "") for name in ("request's own text", "reply's own text")]
        request, tools = request_of(span.attributes, Counter() if own[0] else refused)
        # A call that failed has no reply that should be there.
        reply = reply_of(span.attributes, request, Counter() if own[1] or span.error else refused)
        prompt_T, response_T, logprob_T = tokens_of(span.attributes, refused)
        calls.append(
            ModelCall(
                key=key,
                call_id=call_id,
                agent=_agent_of(tree, span),
                policy_version=-1,
                prompt_T=prompt_T,
                response_T=response_T,
                logprob_T=logprob_T,
                finish_reason=finish_reason_of(span.attributes),
                started_at=span.started_at,
                ended_at=max(span.started_at, span.ended_at),
                request=own[0] or (dump(request) if request else ""),
                reply=own[1] or (dump(reply) if reply else ""),
                span_id=span.span_id,
                parent_id=tree.parent_of(span),
                model=model_of(span.attributes),
                error=span.error,
                source="trace",
            )
        )
        if tools:
            offered[call_id] = dump(tools)
        sent, said = (whole_number(first(span.attributes, side)) for side in ("prompt tokens", "reply tokens"))
        if sent or said:
            usage[call_id] = (sent, said)
    return tuple(calls), offered, usage


def _agent_of(tree: _Tree, span: RawSpan) -> str:
    own = next((span.attributes[name] for name in ("gen_ai.agent.name", "agent.name") if name in span.attributes), "")
    own = own or langchain_agent(span.attributes)
    above = (one for one in tree.above(span) if tree.kind[one.span_id] is Kind.AGENT)
    return str(own) or next((agent_name_of(one.name, one.attributes) for one in above), "")


def _stated(span: RawSpan) -> Kind | None:
    return next((kinds[v] for name, kinds in KINDS if (v := str(span.attributes.get(name))) in kinds), None)


def _tools(tree: _Tree, key: RolloutKey, calls: Sequence[ModelCall]) -> tuple[ToolCall, ...]:
    asked = Asked(calls)
    starts = [call.started_at for call in calls]
    tools = []
    for span in [_merged(one, tree.wrappers.get(one.span_id, ())) for one in tree.of(Kind.TOOL)]:
        given = first(span.attributes, "result")
        if given is None and any(name in span.attributes for name in FIELDS["result"]):
            given = ""
        message = tool_result_of(given) or {}
        identity = str(first(span.attributes, "tool call id") or message.get("tool_call_id") or "")
        name = str(first(span.attributes, "tool") or message.get("name") or span.name.removeprefix("execute_tool "))
        cause, status = str(first(span.attributes, "the call that asked") or ""), first(span.attributes, "status")
        before = bisect_right(starts, span.started_at)
        arguments = _arguments(span)
        match = asked.take(identity, name, arguments, before, cause)
        arguments = match.arguments if match else arguments
        result = text_of(given) if given is not None else match.result or None if match else None
        seen = status_of(arguments, f"error: {span.error}" if span.error else result)
        tools.append(
            ToolCall(
                key=key,
                span_id=tree.kept_id[span.span_id],
                parent_id=tree.parent_of(span),
                call_id=cause or (match.call_id if match else calls[before - 1].call_id if before else ""),
                tool_call_id=match.tool_call_id if match else identity,
                name=name,
                arguments=arguments,
                # Our own span of a tool has its result even where that is empty.
                result=result or ("" if status else span.error),
                status=ToolStatus(status) if status in list(ToolStatus) else seen,
                started_at=span.started_at,
                ended_at=max(span.started_at, span.ended_at),
                source="trace",
            )
        )
    return tuple(tools)


def _same_use(around: RawSpan, span: RawSpan) -> bool:
    """Whether a span of a tool inside another is of the same use of it, and not of one that the tool made of itself."""
    names = {str(first(one.attributes, "tool")) for one in (around, span)}
    told = {_arguments(one) for one in (around, span) if first(one.attributes, "arguments") is not None}
    return len(names) == 1 and len(told) < 2


def _arguments(span: RawSpan) -> str:
    given = first(span.attributes, "arguments")
    value = parsed(given)
    if isinstance(value, Mapping) and len(value) == 1 and isinstance(inner := next(iter(value.values())), Mapping):
        given = inner if next(iter(value)) in ("input", "inputs") else given
    return as_json(given)


def _rewards(tree: _Tree, key: RolloutKey, refused: Counter[str]) -> tuple[Reward, ...]:
    rewards = []
    for span in tree.of(Kind.REWARD):
        about = str(first(span.attributes, "what a reward is about") or "")
        for index, (name, value) in enumerate(_dimensions(span)):
            if not math.isfinite(number(value)):
                refused["a reward that is not a finite number"] += 1
                continue
            rewards.append(
                Reward(
                    key=key,
                    span_id=f"{first(span.attributes, 'span id') or span.span_id}{f'/{index}' if index else ''}",
                    name=name,
                    value=number(value),
                    about=tree.kept_id.get(about, about),
                    at=span.started_at,
                )
            )
    return tuple(rewards)


def _dimensions(span: RawSpan) -> list[tuple[str, Any]]:
    if "agl.reward.value" in span.attributes:
        return [(str(first(span.attributes, "reward's name") or "reward"), span.attributes["agl.reward.value"])]
    parts = unflattened(span.attributes, "agentlightning.reward.")
    return [(str(as_mapping(one).get("name") or "reward"), as_mapping(one).get("value")) for one in parts]


def _merged(span: RawSpan, wrappers: Sequence[RawSpan]) -> RawSpan:
    """A call with what the spans around it say and it does not; a field is taken whole, from one span."""
    attributes = dict(span.attributes)
    for wrapper in wrappers:
        for names in FIELDS.values():
            if not any(has(attributes, name) for name in names):
                attributes |= {n: v for n, v in wrapper.attributes.items() if any(matches(n, name) for name in names)}
    return replace(span, attributes=attributes)
