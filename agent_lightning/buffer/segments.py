"""The journal's files: what a segment looks like, and how one is read without ever believing a broken record.

    segment  =  header  record*
    header   =  "AGLJ"  format:u16  flags:u16  number:u64  before:u64  crc:u32     28 bytes
    record   =  mark:u32  length:u32  crc:u32  payload                             12 bytes and the payload

Numbers are little-endian. `before` is the size of the segment before this one, so that none can end early unseen. A
record's checksum (CRC-32) is over its segment's number, its own place in the file, its length and its payload: a record
that was moved or copied is no record. The mark makes it possible to find the next record behind a broken one, and so to
tell a torn tail, which a crash leaves, from damage in the middle.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Final, NamedTuple

from agent_lightning.core.errors import JournalDamaged, JournalError

FORMAT: Final = 1
"""Of what is written; a reader refuses higher ones."""
BASE: Final = 1
"""Flag: the segment begins with all that was known, so older ones say nothing more."""
_MAGIC: Final = b"AGLJ"
_HEADER: Final = struct.Struct("<4sHHQQ")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
_MARK: Final = b"\xa5\x1e\xc0\xed"
_FRAME: Final = struct.Struct("<4sII")
FRAME_BYTES: Final = _FRAME.size
_PLACE: Final = struct.Struct("<QQI")
MAX_PAYLOAD: Final = 2**31
_NAME: Final = re.compile(r"segment-(\d{8})\.agl")


class Place(NamedTuple):
    """Where a record is: its segment, the first byte of its frame there, and the length of its payload."""

    segment: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A file of the journal."""

    path: Path
    number: int


def path_of(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:08d}.agl"


def listed(folder: Path) -> list[Segment]:
    """The segments in a folder, in order. Raises JournalError where it cannot be read."""
    try:
        names = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    except OSError as error:
        raise JournalError(f"the journal {folder} cannot be read: {error.strerror}") from error
    return sorted((Segment(path, int(found[1])) for path, found in names if found), key=lambda one: one.number)


def is_base(segment: Segment) -> bool:
    """Whether all that was known before is in it; False also where its header is broken."""
    with segment.path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES or _CRC.unpack_from(start, _HEADER.size)[0] != zlib.crc32(start[: _HEADER.size]):
        return False
    return bool(_HEADER.unpack_from(start)[2] & BASE)


def header(number: int, before: int, *, base: bool) -> bytes:
    start = _HEADER.pack(_MAGIC, FORMAT, BASE if base else 0, number, before)
    return start + _CRC.pack(zlib.crc32(start))


def frame(payload: bytes, number: int, offset: int) -> bytes:
    """What stands before a payload that is written at `offset` of segment `number`."""
    return _FRAME.pack(_MARK, len(payload), _checksum(payload, number, offset))


def unframe(data: bytes, place: Place, path: Path) -> bytes:
    """The payload of the record that was read from its place. Raises JournalDamaged."""
    payload = _record_at(data, 0, place.segment, place.offset)
    if payload is None or len(payload) != place.length:
        raise JournalDamaged(path, place.offset, "the record does not match its checksum")
    return bytes(payload)


@dataclass(slots=True)
class Reading:
    """Goes through one segment; what is left behind its last whole record is known in the end.

    Raises JournalDamaged where a broken record has a whole one behind it, or where `last` is not set and anything is
    broken; JournalError where the format is newer.
    """

    segment: Segment
    last: bool
    """Whether a torn tail is to be expected: nothing was ever written behind this segment."""
    before: int | None = None
    """Bytes of the segment before it, where that counts."""
    end: int = 0
    """Behind the last whole record; 0 where not even the header is whole."""
    torn: int = 0
    """Bytes behind `end` that are no record."""

    def records(self) -> Iterator[tuple[Place, memoryview]]:
        """Places and payloads; a payload is good until the next one is asked for."""
        with self.segment.path.open("rb") as file:
            size = file.seek(0, 2)
            if size < HEADER_BYTES:
                self._tear(size, "its header is cut")
                return
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data, memoryview(data) as view:
                self._read_header(bytes(view[:HEADER_BYTES]))
                while self.end < size:
                    payload = _record_at(view, self.end, self.segment.number, self.end)
                    if payload is None:
                        self._judge(data, view)
                        return
                    place = Place(self.segment.number, self.end, len(payload))
                    self.end += FRAME_BYTES + len(payload)
                    with payload:
                        yield place, payload

    def _read_header(self, start: bytes) -> None:
        path = self.segment.path
        magic, form, _, number, before = _HEADER.unpack_from(start)
        if magic != _MAGIC or _CRC.unpack_from(start, _HEADER.size)[0] != zlib.crc32(start[: _HEADER.size]):
            raise JournalDamaged(path, 0, "its header is not one of a journal")
        if form > FORMAT:
            raise JournalError(
                f"{path} has format {form}, this version reads up to {FORMAT}: use the agent-lightning that wrote it"
            )
        if number != self.segment.number:
            raise JournalDamaged(path, 0, f"its name says another number than its header, {number}")
        if self.before is not None and before != self.before:
            raise JournalDamaged(path, 0, f"the segment before it should have {before} bytes and has {self.before}")
        self.end = HEADER_BYTES

    def _judge(self, data: mmap, view: memoryview) -> None:
        """The record at `end` is broken: a torn tail, or damage, where there is a whole one behind it."""
        at = data.find(_MARK, self.end + 1)
        while at >= 0:
            found = _record_at(view, at, self.segment.number, at)
            if found is not None:
                found.release()
                raise JournalDamaged(self.segment.path, self.end, f"a whole record follows at byte {at}")
            at = data.find(_MARK, at + 1)
        self._tear(len(view) - self.end, "it does not end with a whole record, and later segments follow")

    def _tear(self, torn: int, why: str) -> None:
        if not self.last:
            raise JournalDamaged(self.segment.path, self.end, why)
        self.torn = torn


def readings(folder: Path) -> Iterator[Reading]:
    """The segments that count, in order, each to be gone through before the next is asked for.

    Raises JournalError, and JournalDamaged where one is missing."""
    found = listed(folder)
    bases = [index for index, one in enumerate(found) if is_base(one)]
    found = found[bases[-1] if bases else 0 :]
    if found and not bases and found[0].number != 1:
        raise JournalError(f"{folder} is damaged: the segments before {found[0].path.name} are missing")
    reading = None
    for index, segment in enumerate(found):
        if index and segment.number != found[index - 1].number + 1:
            raise JournalError(f"{folder} is damaged: a segment before {segment.path.name} is missing")
        before = None if reading is None else reading.end
        reading = Reading(segment, last=index == len(found) - 1, before=before)
        yield reading


def _record_at(data: memoryview | bytes, start: int, number: int, offset: int) -> memoryview | None:
    """The payload of the record at `start` of `data`, which is `offset` in its file; None where none is whole."""
    if start + FRAME_BYTES > len(data):
        return None
    mark, length, checksum = _FRAME.unpack_from(data, start)
    first = start + FRAME_BYTES
    if mark != _MARK or first + length > len(data):
        return None
    payload = memoryview(data)[first : first + length]
    return payload if _checksum(payload, number, offset) == checksum else None


def _checksum(payload: bytes | memoryview, number: int, offset: int) -> int:
    return zlib.crc32(payload, zlib.crc32(_PLACE.pack(number, offset, len(payload))))
