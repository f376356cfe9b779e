"""Raw spans, their kinds, and the tree that they form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent_lightning.spans.attributes import KINDS, PRESENT, Kind
from agent_lightning.spans.fields import first, has, is_graph_node, join
from agent_lightning.spans.message_forms import SHELL, arguments_as_json, parse_value
from agent_lightning.spans.messages import read_tool_result


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSpan:
    """A span as it was sent: OpenTelemetry's fields, whichever instrumentor wrote them."""

    span_id: str
    """16 hex digits, or any other text that is unique in its trace."""
    parent_id: str = ""
    """Id of the span above; "" if there is none."""
    name: str
    started_at: float
    """Unix seconds."""
    ended_at: float
    attributes: Mapping[str, Any]
    """Plain values: text, numbers, booleans, and lists of them."""
    error: str = ""
    """The error message; "" if the status is not an error."""


def span_kind(span: RawSpan) -> Kind:
    """The kind of event that a span describes, by its attributes.

    Example: span_kind(span with {"openinference.span.kind": "LLM"}) -> Kind.CALL
    """
    present = [kind for name, kind in PRESENT if has(span.attributes, name)]
    if Kind.REWARD in present:
        return Kind.REWARD
    for name, kinds in KINDS:
        value = span.attributes.get(name)
        if isinstance(value, str) and value in kinds:
            return kinds[value]
    if present:
        return present[0]
    if read_tool_result(first(span.attributes, "result")) is not None:
        return Kind.TOOL
    return Kind.AGENT if is_graph_node(span.name, span.attributes) else Kind.OTHER


def nearest(start: str, parents: Mapping[str, str], wanted: Container[str], passed: dict[str, str]) -> str:
    """The first id in `wanted` on the way from `start` up through its parents, `start` included; "" if there is none.

    `passed` remembers the answer of every span on the way, so that all questions together take linear time; it belongs
    to one `wanted`. A circle of parents ends where it begins.

    Example: nearest("c", {"c": "b", "b": "a"}, {"a"}, {}) -> "a"
    """
    path: list[str] = []
    while start and start not in passed and start not in wanted:
        passed[start] = ""
        path.append(start)
        start = parents.get(start, "")
    answer = start if start in wanted else passed.get(start, "")
    passed.update(dict.fromkeys(path, answer))
    return answer


class SpanTree:
    """Unique spans in the order in which they started, and the ids under which some of them are kept.

    Building it and asking all its questions take linear time, however deep the tree is.
    """

    def __init__(self, spans: Sequence[RawSpan], refused: Counter[str]) -> None:
        self.by_id = {span.span_id: span for span in spans}
        self._parent = _parents(self.by_id, refused)
        depth = {"": -1}  # span id -> number of its ancestors
        for start in self._parent:
            path = []
            while start not in depth:
                path.append(start)
                start = self._parent[start]
            depth.update((span_id, number) for number, span_id in enumerate(reversed(path), depth[start] + 1))
        # By start; of two spans with the same start the parent is first. With clocks that differ, a child may start
        # before its parent, and stays before it.
        self.spans = sorted(spans, key=lambda span: (span.started_at, depth[span.span_id], span.span_id))
        self.kind = {span.span_id: span_kind(span) for span in spans}
        self.wrappers: dict[str, list[RawSpan]] = {}
        """Id of a model call or tool -> the spans around it that describe the same event, the nearest first."""
        self.kept_id: dict[str, str] = {}
        self._shortcut = dict(self._parent)
        """An ancestor, with nothing but spans of other kinds between: kinds only change to OTHER."""
        self._nearest_kept, self._nearest_agent = dict[str, str](), dict[str, str]()
        self._find_wrappers()
        self._drop_idle_nodes()
        self._agents = {span.span_id for span in self.of(Kind.AGENT)}
        for span in self.spans:
            if self.kind[span.span_id] in (Kind.TOOL, Kind.AGENT):
                kept = str(first(span.attributes, "span id") or span.span_id)
                self.kept_id.update((same.span_id, kept) for same in self.same_event(span))

    def of(self, kind: Kind) -> list[RawSpan]:
        """The spans of a kind, in the order of start."""
        return [span for span in self.spans if self.kind[span.span_id] is kind]

    def same_event(self, span: RawSpan) -> tuple[RawSpan, ...]:
        """The span of a model call or a tool, and the spans around it that describe the same event."""
        return (span, *self.wrappers.get(span.span_id, ()))

    def joined(self, span: RawSpan) -> RawSpan:
        """The span of a model call or a tool, with the fields that it lacks and the spans around it have."""
        return replace(span, attributes=join([same.attributes for same in self.same_event(span)]))

    def agent_above(self, span: RawSpan) -> RawSpan | None:
        """The nearest agent around a span."""
        return self.by_id.get(nearest(self._parent[span.span_id], self._parent, self._agents, self._nearest_agent))

    def parent_of(self, span: RawSpan) -> str:
        """The id of the nearest ancestor that is kept, or "". Call it when all kept ids are known."""
        own, above = self.kept_id.get(span.span_id), span.span_id
        while above := nearest(self._parent[above], self._parent, self.kept_id, self._nearest_kept):
            if self.kept_id[above] != own:  # else it is a wrapper of the span itself
                return self.kept_id[above]
        return ""

    def event_above(self, span_id: str) -> str:
        """The id of the nearest ancestor that is a model call, a tool or an agent, or ""."""
        path: list[str] = []
        while (above := self._shortcut[span_id]) and self.kind[above] in (Kind.OTHER, Kind.REWARD):
            path.append(span_id)
            span_id = above
        self._shortcut.update(dict.fromkeys(path, above))
        return above

    def _find_wrappers(self) -> None:
        """Find the spans that describe the same event as another span inside them.

        The innermost of nested model calls is the call, and a call around exactly one other call is its wrapper. So it
        is with a use of a tool, for which a framework and its instrumentor may each write a span.
        """
        inner: dict[str, list[str]] = {}
        for span in self.of(Kind.CALL):
            around = self.event_above(span.span_id)
            if around and self.kind[around] is Kind.CALL:
                inner.setdefault(around, []).append(span.span_id)
        innermost: dict[str, str] = {}
        for outer in inner:
            chain = [outer]  # down through calls that have one call inside
            while chain[-1] not in innermost and len(inner.get(chain[-1], ())) == 1:
                chain.append(inner[chain[-1]][0])
            end = innermost.get(chain[-1], "" if chain[-1] in inner else chain[-1])
            innermost.update(dict.fromkeys(chain, end))
        for wrapper in reversed([span for span in self.spans if span.span_id in inner]):
            self.kind[wrapper.span_id] = Kind.OTHER
            if innermost[wrapper.span_id]:
                self.wrappers.setdefault(innermost[wrapper.span_id], []).append(wrapper)
        for span in self.of(Kind.TOOL):
            around = self.event_above(span.span_id)
            if not around or self.kind[around] is not Kind.TOOL:
                continue
            both = self.by_id[around], span
            names = {str(first(tool.attributes, "tool")) for tool in both}
            # Arguments that are printed in another way than JSON say nothing.
            given = {arguments_of(tool) for tool in both if first(tool.attributes, "arguments") is not None}
            given = {arguments for arguments in given if arguments.startswith("{")}
            if len(names) == 1 and len(given) < 2:  # the same use; else the outer use has caused the inner one
                self.kind[around] = Kind.OTHER
                self.wrappers[span.span_id] = wrappers = self.wrappers.pop(around, [])
                wrappers.insert(0, self.by_id[around])

    def _drop_idle_nodes(self) -> None:
        """Nodes of a graph that call no model are not agents, unless an attribute states that they are."""
        busy: set[str] = set()
        for span in self.of(Kind.CALL):
            above = self._parent[span.span_id]
            while above and above not in busy:
                busy.add(above)
                above = self._parent[above]
        for span in self.of(Kind.AGENT):
            stated = any(str(span.attributes.get(name)) in kinds for name, kinds in KINDS)
            if is_graph_node(span.name, span.attributes) and span.span_id not in busy and not stated:
                self.kind[span.span_id] = Kind.OTHER


def _parents(by_id: Mapping[str, RawSpan], refused: Counter[str]) -> dict[str, str]:
    """Span id -> its parent's id among the spans, "" if there is none; a circle is cut at its smallest id."""
    parent = {span_id: span.parent_id if span.parent_id in by_id else "" for span_id, span in by_id.items()}
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


def arguments_of(span: RawSpan) -> str:
    """The arguments of a tool call as JSON text, without the shell that some instrumentors put around them.

    Example: {"input": {"q": "x"}} -> '{"q": "x"}'
    """
    given = first(span.attributes, "arguments")
    value = parse_value(given)
    if isinstance(value, Mapping) and value.keys() <= SHELL:
        given = next((value[name] for name in ("input", "inputs") if isinstance(value.get(name), Mapping)), given)
    return arguments_as_json(given)
