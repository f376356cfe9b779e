"""OTLP, OpenTelemetry's format for traces, to and from raw spans. The only module that imports opentelemetry.proto.

OTLP/HTTP has two encodings: protobuf, and JSON with ids in hex (https://opentelemetry.io/docs/specs/otlp/). Bodies come
from outside: whatever they hold, `decode` returns spans and counts of refused spans, or raises DataError.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_UNREADABLE = (json_format.ParseError, ValueError, TypeError, AttributeError, RecursionError, SystemError)
"""Errors that protobuf raises for JSON; SystemError is for a field whose name has half of a surrogate pair."""
_LONG = 4096
"""Characters from which on a text does not go through protobuf's reader of JSON, which searches each for halves of
surrogate pairs, at 25 ns a character, and holds Python's lock meanwhile."""
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
    messages: Iterable[trace_pb2.Span]
    if kind == PROTOBUF:
        request = trace_service_pb2.ExportTraceServiceRequest()
        try:
            request.ParseFromString(plain)
        except DecodeError:
            raise DataError("OTLP body is truncated or not protobuf") from None
        if plain and not request.resource_spans:
            raise DataError("body is protobuf, but no OTLP trace request")
        scopes = (scope for resource in request.resource_spans for scope in resource.scope_spans)
        messages = (span for scope in scopes for span in scope.spans)
    elif kind == JSON:
        try:
            tree = json.loads(plain)
        except (ValueError, RecursionError):
            raise DataError("OTLP body is truncated or not JSON") from None
        if not isinstance(tree, dict) or (tree and not any(name in tree for name in RESOURCES)):
            raise DataError("body is JSON, but no OTLP trace request: it has no resourceSpans")
        messages = _json_spans([tree], refused)
    else:
        raise DataError(f"content type {kind!r}: OTLP is {PROTOBUF} or {JSON}")
    return _by_trace(messages, refused, max_spans), +refused


def read_json(records: Iterable[Mapping[str, Any]], refused: Counter[str]) -> Mapping[str, tuple[RawSpan, ...]]:
    """The spans in requests that were parsed from JSON, by trace id; counts the refused ones as `decode` does."""
    return _by_trace(_json_spans(records, refused), refused, 10**9)


def _by_trace(
    messages: Iterable[trace_pb2.Span], refused: Counter[str], max_spans: int
) -> dict[str, tuple[RawSpan, ...]]:
    traces: dict[str, dict[str, RawSpan]] = {}
    for number, message in enumerate(messages):
        if number >= max_spans:
            raise DataError(f"OTLP body of more than {max_spans} spans: send fewer at once")
        span = _raw_span(message, refused)
        if span is None:
            continue
        spans = traces.setdefault(message.trace_id.hex(), {})
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
_IDS = {"traceId": "trace_id", "spanId": "span_id", "parentSpanId": "parent_span_id"}


def _json_spans(trees: Iterable[Mapping[str, Any]], refused: Counter[str]) -> Iterator[trace_pb2.Span]:
    resources = (part for tree in trees for name in RESOURCES for part in _dicts(tree.get(name)))
    scopes = (scope for part in resources for name in _SCOPES for scope in _dicts(part.get(name)))
    for span in (span for scope in scopes for span in _dicts(scope.get("spans"))):
        status = span.get("status")
        failed = isinstance(status, dict) and str(status.get("code")).upper().endswith("ERROR")
        known = {name: value for name, value in span.items() if name not in ("links", "kind", *_IDS, *_IDS.values())}
        known |= {name: _base64(span.get(name, span.get(snake))) for name, snake in _IDS.items()}
        known |= {"status": {**status, "code": 2}} if isinstance(status, dict) and failed else {}
        texts: dict[str, str] = {}
        try:
            message = json_format.ParseDict(_shorten(known, texts), trace_pb2.Span(), ignore_unknown_fields=True)
            yield _lengthen(message, texts) if texts else message
        except _UNREADABLE:
            refused["a span that cannot be read"] += 1


def _shorten(value: Any, texts: dict[str, str]) -> Any:
    """The JSON of a span with a name for each long text, which `texts` then has. Raises ValueError for one with half of
    a surrogate pair, and RecursionError."""
    if isinstance(value, dict):
        # Bytes are written in base64, which a name is not.
        return {k: v if k in ("bytesValue", "bytes_value") else _shorten(v, texts) for k, v in value.items()}
    if isinstance(value, list):
        return [_shorten(part, texts) for part in value]
    if not isinstance(value, str) or len(value) < _LONG:
        return value
    value.encode()
    texts[name := secrets.token_hex(16)] = value  # nobody can guess it, and so write it
    return name


def _lengthen(span: trace_pb2.Span, texts: Mapping[str, str]) -> trace_pb2.Span:
    """The span with the texts that `_shorten` has taken out."""

    def restore(value: AnyValue) -> None:
        if value.string_value in texts:
            value.string_value = texts[value.string_value]
        for part in value.array_value.values if value.HasField("array_value") else ():
            restore(part)
        restore_all(value.kvlist_value.values if value.HasField("kvlist_value") else ())

    def restore_all(pairs: Iterable[KeyValue]) -> None:
        for pair in pairs:
            pair.key = texts.get(pair.key, pair.key)
            restore(pair.value)

    for part in (span, *span.events):
        part.name = texts.get(part.name, part.name)
        restore_all(part.attributes)
    span.status.message = texts.get(span.status.message, span.status.message)
    return span


def _dicts(value: Any) -> Iterable[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _base64(identity: Any) -> str:
    """An id in the base64 of protobuf's JSON. OTLP writes ids in hexadecimal, protobuf's own JSON and Tempo in base64.
    "" if it is neither."""
    text = identity.strip() if isinstance(identity, str) else ""
    if re.fullmatch(r"([0-9a-fA-F]{2})*", text):
        return base64.b64encode(bytes.fromhex(text)).decode()
    plain = text.rstrip("=").replace("-", "+").replace("_", "/")
    return f"{plain}{'=' * (-len(plain) % 4)}" if re.fullmatch("[0-9A-Za-z+/]{11}|[0-9A-Za-z+/]{22}", plain) else ""


def _raw_span(message: trace_pb2.Span, refused: Counter[str]) -> RawSpan | None:
    if not message.span_id.strip(b"\0"):
        refused["a span without id"] += 1
        return None
    if message.start_time_unix_nano == 0:
        refused["a span without start time"] += 1
        return None
    if message.end_time_unix_nano < message.start_time_unix_nano:
        refused["repaired: end before start"] += 1
    attributes = _plain_attributes(message.attributes)
    events = [{"event.name": event.name, **_plain_attributes(event.attributes)} for event in message.events]
    if is_deeper([attributes, *events], _DEPTH + 2):
        refused["repaired: a value nested too deep"] += 1
        attributes, events = _shallow(attributes, _DEPTH + 1), [_shallow(event, _DEPTH + 1) for event in events]
    chat = [event for event in events if event["event.name"].startswith("gen_ai.")]
    error = ""
    if message.status.code == trace_pb2.Status.STATUS_CODE_ERROR:
        error = message.status.message or "error"
        for event in events:  # the last exception counts
            if event["event.name"] == "exception":
                words = [str(event.get(f"exception.{part}") or "") for part in ("type", "message")]
                error = ": ".join(filter(None, words)) or "exception"
    return RawSpan(
        span_id=message.span_id.hex(),
        parent_id=message.parent_span_id.hex() if message.parent_span_id.strip(b"\0") else "",
        name=message.name,
        started_at=message.start_time_unix_nano / _NANO,
        ended_at=max(message.start_time_unix_nano, message.end_time_unix_nano) / _NANO,
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
