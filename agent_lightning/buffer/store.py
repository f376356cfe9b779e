"""The ledger and its journal as one: an event changes both, and a process that restarts reads the journal back."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from agent_lightning.buffer.codec import decode, encode
from agent_lightning.buffer.events import Advanced, Base, Called, CallFailed, Event, Released, Taken, Traced
from agent_lightning.buffer.journal import Journal
from agent_lightning.buffer.ledger import Ledger
from agent_lightning.buffer.segments import RecordLocation, path_of
from agent_lightning.buffer.taken import TakenGroup, TakenRollout
from agent_lightning.config.running import BufferConfig
from agent_lightning.core.errors import JournalDamaged, JournalError, JournalFull
from agent_lightning.core.types import Split

logger = logging.getLogger(__name__)

CHARGED: Final = (Called, Traced, CallFailed)
"""Events that an agent causes as often as it likes."""


class Store:
    """Changes the ledger by events, and records them in the journal if there is one. Constructing it never raises
    JournalError: if the journal cannot be used, every change raises its error instead."""

    def __init__(self, path: Path | None, config: BufferConfig, *, first_group: Mapping[Split, int] | None) -> None:
        # With a journal only its own events count; else a replay would depend on who starts it.
        first_group = first_group if path is None else None
        memory_bytes = int(config.memory_gib * 2**30)
        self.ledger = Ledger(next_group=first_group, keeps_taken=path is not None, memory_bytes=memory_bytes)
        self._journal: Journal | None = None
        self._broken: JournalError | None = None
        if path is None:
            return
        self._compact_at = self._segment_bytes = int(config.segment_mib * 2**20)
        number, collecting = 0, gc.isenabled()
        gc.disable()  # millions of objects are created, and none of them is garbage
        try:
            self._journal = Journal(path, config)
            for location, payload in self._journal.replay():
                apply_record(self.ledger, payload, location, path)
                number += 1
        except JournalError as error:
            logger.error("%s", error)
            self._broken = error
        finally:
            if collecting:
                gc.enable()
        if number and self._broken is None:
            logger.warning("the journal %s: %d records, %d groups", path, number, len(self.ledger.groups))

    def note(self, event: Event, *, grows: bool = False) -> None:
        """Record an event and apply it. An event that `grows` the journal is refused when the journal is full. Raises
        JournalFull, JournalError or DataError; then nothing has changed."""
        if self._broken is not None:
            raise self._broken
        if self._journal is None:
            event.apply(self.ledger, None)
            if isinstance(event, CHARGED):
                charge(self.ledger, event, len(encode(event)))
            return
        payload = encode(event)
        try:
            location = self._journal.append(payload, reserve=not grows)
        except JournalFull:
            if self.ledger.live_bytes > 0.7 * self._journal.size:  # compacting it would win little
                raise
            self._compact(self._journal)
            location = self._journal.append(payload, reserve=not grows)
        event.apply(self.ledger, location)
        charge(self.ledger, event, location.length)
        if isinstance(event, Taken | Advanced | Released) and self._journal.size > self._compact_at:
            if self.ledger.live_bytes <= self._journal.size / 2:
                self._compact(self._journal)
            else:  # look again when it has grown by a quarter
                self._compact_at = int(1.25 * self._journal.size)

    async def durable(self) -> None:
        """Wait until all events so far are as durable as the journal makes them. Raises JournalError."""
        if self._journal is not None:
            await self._journal.durable()

    def group(self, group_id: str) -> TakenGroup:
        """A complete group with its spans. Raises JournalDamaged."""
        group, rollouts = self.ledger.groups[group_id], list[TakenRollout]()
        for rollout in group.rollouts:
            assert rollout.ending is not None  # the group is complete
            spans = self.ledger.spans(rollout.key)
            calls, raw = dict(spans.calls), dict(spans.raw)
            spilled = [self._journal.read(at) for at in spans.locations] if spans.spilled and self._journal else []
            for event in map(decode, spilled):
                if isinstance(event, Called):
                    calls[event.call.call_id] = event.call
                elif isinstance(event, Traced):
                    raw.update({span.span_id: span for span in event.spans})
            rollouts.append(
                TakenRollout(
                    key=rollout.key,
                    started_at=rollout.started_at,
                    ending=rollout.ending,
                    calls=tuple(calls.values()),
                    spans=tuple(raw.values()),
                    refused_spans=dict(rollout.refused),
                )
            )
        return TakenGroup(group_id=group_id, task=group.task, rollouts=tuple(rollouts))

    def close(self) -> None:
        """Write what is pending, and release the journal."""
        if self._journal is not None:
            self._journal.close()

    def _compact(self, journal: Journal) -> None:
        recorded = self.ledger.recorded()
        payloads = (journal.read(location) for spans in recorded for location in spans.locations)
        try:
            locations = journal.compact(itertools.chain([encode(Base.of(self.ledger))], payloads))
        except OSError as error:
            logger.warning("the journal cannot be compacted now (%s)", error.strerror)
            self._compact_at = int(1.25 * journal.size)
            return
        new_locations = iter(locations[1:])
        for spans in recorded:
            spans.locations = [next(new_locations) for _ in spans.locations]
        self._compact_at = max(self._segment_bytes, 2 * journal.size)


def charge(ledger: Ledger, event: Event, size: int) -> None:
    """Charge an attempt for the bytes of an event that its agent has caused."""
    if isinstance(event, CHARGED):
        ledger.charge(event.call.key if isinstance(event, Called) else event.key, size)


def apply_record(ledger: Ledger, payload: bytes | memoryview, location: RecordLocation, folder: Path) -> None:
    """Apply the event in a record of the journal in `folder`. Raises JournalDamaged if it does not fit the ledger."""
    try:
        event = decode(payload)
        event.apply(ledger, location)
        charge(ledger, event, location.length)
    except (ValueError, KeyError, IndexError) as error:
        why = f"it does not fit what is before it ({type(error).__name__}: {error})"
        raise JournalDamaged(path_of(folder, location.segment), location.offset, why) from error
