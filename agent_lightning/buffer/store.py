"""The ledger and its journal as one: an event changes both, and a process that restarts reads the journal back."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from agent_lightning.buffer.codec import decode, encode
from agent_lightning.buffer.events import Advanced, Called, Event, Released, Taken, Traced
from agent_lightning.buffer.journal import Journal, JournalConfig
from agent_lightning.buffer.ledger import Ledger
from agent_lightning.buffer.segments import RecordLocation, path_of
from agent_lightning.buffer.state import RecordedSpans, StoredRollout
from agent_lightning.buffer.taken import TakenGroup, TakenRollout
from agent_lightning.core.errors import JournalDamaged, JournalError, JournalFull
from agent_lightning.core.types import Split

logger = logging.getLogger(__name__)

_LIVE_SHARE = 0.7
"""A full journal is compacted unless more than this share of it is still needed."""


class Store:
    """Changes the ledger by events, and records them in the journal if there is one.

    Constructing it never raises JournalError: if the journal cannot be used, every change raises its error instead.
    """

    def __init__(
        self, config: JournalConfig | None, *, first_group: Mapping[Split, int] | None, memory_bytes: int
    ) -> None:
        # With a journal only its own events count; else a replay would depend on who starts it.
        first_group = first_group if config is None else None
        self.ledger = Ledger(next_group=first_group, keeps_taken=config is not None, memory_bytes=memory_bytes)
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
        """Record an event and apply it. An event that `grows` the journal is refused when the journal is full.

        Raises JournalFull, JournalError or DataError; then nothing has changed."""
        if self._broken is not None:
            raise self._broken
        if self._journal is None:
            event.apply(self.ledger, None)
            return
        payload = encode(event)
        try:
            location = self._journal.append(payload, reserve=not grows)
        except JournalFull:
            if self.ledger.live_bytes > _LIVE_SHARE * self._journal.size:
                raise
            self._compact(self._journal)
            location = self._journal.append(payload, reserve=not grows)
        event.apply(self.ledger, location)
        if isinstance(event, Taken | Advanced | Released) and self._journal.size > self._compact_at:
            self._compact_if_worthwhile(self._journal)

    async def durable(self) -> None:
        """Wait until all events so far are as durable as the journal makes them. Raises JournalError."""
        if self._journal is not None:
            await self._journal.durable()

    def group(self, group_id: str) -> TakenGroup:
        """A complete group with its spans. Raises JournalDamaged."""
        group = self.ledger.groups[group_id]
        rollouts = tuple(self._with_spans(rollout) for rollout in group.rollouts)
        return TakenGroup(group_id=group_id, task=group.task, rollouts=rollouts)

    def close(self) -> None:
        """Write what is pending, and release the journal."""
        if self._journal is not None:
            self._journal.close()

    def _with_spans(self, rollout: StoredRollout) -> TakenRollout:
        assert rollout.ending is not None  # the group is complete
        spans = self.ledger.spans(rollout.key)
        if spans.spilled and self._journal is not None:
            spans = _read_back(self._journal, spans.locations)
        return TakenRollout(
            key=rollout.key,
            started_at=rollout.started_at,
            ending=rollout.ending,
            calls=tuple(spans.calls.values()),
            spans=tuple(spans.raw.values()),
            refused_spans=dict(rollout.refused),
        )

    def _replay(self, journal: Journal) -> None:
        number, path = 0, journal.config.path
        collecting = gc.isenabled()
        gc.disable()  # millions of objects are created, and none of them is garbage
        try:
            for location, payload in journal.replay():
                apply_record(self.ledger, payload, location, path)
                number += 1
        finally:
            if collecting:
                gc.enable()
        if number:
            logger.warning("the journal %s: %d records, %d groups", path, number, len(self.ledger.groups))

    def _compact_if_worthwhile(self, journal: Journal) -> None:
        """Compact the journal if less than half of it is needed; else look again when it has grown by a quarter."""
        if self.ledger.live_bytes > journal.size / 2:
            self._compact_at = int(1.25 * journal.size)
            return
        self._compact(journal)

    def _compact(self, journal: Journal) -> None:
        recorded = self.ledger.recorded()
        try:
            locations = journal.compact(self._compacted(journal, recorded))
        except OSError as error:
            logger.warning("the journal cannot be compacted now (%s)", error.strerror)
            self._compact_at = int(1.25 * journal.size)
            return
        new_locations = iter(locations[1:])
        for spans in recorded:
            spans.locations = [next(new_locations) for _ in spans.locations]
        self._compact_at = max(journal.config.segment_bytes, 2 * journal.size)

    def _compacted(self, journal: Journal, recorded: list[RecordedSpans]) -> Iterator[bytes]:
        """The payloads of a compacted journal."""
        yield encode(self.ledger.base())
        for spans in recorded:
            for location in spans.locations:
                yield journal.read(location)


def apply_record(ledger: Ledger, payload: bytes | memoryview, location: RecordLocation, folder: Path) -> None:
    """Apply the event in a record of the journal in `folder`. Raises JournalDamaged if it does not fit the ledger."""
    try:
        decode(payload).apply(ledger, location)
    except (ValueError, KeyError, IndexError) as error:
        why = f"it does not fit what is before it ({type(error).__name__}: {error})"
        raise JournalDamaged(path_of(folder, location.segment), location.offset, why) from error


def _read_back(journal: Journal, locations: list[RecordLocation]) -> RecordedSpans:
    """Spilled spans, as the journal has them. Raises JournalDamaged."""
    spans = RecordedSpans()
    for location in locations:
        event = decode(journal.read(location))
        if isinstance(event, Called):
            spans.calls[event.call.call_id] = event.call
        elif isinstance(event, Traced):
            spans.raw.update({span.span_id: span for span in event.spans})
    return spans
