"""The journal: an append-only log of records in a folder, that outlives the process which writes it.

    journal = Journal(JournalConfig(path=Path("runs/first/journal")))
    for place, payload in journal.replay():   # what an earlier process wrote; cuts a torn tail
        ...
    place = journal.append(b"...")            # at once; what is appended together is written together
    await journal.durable()                   # until it survives what `fsync` says
    journal.read(place)                       # b"..."

What survives what, by `fsync`: see FSYNC, and docs/reliability.md. It knows bytes only; `codec` says what they mean.
A full disk is waited for: nothing is acknowledged meanwhile, and after `patience_s` the journal fails with one line.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, Literal

from agent_lightning.buffer import segments
from agent_lightning.buffer.segments import FRAME_BYTES, HEADER_BYTES, MAX_PAYLOAD, Place
from agent_lightning.core.errors import JournalError, JournalFull

logger = logging.getLogger(__name__)

Fsync = Literal["always", "interval", "never"]
FSYNC: Final[Mapping[str, str]] = {
    "always": "acknowledged when it is on the disk: survives the loss of the machine",
    "interval": "acknowledged when the kernel has it, on the disk within the interval: survives kill -9",
    "never": "acknowledged when the kernel has it, on the disk when the kernel likes: survives kill -9",
}
_RESERVE: Final = 1.1
"""Endings and what follows them are small, and are written up to this share of the limit."""
_RETRY_S: Final = 0.2
_MODE: Final = 0o600
"""Of its files: they hold what agents and users say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalConfig:
    """Where a journal is and how it is kept."""

    path: Path
    """Its folder, on a local or a shared disk; made where it is missing."""
    fsync: Fsync = "interval"
    fsync_interval_s: float = 1.0
    """Of fsync=interval."""
    segment_bytes: int = 64 * 2**20
    max_bytes: int = 20 * 2**30
    """On disk, all segments together; see JournalFull."""
    patience_s: float = 60.0
    """Seconds that a full disk is waited for."""
    takeover_s: float = 5.0
    """Seconds that a process which was just killed may take to let go of the folder."""


@dataclass(slots=True, eq=False)
class _Open:
    """A segment that is written. Its file is made with the first write."""

    number: int
    size: int
    """With what is pending."""
    written: int
    pending: list[bytes] = field(default_factory=list)
    descriptor: int = -1


class Journal:
    """One process at a time writes one; `append` and `durable` belong to one event loop."""

    def __init__(self, config: JournalConfig) -> None:
        """Take the folder. Raises JournalError where another process has it, or it cannot be used."""
        self.config = config
        self._lock = _locked(config.path, config.takeover_s)
        self._open: list[_Open] = []
        self._numbers: list[int] = []
        self.size = 0
        """Bytes on disk, with what is about to be written."""
        self._readers: dict[int, int] = {}
        self._written: asyncio.Future[None] | None = None
        """Done when what is pending now is as durable as the policy says."""
        self._syncing: asyncio.Task[None] | None = None
        self._retired: list[int] = []
        """Descriptors that are closed when no sync may be using them."""
        self._scheduled = False
        self._full_since = 0.0
        self._failed: JournalError | None = None

    def replay(self) -> Iterator[tuple[Place, memoryview]]:
        """All records in order; afterwards it may be written. A payload is good until the next one is asked for.

        Raises JournalDamaged, JournalError."""
        for half in self.config.path.glob("*.half"):
            half.unlink()
        reading = None
        for reading in segments.readings(self.config.path):
            yield from reading.records()
            self._numbers.append(reading.segment.number)
            self.size += reading.end
        for segment in segments.listed(self.config.path):
            if segment.number not in self._numbers:  # a crash came between a compaction and its end
                segment.path.unlink()
        if reading is None:
            self._begin(1, 0)
            return
        if reading.torn:
            message = "%s: its last %d bytes were never acknowledged, or are broken: cut at byte %d"
            logger.warning(message, reading.segment.path, reading.torn, reading.end)
            os.truncate(reading.segment.path, reading.end)
        if reading.end < HEADER_BYTES:
            self._numbers.pop()
            self._begin(reading.segment.number, reading.before or 0)
        else:
            self._open.append(_Open(reading.segment.number, reading.end, reading.end))

    def append(self, payload: bytes, *, ending: bool = True) -> Place:
        """Put one record at the end. `ending`: it is one of those few that are written although the limit is reached.

        Raises JournalFull, and JournalError where the journal has failed: then nothing was appended."""
        self._check()
        size = FRAME_BYTES + len(payload)
        limit = self.config.max_bytes * (_RESERVE if ending else 1.0)
        if size > MAX_PAYLOAD:
            raise JournalError(f"a record of {size} bytes is more than a journal takes")
        if self.size + size > limit:
            raise JournalFull(
                f"the journal {self.config.path} has reached its limit of {self.config.max_bytes / 2**30:.2f} GiB: "
                f"raise buffer.max_disk_gib, or checkpoint more often"
            )
        current = self._open[-1]
        if current.size + size > self.config.segment_bytes and current.size > HEADER_BYTES:
            current = self._begin(current.number + 1, current.size)
        place = Place(current.number, current.size, len(payload))
        current.pending += (segments.frame(payload, place.segment, place.offset), payload)
        current.size += size
        self.size += size
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)
        return place

    async def durable(self) -> None:
        """Wait until all that was appended so far survives what the policy says. Raises JournalError."""
        self._check()
        if self._scheduled or (self._syncing is not None and self.config.fsync == "always"):
            if self._written is None:
                self._written = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._written)

    def read(self, place: Place) -> bytes:
        """The payload of a record. Raises JournalDamaged where the disk gives back something else."""
        path = segments.path_of(self.config.path, place.segment)
        for segment in self._open:
            if segment.number == place.segment and place.offset + FRAME_BYTES + place.length > segment.written:
                return segments.unframe(b"".join(segment.pending)[place.offset - segment.written :], place, path)
        if place.segment not in self._readers:
            while len(self._readers) >= 64:
                os.close(self._readers.pop(next(iter(self._readers))))
            self._readers[place.segment] = os.open(path, os.O_RDONLY)
        data = os.pread(self._readers[place.segment], FRAME_BYTES + place.length, place.offset)
        return segments.unframe(data, place, path)

    def compact(self, payloads: Iterable[bytes]) -> list[Place]:
        """Begin anew with these records, which say all that is known, and remove what was before; their places.

        A crash leaves the old segments or the new one. Raises OSError, then nothing has changed."""
        self.flush()
        number = self._open[-1].number + 1
        path = segments.path_of(self.config.path, number)
        half, places, size = path.with_suffix(".half"), list[Place](), HEADER_BYTES
        try:
            with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE), "wb") as file:
                file.write(segments.header(number, 0, base=True))
                for payload in payloads:
                    file.write(segments.frame(payload, number, size))
                    file.write(payload)
                    places.append(Place(number, size, len(payload)))
                    size += FRAME_BYTES + len(payload)
                file.flush()
                if self.config.fsync != "never":
                    os.fsync(file.fileno())
            half.replace(path)
        except OSError:
            half.unlink(missing_ok=True)
            raise
        self._sync_folder()
        self._let_go()
        for old in self._numbers:
            segments.path_of(self.config.path, old).unlink(missing_ok=True)
        self.size, self._numbers, self._open = size, [number], [_Open(number, size, size)]
        return places

    def flush(self) -> None:
        """Write what is pending, now. Raises OSError."""
        for segment in self._open:
            self._write(segment)

    def close(self) -> None:
        """Write and sync what is pending, and let go of the folder."""
        if self._failed is None and self._open:
            self.flush()
            if self.config.fsync != "never":
                for segment in self._open:
                    if segment.descriptor >= 0:
                        os.fsync(segment.descriptor)
        self._settle(self._failed)
        if self._syncing is not None:
            self._syncing.cancel()
        self._let_go()
        self._open = []
        self._lock.close()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed
        if not self._open:
            raise JournalError(f"the journal {self.config.path} is closed, or was never replayed")

    def _begin(self, number: int, before: int) -> _Open:
        segment = _Open(number, HEADER_BYTES, 0, [segments.header(number, before, base=False)])
        self._open.append(segment)
        self._numbers.append(number)
        self.size += segment.size
        return segment

    def _turn(self) -> None:
        """At the end of a turn of the event loop: one write for all that was appended in it."""
        self._scheduled = False
        try:
            self.flush()
        except OSError as error:
            self._hold(error)
            return
        self._full_since = 0.0
        if self.config.fsync != "always":
            self._settle(None)
        if self._syncing is None and (self.config.fsync != "never" or len(self._open) > 1):
            self._syncing = asyncio.get_running_loop().create_task(self._sync())

    def _hold(self, error: OSError) -> None:
        """The disk is full: try again until it is not. Anything else, or too long: the journal has failed."""
        now = time.monotonic()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full and not self._full_since:
            logger.warning("the journal waits: no space left at %s", self.config.path)
            self._full_since = now
        if full and now - self._full_since < self.config.patience_s:
            self._scheduled = True
            asyncio.get_running_loop().call_later(_RETRY_S, self._turn)
            return
        after = f" for {self.config.patience_s:g} s: free some space" if full else ""
        self._fail(f"the journal {self.config.path} cannot be written ({error.strerror}){after}")

    def _write(self, segment: _Open) -> None:
        """Raises OSError; what was written of the pending part is taken back."""
        if not segment.pending:
            return
        path = segments.path_of(self.config.path, segment.number)
        if segment.descriptor < 0:
            segment.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, _MODE)
            self._sync_folder()
        data = memoryview(b"".join(segment.pending))
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(segment.descriptor, data[done:], segment.written + done)
        except OSError:
            os.ftruncate(segment.descriptor, segment.written)
            raise
        segment.pending.clear()
        segment.written += done

    async def _sync(self) -> None:
        """Bring to the disk what was written, again while there is more; ends when all is there."""
        try:
            while not any(segment.pending for segment in self._open):  # else the disk is full: `_turn` comes again
                if self.config.fsync == "interval":
                    await asyncio.sleep(self.config.fsync_interval_s)
                dirty, waiting = [(one, one.written) for one in self._open], None
                if self.config.fsync == "always":
                    waiting, self._written = self._written, None
                if self.config.fsync != "never":
                    await asyncio.to_thread(_fsync, [one.descriptor for one, _ in dirty if one.descriptor >= 0])
                if waiting is not None:
                    self._settle(None, waiting)
                for segment, _ in dirty[:-1]:
                    if segment in self._open:
                        self._retired.append(segment.descriptor)
                        self._open.remove(segment)
                if [(one, one.written) for one in self._open] == dirty[-1:] and self._written is None:
                    return
        except OSError as error:  # what the kernel could not write it may have thrown away: never trust it again
            self._fail(f"the journal {self.config.path} cannot be brought to the disk ({error.strerror})")
        finally:
            self._syncing = None
            self._close_retired()

    def _fail(self, message: str) -> None:
        self._failed = JournalError(f"{message}; go on with agl train resume=RUN")
        logger.error("%s", self._failed)
        self._settle(self._failed)

    def _settle(self, error: JournalError | None, waiting: asyncio.Future[None] | None = None) -> None:
        """Wake those who wait: all, or the given ones."""
        if waiting is None:
            waiting, self._written = self._written, None
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(error)

    def _let_go(self) -> None:
        """Close every segment's files, but for those that are being synced."""
        for descriptor in self._readers.values():
            os.close(descriptor)
        self._readers.clear()
        self._retired += [one.descriptor for one in self._open if one.descriptor >= 0]
        if self._syncing is None:
            self._close_retired()

    def _close_retired(self) -> None:
        for descriptor in self._retired:
            os.close(descriptor)
        self._retired.clear()

    def _sync_folder(self) -> None:
        if self.config.fsync != "never":
            descriptor = os.open(self.config.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _fsync(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.fsync(descriptor)


def _locked(folder: Path, wait_s: float) -> IO[bytes]:
    """The folder, made and locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("wb")
    except OSError as error:
        raise JournalError(f"the journal {folder} cannot be used: {error.strerror}") from error
    until = time.monotonic() + wait_s
    while True:  # ends when it is free, or after some seconds
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError as error:
            if time.monotonic() > until:
                lock.close()
                raise JournalError(f"the journal {folder} is in use by another process") from error
            time.sleep(0.05)
