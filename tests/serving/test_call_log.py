"""What `agl serve` records."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from builders import model_call

from agent_lightning.core.types import Outcome, RolloutKey
from agent_lightning.serving.call_log import CallLog
from agent_lightning.spans.traces import export

KEY = RolloutKey(split="val", group=0, index=0)


async def test_calls_without_end_are_lines_that_agl_import_reads(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "calls.jsonl", max_bytes=5_000, kept=3)
    calls = [model_call(KEY, [1, 5], [6], call_id=f"c{number}") for number in range(100)]
    for call in calls:
        assert await log.record(call) == sys.maxsize
    newest = await log.recorded_messages(KEY, {"c99": True, "c0": True})
    assert newest == {"c99": (calls[-1].request, calls[-1].reply)}
    assert await log.record_spans(calls[0].key, (), {}) == 0
    await log.note_failure(calls[0].key, Outcome.ENGINE_ERROR, "why")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls.jsonl", "calls.jsonl.old"]
    assert all(path.stat().st_size < 10_000 for path in tmp_path.iterdir())
    lines = (tmp_path / "calls.jsonl").read_text().split("\n")[:-1]
    read = [export.from_row(json.loads(line)) for line in lines]
    assert len({rollout.key for rollout in read}) == len(read)
    assert [rollout.calls[0].call_id for rollout in read] == [call.call_id for call in calls[-len(read) :]]


async def test_a_disk_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    log = CallLog(tmp_path / "gone" / "calls.jsonl")
    assert await log.record(model_call(KEY, [1], [6], call_id="c")) == sys.maxsize
