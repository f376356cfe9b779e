"""The journal: an append-only log of records in a folder, which outlives the process that writes it.

What survives which failure: see docs/reliability.md. The journal handles bytes; `codec` gives them meaning.
While the disk is full, nothing is acknowledged; after `patience_s` the journal fails with one line.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agent_lightning.buffer import segments
from agent_lightning.buffer.segments import FRAME_BYTES, HEADER_BYTES, MAX_PAYLOAD, RecordLocation
from agent_lightning.config.running import BufferConfig
from agent_lightning.core.errors import JournalDamaged, JournalError, JournalFull
from agent_lightning.core.files import lock_folder, replacing

logger = logging.getLogger(__name__)

_RESERVE: Final = 1.1
"""Events that end rollouts may be written up to 1.1 x `buffer.max_disk_gib`: a run with a full journal can finish."""
_MODE: Final = 0o600  # permissions of the journal's files, which hold messages of agents and users


@dataclass(slots=True, eq=False)
class _Open:
    """A segment that is being written. Its file is created by the first write."""

    number: int
    size: int  # in bytes, pending bytes included
    written: int  # bytes in the file
    pending: list[bytes] = field(default_factory=list)  # appended and not written yet
    descriptor: int = -1


class Journal:
    """A journal that this process writes; no other process can write it meanwhile. `append` and `durable` must be
    called in one event loop.

        journal = Journal(Path("runs/first/journal"))
        for location, payload in journal.replay():  # records of an earlier process; cuts a torn tail
            ...
        location = journal.append(b"...")           # returns at once; records of one turn of the loop share a write
        await journal.durable()                     # until the records survive what `fsync` promises
        journal.read(location)                      # b"..."
    """

    def __init__(
        self, path: Path, config: BufferConfig = BufferConfig(), *, patience_s: float = 60.0, takeover_s: float = 5.0
    ) -> None:
        """Create and lock the folder `path`. A full disk is waited for `patience_s` seconds, and a process that holds
        the folder, and may just have been killed, `takeover_s`. Raises JournalError if the folder cannot be used."""
        self.path = path
        self.config = config
        self._patience_s = patience_s
        try:
            self._lock = lock_folder(path, wait_s=takeover_s)
        except BlockingIOError as error:
            raise JournalError(f"the journal {path} is in use by another process") from error
        except OSError as error:
            raise JournalError(f"the journal {path} cannot be used: {error.strerror}") from error
        # Segments that may have bytes to write or to bring to the disk; records are appended to the last.
        self._open: list[_Open] = []
        self._numbers: list[int] = []  # of all segments in the folder
        self.size = 0  # of all segments in bytes, pending bytes included
        self._readers: dict[int, int] = {}  # segment number -> descriptor for reading
        self._written: asyncio.Future[None] | None = None  # done when all records are as durable as `fsync` promises
        self._syncing: asyncio.Task[None] | None = None
        self._retired: list[int] = []  # descriptors to close when no sync can be using them
        self._scheduled = False
        self._full_since = 0.0
        self._failed: JournalError | None = None

    def replay(self) -> Iterator[tuple[RecordLocation, memoryview]]:
        """All records in order; afterwards the journal can be written. A payload is valid until the next iteration.
        Raises JournalDamaged, JournalError."""
        folder = self.path
        for unfinished in (*folder.glob(".*.tmp"), *folder.glob("*.half")):
            unfinished.unlink()  # a crash came during a compaction, of this version or of 0.1.0
        reader = None
        for reader in segments.segment_readers(folder):
            yield from reader.records()
            self._numbers.append(reader.segment.number)
            self.size += reader.end
        for segment in segments.list_segments(folder):
            if segment.number not in self._numbers:  # a crash came before a compaction had removed it
                segment.path.unlink()
        if reader is None:
            self._begin(1, 0)
            return
        if reader.torn:
            message = "%s: its last %d bytes were never acknowledged, or are broken: cut at byte %d"
            logger.warning(message, reader.segment.path, reader.torn, reader.end)
            os.truncate(reader.segment.path, reader.end)
        if reader.end < HEADER_BYTES:
            self._begin(self._numbers.pop(), reader.before or 0)
        else:
            self._open.append(_Open(reader.segment.number, reader.end, reader.end))

    def append(self, payload: bytes, *, reserve: bool = True) -> RecordLocation:
        """Append a record. With `reserve` it may be written although `max_disk_gib` is reached (see _RESERVE). Raises
        JournalFull, and JournalError if the journal has failed; then nothing was appended."""
        self._check()
        size = FRAME_BYTES + len(payload)
        limit = self.config.max_disk_gib * 2**30 * (_RESERVE if reserve else 1.0)
        if size > MAX_PAYLOAD:
            raise JournalError(f"a record of {size} bytes is more than a journal takes")
        if self.size + size > limit:
            reached = f"the journal {self.path} has reached its limit of {self.config.max_disk_gib:.2f} GiB"
            raise JournalFull(f"{reached}: raise buffer.max_disk_gib, or checkpoint more often")
        current = self._open[-1]
        if current.size + size > self.config.segment_mib * 2**20 and current.size > HEADER_BYTES:
            current = self._begin(current.number + 1, current.size)
        location = RecordLocation(current.number, current.size, len(payload))
        current.pending += (segments.frame(payload, location.segment, location.offset), payload)
        current.size += size
        self.size += size
        if not self._scheduled:
            asyncio.get_running_loop().call_soon(self._write_pending)
        self._scheduled = True
        return location

    async def durable(self) -> None:
        """Wait until all records appended so far are as durable as `fsync` promises. Raises JournalError."""
        self._check()
        if self._scheduled or (self._syncing is not None and self.config.fsync == "always"):
            if self._written is None:
                self._written = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._written)

    def read(self, location: RecordLocation) -> bytes:
        """The payload of a record. Raises JournalDamaged if the disk returns other bytes than were written, or none."""
        path = segments.path_of(self.path, location.segment)
        for segment in self._open:
            if segment.number == location.segment and location.offset + FRAME_BYTES + location.length > segment.written:
                return segments.unframe(b"".join(segment.pending)[location.offset - segment.written :], location, path)
        try:
            if location.segment not in self._readers:
                while len(self._readers) >= 64:  # files are open at a time
                    os.close(self._readers.pop(next(iter(self._readers))))
                self._readers[location.segment] = os.open(path, os.O_RDONLY)
            data = os.pread(self._readers[location.segment], FRAME_BYTES + location.length, location.offset)
        except OSError as error:
            raise JournalDamaged(path, location.offset, f"it cannot be read ({error.strerror})") from error
        return segments.unframe(data, location, path)

    def compact(self, payloads: Iterable[bytes]) -> list[RecordLocation]:
        """Replace all records by these, of which the first is a Base event; their locations. A crash leaves the old
        segments or the new one. Raises OSError; then nothing has changed."""
        self.flush()
        number = self._open[-1].number + 1
        locations, size = list[RecordLocation](), HEADER_BYTES
        with replacing(segments.path_of(self.path, number)) as unfinished:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            with os.fdopen(os.open(unfinished, flags, _MODE), "wb") as file:
                file.write(segments.header(number, 0, base=True))
                for payload in payloads:
                    file.write(segments.frame(payload, number, size))
                    file.write(payload)
                    locations.append(RecordLocation(number, size, len(payload)))
                    size += FRAME_BYTES + len(payload)
                file.flush()
                if self.config.fsync != "never":
                    os.fsync(file.fileno())
        self._sync_folder()
        self._close_files()
        for old in self._numbers:
            segments.path_of(self.path, old).unlink(missing_ok=True)
        self.size, self._numbers, self._open = size, [number], [_Open(number, size, size)]
        return locations

    def flush(self) -> None:
        """Write all pending bytes now. Raises OSError."""
        for segment in self._open:
            self._write(segment)

    def close(self) -> None:
        """Write all pending bytes, bring them to the disk, and unlock the folder."""
        if self._failed is None and self._open:
            self.flush()
            if self.config.fsync != "never":
                _fsync([segment.descriptor for segment in self._open])
        self._wake(self._failed)
        if self._syncing is not None:
            self._syncing.cancel()
        self._close_files()
        self._open = []
        self._lock.close()

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed
        if not self._open:
            raise JournalError(f"the journal {self.path} is closed, or was never replayed")

    def _begin(self, number: int, before: int) -> _Open:
        segment = _Open(number, HEADER_BYTES, 0, [segments.header(number, before, base=False)])
        self._open.append(segment)
        self._numbers.append(number)
        self.size += segment.size
        return segment

    def _write_pending(self) -> None:
        """Write all records that were appended in one turn of the event loop. If the disk is full, write again later;
        after `patience_s`, or after another error, the journal fails."""
        self._scheduled = False
        try:
            self.flush()
        except OSError as error:
            now, full = time.monotonic(), error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full and not self._full_since:
                logger.warning("the journal waits: no space left at %s", self.path)
                self._full_since = now
            if full and now - self._full_since < self._patience_s:
                self._scheduled = True
                asyncio.get_running_loop().call_later(0.2, self._write_pending)
                return
            after = f" for {self._patience_s:g} s: free some space" if full else ""
            self._fail(f"the journal {self.path} cannot be written ({error.strerror}){after}")
            return
        self._full_since = 0.0
        if self.config.fsync != "always":
            self._wake(None)
        if self._syncing is None and (self.config.fsync != "never" or len(self._open) > 1):
            self._syncing = asyncio.get_running_loop().create_task(self._sync())

    def _write(self, segment: _Open) -> None:
        """Write the pending bytes of a segment. Raises OSError; then its file is as it was before."""
        if not segment.pending:
            return
        path = segments.path_of(self.path, segment.number)
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
        """Bring written bytes to the disk, until all are on the disk."""
        try:
            while not any(segment.pending for segment in self._open):  # else the disk is full: `_write_pending` retries
                if self.config.fsync == "interval":
                    await asyncio.sleep(self.config.fsync_interval_s)
                dirty, waiting = [(segment, segment.written) for segment in self._open], None
                if self.config.fsync == "always":
                    waiting, self._written = self._written, None
                if self.config.fsync != "never":
                    await asyncio.to_thread(_fsync, [segment.descriptor for segment, _ in dirty])
                if waiting is not None:
                    self._wake(None, waiting)
                for segment, _ in dirty[:-1]:
                    if segment in self._open:
                        self._retired += [segment.descriptor] if segment.descriptor >= 0 else []  # it may have no file
                        self._open.remove(segment)
                if [(segment, segment.written) for segment in self._open] == dirty[-1:] and self._written is None:
                    return
        except OSError as error:  # the kernel may have discarded bytes that it could not write: the journal is unusable
            self._fail(f"the journal {self.path} cannot be brought to the disk ({error.strerror})")
        finally:
            self._syncing = None
            self._close_retired()

    def _fail(self, message: str) -> None:
        self._failed = JournalError(f"{message}; go on with agl train resume=RUN")
        logger.error("%s", self._failed)
        self._wake(self._failed)

    def _wake(self, error: JournalError | None, waiting: asyncio.Future[None] | None = None) -> None:
        """Let the callers of `durable` return, or raise the error: all callers, or those of the given future."""
        if waiting is None:
            waiting, self._written = self._written, None
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(error)

    def _close_files(self) -> None:
        """Close the files of all segments; those that are being synced are closed later."""
        for descriptor in self._readers.values():
            os.close(descriptor)
        self._readers.clear()
        self._retired += [segment.descriptor for segment in self._open if segment.descriptor >= 0]
        if self._syncing is None:
            self._close_retired()

    def _close_retired(self) -> None:
        for descriptor in self._retired:
            os.close(descriptor)
        self._retired.clear()

    def _sync_folder(self) -> None:
        if self.config.fsync != "never":
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _fsync(descriptors: Sequence[int]) -> None:
    """Bring files to the disk; a segment that has no file yet has the descriptor -1."""
    for descriptor in descriptors:
        if descriptor >= 0:
            os.fsync(descriptor)
