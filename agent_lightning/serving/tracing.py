"""The gateway's endpoint for traces: OTLP over HTTP in, spans to the buffer."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping

from starlette.responses import JSONResponse, Response

from agent_lightning.core.errors import DataError, UnknownRollout
from agent_lightning.spans.otlp import PROTOBUF, acknowledge, decode
from agent_lightning.spans.tree import RawSpan

_MAX_SPANS = 10_000
"""Spans of a body that are read; the others are counted as rejected."""
AGENT_HEADER = "x-agl-agent"
"""Name of the agent that sends a request; overrides the name in the URL."""
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


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
    record: Callable[[tuple[RawSpan, ...], Mapping[str, int]], Awaitable[int]],
    raw: bytes,
    headers: Mapping[str, str],
    *,
    max_bytes: int,
    secret: str,
) -> Response:
    """Record the spans of an ExportTraceServiceRequest, protobuf or JSON, and answer as OTLP's specification says.

    `record` gets the spans and the faults by their reason, and returns how many spans it rejects; they are counted in
    the answer's `partial_success`. The status is 400 if the body cannot be read, and 409 if the rollout has ended:
    exporters repeat neither.
    """
    content_type = headers.get("content-type", PROTOBUF)
    try:
        traces, faults = decode(
            raw,
            content_type=content_type,
            content_encoding=headers.get("content-encoding", ""),
            max_bytes=max_bytes,
            max_spans=_MAX_SPANS,
            secret=secret,
        )
        spans = tuple(span for trace in traces.values() for span in trace)
        lost = sum(count for reason, count in faults.items() if not reason.startswith("repaired"))
        rejected = lost + await record(spans, faults)
    except DataError as error:
        return JSONResponse({"code": 3, "message": str(error)}, status_code=400)
    except UnknownRollout as error:
        return JSONResponse({"code": 9, "message": str(error)}, status_code=409)
    body, kind = acknowledge(content_type, rejected=rejected, message=", ".join(faults))
    return Response(body, media_type=kind)
