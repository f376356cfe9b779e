"""A request to the gateway: its body and headers, its attempt, and what it asks for: a model call, or traces (OTLP)."""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from starlette.responses import JSONResponse, Response

from agent_lightning.core.errors import DataError, JournalError, OverBudget, UnknownRollout
from agent_lightning.core.json_values import compact
from agent_lightning.core.types import ModelCall, Outcome, RolloutKey
from agent_lightning.serving.dialects.base import BadRequest, Dialect, RequestContext, Stream
from agent_lightning.spans import otlp
from agent_lightning.spans.tree import RawSpan

if TYPE_CHECKING:
    from agent_lightning.serving.bodies import Reader

AGENT_HEADER = "x-agl-agent"
"""Name of the agent that sends a request; overrides the name in the URL."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_MAX_SPANS = 10_000
"""Spans of a body that are read; the others are counted as rejected."""
_REMEMBERED = 100
"""Bodies of spans of an attempt that are known if they come again."""


class Recorder(Protocol):
    """The buffer as the gateway calls it. All methods raise UnknownRollout if the attempt has ended."""

    async def record(self, call: ModelCall) -> int:
        """Record a call; returns how many more calls the attempt may make."""

    async def recorded_messages(self, key: RolloutKey, wanted: Mapping[str, bool]) -> Mapping[str, tuple[str, str]]:
        """Request and reply (JSON texts) of the calls of this attempt with these ids, of those that there are. The
        request is "" where the value in `wanted` is False."""

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
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a large body is read: one after the other."""
    traces: OrderedDict[bytes, tuple[bytes, str]] = field(default_factory=OrderedDict)
    """The answers to the latest bodies of spans, by a hash of each: exporters send a body again if its answer is late,
    and it is recorded once."""
    over_budget: str = ""
    """Why the buffer takes no more spans of this attempt: their bodies are not read any more."""
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


def parse_request(body: Mapping[str, Any], dialect: Dialect, *, model: str, max_choices: int) -> RequestContext:
    """The request that a body is. Raises BadRequest if it is none of its dialect, or wants too many choices. `model` is
    the name in the reply if the agent names none; `max_choices` counts `n` choices of every prompt."""
    engine = dialect.to_engine(body)
    prompt = engine.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt) else 1
    if (engine.get("n") or 1) * prompts > max_choices:
        raise BadRequest(f"n must be a number from 1 to {max_choices}, all prompts together", param="n")
    model, reply_id = body.get("model") or model, dialect.new_id(body)
    return RequestContext(body=body, engine=engine, reply_id=reply_id, model=model, created=int(time.time()))


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
    recorder: Recorder, attempt: Attempt, raw: bytes, headers: Mapping[str, str], reader: Reader
) -> Response:
    """Record the spans of an ExportTraceServiceRequest, protobuf or JSON, and answer as OTLP's specification says.
    Rejected spans are counted in the answer's `partial_success` and in the buffer. The status is 400 if the body cannot
    be read, 409 if the rollout has ended, and 413 if it has sent too much or the journal is full: exporters repeat none
    of these."""
    content_type = headers.get("content-type", otlp.PROTOBUF)

    def decode() -> tuple[bytes, Mapping[str, tuple[RawSpan, ...]], Mapping[str, int]]:
        digest = hashlib.sha256(f"{content_type}\n".encode() + raw).digest()
        if digest in attempt.traces:
            return digest, {}, {}
        if attempt.over_budget:  # since this body has come
            raise OverBudget(attempt.over_budget)
        options = {"content_type": content_type, "secret": attempt.secret}
        return digest, *otlp.decode(raw, max_bytes=len(raw), max_spans=_MAX_SPANS, **options)

    try:
        digest, traces, faults = await reader.apart(attempt, len(raw), decode)
        if digest in attempt.traces:  # the same body has come before
            body, kind = attempt.traces[digest]
            return Response(body, media_type=kind)
        spans = tuple(span for trace in traces.values() for span in trace)
        lost = sum(count for reason, count in faults.items() if not reason.startswith("repaired"))
        rejected = lost + await recorder.record_spans(attempt.key, spans, faults)
    except DataError as error:
        return JSONResponse({"code": 3, "message": str(error)}, status_code=400)
    except UnknownRollout as error:
        return JSONResponse({"code": 9, "message": str(error)}, status_code=409)
    except OverBudget as error:
        attempt.over_budget = str(error)
        return refuse_traces(attempt)
    except JournalError:  # not 5xx: exporters would repeat it, in vain
        message = "the run can record no more spans: its journal is full or broken"
        return JSONResponse({"code": 8, "message": message}, status_code=413)
    body, kind = otlp.acknowledge(content_type, rejected=rejected, message=", ".join(faults))
    attempt.traces[digest] = body, kind
    if len(attempt.traces) > _REMEMBERED:
        attempt.traces.popitem(last=False)
    return Response(body, media_type=kind)


def refuse_traces(attempt: Attempt) -> Response:
    """The answer to spans of an attempt that may send no more. Exporters do not repeat them."""
    return JSONResponse({"code": 8, "message": attempt.over_budget}, status_code=413)
