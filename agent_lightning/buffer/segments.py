"""The journal's files: the layout of a segment, and a reader that never believes a broken record.

    segment  =  header  record*
    header   =  "AGLJ"  format:u16  flags:u16  number:u64  before:u64  crc:u32     28 bytes
    record   =  mark:u32  length:u32  crc:u32  payload                             12 bytes and the payload

Numbers are little-endian. `before` is the size of the segment before this one, so that a segment that was cut short is
noticed. A record's checksum (CRC-32) covers its segment's number, its position in the file, its length and its payload:
a record that was moved or copied is invalid. The mark makes it possible to find the next record behind a broken one,
and so to distinguish a torn tail, which a crash leaves, from damage in the middle.
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

FORMAT: Final = 2
"""The format that is written; a reader refuses higher ones. In format 1 some fields of a Base have other names."""
BASE: Final = 1  # header flag: the segment begins with a Base event, so that older segments are not needed
_MAGIC: Final = b"AGLJ"
_HEADER: Final = struct.Struct("<4sHHQQ")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
_MARK: Final = b"\xa5\x1e\xc0\xed"
_FRAME: Final = struct.Struct("<4sII")
FRAME_BYTES: Final = _FRAME.size
_POSITION: Final = struct.Struct("<QQI")
MAX_PAYLOAD: Final = 2**31
_NAME: Final = re.compile(r"segment-(\d{8})\.agl")


class RecordLocation(NamedTuple):
    """The place of a record: its segment, the first byte of its frame in the file, and the length of its payload."""

    segment: int
    offset: int
    length: int


class Segment(NamedTuple):
    """A file of the journal."""

    path: Path
    number: int


def path_of(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:08d}.agl"


def list_segments(folder: Path) -> list[Segment]:
    """The segments in a folder, in order. Raises JournalError if it cannot be read."""
    try:
        names = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    except OSError as error:
        raise JournalError(f"the journal {folder} cannot be read: {error.strerror}") from error
    return sorted((Segment(path, int(name[1])) for path, name in names if name), key=lambda segment: segment.number)


def header(number: int, before: int, *, base: bool) -> bytes:
    """The first bytes of segment `number`, which follows a segment of `before` bytes."""
    start = _HEADER.pack(_MAGIC, FORMAT, BASE if base else 0, number, before)
    return start + _CRC.pack(zlib.crc32(start))


def frame(payload: bytes, number: int, offset: int) -> bytes:
    """The bytes before a payload that is written at `offset` of segment `number`."""
    return _FRAME.pack(_MARK, len(payload), _checksum(payload, number, offset))


def unframe(data: bytes, location: RecordLocation, path: Path) -> bytes:
    """The payload of the record whose bytes were read from its location. Raises JournalDamaged."""
    payload = _payload_at(data, 0, location.segment, location.offset)
    if payload is None or len(payload) != location.length:
        raise JournalDamaged(path, location.offset, "the record does not match its checksum")
    return bytes(payload)


@dataclass(slots=True)
class SegmentReader:
    """Reads one segment from its start to its last valid record. Raises JournalDamaged if a valid record follows a
    broken one, or if anything is broken and `last` is not set; JournalError if the format is newer."""

    segment: Segment
    last: bool  # whether this is the last segment, which a crash may have left with a torn tail
    before: int | None = None  # size in bytes of the segment before this one; None if that does not matter
    end: int = 0  # offset behind the last valid record; 0 if not even the header is valid
    torn: int = 0  # number of bytes behind `end`, which are no record

    def records(self) -> Iterator[tuple[RecordLocation, memoryview]]:
        """Locations and payloads; a payload is valid until the next iteration."""
        path, number = self.segment.path, self.segment.number
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < HEADER_BYTES:
                self._accept_torn(size, "its header is cut")
                return
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data, memoryview(data) as view:
                fields = _read_header(bytes(view[:HEADER_BYTES]))
                if fields is None:
                    raise JournalDamaged(path, 0, "its header is not one of a journal")
                form, _, own_number, before = fields
                if form > FORMAT:
                    remedy = "use the agent-lightning that wrote it"
                    raise JournalError(f"{path} has format {form}, this version reads up to {FORMAT}: {remedy}")
                if own_number != number:
                    raise JournalDamaged(path, 0, f"its name says another number than its header, {own_number}")
                if self.before is not None and before != self.before:
                    why = f"the segment before it should have {before} bytes and has {self.before}"
                    raise JournalDamaged(path, 0, why)
                self.end = HEADER_BYTES
                while self.end < size:
                    payload = _payload_at(view, self.end, number, self.end)
                    if payload is None:
                        self._check_tail(data, view)
                        return
                    location = RecordLocation(number, self.end, len(payload))
                    self.end += FRAME_BYTES + len(payload)
                    with payload:
                        yield location, payload

    def _check_tail(self, data: mmap, view: memoryview) -> None:
        """Judge the broken record at `end`: with a valid record behind it, it is damage; else a torn tail."""
        at = data.find(_MARK, self.end + 1)
        while at >= 0:
            payload = _payload_at(view, at, self.segment.number, at)
            if payload is not None:
                payload.release()
                raise JournalDamaged(self.segment.path, self.end, f"a whole record follows at byte {at}")
            at = data.find(_MARK, at + 1)
        self._accept_torn(len(view) - self.end, "it does not end with a whole record, and later segments follow")

    def _accept_torn(self, torn: int, why: str) -> None:
        if not self.last:
            raise JournalDamaged(self.segment.path, self.end, why)
        self.torn = torn


def segment_readers(folder: Path) -> Iterator[SegmentReader]:
    """Readers of the segments that count, in order; read each to its end before advancing to the next. Raises
    JournalError, and JournalDamaged if a segment is missing."""
    segments = list_segments(folder)
    bases = []
    for index, segment in enumerate(segments):
        with segment.path.open("rb") as file:
            fields = _read_header(file.read(HEADER_BYTES))
        if fields is not None and fields[1] & BASE:
            bases.append(index)
    segments = segments[bases[-1] if bases else 0 :]
    if segments and not bases and segments[0].number != 1:
        raise JournalError(f"{folder} is damaged: the segments before {segments[0].path.name} are missing")
    reader = None
    for index, segment in enumerate(segments):
        if index and segment.number != segments[index - 1].number + 1:
            raise JournalError(f"{folder} is damaged: a segment before {segment.path.name} is missing")
        before = None if reader is None else reader.end
        reader = SegmentReader(segment, last=index == len(segments) - 1, before=before)
        yield reader


def _read_header(start: bytes) -> tuple[int, int, int, int] | None:
    """Format, flags, number and `before` of a segment's first bytes; None if they are no header of a journal."""
    if len(start) < HEADER_BYTES or _CRC.unpack_from(start, _HEADER.size)[0] != zlib.crc32(start[: _HEADER.size]):
        return None
    magic, form, flags, number, before = _HEADER.unpack_from(start)
    return (form, flags, number, before) if magic == _MAGIC else None


def _payload_at(data: memoryview | bytes, start: int, number: int, offset: int) -> memoryview | None:
    """The payload of the record at `start` of `data`, which is `offset` in its file; None if no valid record starts
    at this byte."""
    if start + FRAME_BYTES > len(data):
        return None
    mark, length, checksum = _FRAME.unpack_from(data, start)
    first = start + FRAME_BYTES
    if mark != _MARK or first + length > len(data):
        return None
    payload = memoryview(data)[first : first + length]
    return payload if _checksum(payload, number, offset) == checksum else None


def _checksum(payload: bytes | memoryview, number: int, offset: int) -> int:
    return zlib.crc32(payload, zlib.crc32(_POSITION.pack(number, offset, len(payload))))
