"""Which of the tool calls in replies a span of a tool is. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from agent_lightning.core.types import ModelCall, ToolCall
from agent_lightning.credit.tools import canonical_arguments, tool_calls


class Asked:
    """The tool calls in replies, each of which is one span at most."""

    def __init__(self, calls: Sequence[ModelCall]) -> None:
        self._place = {call.call_id: index for index, call in enumerate(calls)}
        self._open: dict[tuple[str, ...], deque[ToolCall]] = {}
        self._taken: set[str] = set()
        self._all = tool_calls(calls)
        for one in self._all:
            for index in (("id", one.tool_call_id), ("name", one.name), (one.name, canonical_arguments(one.arguments))):
                self._open.setdefault(index, deque()).append(one)

    def take(self, identity: str, name: str, arguments: str, before: int, cause: str) -> ToolCall | None:
        """The one that a span is, of the first `before` calls, or of the call `cause`: by its id, in the newest reply;
        or the oldest with its name and arguments; or the only one with its name."""
        same_id = list(self._find(("id", identity), before, cause)) if identity else []
        same = islice(self._find((name, canonical_arguments(arguments)), before, cause), 1)
        same_name = list(islice(self._find(("name", name), before, cause), 2))
        found = same_id[-1] if same_id else next(same, same_name[0] if len(same_name) == 1 else None)
        if found is not None:
            self._taken.add(found.span_id)
        return found

    def left(self) -> tuple[ToolCall, ...]:
        """Those that no span was found for."""
        return tuple(one for one in self._all if one.span_id not in self._taken)

    def _find(self, index: tuple[str, ...], before: int, cause: str) -> Iterator[ToolCall]:
        waiting = self._open.get(index, deque())
        while waiting and waiting[0].span_id in self._taken:
            waiting.popleft()
        for one in waiting:
            if self._place[one.call_id] >= before and not cause:
                return
            if one.span_id not in self._taken and cause in ("", one.call_id):
                yield one
