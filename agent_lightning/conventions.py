"""Spans as OpenTelemetry has them -> ours, by the attributes that instrumentors write. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_lightning.types import AgentSpan, ModelCall, Reward, ToolCall


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
    """Without tokens, `source="trace"`; `call_id` is the reply's id where the span has it, else the span's."""
    tools: tuple[ToolCall, ...] = ()
    rewards: tuple[Reward, ...] = ()
    agents: tuple[AgentSpan, ...] = ()
    refused: Mapping[str, int] = field(default_factory=Counter)
    """Reason -> how many spans are not among the above though they should be."""
