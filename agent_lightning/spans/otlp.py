"""OTLP, OpenTelemetry's format for traces, to and from raw spans. The only module that imports opentelemetry.proto.

OTLP/HTTP has two encodings: protobuf, and JSON with ids in hex (https://opentelemetry.io/docs/specs/otlp/). Bodies come
from outside: whatever they hold, `decode` returns spans and counts of refused spans, or raises DataError.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util import instrumentation
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from agent_lightning.core.errors import DataError
from agent_lightning.core.inflate import inflate
from agent_lightning.core.json_values import is_deeper
from agent_lightning.core.text import hide_secret, replace_surrogates
from agent_lightning.spans.attributes import Kind
from agent_lightning.spans.tree import RawSpan, span_kind

PROTOBUF, JSON = "application/x-protobuf", "application/json"
REASONS = {
    "a span that cannot be read": "JSON that is no OTLP span, e.g. a time that is not a number",
    "a span without id": "no span id, or one that is all zeros or not hex",
    "a span without start time": "its start is 0 or missing",
    "a span id for the second time": "the first one in its trace is kept",
    "repaired: end before start": "kept, as a span that ended when it started",
    "repaired: a value nested too deep": "kept, without what is nested deeper than 16",
}
"""Every reason for which `decode` refuses or repairs a span, and its meaning. Repaired spans are kept."""
_UNREADABLE = (ValueError, TypeError, AttributeError, RecursionError, OverflowError)
"""Errors of reading a span in JSON that is no OTLP."""
_DEPTH = 16
"""Lists and mappings that may be nested in each other in the value of an attribute."""
_EVENTS = "gen_ai.events"
"""The attribute of a RawSpan that holds the chat messages among the span's events."""
_NANO = 10**9
_SCOPE = instrumentation.InstrumentationScope("agent-lightning")


def decode(
    body: bytes, *, content_type: str, content_encoding: str = "", max_bytes: int, max_spans: int, secret: str = ""
) -> tuple[Mapping[str, tuple[RawSpan, ...]], Mapping[str, int]]:
    """The spans of an OTLP/HTTP body by trace id (hex), and the number of spans refused or repaired for each reason.

    `max_bytes` bounds the body after inflation. `secret` is hidden in all spans: instrumentors of HTTP clients record
    the URLs that an agent calls. A span's events named `gen_ai.*` are in its attribute "gen_ai.events"; its exception
    is in its `error` if its status is an error.

    Raises DataError, in one line, if the body is truncated, too large or not OTLP.

    Example: traces, refused = decode(body, content_type="application/json", max_bytes=4_000_000, max_spans=10_000)
    """
    plain = hide_secret(inflate(body, content_encoding, max_bytes), secret)
    if len(plain) > max_bytes:
        raise DataError(f"OTLP body of more than {max_bytes} bytes: send fewer spans at once")
    refused: Counter[str] = Counter()
    kind = content_type.partition(";")[0].strip().lower()
    sent: Iterable[_Sent]
    if kind == PROTOBUF:
        request = trace_service_pb2.ExportTraceServiceRequest()
        try:
            request.ParseFromString(plain)
        except DecodeError:
            raise DataError("OTLP body is truncated or not protobuf") from None
        if plain and not request.resource_spans:
            raise DataError("body is protobuf, but no OTLP trace request")
        scopes = (scope for resource in request.resource_spans for scope in resource.scope_spans)
        sent = (_of_message(span) for scope in scopes for span in scope.spans)
    elif kind == JSON:
        try:
            tree = json.loads(plain)
        except (ValueError, RecursionError):
            raise DataError("OTLP body is truncated or not JSON") from None
        if not isinstance(tree, dict) or (tree and not any(name in tree for name in RESOURCES)):
            raise DataError("body is JSON, but no OTLP trace request: it has no resourceSpans")
        sent = _json_spans([tree], refused)
    else:
        raise DataError(f"content type {kind!r}: OTLP is {PROTOBUF} or {JSON}")
    return _by_trace(sent, refused, max_spans), +refused


def read_json(records: Iterable[Mapping[str, Any]], refused: Counter[str]) -> Mapping[str, tuple[RawSpan, ...]]:
    """The spans in requests that were parsed from JSON, by trace id; counts the refused ones as `decode` does."""
    return _by_trace(_json_spans(records, refused), refused, 10**9)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """A span as a client has sent it."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]]  # the name of each is its "event.name"
    failed: bool
    message: str  # of the status


def _by_trace(sent: Iterable[_Sent], refused: Counter[str], max_spans: int) -> dict[str, tuple[RawSpan, ...]]:
    traces: dict[str, dict[str, RawSpan]] = {}
    for number, own in enumerate(sent):
        if number >= max_spans:
            raise DataError(f"OTLP body of more than {max_spans} spans: send fewer at once")
        span = _raw_span(own, refused)
        if span is None:
            continue
        spans = traces.setdefault(own.trace_id.hex(), {})
        refused["a span id for the second time"] += span.span_id in spans
        spans.setdefault(span.span_id, span)
    return {trace_id: tuple(spans.values()) for trace_id, spans in traces.items()}


def encode(spans: Sequence[RawSpan], *, trace_id: str, resource: Mapping[str, str]) -> bytes:
    """The spans of one trace as the protobuf body of an OTLP/HTTP request; `decode` reads it back. See `to_sdk`.

    Example: encode(spans, trace_id="train-12-3/0", resource={"service.name": "agent-lightning"})
    """
    return bytes(encode_spans(to_sdk(spans, trace_id, Resource(resource))).SerializeToString())


def encode_json(spans: Sequence[RawSpan], *, trace_id: str, resource: Mapping[str, str]) -> str:
    """The spans of one trace as a line of JSON, the form of OpenTelemetry's file exporter; else like `encode`. As OTLP
    demands, ids are in hex, enums are numbers, and integers of 64 bits are text."""
    request = encode_spans(to_sdk(spans, trace_id, Resource(resource)))
    tree = json_format.MessageToDict(request, use_integers_for_enums=True)
    for span in (span for part in tree.get("resourceSpans", ()) for span in part["scopeSpans"][0]["spans"]):
        for name in {"traceId", "spanId", "parentSpanId"} & span.keys():
            span[name] = base64.b64decode(span[name]).hex()
    return json.dumps(tree, separators=(",", ":"))


def to_sdk(spans: Sequence[RawSpan], trace_id: str, resource: Resource) -> list[ReadableSpan]:
    """The spans of one trace as OpenTelemetry's SDK exports them.

    Ids that are not hex of the right length become hashes; that of a span has its trace in it, because viewers keep a
    span's id once. Times are kept to the nanosecond. A model call is a request to a server, in OpenTelemetry's word
    CLIENT; any other span is INTERNAL.
    """

    def context(span_id: str) -> SpanContext:
        trace, number = _identity(trace_id, 16), _identity(span_id, 8, trace_id)
        return SpanContext(trace, number, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    return [
        ReadableSpan(
            name=replace_surrogates(span.name),
            context=context(span.span_id),
            parent=context(span.parent_id) if span.parent_id else None,
            resource=resource,
            instrumentation_scope=_SCOPE,
            attributes={replace_surrogates(name): _sendable(value) for name, value in span.attributes.items()},
            kind=SpanKind.CLIENT if span_kind(span) is Kind.CALL else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, replace_surrogates(span.error)) if span.error else Status(),
            # As a product of floating-point numbers a time would be off by a hundred nanoseconds.
            start_time=round(Fraction(span.started_at) * _NANO),
            end_time=round(Fraction(span.ended_at) * _NANO),
        )
        for span in spans
    ]


def acknowledge(content_type: str, *, rejected: int, message: str) -> tuple[bytes, str]:
    """The body and the content type of the answer to an OTLP/HTTP request, in the encoding of the request."""
    answer = trace_service_pb2.ExportTraceServiceResponse()
    if rejected:
        answer.partial_success.rejected_spans = rejected
        answer.partial_success.error_message = message
    if content_type.partition(";")[0].strip().lower() == JSON:
        return json_format.MessageToJson(answer).encode(), JSON
    return bytes(answer.SerializeToString()), PROTOBUF


RESOURCES = ("resourceSpans", "resource_spans", "batches")
"""Keys under which a request in JSON has its spans: OTLP's, the same as protobuf names it, and Grafana Tempo's."""
_SCOPES = ("scopeSpans", "scope_spans", "instrumentationLibrarySpans", "instrumentation_library_spans")
_KINDS = ("string", "bool", "int", "double", "array", "kvlist", "bytes")
_VALUE = {f"{kind}{ending}": kind for kind in _KINDS for ending in ("Value", "_value")}
"""Key of an AnyValue in JSON -> its kind."""


def _json_spans(trees: Iterable[Mapping[str, Any]], refused: Counter[str]) -> Iterator[_Sent]:
    """The spans of requests in JSON. protobuf would take 90 us to read a small span, and 100 ms for a text of 4 MB, in
    which it holds Python's lock."""
    resources = (part for tree in trees for name in RESOURCES for part in _dicts(tree.get(name)))
    scopes = (scope for part in resources for name in _SCOPES for scope in _dicts(part.get(name)))
    for span in (span for scope in scopes for span in _dicts(scope.get("spans"))):
        try:
            yield _of_json(span)
        except _UNREADABLE:
            refused["a span that cannot be read"] += 1


def _of_json(span: Mapping[str, Any]) -> _Sent:
    """A span in JSON; every key may be as OTLP writes it, or as protobuf names it. Raises what `_UNREADABLE` lists."""
    status = span.get("status")
    status = status if isinstance(status, dict) else {}
    return _Sent(
        trace_id=_identity_of(span.get("traceId", span.get("trace_id"))),
        span_id=_identity_of(span.get("spanId", span.get("span_id"))),
        parent_id=_identity_of(span.get("parentSpanId", span.get("parent_span_id"))),
        name=_text(span.get("name") or ""),
        start_ns=_integer(span.get("startTimeUnixNano", span.get("start_time_unix_nano")) or 0, 0, 2**64),
        end_ns=_integer(span.get("endTimeUnixNano", span.get("end_time_unix_nano")) or 0, 0, 2**64),
        attributes=_json_attributes(span.get("attributes")),
        events=[
            {"event.name": _text(event.get("name") or ""), **_json_attributes(event.get("attributes"))}
            for event in span.get("events") or ()
        ],
        failed=str(status.get("code")) == "2" or str(status.get("code")).upper().endswith("ERROR"),
        message=_text(status.get("message") or ""),
    )


def _json_attributes(pairs: Any) -> dict[str, Any]:
    return {_text(pair.get("key") or ""): _json_value(pair.get("value") or {}) for pair in pairs or ()}


def _json_value(value: Mapping[str, Any]) -> Any:
    """An AnyValue in JSON as a plain value; None if it has none. Raises ValueError if it has several."""
    given = [(_VALUE[name], part) for name, part in value.items() if name in _VALUE and part is not None]
    if not given:
        return None
    ((kind, part),) = given
    match kind:
        case "string":
            return _text(part)
        case "bool" if isinstance(part, bool):
            return part
        case "int":
            return _integer(part, -(2**63), 2**63)
        case "double" if isinstance(part, str) or math.isfinite(part):  # else it is written as a text
            return float(part)
        case "array":
            return [_json_value(item) for item in part.get("values") or ()]
        case "kvlist":
            return _json_attributes(part.get("values"))
        case "bytes":
            return base64.b64decode(part.replace("-", "+").replace("_", "/") + "==").hex()
    raise TypeError(f"no {kind}: {part!r}")


def _text(value: Any) -> str:
    """A text that UTF-8 can hold. Raises ValueError for half of a surrogate pair, AttributeError for no text."""
    value.encode()
    return str(value)


def _integer(value: Any, least: int, beyond: int) -> int:
    """An integer of JSON, which may be written as a text, and as a number with an exponent. Raises ValueError."""
    if isinstance(value, str) and value == value.strip():
        value = int(value) if re.fullmatch("-?[0-9]+", value) else float(value)
    number = int(value)
    if number != value or isinstance(value, bool) or not least <= number < beyond:
        raise ValueError(f"no integer from {least} on: {str(value)[:50]}")
    return number


def _dicts(value: Any) -> Iterable[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _identity_of(text: Any) -> bytes:
    """An id: OTLP writes ids in hexadecimal, protobuf's own JSON and Tempo in base64. b"" if it is neither."""
    text = text.strip() if isinstance(text, str) else ""
    if re.fullmatch(r"([0-9a-fA-F]{2})*", text):
        return bytes.fromhex(text)
    plain = text.rstrip("=").replace("-", "+").replace("_", "/")
    is_base64 = re.fullmatch("[0-9A-Za-z+/]{11}|[0-9A-Za-z+/]{22}", plain)
    return base64.b64decode(plain + "==") if is_base64 else b""


def _of_message(span: trace_pb2.Span) -> _Sent:
    return _Sent(
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_id=span.parent_span_id,
        name=span.name,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_plain_attributes(span.attributes),
        events=[{"event.name": event.name, **_plain_attributes(event.attributes)} for event in span.events],
        failed=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        message=span.status.message,
    )


def _raw_span(sent: _Sent, refused: Counter[str]) -> RawSpan | None:
    if not sent.span_id.strip(b"\0"):
        refused["a span without id"] += 1
        return None
    if sent.start_ns == 0:
        refused["a span without start time"] += 1
        return None
    if sent.end_ns < sent.start_ns:
        refused["repaired: end before start"] += 1
    attributes, events = sent.attributes, sent.events
    if is_deeper([attributes, *events], _DEPTH + 2):
        refused["repaired: a value nested too deep"] += 1
        attributes, events = _shallow(attributes, _DEPTH + 1), [_shallow(event, _DEPTH + 1) for event in events]
    chat = [event for event in events if event["event.name"].startswith("gen_ai.")]
    error = ""
    if sent.failed:
        error = sent.message or "error"
        for event in events:  # the last exception counts
            if event["event.name"] == "exception":
                words = [str(event.get(f"exception.{part}") or "") for part in ("type", "message")]
                error = ": ".join(filter(None, words)) or "exception"
    return RawSpan(
        span_id=sent.span_id.hex(),
        parent_id=sent.parent_id.hex() if sent.parent_id.strip(b"\0") else "",
        name=sent.name,
        started_at=sent.start_ns / _NANO,
        ended_at=max(sent.start_ns, sent.end_ns) / _NANO,
        attributes={**attributes, **({_EVENTS: chat} if chat else {})},
        error=error,
    )


def _plain_attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _plain(pair.value) for pair in pairs}


def _plain(value: AnyValue) -> Any:
    """An OTLP value as plain JSON. protobuf itself refuses messages that would exhaust the stack here."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _plain_attributes(value.kvlist_value.values)
    if kind == "bytes_value":
        return value.bytes_value.hex()
    return None if kind is None else getattr(value, kind)


def _shallow(value: Any, depth: int) -> Any:
    """The value with None for each list or mapping that is nested deeper than `depth`."""
    if isinstance(value, dict):
        return {name: _shallow(part, depth - 1) for name, part in value.items()} if depth else None
    if isinstance(value, list):
        return [_shallow(item, depth - 1) for item in value] if depth else None
    return value


def _identity(text: str, size: int, trace_id: str = "") -> int:
    """An id of `size` bytes: the text's own if it is hexadecimal, else the hash of it and of its trace."""
    if re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text):
        return int(text, 16)
    return int.from_bytes(hashlib.sha256(replace_surrogates(f"{trace_id}/{text}").encode()).digest()[:size])


def _sendable(value: Any) -> Any:
    """The value as OTLP can hold it: without halves of surrogate pairs, and what it has no type for as text."""
    if isinstance(value, Mapping):
        return {replace_surrogates(str(name)): _sendable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_sendable(part) for part in value]
    if value is None or isinstance(value, float) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    return replace_surrogates(str(value))
