"""A buffer with a journal: everything that it acknowledged survives any crash, exactly once."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from agents_for_tests import RUN_SECRET, make_call, make_task
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.api.cli.main import main
from agent_lightning.buffer import segments
from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.codec import decode, encode
from agent_lightning.buffer.events import KINDS, Admitted, Base, Called
from agent_lightning.buffer.taken import TakenGroup, take_groups
from agent_lightning.config.running import BufferConfig
from agent_lightning.core.errors import DataError, JournalError, JournalFull, UnknownRollout
from agent_lightning.core.types import Ending, Outcome, RolloutKey, Task
from agent_lightning.credit.failures import Retries
from agent_lightning.spans.tree import RawSpan


def open_buffer(path: Path, *, config: BufferConfig = BufferConfig(), **keys: Any) -> Buffer:
    return Buffer(run_secret=RUN_SECRET, journal=path, config=config, **keys)


async def again(buffer: Buffer, path: Path, **keys: Any) -> Buffer:
    """The buffer after its process died."""
    await buffer.close()
    return open_buffer(path, **keys)


def same(first: object, second: object) -> bool:
    """Whether two values would be equal in a journal."""
    return plain(first) == plain(second)


def plain(value: object) -> object:
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def base_of(buffer: Buffer) -> Base:
    return decode(encode(Base.of(buffer._store.ledger)))  # type: ignore[return-value]


def complete_groups(buffer: Buffer) -> list[TakenGroup]:
    """The groups that could be taken, with their spans."""
    store = buffer._store
    return [store.group(group_id) for ids in store.ledger.complete.values() for group_id in ids]


async def play(buffer: Buffer, source: random.Random, num: int) -> None:
    """Do `num` random operations of clients, most of them sensible, as the loop and workers would."""
    for _ in range(num):
        ledger = buffer._store.ledger
        running = [rollout.key for rollout in ledger.open_rollouts() if rollout.phase == "running"]
        key = source.choice(running) if running else RolloutKey(split="train", group=99, index=0)
        request = f"request-{source.randrange(10**9)}" if source.random() < 0.5 else ""
        try:
            match source.choice("alcccssmffffftvdxe"):
                case "a":
                    split: Any = "train" if source.random() < 0.8 else "val"
                    await buffer.admit(make_task(), split=split, num_rollouts=source.randrange(1, 4), request=request)
                case "l":
                    await buffer.lease(source.randrange(1, 6), 0.0, deadline=source.choice([0.0, 1e9]), request=request)
                case "c":
                    await buffer.record(make_call(key, f"call-{source.randrange(5)}", num_tokens=source.randrange(9)))
                case "s":
                    span = RawSpan(
                        span_id=f"{source.randrange(3)}", name="n", started_at=0.0, ended_at=1.0, attributes={}
                    )
                    await buffer.record_spans(key, [span], {"late": 1}, request=request)
                case "m":
                    await buffer.note_failure(key, Outcome.ENGINE_ERROR, "the engine is broken")
                case "f":
                    outcome = source.choice([Outcome.FINISHED, Outcome.FINISHED, Outcome.ENGINE_ERROR, Outcome.TIMEOUT])
                    await buffer.finish(
                        key, Ending(outcome=outcome, reward=1.0 if outcome is Outcome.FINISHED else None)
                    )
                case "t" | "v" as which:
                    split = "train" if which == "t" else "val"
                    if ledger.complete[split]:
                        await buffer.take(1, split=split, request=request)
                case "d":
                    taken = ledger.counts.count.get("taken", 0)
                    await buffer.advance(trained=taken // 2, dropped={"x": taken - taken // 2}, request=request)
                case "x":
                    await buffer.cancel("stop") if source.random() < 0.1 else await buffer.milestone(
                        source.randrange(4)
                    )
                case "e":
                    await buffer.expire(1e6 + 1e9) if source.random() < 0.2 else await buffer.forget_before(1)
        except UnknownRollout:
            pass


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), small=st.booleans())
def test_a_buffer_that_restarts_has_the_same_state(
    seed: int, small: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """After any operations; also if the journal was compacted, and if spans are only on disk."""

    async def run() -> None:
        path, source = tmp_path_factory.mktemp("journal"), random.Random(seed)
        keys: dict[str, Any] = {"retries": Retries(max_attempts=2), "grace": 0.0}
        if small:
            keys |= {"config": BufferConfig(memory_gib=0, segment_mib=2000 / 2**20)}
        buffer = open_buffer(path, **keys)
        for _ in range(4):
            await play(buffer, source, source.randrange(60))
            before = base_of(buffer)
            groups = complete_groups(buffer)
            buffer = await again(buffer, path, **keys)
            assert same(base_of(buffer), before)
            assert same(complete_groups(buffer), groups)
            balance(await stats_of(buffer))
        await buffer.close()
        shutil.rmtree(path)

    asyncio.run(run())


async def stats_of(buffer: Buffer) -> dict[str, Any]:
    stats = await buffer.stats()
    return {name: getattr(stats, name) for name in stats.__slots__}


def balance(stats: Mapping[str, Any]) -> None:
    ended = stats["complete"] + stats["taken"] + stats["trained"] + sum(stats["dropped"].values())
    assert stats["admitted"] == stats["waiting"] + stats["running"] + ended


async def test_a_crash_at_any_byte_leaves_exactly_what_was_acknowledged(tmp_path: Path) -> None:
    """Every acknowledged state is noted with the journal's size; a journal cut at any byte restores the last state."""
    buffer, source = open_buffer(tmp_path / "complete", retries=Retries(max_attempts=2)), random.Random(5)
    states: list[tuple[int, object]] = [(0, plain(base_of(buffer)))]
    while buffer._store._journal is not None and buffer._store._journal.size < 5000:
        await play(buffer, source, 1)
        states.append((buffer._store._journal.size, plain(base_of(buffer))))
    await buffer.close()
    (segment,) = segments.list_segments(tmp_path / "complete")
    content = segment.path.read_bytes()
    cut_path = tmp_path / "cut"
    cut_path.mkdir()
    for cut in [*range(0, len(content), 23), len(content)]:
        segments.path_of(cut_path, 1).write_bytes(content[:cut])
        buffer = open_buffer(cut_path)
        restored = plain(base_of(buffer))
        acknowledged = [state for size, state in states if size <= cut]
        at = next(index for index, (_, state) in enumerate(states) if state == restored)
        assert at >= len(acknowledged) - 1 or restored == acknowledged[-1]
        await buffer.close()


async def run_rollouts(buffer: Buffer, num: int, *, calls: int = 1) -> None:
    for lease in await buffer.lease(num, 0.0):
        for number in range(calls):
            await buffer.record(make_call(lease.key, f"{lease.key.rollout_id}-{number}", num_tokens=50))
        await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=1.0, output=lease.key.rollout_id))


async def test_running_rollouts_continue_after_a_restart_and_a_repeated_call_is_recorded_once(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 0.0, deadline=60.0)
    call = make_call(lease.key, "first")
    assert await buffer.record(call) == 31
    buffer = await again(buffer, tmp_path)
    assert await buffer.record(call) == 31
    assert await buffer.record(make_call(lease.key, "second")) == 30
    await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=0.5))
    buffer = await again(buffer, tmp_path)
    with pytest.raises(UnknownRollout):
        await buffer.record(make_call(lease.key, "late"))
    (group,) = await take_groups(buffer, 1, split="train")
    assert [call.call_id for call in group.trajectories[0].calls] == ["first", "second"]


async def test_a_repeated_request_gets_the_first_answer(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    for _ in range(2):
        assert await buffer.admit(make_task(), split="train", num_rollouts=2, request="a") == "train-0"
        buffer = await again(buffer, tmp_path)
    for _ in range(2):
        leases = await buffer.lease(8, 0.0, request="b")
        assert [lease.key.rollout_id for lease in leases] == ["train-0-0", "train-0-1"]
        buffer = await again(buffer, tmp_path)
    for lease in leases:
        await buffer.finish(lease.key, Ending(outcome=Outcome.TIMEOUT))
    taken: list[TakenGroup] = []
    for _ in range(2):
        taken += await buffer.take(1, split="train", request="c")
        buffer = await again(buffer, tmp_path)
    assert same(taken[0], taken[1])
    for _ in range(2):
        await buffer.advance(trained=1, dropped={"timeout": 1}, request="d")
        buffer = await again(buffer, tmp_path)
    stats = await buffer.stats()
    assert (stats.admitted, stats.trained, stats.dropped, stats.taken) == (2, 1, {"timeout": 1}, 0)


async def test_a_deadline_survives_a_restart(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, retries=Retries(max_attempts=2), grace=0.0)
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 0.0, deadline=10.0)
    buffer = await again(buffer, tmp_path, retries=Retries(max_attempts=2), grace=0.0)
    expires_at = buffer._store.ledger.attempt(lease.key).expires_at
    assert await buffer.expire(expires_at - 1) == 0
    assert await buffer.expire(expires_at + 1) == 1
    assert [lease.key.attempt for lease in await buffer.lease(1, 0.0)] == [1]


async def test_spans_beyond_the_memory_are_read_back_from_disk(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"config": BufferConfig(memory_gib=5000 / 2**30, segment_mib=10_000 / 2**20)}
    buffer, plain_buffer = open_buffer(tmp_path, **keys), Buffer(run_secret=RUN_SECRET)
    for source in (buffer, plain_buffer):
        for _ in range(20):
            await source.admit(make_task(), split="train", num_rollouts=2)
        await run_rollouts(source, 40, calls=3)
    held = sum(len(spans.calls) for spans in buffer._store.ledger.recorded())
    assert 0 < held < 30
    for source in (buffer, plain_buffer):
        groups = await take_groups(source, 20, split="train")
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        assert [len(trajectory.calls) for trajectory in trajectories] == [3] * 40
        assert all(trajectory.output == trajectory.key.rollout_id for trajectory in trajectories)


async def test_the_journal_of_a_long_run_stays_small(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, config=BufferConfig(segment_mib=20_000 / 2**20))
    for _ in range(60):
        await buffer.admit(make_task(), split="train", num_rollouts=4)
        await run_rollouts(buffer, 4, calls=5)
        await take_groups(buffer, 1, split="train")
        await buffer.advance(trained=4, dropped={})
        assert sum(path.stat().st_size for path in tmp_path.glob("segment-*")) < 60_000
    buffer = await again(buffer, tmp_path)
    stats = await buffer.stats()
    assert (stats.admitted, stats.trained, stats.next_group["train"], stats.calls) == (240, 240, 60, 1200)


async def test_a_full_journal_refuses_new_work_and_lets_running_rollouts_end(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, config=BufferConfig(max_disk_gib=20_000 / 2**30, segment_mib=10_000 / 2**20))
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 0.0)
    calls = [make_call(lease.key, f"{number}", num_tokens=50) for number in range(100)]
    with pytest.raises(JournalFull, match=r"reached its limit .* raise buffer\.max_disk_gib"):
        await asyncio.gather(*map(buffer.record, calls))
    with pytest.raises(JournalFull):
        await buffer.admit(Task(task_id="big", payload={"text": "x" * 1000}), split="train", num_rollouts=1)
    await buffer.finish(lease.key, Ending(outcome=Outcome.AGENT_ERROR, error="the journal is full"))
    (group,) = await take_groups(buffer, 1, split="train")
    await buffer.advance(trained=1, dropped={})
    assert len(group.trajectories[0].calls) > 10
    await buffer.milestone(1)
    await buffer.forget_before(1)  # the checkpoint is complete: trained groups make room
    for number in range(1, 20):
        assert await buffer.admit(make_task(), split="train", num_rollouts=1) == f"train-{number}"


async def test_with_a_damaged_journal_every_change_fails_with_a_clear_line(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    for _ in range(3):
        await buffer.admit(make_task(), split="train", num_rollouts=1)
    await buffer.close()
    (segment,) = segments.list_segments(tmp_path)
    content = bytearray(segment.path.read_bytes())
    content[segments.HEADER_BYTES + segments.FRAME_BYTES] ^= 1
    segment.path.write_bytes(content)
    buffer = open_buffer(tmp_path)
    with pytest.raises(JournalError, match=f"{segment.path} is damaged at byte {segments.HEADER_BYTES}"):
        await buffer.admit(make_task(), split="train", num_rollouts=1)
    assert segment.path.read_bytes() == content


async def test_the_secret_of_the_run_is_not_in_the_journal(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 0.0)
    await buffer.record(make_call(lease.key, "first"))
    await buffer.close()
    content = b"".join(segment.path.read_bytes() for segment in segments.list_segments(tmp_path))
    assert b"task-0" in content
    assert RUN_SECRET not in content
    assert lease.secret.encode() not in content


# Resuming a run.


async def a_step(buffer: Buffer, *, ends: int) -> None:
    """Admit two groups of two, and finish `ends` of their rollouts."""
    for number in range(2):
        await buffer.admit(make_task(number), split="train", num_rollouts=2)
    leases = await buffer.lease(4, 0.0)
    for lease in leases[:ends]:
        await buffer.record(make_call(lease.key, lease.key.rollout_id))
        await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=1.0))


async def train(buffer: Buffer, groups: int) -> None:
    taken = await take_groups(buffer, groups, split="train")
    await buffer.advance(trained=sum(len(group.trajectories) for group in taken), dropped={})


async def test_a_resumed_run_reuses_the_rollouts_that_ended_since_its_checkpoint(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    await a_step(buffer, ends=4)
    await train(buffer, 2)
    await buffer.milestone(1)
    await buffer.forget_before(1)
    await a_step(buffer, ends=4)  # trained after the checkpoint
    await train(buffer, 2)
    await a_step(buffer, ends=3)  # the step that was interrupted
    buffer = await again(buffer, tmp_path)
    for _ in range(2):  # also if it is killed again before it does anything
        assert await buffer.resume(1, {"train": 2, "val": 0}) == 4 + 3
        buffer = await again(buffer, tmp_path)
    stats = await buffer.stats()
    assert (stats.admitted, stats.trained, stats.waiting, stats.running, stats.complete) == (4, 4, 0, 0, 0)
    for number in range(2):
        assert await buffer.admit(make_task(number), split="train", num_rollouts=2) == f"train-{2 + number}"
    groups = await take_groups(buffer, 2, split="train")
    assert [trajectory.calls[0].call_id for trajectory in groups[0].trajectories] == ["train-2-0", "train-2-1"]
    await buffer.advance(trained=4, dropped={})
    for number in range(2):
        await buffer.admit(make_task(number), split="train", num_rollouts=2)
    (lease,) = await buffer.lease(9, 0.0)  # the rollout that had not ended, as another attempt
    assert (lease.key.rollout_id, lease.key.attempt) == ("train-5-1", 1)
    await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=0.0))
    await train(buffer, 2)
    stats = await buffer.stats()
    assert (stats.admitted, stats.trained, stats.ended) == (12, 12, 12)


async def test_an_attempt_that_ended_with_its_run_does_not_count_as_a_retry(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, retries=Retries(max_attempts=2))
    await buffer.milestone(0)
    await a_step(buffer, ends=0)
    for _ in range(3):
        buffer = await again(buffer, tmp_path, retries=Retries(max_attempts=2))
        await buffer.resume(0, {})
        for number in range(2):
            await buffer.admit(make_task(number), split="train", num_rollouts=2)
        leases = await buffer.lease(4, 0.0)
    assert [lease.key.attempt for lease in leases] == [3] * 4
    await buffer.finish(leases[0].key, Ending(outcome=Outcome.ENGINE_ERROR))
    (second,) = await buffer.lease(4, 0.0)
    await buffer.finish(second.key, Ending(outcome=Outcome.ENGINE_ERROR))
    assert await buffer.lease(4, 0.0) == []


async def test_an_orphaned_group_of_another_task_is_not_adopted(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    await buffer.milestone(0)
    await a_step(buffer, ends=4)
    await buffer.resume(0, {})
    await buffer.admit(make_task(7), split="train", num_rollouts=2)
    await buffer.admit(make_task(1), split="train", num_rollouts=3)
    assert len(await buffer.lease(9, 0.0)) == 5


async def test_a_journal_without_the_checkpoint_starts_empty(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    await a_step(buffer, ends=4)
    assert await buffer.resume(7, {"train": 9, "val": 3}) == 0
    assert await buffer.admit(make_task(), split="train", num_rollouts=1) == "train-9"
    buffer = await again(buffer, tmp_path)
    assert (await buffer.stats()).next_group == {"train": 10, "val": 3}


# Journals of earlier versions.

JOURNAL_OF_FORMAT_1 = Path(__file__).parent / "journal_format_1"
"""Written by commit ac8625d: a Base, then one event of every other kind at least, and a run that was resumed."""


def test_a_number_never_changes_its_event() -> None:
    names = "Base Admitted Leased Called Traced CallFailed Ended Cancelled Taken Advanced Checkpointed Released Resumed"
    assert {number: kind.__name__ for number, kind in KINDS.items()} == dict(enumerate(names.split(), start=1))


async def test_a_journal_of_format_1_is_read_and_continued(tmp_path: Path) -> None:
    shutil.copytree(JOURNAL_OF_FORMAT_1, tmp_path, dirs_exist_ok=True)
    (reader,) = segments.segment_readers(tmp_path)
    assert {payload[0] for _, payload in reader.records()} == set(KINDS)
    buffer = open_buffer(tmp_path)
    stats = await stats_of(buffer)
    assert stats == {
        **stats,
        **{"admitted": 4, "complete": 2, "taken": 0, "trained": 1, "dropped": {"stale": 1}, "evaluated": 1},
        **{"ended": 5, "calls": 5, "sampled_tokens": 10, "next_group": {"train": 2, "val": 1}},
    }
    ledger = buffer._store.ledger
    assert {group_id: (group.stage, group.checkpoint_epoch) for group_id, group in ledger.groups.items()} == {
        "train-1": ("open", 4),
        "train-2": ("orphaned", 4),
        "train-3": ("orphaned", 4),
    }
    assert [(milestone.step, milestone.checkpoint_epoch) for milestone in ledger.milestones] == [(1, 2), (2, 3)]
    assert ledger.groups["train-1"].task.payload["array"].tolist() == [0.0, 1.0]
    assert ledger.groups["train-1"].task.payload["era"] == 1  # a user's own names stay
    (group,) = await take_groups(buffer, 1, split="train")
    for trajectory in group.trajectories:
        assert [call.call_id for call in trajectory.calls] == [f"{trajectory.key.rollout_id}-a"]
        assert [(reward.name, reward.value) for reward in trajectory.rewards] == [("format", 0.25)]
        assert (trajectory.reward, trajectory.refused_spans) == (0.5, {"late": 1})
    for number, attempt in ((2, 3), (3, 1)):  # orphaned groups continue
        assert await buffer.admit(make_task(number), split="train", num_rollouts=2) == f"train-{number}"
        (lease,) = await buffer.lease(2, 0.0)
        assert (lease.key.rollout_id, lease.key.attempt) == (f"train-{number}-1", attempt)
    before = base_of(buffer)
    buffer = await again(buffer, tmp_path)
    assert same(base_of(buffer), before)


# Values.


def test_payloads_are_read_back_unchanged() -> None:
    payload = {
        "text": "é",
        "half of a pair": "\ud800",
        "numbers": [1, -(2**80), 2.5, float("inf"), None, True],
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "scalar": np.int64(7),
        "nested": {"list": [{"a": b"bytes"}]},
    }
    event = Admitted(split="train", group=0, num_rollouts=1, task=Task(task_id="t", payload=payload))
    read = decode(encode(event))
    assert isinstance(read, Admitted)
    assert same(read, replace(event, task=Task(task_id="t", payload={**payload, "half of a pair": "?"})))


def test_a_call_knows_its_versions_after_a_restart_and_in_a_journal_of_before() -> None:
    call = make_call(RolloutKey(split="train", group=0, index=0), "c0", num_tokens=3)
    event = Called(call=replace(call, last_version=2, new_versions=((1, 1), (2, 2))))
    payload = encode(event)
    read = decode(payload)
    assert same(read, event)
    assert read.call.version_T.tolist() == [0, 1, 2]  # type: ignore[attr-defined]
    fields = msgspec.msgpack.decode(payload[1:])
    del fields["call"]["new_versions"]
    old = decode(payload[:1] + msgspec.msgpack.encode(fields))
    assert same(old, Called(call=replace(event.call, new_versions=())))


def test_values_that_a_journal_cannot_hold_are_refused_with_a_reason() -> None:
    task = Task(task_id="t", payload={"object": object()})
    with pytest.raises(DataError, match="holds a object, which the journal cannot keep"):
        encode(Admitted(split="train", group=0, num_rollouts=1, task=task))
    with pytest.raises(DataError, match="holds a ndarray"):
        encode(Admitted(split="train", group=0, num_rollouts=1, task=Task(task_id="t", payload={"a": np.array([{}])})))


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=80), kind=st.integers(0, 20))
def test_bytes_that_are_no_event_are_refused(data: bytes, kind: int) -> None:
    try:
        read = decode(bytes([kind]) + data)
    except ValueError:
        return
    assert same(decode(encode(read)), read)


# agl journal check


def test_a_check_shows_what_a_journal_holds_and_which_byte_is_broken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def write() -> None:
        buffer = open_buffer(tmp_path / "journal")
        await a_step(buffer, ends=3)
        await buffer.close()

    asyncio.run(write())
    (segment,) = segments.list_segments(tmp_path / "journal")
    content = segment.path.read_bytes()
    assert main(["journal", "check", str(tmp_path)]) == 0
    shown = capfd.readouterr().out
    assert "Called         3" in shown
    assert "open     2 groups: rollouts 3 complete, 1 running" in shown
    segment.path.write_bytes(content + b"torn")
    assert main(["journal", "check", str(tmp_path / "journal")]) == 0
    assert f"torn end of 4 bytes at byte {len(content)}" in capfd.readouterr().out
    segment.path.write_bytes(content[:100] + b"?" + content[101:])
    assert main(["journal", "check", str(tmp_path)]) == 2
    assert f"{segment.path} is damaged at byte {segments.HEADER_BYTES}" in capfd.readouterr().err
    assert main(["journal", "check", str(tmp_path / "none")]) == 2
    assert "holds no journal" in capfd.readouterr().err
