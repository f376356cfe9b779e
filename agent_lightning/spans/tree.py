"""What spans are and how they stand: raw spans, their kinds, and the tree that they make. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_lightning.spans.attributes import KINDS, PRESENT, Kind
from agent_lightning.spans.fields import first, has, is_graph_node
from agent_lightning.spans.forms import as_json, parsed
from agent_lightning.spans.messages import tool_result_of


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


class SpanTree:
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


def _stated(span: RawSpan) -> Kind | None:
    return next((kinds[v] for name, kinds in KINDS if (v := str(span.attributes.get(name))) in kinds), None)


def _same_use(around: RawSpan, span: RawSpan) -> bool:
    """Whether a span of a tool inside another is of the same use of it, and not of one that the tool made of itself."""
    names = {str(first(one.attributes, "tool")) for one in (around, span)}
    told = {arguments_of(one) for one in (around, span) if first(one.attributes, "arguments") is not None}
    return len(names) == 1 and len(told) < 2


def arguments_of(span: RawSpan) -> str:
    given = first(span.attributes, "arguments")
    value = parsed(given)
    if isinstance(value, Mapping) and len(value) == 1 and isinstance(inner := next(iter(value.values())), Mapping):
        given = inner if next(iter(value)) in ("input", "inputs") else given
    return as_json(given)
