"""Malformed requests to the gateway, in this process over ASGI: how it answers, and whether its memory grows.

python tests/chaos/malformed.py --number 100000   # prints a line of JSON; exit code 1 if it failed
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import gc
import gzip
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
from starlette.applications import Starlette

from agent_lightning.buffer.buffer import Buffer, attempt_secret
from agent_lightning.buffer.taken import take_groups
from agent_lightning.core.types import Ending, Outcome, RolloutKey, Task
from agent_lightning.serving.gateway import Gateway, GatewayConfig, application
from agent_lightning.spans.otlp import encode, encode_json
from agent_lightning.spans.tree import RawSpan
from agent_lightning.testing.model import ToyEngine, ToyLanguage
from agent_lightning.testing.world import SAMPLING

SECRET = b"a secret of the tests"
LARGEST = 64 * 1024
USER = {"role": "user", "content": "hello"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"expression": "2"}'}}
SPAN = RawSpan(
    span_id="00f067aa0ba902b7", parent_id="", name="a", started_at=1e9, ended_at=2e9, attributes={"k": 1}, error=""
)
BODIES: Mapping[str, Any] = {
    "v1/chat/completions": {
        "model": "m",
        "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}],
        "tools": [{"type": "function", "function": FUNCTION}],
        "n": 2,
        "stop": ["x"],
        "temperature": 0.5,
        "max_tokens": 5,
        "logprobs": True,
        "stream": False,
        "stream_options": {"include_usage": True},
    },
    "v1/completions": {"prompt": [3, 80, 1, 4], "n": 1, "logprobs": 1, "echo": False, "stream": False},
    "v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "text": {"format": {"type": "text"}},
        "max_output_tokens": 5,
    },
    "v1/messages": {
        "system": [{"type": "text", "text": "be brief"}],
        "messages": [USER, {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "5"}]}],
        "tools": [{"name": "f", "input_schema": {}}],
        "max_tokens": 5,
        "stop_sequences": ["x"],
    },
    "v1/messages/count_tokens": {"messages": [USER], "max_tokens": 5},
    "v1/traces": json.loads(encode_json([SPAN], trace_id="t", resource={})),
}
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, -(2**63), 1e308, float("nan"), float("inf"), "", "\ud800", "\0", "a" * 5000, [], {},
    [[]], [None], {"": None}, [[1, -1, 2**40]], {"role": "user"}, "data:image/png;base64,AAAA",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """An HTTP request."""

    path: str
    method: str = "POST"
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    leaves: bool = False
    """Whether the client disconnects before it has sent its body."""


def requests(seed: int, root: str) -> Iterator[Sent]:
    """Endless requests, most of them malformed; some changes happen to leave a request that is valid."""
    draw = random.Random(seed)
    makers = (broken_field, broken_field, broken_json, deep, random_bytes, too_large, broken_trace, wrong_url, gone)
    while True:
        yield draw.choice(makers)(draw, root)


def broken_field(draw: random.Random, root: str) -> Sent:
    end = draw.choice(list(BODIES))
    body = copy.deepcopy(BODIES[end])
    places = list(_places(body))
    for place in draw.sample(places, min(len(places), draw.randint(1, 3))):
        try:
            holder = body
            for name in place[:-1]:
                holder = holder[name]
            if draw.random() < 0.2 and isinstance(holder, dict):
                holder.pop(place[-1], None)
            else:
                holder[place[-1]] = copy.deepcopy(draw.choice(ODD))
        except (KeyError, IndexError, TypeError):
            continue  # another change has removed this field
    return Sent(path=root + end, body=json.dumps(body).encode(), headers=_headers(draw))


def broken_json(draw: random.Random, root: str) -> Sent:
    end = draw.choice(list(BODIES))
    raw = bytearray(json.dumps(BODIES[end]).encode())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(raw) - 8)
        raw[at : at + draw.randint(0, 4)] = draw.randbytes(draw.randint(0, 3))
    return Sent(path=root + end, body=bytes(raw[: draw.randint(1, len(raw))]), headers=_headers(draw))


def deep(draw: random.Random, root: str) -> Sent:
    levels = draw.choice((50, 63, 65, 500, 2000, 20_000))
    inner = (
        b"[" * levels + b"]" * levels if draw.random() < 0.5 else b'{"a":' * (levels // 2) + b"1" + b"}" * (levels // 2)
    )
    body = draw.choice((inner, b'{"messages": ' + inner + b"}", b'{"resourceSpans": ' + inner + b"}"))
    return Sent(path=root + draw.choice(list(BODIES)), body=body, headers=_headers(draw))


def random_bytes(draw: random.Random, root: str) -> Sent:
    return Sent(
        path=root + draw.choice(list(BODIES)), body=draw.randbytes(draw.randint(0, 300)), headers=_headers(draw)
    )


def too_large(draw: random.Random, root: str) -> Sent:
    if draw.random() < 0.5:  # a bomb: small when it is sent, large when it is decompressed
        packed = gzip.compress(b"\0" * (8 * LARGEST), 1)
        return Sent(path=f"{root}v1/traces", body=packed, headers=_headers(draw) | {"content-encoding": "gzip"})
    return Sent(path=root + draw.choice(list(BODIES)), body=b" " * (LARGEST + draw.randint(-1, 1000)))


def broken_trace(draw: random.Random, root: str) -> Sent:
    raw = bytearray(encode([SPAN], trace_id="t", resource={"a": "b"}))
    for _ in range(draw.randint(0, 3)):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    packing = draw.choice(("", "gzip", "deflate", "br", "identity"))
    body = gzip.compress(bytes(raw), 1) if packing == "gzip" and draw.random() < 0.7 else bytes(raw)
    kind = draw.choice(("application/x-protobuf", "application/json", "text/plain", "", "application/json; charset=x"))
    return Sent(path=f"{root}v1/traces", body=body, headers={"content-type": kind, "content-encoding": packing})


def wrong_url(draw: random.Random, root: str) -> Sent:
    pieces = [*root.split("/")[1:-1], *draw.choice(list(BODIES)).split("/")]
    at = draw.randrange(len(pieces))
    pieces[at] = draw.choice(("", "..", "x" * 3000, "é", "%00", "-1", "rollout", "train-0-99999999999999999999", "٣"))
    path = "/" + "/".join(pieces[: draw.randint(0, len(pieces))] if draw.random() < 0.3 else pieces)
    method = draw.choice(("POST", "GET", "GET", "PUT", "DELETE"))
    return Sent(path=path, method=method, body=json.dumps(BODIES["v1/chat/completions"]).encode())


def gone(draw: random.Random, root: str) -> Sent:
    return Sent(path=root + draw.choice(list(BODIES)), body=b'{"messages": [', leaves=True)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _places(part, (*path, key))


def _headers(draw: random.Random) -> dict[str, str]:
    kind = draw.choice(("application/json", "application/json", "", "text/html", "application/x-protobuf"))
    odd = draw.choice(({}, {}, {"x-stainless-retry-count": draw.choice(("0", "1", "x"))}, {"traceparent": "00-zz"}))
    return {"content-type": kind, **odd}


async def ask(app: Starlette, sent: Sent) -> int:
    """Send a request to the application; returns the status of its answer, or 500 if its stream ends with a failure."""
    status, failed = 0, False
    pieces = [] if sent.leaves else [{"type": "http.request", "body": sent.body, "more_body": False}]
    first = [{"type": "http.request", "body": sent.body, "more_body": True}] if sent.leaves else []
    coming = iter([*first, *pieces])
    over = asyncio.Event()

    async def receive() -> dict[str, Any]:
        message = next(coming, None)
        if message is None and not sent.leaves:
            await over.wait()  # the client waits for its answer
        return message or {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, failed
        status = message.get("status", status)
        failed = failed or b"the gateway failed" in message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in sent.headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    over.set()
    return 500 if failed else status


async def attack(number: int, seed: int, concurrency: int = 16) -> dict[str, Any]:
    """Send `number` requests, with a new rollout for every 500; returns the counts."""
    buffer, language = Buffer(run_secret=SECRET), ToyLanguage(("no", "yes", "call:2+3"))
    config = GatewayConfig(model="policy", run_secret=SECRET, sampling=SAMPLING, max_body_bytes=LARGEST)
    app = application(Gateway(engine=ToyEngine(language, max_len=4096), recorder=buffer, config=config))
    statuses, memory, errors, started = Counter[int](), [], list[str](), time.monotonic()

    async def attempt(sent: Sent) -> None:
        try:
            status = await ask(app, sent)
        except Exception as error:  # a server would answer 500
            errors.append(f"{type(error).__name__}: {error}"[:200])
            status = 500
        statuses[status] += 1
        if status >= 500 and len(errors) < 20:
            errors.append(f"{sent.method} {sent.path[-60:]} {sent.body[:200]!r}")

    process = psutil.Process()
    for begin in range(0, number, 500):
        key = await new_rollout(buffer)
        root = f"/rollout/{key.rollout_id}/attempt/{key.attempt}/{attempt_secret(SECRET, key)}/agent/"
        coming = requests(seed + begin, root)
        for _ in range(0, min(500, number - begin), concurrency):
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(attempt(next(coming)))
        await buffer.finish(key, Ending(outcome=Outcome.AGENT_ERROR))
        await take_groups(buffer, 1, split="train")
        await buffer.advance(trained=0, dropped={"fuzzed": 1})
        if begin % 5000 == 0:
            gc.collect()
            memory.append(round(process.memory_info().rss / 2**20, 1))
    server_errors = sum(count for status, count in statuses.items() if status >= 500)
    late = memory[len(memory) // 2 :]
    return {
        "benchmark": "malformed requests",
        "requests": sum(statuses.values()),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "server_errors": server_errors,
        "examples": errors,
        "rss_mib": memory,
        "growth_mib_in_the_second_half": round(late[-1] - late[0], 1) if late else 0.0,
        "seconds": round(time.monotonic() - started, 1),
    }


async def new_rollout(buffer: Buffer) -> RolloutKey:
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 1.0)
    return lease.key


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    result = asyncio.run(attack(**vars(parser.parse_args())))
    sys.stdout.write(json.dumps(result) + "\n")
    return int(result["server_errors"] > 0 or result["growth_mib_in_the_second_half"] > 5.0)


if __name__ == "__main__":
    sys.exit(main())
