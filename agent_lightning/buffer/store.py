"""The ledger and, where there is one, its journal: what is noted is in both, and comes back from either."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping

from agent_lightning.buffer.codec import decode, encode
from agent_lightning.buffer.events import Advanced, Called, Event, Released, Taken, Traced
from agent_lightning.buffer.holdings import Rollout
from agent_lightning.buffer.journal import Journal, JournalConfig
from agent_lightning.buffer.ledger import Ledger
from agent_lightning.buffer.segments import path_of
from agent_lightning.buffer.taken import TakenGroup, TakenRollout
from agent_lightning.core.errors import JournalDamaged, JournalError, JournalFull
from agent_lightning.core.types import ModelCall, Split
from agent_lightning.spans.tree import RawSpan

logger = logging.getLogger(__name__)


class Store:
    """Changes the ledger, and remembers how.

    A journal that cannot be read or used is not fatal here: whatever would change something raises its error.
    """

    def __init__(
        self, config: JournalConfig | None, *, first_group: Mapping[Split, int] | None, memory_bytes: int
    ) -> None:
        keeps = config is not None
        # With a journal only what is in it counts: else a replay would depend on who asks for it.
        self.ledger = Ledger(next_group=None if keeps else first_group, keeps=keeps, memory_bytes=memory_bytes)
        self._journal: Journal | None = None
        self._broken: JournalError | None = None
        if config is None:
            return
        self._compact_at = config.segment_bytes
        try:
            self._journal = Journal(config)
            self._replay(self._journal)
        except JournalError as error:
            logger.error("%s", error)
            self._broken = error

    def note(self, event: Event, *, grows: bool = False) -> None:
        """Let it have happened. `grows`: refused where the journal has reached its limit.

        Raises JournalFull, JournalError, DataError: then it has not happened."""
        if self._broken is not None:
            raise self._broken
        if self._journal is None:
            self.ledger.apply(event)
            return
        payload = encode(event)
        try:
            place = self._journal.append(payload, ending=not grows)
        except JournalFull:
            if self.ledger.live_bytes > 0.7 * self._journal.size:
                raise
            self._compact(self._journal)
            place = self._journal.append(payload, ending=not grows)
        self.ledger.apply(event, place)
        if isinstance(event, Taken | Advanced | Released) and self._journal.size > self._compact_at:
            self._tidy(self._journal)

    async def kept(self) -> None:
        """Wait until all that was noted so far is as durable as the journal makes it. Raises JournalError."""
        if self._journal is not None:
            await self._journal.durable()

    def group(self, group_id: str) -> TakenGroup:
        """A complete group with its spans. Raises JournalDamaged."""
        group = self.ledger.groups[group_id]
        return TakenGroup(
            group_id=group_id, task=group.task, rollouts=tuple(self._taken(rollout) for rollout in group.rollouts)
        )

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    def _taken(self, rollout: Rollout) -> TakenRollout:
        state, (calls, spans) = rollout.state, self._spans(rollout)
        assert state.ending is not None  # the group is complete
        return TakenRollout(
            key=state.key,
            started_at=state.started_at,
            ending=state.ending,
            calls=tuple(calls.values()),
            spans=tuple(spans.values()),
            refused_spans=dict(state.refused),
        )

    def _spans(self, rollout: Rollout) -> tuple[dict[str, ModelCall], dict[str, RawSpan]]:
        if not rollout.spilled or self._journal is None:
            return rollout.calls, rollout.raw
        calls, raw = dict[str, ModelCall](), dict[str, RawSpan]()
        for place in rollout.places:
            event = decode(self._journal.read(place))
            if isinstance(event, Called):
                calls[event.call.call_id] = event.call
            elif isinstance(event, Traced):
                raw.update({span.span_id: span for span in event.spans})
        return calls, raw

    def _replay(self, journal: Journal) -> None:
        number, path = 0, journal.config.path
        collecting = gc.isenabled()
        gc.disable()  # millions of objects are made, and none of them is garbage
        try:
            for place, payload in journal.replay():
                try:
                    self.ledger.apply(decode(payload), place)
                except (ValueError, KeyError, IndexError) as error:
                    why = f"it does not fit what is before it ({type(error).__name__}: {error})"
                    raise JournalDamaged(path_of(path, place.segment), place.offset, why) from error
                number += 1
        finally:
            if collecting:
                gc.enable()
        if number:
            logger.warning("the journal %s: %d records, %d groups", path, number, len(self.ledger.groups))

    def _tidy(self, journal: Journal) -> None:
        """Compact where less than half of the journal is needed, and say when to look again."""
        live = self.ledger.live_bytes
        if live > journal.size / 2:
            self._compact_at = int(1.25 * journal.size)
            return
        self._compact(journal)

    def _compact(self, journal: Journal) -> None:
        rollouts = list(self.ledger.kept())
        try:
            places = journal.compact(self._all(journal, rollouts))
        except OSError as error:
            logger.warning("the journal cannot be compacted now (%s)", error.strerror)
            self._compact_at = int(1.25 * journal.size)
            return
        fresh = iter(places[1:])
        for rollout in rollouts:
            rollout.places = [next(fresh) for _ in rollout.places]
        self._compact_at = max(journal.config.segment_bytes, 2 * journal.size)

    def _all(self, journal: Journal, rollouts: list[Rollout]) -> Iterator[bytes]:
        yield encode(self.ledger.base())
        for rollout in rollouts:
            for place in rollout.places:
                yield journal.read(place)
