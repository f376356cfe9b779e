"""A circuit breaker: if most of the latest rollouts fail in the same way, the run should stop and say why."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence

from agent_lightning.config.running import BreakerConfig
from agent_lightning.core.types import Outcome, ToolCall, ToolStatus

_VARYING = (
    (re.compile(r" \([^()]*:\d+ in [^()]*\)$"), ""),  # where it was raised (rollouts.evidence.place_of)
    (re.compile(r"\b(?:https?|file|sqlite)://\S+"), "URL"),
    (re.compile(r"\"[^\"]*\"|'[^']*'|`[^`]*`"), "…"),
    (re.compile(r"(?:/[\w.+-]+){2,}/?"), "PATH"),
    (re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(?:[.:]\d+)*", re.IGNORECASE), "#"),
)
"""Parts of a message that differ between two cases of the same error, and what replaces them."""


def without_details(error: str) -> str:
    """An error message without the parts that change from case to case.
    Example: "ConnectionError: host 'db-7' refused 10.0.0.3:5432" -> "ConnectionError: host … refused #"
    """
    for pattern, replacement in _VARYING:
        error = pattern.sub(replacement, error)
    return " ".join(error.split())[:200]


def last_failed_tool(tools: Sequence[ToolCall]) -> str:
    """The last of an attempt's tool calls if it had no success, e.g. "search: timeout"; else ""."""
    last = tools[-1] if tools else None
    return f"{last.name}: {last.status}" if last and last.status not in (ToolStatus.OK, ToolStatus.EMPTY) else ""


def cause_of(outcome: Outcome, error: str, failed_tool: str = "") -> str:
    """Why an attempt failed, in words that are the same for the same failure of another attempt; "" if it finished.
    Example: "timeout: not done after # s (its last tool, search: unanswered)"
    """
    if outcome in (Outcome.FINISHED, Outcome.UNSCORED):
        return ""
    return f"{outcome}: {without_details(error)}{f' (its last tool, {failed_tool})' if failed_tool else ''}"


class Breaker:
    """Watches how attempts end.

    breaker = Breaker(BreakerConfig(window=50, share=0.9))
    breaker.note("agent_error: ConnectionError: host … refused #")  # 45 of 50
    breaker.tripped  # "45 of the last 50 attempts ended alike: agent_error: ConnectionError: host … refused #"
    """

    def __init__(self, config: BreakerConfig) -> None:
        self._share = config.share
        self._latest: deque[str] = deque(maxlen=config.window)

    def note(self, cause: str) -> None:
        """Count the end of an attempt; `cause` comes from `cause_of`."""
        self._latest.append(cause)

    @property
    def tripped(self) -> str:
        """One line that names the failure of the latest attempts; "" if they do not fail alike, or are too few yet."""
        window, causes = self._latest.maxlen, Counter(filter(None, self._latest))
        if not causes or len(self._latest) != window:
            return ""
        ((cause, count),) = causes.most_common(1)
        return f"{count} of the last {window} attempts ended alike: {cause}" if count >= self._share * window else ""
