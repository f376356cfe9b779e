"""What one attempt may cost the buffer and its journal, whatever its agent sends; and a full journal at the gateway."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from agents_for_tests import RUN_SECRET, make_call, make_task
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.applications import Starlette
from test_gateway import code_of, open_rig, url_of

from agent_lightning.buffer.buffer import Buffer, attempt_secret
from agent_lightning.config.running import AgentConfig, BufferConfig
from agent_lightning.core.errors import OverBudget
from agent_lightning.core.types import Ending, Outcome, RolloutKey
from agent_lightning.serving.gateway import Gateway, GatewayConfig
from agent_lightning.spans.tree import RawSpan
from agent_lightning.testing.model import ToyEngine, ToyLanguage
from agent_lightning.testing.world import application

MIB = 2**20
Harm = Callable[[Buffer, RolloutKey, int], Awaitable[int]]


def span(identity: str, size: int) -> RawSpan:
    times = {"started_at": 1.0, "ended_at": 2.0}
    return RawSpan(span_id=identity, parent_id="", name="x", attributes={"text": "x" * size}, **times)  # type: ignore[arg-type]


def spans_of(name: str) -> bytes:
    """A span as an exporter sends it."""
    request = ExportTraceServiceRequest()
    sent = request.resource_spans.add().scope_spans.add().spans.add(trace_id=b"1" * 16, span_id=b"1" * 8, name=name)
    sent.start_time_unix_nano, sent.end_time_unix_nano = 1, 2
    return bytes(request.SerializeToString())


async def send(buffer: Buffer, key: RolloutKey, *spans: RawSpan, **faults: int) -> int:
    """1 if the spans are refused, else 0."""
    try:
        return await buffer.record_spans(key, spans, faults)
    except OverBudget:
        return 1


async def new_spans(buffer: Buffer, key: RolloutKey, number: int) -> int:
    return await send(buffer, key, span(f"{number}", 100_000))


async def the_same_span(buffer: Buffer, key: RolloutKey, number: int) -> int:
    return await send(buffer, key, span("same", 100_000))


async def small_spans(buffer: Buffer, key: RolloutKey, number: int) -> int:
    return await send(buffer, key, *(span(f"{number}-{i}", 10) for i in range(900)))


async def faults(buffer: Buffer, key: RolloutKey, number: int) -> int:
    return await send(buffer, key, **{"x" * 100_000: 1})


async def calls(buffer: Buffer, key: RolloutKey, number: int) -> int:
    return int(await buffer.record(make_call(key, f"{number}", num_tokens=10_000)) == 0)


async def failures(buffer: Buffer, key: RolloutKey, number: int) -> int:
    await buffer.note_failure(key, Outcome.ENGINE_ERROR, "x" * 100_000)
    return 0


@pytest.mark.parametrize("journaled", [True, False])
@pytest.mark.parametrize("harm", [new_spans, the_same_span, small_spans, faults, calls, failures])
async def test_an_attempt_costs_its_budget_whatever_it_sends(harm: Harm, journaled: bool, tmp_path: Path) -> None:
    agent = AgentConfig(target="", max_calls=10**6, max_spans=10**6, max_recorded_mib=1)
    settings: dict[str, Any] = {"agent": agent, "journal": tmp_path / "journal" if journaled else None}
    buffer = Buffer(run_secret=RUN_SECRET, **settings)
    await buffer.admit(make_task(), split="train", num_rollouts=2)
    first, second = await buffer.lease(2, 0.0)
    refused: list[int] = []
    while len(refused) < 60 and not (harm is calls and refused and refused[-1]):  # the gateway starts no more calls
        refused.append(await harm(buffer, first.key, len(refused)))
    if harm not in (faults, failures):
        assert refused[0] == 0
        assert all(refused[30:])
        assert refused[-1]
    assert sum(path.stat().st_size for path in tmp_path.rglob("segment-*")) < 1.3 * MIB
    # The other attempt is as before.
    assert await buffer.record_spans(second.key, (span("a", 10),), {}) == 0
    assert await buffer.record(make_call(second.key, "a")) > 0
    if journaled:  # a buffer that restarts knows what was spent
        await buffer.close()
        buffer = Buffer(run_secret=RUN_SECRET, **settings)
        if harm is not failures:
            assert await send(buffer, first.key, span("b", 10)) == 1
        assert await buffer.record_spans(second.key, (span("b", 10),), {}) == 0
    await buffer.finish(first.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
    await buffer.finish(second.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
    stats = await buffer.stats()
    assert (stats.complete, stats.running) == (2, 0)
    await buffer.close()


async def test_nothing_to_record_is_not_written_down(tmp_path: Path) -> None:
    buffer = Buffer(run_secret=RUN_SECRET, journal=tmp_path)
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 0.0)
    before = sum(path.stat().st_size for path in tmp_path.glob("segment-*"))
    for _ in range(50):
        assert await buffer.record_spans(lease.key, (), {}) == 0
    assert sum(path.stat().st_size for path in tmp_path.glob("segment-*")) == before
    await buffer.close()


async def test_spans_of_an_attempt_that_has_sent_too_much_are_not_even_read(tmp_path: Path) -> None:
    async with open_rig() as rig:
        rig.buffer._agent = AgentConfig(target="", max_recorded_mib=0.001)
        url, small = f"{url_of(rig.key)}/traces", spans_of("x" * 2000)
        assert (await rig.http.post(url, content=small)).status_code == 200
        for body in (spans_of("y" * 2000), b"no protobuf, and not read"):
            refused = await rig.http.post(url, content=body)
            assert (refused.status_code, refused.json()["code"]) == (413, 8)
            assert "over 0.001 MiB" in refused.json()["message"]
        assert (await rig.post()).status_code == 200  # a call that was sampled is recorded: the next is refused
        assert code_of(await rig.post()) == (400, "too_many_calls")
        (trajectory,) = [await rig.end()]
        assert trajectory.refused_spans == {"over 0.001 MiB in one attempt": 1}


async def test_a_full_journal_is_an_error_of_each_protocol(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = BufferConfig(max_disk_gib=4000 / 2**30, segment_mib=2000 / 2**20)
    buffer = Buffer(run_secret=RUN_SECRET, journal=tmp_path, config=config)
    gateway = Gateway(
        engine=ToyEngine(ToyLanguage(("a", "b"))),
        recorder=buffer,
        config=GatewayConfig(model="policy", run_secret=RUN_SECRET, sampling={"train": {}, "val": {}}),
    )
    app: Starlette = application(gateway)
    await buffer.admit(make_task(), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 0.0)
    root = f"/rollout/{lease.key.rollout_id}/attempt/0/{attempt_secret(RUN_SECRET, lease.key)}/agent/v1"
    words = " ".join(["a"] * 1900)
    hello = {"model": "policy", "max_tokens": 4, "messages": [{"role": "user", "content": words}]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as http:
        chat = await http.post(f"{root}/chat/completions", json=hello)
        message = await http.post(f"{root}/messages", json=hello, headers={"anthropic-version": "2023-06-01"})
        otlp = await http.post(f"{root}/traces", content=spans_of("x" * 5000))
    assert [chat.status_code, message.status_code, otlp.status_code] == [507, 507, 413], chat.text
    assert chat.json()["error"]["code"] == "engine_error"
    assert chat.headers["x-should-retry"] == "false"
    assert message.json()["type"] == "error"
    assert otlp.json() == {"code": 8, "message": "the run can record no more spans: its journal is full or broken"}
    for response in (chat, message, otlp):
        assert str(tmp_path) not in response.text
        assert "Journal" not in response.text
    assert "Traceback" not in caplog.text
    await buffer.finish(lease.key, Ending(outcome=Outcome.AGENT_ERROR, error="the journal is full"))
    await buffer.close()
