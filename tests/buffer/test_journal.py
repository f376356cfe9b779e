"""The journal: acknowledged records are read back, and broken records are never believed."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.buffer import segments
from agent_lightning.buffer.journal import Journal
from agent_lightning.config.running import BufferConfig
from agent_lightning.core.errors import JournalDamaged, JournalError, JournalFull


def opened(path: Path, *, segment_bytes: int = 2**20, **keys: Any) -> tuple[Journal, list[bytes]]:
    journal = Journal(path, BufferConfig(segment_mib=segment_bytes / 2**20, **keys))
    return journal, [bytes(payload) for _, payload in journal.replay()]


async def write(path: Path, payloads: list[bytes], **keys: Any) -> None:
    journal, _ = opened(path, **keys)
    for payload in payloads:
        journal.append(payload)
    await journal.durable()
    journal.close()


def payloads_in(path: Path) -> Iterator[bytes]:
    for reader in segments.segment_readers(path):
        for _, payload in reader.records():
            yield bytes(payload)


def read_all(path: Path) -> tuple[list[bytes], JournalError | None]:
    read: list[bytes] = []
    try:
        for payload in payloads_in(path):
            read.append(payload)
    except JournalError as error:
        return read, error
    return read, None


@pytest.mark.parametrize("fsync", ["always", "interval", "never"])
async def test_records_are_read_back_in_order_over_many_segments(tmp_path: Path, fsync: str) -> None:
    payloads = [os.urandom(size % 700) for size in range(300)]
    interval = {"fsync_interval_s": 0.001} if fsync == "interval" else {}
    await write(tmp_path, payloads[:200], segment_bytes=4096, fsync=fsync, **interval)
    journal, before = opened(tmp_path, segment_bytes=4096, fsync=fsync)
    assert before == payloads[:200]
    locations = [journal.append(payload) for payload in payloads[200:]]
    assert [journal.read(location) for location in locations] == payloads[200:]  # also before they are written
    await journal.durable()
    assert [journal.read(location) for location in locations] == payloads[200:]
    assert journal.size == sum(path.stat().st_size for path in tmp_path.glob("segment-*"))
    journal.close()
    assert opened(tmp_path)[1] == payloads
    assert len(segments.list_segments(tmp_path)) > 10


@pytest.mark.parametrize("fsync", ["always", "interval"])
async def test_many_acknowledgements_share_a_write(tmp_path: Path, fsync: str) -> None:
    journal, _ = opened(tmp_path, fsync=fsync)

    async def client(number: int) -> None:
        for _ in range(5):
            journal.append(b"%d" % number)
            await journal.durable()

    async with asyncio.timeout(10):
        await asyncio.gather(*(client(number) for number in range(200)))
    journal.close()
    assert len(opened(tmp_path)[1]) == 1000


async def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    journal, _ = opened(tmp_path)
    with pytest.raises(JournalError, match="in use by another process"):
        Journal(tmp_path, takeover_s=0.1)
    journal.close()
    opened(tmp_path)


async def test_at_its_limit_a_journal_takes_only_records_that_may_use_the_reserve(tmp_path: Path) -> None:
    journal, _ = opened(tmp_path, segment_bytes=2048, max_disk_gib=4096 / 2**30)
    for _ in range(36):
        journal.append(b"x" * 100, reserve=False)
    with pytest.raises(JournalFull, match=r"raise buffer\.max_disk_gib"):
        journal.append(b"x" * 100, reserve=False)
    for _ in range(3):
        journal.append(b"end" * 30)
    with pytest.raises(JournalFull):
        journal.append(b"end" * 100)
    assert 4096 < journal.size < 1.1 * 4096
    journal.close()
    assert len(opened(tmp_path)[1]) == 39


async def test_compaction_replaces_all_records_by_the_given_ones(tmp_path: Path) -> None:
    journal, _ = opened(tmp_path, segment_bytes=1024)
    for number in range(100):
        journal.append(b"%d" % number * 50)
    locations = journal.compact([b"base", b"kept"])
    assert [journal.read(location) for location in locations] == [b"base", b"kept"]
    journal.append(b"after")
    await journal.durable()
    assert len(segments.list_segments(tmp_path)) == 1
    journal.close()
    assert opened(tmp_path)[1] == [b"base", b"kept", b"after"]


async def test_a_crash_in_a_compaction_leaves_the_old_segments_or_the_new_one(tmp_path: Path) -> None:
    await write(tmp_path, [b"a", b"b"])
    old = {path.name: path.read_bytes() for path in tmp_path.glob("segment-*")}
    journal, _ = opened(tmp_path)
    journal.compact([b"base"])
    journal.close()
    (new,) = segments.list_segments(tmp_path)
    for name, content in old.items():  # it died before it had removed the old segments
        (tmp_path / name).write_bytes(content)
    journal, read = opened(tmp_path)
    assert read == [b"base"]
    journal.close()
    assert [segment.number for segment in segments.list_segments(tmp_path)] == [new.number]
    new.path.rename(tmp_path / f".{new.path.name}.tmp")  # it died before the new segment was complete
    (tmp_path / "segment-00000009.half").touch()  # the same, of an earlier version
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    assert opened(tmp_path)[1] == [b"a", b"b"]
    assert not list(tmp_path.glob("*.half"))
    assert not list(tmp_path.glob(".*.tmp"))


class FullDisk(Journal):
    """A journal whose disk is full for the next `refusals` writes."""

    full = errno.ENOSPC
    refusals = 3

    def flush(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise OSError(self.full, os.strerror(self.full))
        super().flush()


async def test_a_journal_waits_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = FullDisk(tmp_path)
    assert list(journal.replay()) == []
    journal.append(b"a")
    waiting = asyncio.create_task(journal.durable())
    await asyncio.sleep(0.1)
    assert not waiting.done()
    assert "no space left" in caplog.text
    async with asyncio.timeout(5):
        await waiting
    journal.refusals = 0
    journal.close()
    assert opened(tmp_path)[1] == [b"a"]


@pytest.mark.parametrize(("code", "patience"), [(errno.ENOSPC, 0.0), (errno.EIO, 60.0)])
async def test_a_disk_that_stays_full_or_fails_gives_one_clear_line(tmp_path: Path, code: int, patience: float) -> None:
    journal = FullDisk(tmp_path, patience_s=patience)
    journal.full, journal.refusals = code, 1000
    assert list(journal.replay()) == []
    journal.append(b"a")
    for _ in range(2):
        with pytest.raises(JournalError, match=r"cannot be written .* resume=RUN"):
            await journal.durable()
    with pytest.raises(JournalError):
        journal.append(b"b")


# Reading.


async def test_a_torn_tail_is_cut_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await write(tmp_path, [b"a" * 100, b"b" * 100])
    (segment,) = segments.list_segments(tmp_path)
    os.truncate(segment.path, segment.path.stat().st_size - 1)
    journal, read = opened(tmp_path)
    assert read == [b"a" * 100]
    assert "cut at byte" in caplog.text
    journal.append(b"c")
    await journal.durable()
    journal.close()
    assert opened(tmp_path)[1] == [b"a" * 100, b"c"]


async def test_damage_in_the_middle_is_reported_with_its_position(tmp_path: Path) -> None:
    await write(tmp_path, [b"a" * 100, b"b" * 100, b"c" * 100])
    (segment,) = segments.list_segments(tmp_path)
    second = segments.HEADER_BYTES + segments.FRAME_BYTES + 100
    damage(segment.path, second + segments.FRAME_BYTES + 50)
    read, error = read_all(tmp_path)
    assert read == [b"a" * 100]
    assert isinstance(error, JournalDamaged)
    assert (error.path, error.offset) == (segment.path, second)


async def test_a_segment_that_is_missing_or_cut_before_the_last_is_damage(tmp_path: Path) -> None:
    await write(tmp_path, [b"x" * 500] * 6, segment_bytes=1024)
    first, second, *_ = segments.list_segments(tmp_path)
    content = second.path.read_bytes()
    second.path.unlink()
    assert "is missing" in str(read_all(tmp_path)[1])
    second.path.write_bytes(content[:-1])
    assert "damaged at byte" in str(read_all(tmp_path)[1])
    second.path.write_bytes(content)
    first.path.unlink()
    assert "are missing" in str(read_all(tmp_path)[1])


async def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    await write(tmp_path, [b"a"])
    (segment,) = segments.list_segments(tmp_path)
    start = segments._HEADER.pack(b"AGLJ", segments.FORMAT + 1, 0, 1, 0)
    content = (
        start + segments._CRC.pack(segments.zlib.crc32(start)) + segment.path.read_bytes()[segments.HEADER_BYTES :]
    )
    segment.path.write_bytes(content)
    with pytest.raises(
        JournalError, match=rf"has format {segments.FORMAT + 1}, this version reads up to {segments.FORMAT}"
    ):
        opened(tmp_path)
    assert segment.path.read_bytes() == content


def damage(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], list[bytes]]:
    """Payloads, some of which look like records, and the contents of the segments that hold them."""
    path, source = tmp_path_factory.mktemp("journal"), random.Random(0)
    payloads = [source.randbytes(source.randrange(60)) for _ in range(24)]
    payloads[7] = segments.frame(payloads[3], 1, 28) + payloads[3]
    payloads[9] = segments._MARK * 5
    asyncio.run(write(path, payloads, segment_bytes=500))
    return payloads, [segment.path.read_bytes() for segment in segments.list_segments(path)]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_produces_a_wrong_record(
    data: st.DataObject, written: tuple[list[bytes], list[bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Truncation, flipped bits, garbage and moved blocks: the records read are a prefix of those written."""
    payloads, contents = written[0], [bytearray(content) for content in written[1]]
    for _ in range(data.draw(st.integers(1, 3))):
        content = contents[data.draw(st.integers(0, len(contents) - 1))]
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["cut", "flip", "garbage", "insert", "zero", "move", "append"])):
            case "cut":
                del content[at:]
            case "flip" if at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "garbage":
                content[at : at + 9] = data.draw(st.binary(min_size=9, max_size=9))
            case "insert":
                content[at:at] = data.draw(st.binary(max_size=30))
            case "zero":
                content[at:] = bytes(len(content) - at)
            case "move":
                content[at:at] = content[: data.draw(st.integers(0, len(content)))]
            case "append":
                content += data.draw(st.binary(max_size=60))
    folder = Path("/dev/shm" if os.path.isdir("/dev/shm") else tmp_path_factory.getbasetemp())
    folder = folder / f"agl-journal-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(contents, start=1):
        segments.path_of(folder, number).write_bytes(content)
    try:
        read, error = read_all(folder)
        assert read == payloads[: len(read)]
        changed = [bytes(content) for content in contents] != written[1]
        last = contents[:-1] == [bytearray(content) for content in written[1][:-1]]
        assert (
            error is not None or read == payloads or (changed and last)
        )  # only a torn end may be dropped without an error
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_a_crash_at_any_byte_leaves_the_records_before_it(
    written: tuple[list[bytes], list[bytes]], tmp_path: Path
) -> None:
    payloads, contents = written
    sizes = [segments.FRAME_BYTES + len(payload) for payload in payloads]
    before = 0
    for number, content in enumerate(contents, start=1):
        within, end = 0, segments.HEADER_BYTES
        for cut in range(len(content) + 1):
            if before + within < len(sizes) and cut >= end + sizes[before + within]:
                end += sizes[before + within]
                within += 1
            segments.path_of(tmp_path, number).write_bytes(content[:cut])
            read, error = read_all(tmp_path)
            assert error is None
            assert read == payloads[: before + within]
        before += within


WRITER = """
import asyncio, os, sys
from pathlib import Path
from agent_lightning.buffer.journal import Journal
from agent_lightning.config.running import BufferConfig

async def main():
    journal = Journal(Path(sys.argv[1]), BufferConfig(fsync=sys.argv[2], segment_mib=4096 / 2**20))
    number = sum(1 for _ in journal.replay())
    while True:
        for _ in range(3):
            journal.append(b"%d " % number * (number % 50 + 1))
            number += 1
        await journal.durable()
        os.write(1, b"%d\\n" % number)

asyncio.run(main())
"""


@pytest.mark.parametrize("fsync", ["interval", "always"])
def test_acknowledged_records_survive_kill_9(tmp_path: Path, fsync: str) -> None:
    source, number = random.Random(1), 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, fsync], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        for _ in range(source.randrange(1, 300)):
            number = int(writer.stdout.readline())
        writer.kill()
        number = max([number, *(int(line) for line in writer.stdout.read().split(b"\n")[:-1])])
        writer.wait()
        read, error = read_all(tmp_path)
        assert error is None
        assert len(read) >= number
        assert read == [b"%d " % number * (number % 50 + 1) for number in range(len(read))]
