"""The gateway's endpoint for traces, and the agent and parent span of a call."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from agent_lightning.buffer.buffer import Buffer, Lease
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Ending, Outcome, Task, Trajectory
from agent_lightning.serving.calls import agent_of, parent_of
from agent_lightning.serving.gateway import Gateway, GatewayConfig, application
from agent_lightning.spans.otlp import PROTOBUF, encode, encode_json
from agent_lightning.spans.tree import RawSpan
from agent_lightning.testing.model import ToyEngine, ToyLanguage
from agent_lightning.testing.world import MODEL, SAMPLING

SECRET = b"s"


class Door:
    """A gateway with one open rollout."""

    def __init__(self, buffer: Buffer, lease: Lease, http: httpx.AsyncClient) -> None:
        self.buffer, self.lease, self.http = buffer, lease, http
        self.root = f"/rollout/{lease.key.rollout_id}/attempt/0/{lease.secret}/agent/v1"

    async def post(self, body: bytes, content_type: str = PROTOBUF, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.post(
            f"{self.root}/traces", content=body, headers={"content-type": content_type, **named}
        )

    async def trajectory(self) -> Trajectory:
        await self.buffer.finish(self.lease.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
        (group,) = await take_groups(self.buffer, 1, split="train")
        return group.trajectories[0]


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    buffer = Buffer(run_secret=SECRET, agent=AgentConfig(target="", max_spans=3))
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 0.1)
    engine = ToyEngine(ToyLanguage(("blue",)), seed=0, max_len=100)
    config = GatewayConfig(model=MODEL, run_secret=SECRET, sampling=SAMPLING, max_body_bytes=20_000)
    gateway = Gateway(engine=engine, recorder=buffer, config=config)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(application(gateway)), base_url="http://door", timeout=10
    ) as http:
        yield Door(buffer, lease, http)


def spans(*names: str) -> list[RawSpan]:
    return [
        RawSpan(
            span_id=f"{n:016x}",
            name=name,
            started_at=float(n),
            ended_at=n + 0.5,
            attributes={"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name},
        )
        for n, name in enumerate(names, 1)
    ]


def body(*names: str) -> bytes:
    return encode(spans(*names), trace_id="t", resource={})


async def test_both_encodings_are_taken_also_packed(door: Door) -> None:
    first = await door.post(body("one"))
    assert (first.status_code, first.headers["content-type"], first.content) == (200, PROTOBUF, b"")
    packed = gzip.compress(encode_json(spans("one", "two"), trace_id="t", resource={}).encode())
    second = await door.post(packed, "application/json", content_encoding="gzip")
    assert (second.status_code, second.json()) == (200, {})
    assert [tool.name for tool in (await door.trajectory()).tools] == ["one", "two"]  # the first came twice


async def test_spans_beyond_the_limit_are_refused_and_counted(door: Door) -> None:
    answer = await door.post(encode_json(spans(*"abcde"), trace_id="t", resource={}).encode(), "application/json")
    assert answer.json()["partialSuccess"]["rejectedSpans"] == "2"
    seen = await door.trajectory()
    assert len(seen.tools) == 3
    assert seen.refused_spans == {"over 3 in one attempt": 2}


async def test_a_body_that_comes_again_is_recorded_once(door: Door) -> None:
    sent = encode_json(spans(*"abcde"), trace_id="t", resource={}).encode()
    answers = [await door.post(sent, "application/json") for _ in range(3)]
    answers.append(await door.post(gzip.compress(sent), "application/json", content_encoding="gzip"))
    assert {(answer.status_code, answer.content) for answer in answers} == {(200, answers[0].content)}
    assert "rejectedSpans" in answers[0].text
    assert (await door.trajectory()).refused_spans == {"over 3 in one attempt": 2}


@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (body("one")[:-3], PROTOBUF, 400),
        (b"\xff" * 100, PROTOBUF, 400),
        (b'{"resourceSpans": [', "application/json", 400),
        (b"[]", "application/json", 400),
        (b"x", "text/plain", 400),
        (b"x" * 30_000, PROTOBUF, 413),
    ],
)
async def test_a_body_that_is_no_trace_is_refused(door: Door, content: bytes, content_type: str, status: int) -> None:
    answer = await door.post(content, content_type)
    assert answer.status_code == status
    assert "\n" not in json.dumps(answer.json())
    assert (await door.trajectory()).tools == ()


async def test_a_packed_body_is_bounded_when_unpacked(door: Door) -> None:
    assert (await door.post(gzip.compress(b"\0" * 10_000_000), content_encoding="gzip")).status_code == 413


async def test_traces_of_an_ended_rollout_are_refused(door: Door) -> None:
    await door.trajectory()
    assert (await door.post(body("late"))).status_code == 409
    assert (await door.buffer.stats()).refused_spans == 1
    assert (await door.http.post(f"{door.root.replace(door.lease.secret, 'x' * 32)}/traces")).status_code == 403


async def test_a_header_names_the_agent(door: Door) -> None:
    request = {"model": MODEL, "messages": [{"role": "user", "content": "The sky is"}]}
    for headers in ({}, {"x-agl-agent": "writer"}):
        answer = await door.http.post(f"{door.root}/chat/completions", json=request, headers=headers)
        assert answer.status_code == 200
    assert [call.agent for call in (await door.trajectory()).calls] == ["agent", "writer"]
    assert agent_of({"x-agl-agent": "  "}, "in the url") == "in the url"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "b7ad6b7169203331"),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", "b7ad6b7169203331"),
        ("b7ad6b7169203331", ""),
        ("", ""),
    ],
)
def test_traceparent(header: str, expected: str) -> None:
    assert parent_of({"traceparent": header}) == expected
