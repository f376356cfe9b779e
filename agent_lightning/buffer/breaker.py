"""A circuit breaker: where most of the latest rollouts fail in the same way, the run should stop and say what it is."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence

from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import Outcome, ToolCall, ToolStatus

_VARIES = (
    (re.compile(r"\b(?:https?|file|sqlite)://\S+"), "URL"),
    (re.compile(r"\"[^\"]*\"|'[^']*'|`[^`]*`"), "…"),
    (re.compile(r"(?:/[\w.+-]+){2,}/?"), "PATH"),
    (re.compile(r"0x[0-9a-f]+|\b[0-9a-f]{8,}\b|\d+(?:[.:]\d+)*", re.IGNORECASE), "#"),
)
"""What differs between two cases of the same error."""


def same_words(error: str) -> str:
    """An error without what changes from case to case.

    Example: "ConnectionError: host 'db-7' refused 10.0.0.3:5432" -> "ConnectionError: host … refused #"
    """
    for pattern, instead in _VARIES:
        error = pattern.sub(instead, error)
    return " ".join(error.split())[:200]


def last_failed_tool(tools: Sequence[ToolCall]) -> str:
    """The last of an attempt's tool calls if it had no success, e.g. "search: timeout"; else ""."""
    last = tools[-1] if tools else None
    return f"{last.name}: {last.status}" if last and last.status not in (ToolStatus.OK, ToolStatus.EMPTY) else ""


def cause_of(outcome: Outcome, error: str, failed_tool: str = "") -> str:
    """Why an attempt failed, in words that are the same for the same failure of another attempt; "" if it finished.

    Example: "timeout: not done after # s (its last tool, search: unanswered)"
    """
    if outcome is Outcome.FINISHED:
        return ""
    return f"{outcome}: {same_words(error)}{f' (its last tool, {failed_tool})' if failed_tool else ''}"


class Breaker:
    """Watches the ends of attempts, one by one.

    Example:

        breaker = Breaker(window=50, share=0.9)
        breaker.saw("agent_error: ConnectionError: host … refused #")  # 45 of 50
        breaker.tripped  # "45 of the last 50 attempts ended alike: agent_error: ConnectionError: host … refused #"
    """

    def __init__(self, *, window: int, share: float) -> None:
        """`window`: attempts that are looked back on; 0: never trips. `share`: of them that end alike."""
        if window < 0 or not 0 < share <= 1:
            raise ConfigError(f"agent.breaker: window={window} must be at least 0, share={share} above 0 and at most 1")
        self._share = share
        self._latest: deque[str] = deque(maxlen=window)
        self._count: Counter[str] = Counter()

    def saw(self, cause: str) -> None:
        """One attempt has ended; `cause` as `cause_of` says it."""
        if not self._latest.maxlen:
            return
        if len(self._latest) == self._latest.maxlen:
            self._count[self._latest[0]] -= 1
        self._latest.append(cause)
        self._count[cause] += 1

    @property
    def tripped(self) -> str:
        """One line that names what the latest attempts fail of; "" where all is well, or too few have ended yet."""
        window = self._latest.maxlen or 0
        if not window or len(self._latest) < window:
            return ""
        cause, count = max(((c, n) for c, n in self._count.items() if c), key=lambda item: item[1], default=("", 0))
        return f"{count} of the last {window} attempts ended alike: {cause}" if count >= self._share * window else ""
