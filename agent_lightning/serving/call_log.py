"""What `agl serve` records: a file of model calls, which does not grow without end."""

from __future__ import annotations

import itertools
import logging
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from agent_lightning.core.types import ModelCall, Outcome, RolloutKey, Trajectory
from agent_lightning.spans.traces import export
from agent_lightning.spans.tree import RawSpan

logger = logging.getLogger(__name__)


class CallLog:
    """A recorder for the gateway in place of the Buffer: every attempt is open and may make any number of calls.

    Each call is a line of `path`, in the form of an exported rollout, so that `agl import` reads it. A file that has
    reached `max_bytes` is renamed to NAME.old, in place of an older one. The newest `kept` calls can be continued.
    """

    def __init__(self, path: Path, *, max_bytes: int = 2**30, kept: int = 4096) -> None:
        self._path: Final = path
        self._max_bytes = max_bytes
        self._kept = kept
        self._numbers = itertools.count()
        self._calls: OrderedDict[tuple[RolloutKey, str], ModelCall] = OrderedDict()

    async def record(self, call: ModelCall) -> int:
        """Write a call; returns how many more there may be. A disk that is full costs lines, and no answers."""
        self._calls[call.key, call.call_id] = call
        while len(self._calls) > self._kept:
            self._calls.popitem(last=False)
        rollout = Trajectory(
            key=replace(call.key, index=next(self._numbers)),  # an import takes a rollout once
            task_id=call.call_id,
            calls=(call,),
            reward=None,
            outcome=Outcome.FINISHED,
            started_at=call.started_at,
            ended_at=call.ended_at,
        )
        try:
            if self._path.exists() and self._path.stat().st_size > self._max_bytes:
                self._path.replace(self._path.with_suffix(f"{self._path.suffix}.old"))
            with self._path.open("a", encoding="utf-8") as file:
                file.write(export.to_line(rollout) + "\n")
        except OSError as error:
            logger.warning("a call could not be written to %s: %s", self._path, error.strerror)
        return sys.maxsize

    async def recorded_messages(self, key: RolloutKey, wanted: Mapping[str, bool]) -> Mapping[str, tuple[str, str]]:
        """Request and reply of the calls with these ids, of those among the newest."""
        newest = ((call_id, self._calls.get((key, call_id))) for call_id in wanted)
        return {call_id: (call.request, call.reply) for call_id, call in newest if call is not None}

    async def record_spans(self, key: RolloutKey, spans: Sequence[RawSpan], faults: Mapping[str, int]) -> int:
        """Take spans and keep none of them: nothing is refused."""
        return 0

    async def note_failure(self, key: RolloutKey, outcome: Outcome, error: str) -> None:
        """Do nothing: the agent was told."""
