"""A request to the gateway: its body and headers, its attempt, and what it asks for: a model call, or traces (OTLP)."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from agent_lightning.core.errors import DataError, UnknownRollout
from agent_lightning.core.json_values import compact, is_deeper
from agent_lightning.core.types import ModelCall, Outcome, RolloutKey
from agent_lightning.serving.dialects.base import BadRequest, Dialect, RequestContext, Stream
from agent_lightning.spans import otlp
from agent_lightning.spans.tree import RawSpan

AGENT_HEADER = "x-agl-agent"
"""Name of the agent that sends a request; overrides the name in the URL."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_MAX_SPANS = 10_000
"""Spans of a body that are read; the others are counted as rejected."""


class Recorder(Protocol):
    """The buffer as the gateway calls it. All methods raise UnknownRollout if the attempt has ended."""

    async def record(self, call: ModelCall) -> int:
        """Record a call; returns how many more calls the attempt may make."""

    async def record_spans(self, key: RolloutKey, spans: tuple[RawSpan, ...], faults: Mapping[str, int]) -> int:
        """Record spans, and count faults by their reason; returns how many spans were rejected."""

    async def note_failure(self, key: RolloutKey, outcome: Outcome, error: str) -> None:
        """Note why a call of the attempt failed."""


@dataclass(slots=True)
class Attempt:
    """The gateway's memory of an attempt, from its first request on."""

    key: RolloutKey
    secret: str = field(repr=False)
    calls_left: int = sys.maxsize
    """The smallest number of remaining calls that the buffer has reported: its replies may arrive out of order."""
    calls_in_flight: int = 0
    bytes_in_flight: int = 0
    """Bytes of all requests that are being read or answered."""
    repeats: Counter[int] = field(default_factory=Counter)
    """How often each request was made, by a hash of it; counted only if calls are seeded."""
    ended: str = ""
    """Why the buffer no longer knows this attempt: the engine does not work for an attempt that has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request for a reply of the policy."""

    attempt: Attempt
    agent: str
    parent_id: str
    """Id of the span that sent the request; "" if its headers name none."""
    dialect: Dialect
    context: RequestContext
    stream: Stream
    is_token_count: bool
    """Whether the agent wants only the number of tokens of its prompt."""

    @property
    def wants_stream(self) -> bool:
        return bool(self.context.body.get("stream")) and not self.is_token_count

    def seed(self, run_seed: int) -> int:
        """The seed of this call's sampling, a number below 2**32. Every attempt at a rollout gets the same seed for the
        same request, if it repeated it as often before."""
        digest = zlib.crc32(compact(self.context.engine).encode(), zlib.crc32(self.agent.encode()))
        self.attempt.repeats[digest] += 1
        text = f"{run_seed}/{self.attempt.key.rollout_id}/{digest}/{self.attempt.repeats[digest]}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def parse_request(raw: bytes, dialect: Dialect, *, model: str, max_depth: int, max_choices: int) -> RequestContext:
    """The request that a body holds. Raises BadRequest if it is not JSON, too deep, or wants too many choices. `model`
    is the name in the reply if the agent names none; `max_choices` counts `n` choices of every prompt."""
    try:
        body = json.loads(raw)
        if is_deeper(body, max_depth):
            raise BadRequest(f"the request is nested more than {max_depth} levels deep")
        compact(body).encode()  # fails for text that a span could not hold: half a surrogate pair
    except (ValueError, RecursionError):
        raise BadRequest("the request is not JSON") from None
    if not isinstance(body, dict):
        raise BadRequest("the request is not a JSON object")
    engine = dialect.to_engine(body)
    prompt = engine.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt) else 1
    if (engine.get("n") or 1) * prompts > max_choices:
        raise BadRequest(f"n must be a number from 1 to {max_choices}, all prompts together")
    model, reply_id = body.get("model") or model, f"{dialect.prefix}{uuid.uuid4().hex}"
    return RequestContext(body=body, engine=engine, reply_id=reply_id, model=model, created=int(time.time()))


@asynccontextmanager
async def reading(
    request: Request, attempt: Attempt, *, max_bytes: int, max_bytes_in_flight: int
) -> AsyncIterator[bytes]:
    """The body of a request, which counts as in flight until the block ends. Raises BadRequest if the client goes away,
    if the body exceeds `max_bytes`, or if all bodies of the attempt exceed `max_bytes_in_flight`."""
    raw = bytearray()
    try:
        async for part in request.stream():
            raw += part
            attempt.bytes_in_flight += len(part)
            if len(raw) > max_bytes:
                raise BadRequest(f"the request is over {max_bytes} bytes", "size", 413)
            if attempt.bytes_in_flight > max_bytes_in_flight:
                message = f"this rollout has requests of over {max_bytes_in_flight} bytes in flight: try again later"
                raise BadRequest(message, "busy", 429, type="rate_limit_error")
        yield bytes(raw)
    except ClientDisconnect:
        raise BadRequest("the client went away", "disconnected") from None
    finally:
        attempt.bytes_in_flight -= len(raw)


def agent_of(headers: Mapping[str, str], name_in_url: str) -> str:
    """Name of the agent that sent a request, at most 200 characters of a header."""
    return headers.get(AGENT_HEADER, "").strip()[:200] or name_in_url


def parent_of(headers: Mapping[str, str]) -> str:
    """Id of the span that sent a request, from W3C's `traceparent` header; "" if there is none.

    Example: {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"} -> "b7ad6b7169203331"
    """
    match = _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip())
    return match[1] if match else ""


async def take_traces(
    recorder: Recorder, attempt: Attempt, raw: bytes, headers: Mapping[str, str], max_bytes: int
) -> Response:
    """Record the spans of an ExportTraceServiceRequest, protobuf or JSON, and answer as OTLP's specification says.
    Rejected spans are counted in the answer's `partial_success` and in the buffer. The status is 400 if the body cannot
    be read, and 409 if the rollout has ended: exporters repeat neither."""
    content_type, encoding = headers.get("content-type", otlp.PROTOBUF), headers.get("content-encoding", "")
    limits = {"max_bytes": max_bytes, "max_spans": _MAX_SPANS}
    try:
        traces, faults = otlp.decode(
            raw, content_type=content_type, content_encoding=encoding, secret=attempt.secret, **limits
        )
        spans = tuple(span for trace in traces.values() for span in trace)
        lost = sum(count for reason, count in faults.items() if not reason.startswith("repaired"))
        rejected = lost + await recorder.record_spans(attempt.key, spans, faults)
    except DataError as error:
        return JSONResponse({"code": 3, "message": str(error)}, status_code=400)
    except UnknownRollout as error:
        return JSONResponse({"code": 9, "message": str(error)}, status_code=409)
    body, kind = otlp.acknowledge(content_type, rejected=rejected, message=", ".join(faults))
    return Response(body, media_type=kind)
