"""OTLP in and out: what is sent comes back, and whatever comes from outside is read, counted or refused in a line."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from agent_lightning.core.errors import DataError
from agent_lightning.spans import otlp
from agent_lightning.spans.otlp import JSON, PROTOBUF, REASONS, encode, encode_json
from agent_lightning.spans.tree import RawSpan

LIMITS: dict[str, Any] = {"max_bytes": 1_000_000, "max_spans": 100}
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
values = st.recursive(
    texts | numbers | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
ids = st.text("0123456789abcdef", min_size=16, max_size=16).filter(lambda text: set(text) != {"0"})
times = st.floats(1e9, 4e9)


@st.composite
def raw_spans(draw: st.DrawFn) -> tuple[RawSpan, ...]:
    span_ids = draw(st.lists(ids, min_size=1, max_size=4, unique=True))
    return tuple(
        RawSpan(
            span_id=identity,
            parent_id=draw(st.sampled_from(["", *span_ids])),
            name=draw(texts),
            started_at=(start := draw(times)),
            ended_at=start + draw(st.floats(0, 1e3)),
            attributes=draw(st.dictionaries(texts, values, max_size=4)),
            error=draw(texts),
        )
        for identity in span_ids
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(raw_spans(), st.sampled_from(["", "gzip", "deflate"]))
def test_spans_that_are_sent_come_back_as_they_were(spans: tuple[RawSpan, ...], encoding: str) -> None:
    bodies = {PROTOBUF: encode(spans, trace_id="t", resource={"service.name": "x"})}
    bodies[JSON] = encode_json(spans, trace_id="t", resource={"service.name": "x"}).encode()
    for content_type, body in bodies.items():
        packed = {"": body, "gzip": gzip.compress(body), "deflate": zlib.compress(body)}[encoding]
        assert decode(packed, content_type=content_type, content_encoding=encoding, **LIMITS) == (spans, {})


def test_long_texts_are_read_as_short_ones_are() -> None:
    long = "é\U0001f600" * 5000
    values: Any = {f"{long}k": long, "list": [long, {long: [long, 1]}], "short": "x", "n": 2}
    span = RawSpan(span_id="1" * 16, parent_id="", name=f"{long}n", started_at=1e9, ended_at=2e9, attributes=values)
    sent = (replace(span, error=f"{long}e"),)
    for content_type, body in {
        PROTOBUF: encode(sent, trace_id="t", resource={}),
        JSON: encode_json(sent, trace_id="t", resource={}).encode(),
    }.items():
        assert decode(body, content_type=content_type, **LIMITS) == (sent, {})
    tree = json.loads(encode_json((span,), trace_id="t", resource={}))
    (read,) = tree["resourceSpans"][0]["scopeSpans"][0]["spans"]
    text, packed = {"stringValue": long}, {"bytesValue": base64.b64encode(long.encode()).decode()}
    read["attributes"] = [{"key": "bytes", "value": packed}]
    read["events"] = [{"name": "gen_ai.choice", "attributes": [{"key": long, "value": text}]}]
    ((got,), refused) = decode(json.dumps(tree).encode(), content_type=JSON, **LIMITS)
    assert got.attributes == {
        "bytes": long.encode().hex(),
        "gen_ai.events": [{"event.name": "gen_ai.choice", long: long}],
    }
    assert refused == {}
    read["name"] = f"{long}\ud800"
    assert decode(json.dumps(tree).encode(), content_type=JSON, **LIMITS) == ((), {"a span that cannot be read": 1})


@given(st.binary(max_size=200), st.sampled_from([PROTOBUF, JSON]), st.sampled_from(["", "gzip", "deflate"]))
def test_any_bytes_are_read_or_refused_in_one_line(body: bytes, content_type: str, encoding: str) -> None:
    _decode_or_refuse(body, content_type, encoding)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(raw_spans(), st.data())
def test_a_damaged_body_is_read_or_refused_in_one_line(spans: tuple[RawSpan, ...], data: st.DataObject) -> None:
    content_type = data.draw(st.sampled_from([PROTOBUF, JSON]))
    body = encode(spans, trace_id="t", resource={})
    if content_type == JSON:
        body = encode_json(spans, trace_id="t", resource={}).encode()
    at = data.draw(st.integers(0, len(body)))
    other = data.draw(st.binary(max_size=3))
    _decode_or_refuse(body[:at] + other + body[at + data.draw(st.integers(0, 3)) :], content_type, "")


def decode(body: bytes, **options: Any) -> tuple[tuple[RawSpan, ...], Any]:
    """The spans of all traces of a body, and the refused ones."""
    traces, refused = otlp.decode(body, **options)
    return tuple(span for spans in traces.values() for span in spans), refused


def _decode_or_refuse(body: bytes, content_type: str, encoding: str) -> None:
    complaint = ""
    try:
        spans, refused = decode(body, content_type=content_type, content_encoding=encoding, **LIMITS)
        assert all(isinstance(span, RawSpan) for span in spans)
        assert set(refused) <= set(REASONS)
    except DataError as error:
        complaint = str(error)
    assert "\n" not in complaint


SPAN = RawSpan(span_id="00000000000000ab", name="x", started_at=1.0, ended_at=2.0, attributes={})


@pytest.mark.parametrize(
    ("body", "content_type", "encoding", "words"),
    [
        (encode([SPAN], trace_id="t", resource={})[:-3], PROTOBUF, "", "truncated or not protobuf"),
        (b'{"resourceSpans": [', JSON, "", "truncated or not JSON"),
        (b'{"a": 1}', JSON, "", "no resourceSpans"),
        (b"[" * 100_000, JSON, "", "not JSON"),
        (b"\x12\x02hi", PROTOBUF, "", "no OTLP"),
        (gzip.compress(b"0" * 9_000_000, mtime=0), PROTOBUF, "gzip", "more than 1000000 bytes"),
        (gzip.compress(b"0" * 9_000, mtime=0)[:-9], PROTOBUF, "gzip", "truncated"),
        (b"{}", JSON, "br", "gzip, deflate"),
        (b"{}", "text/html; charset=utf-8", "", "'text/html'"),
        (encode([SPAN] * 101, trace_id="t", resource={}), PROTOBUF, "", "more than 100 spans"),
    ],
)
def test_a_body_that_is_no_otlp_is_refused(body: bytes, content_type: str, encoding: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        decode(body, content_type=content_type, content_encoding=encoding, **LIMITS)


GOOD = {"spanId": "00000000000000ab", "startTimeUnixNano": "1000000000", "endTimeUnixNano": 2_000_000_000}


def _sent(*spans: dict[str, Any]) -> tuple[tuple[RawSpan, ...], dict[str, int]]:
    body = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode()
    spans, refused = decode(body, content_type=JSON, **LIMITS)
    return spans, dict(refused)


def test_what_is_wrong_with_one_span_is_counted_and_the_others_are_kept() -> None:
    deep: dict[str, Any] = {"intValue": "1"}
    for _ in range(20):
        deep = {"arrayValue": {"values": [deep]}}
    bad: list[dict[str, Any]] = [
        {**GOOD, "startTimeUnixNano": "yesterday"},
        {**GOOD, "spanId": "no hex"},
        {**GOOD, "spanId": "0000000000000000"},
        {"spanId": "00000000000000ac"},
        {**GOOD, "name": "again"},
        {**GOOD, "spanId": "00000000000000ad", "endTimeUnixNano": "5"},
        {**GOOD, "spanId": "00000000000000ae", "attributes": [{"key": "deep", "value": deep}]},
    ]
    spans, refused = _sent(GOOD, *bad)
    assert [span.span_id for span in spans] == ["00000000000000ab", "00000000000000ad", "00000000000000ae"]
    assert [(span.started_at, span.ended_at) for span in spans] == [(1.0, 2.0), (1.0, 1.0), (1.0, 2.0)]
    assert refused == {
        "a span that cannot be read": 1,
        "a span without id": 2,
        "a span without start time": 1,
        "a span id for the second time": 1,
        "repaired: end before start": 1,
        "repaired: a value nested too deep": 1,
    }
    assert set(refused) == set(REASONS)


def test_the_error_of_a_span_is_its_exception_else_its_status() -> None:
    attributes = [{"key": "exception.type", "value": {"stringValue": "ValueError"}}]
    attributes += [{"key": "exception.message", "value": {"stringValue": "no"}}]
    raised = {**GOOD, "events": [{"name": "exception", "attributes": attributes}]}
    cases = [({"code": 2}, "ValueError: no"), ({"code": 1}, ""), ({}, "")]
    assert [_sent({**raised, "status": status})[0][0].error for status, _ in cases] == [error for _, error in cases]
    assert _sent({**GOOD, "status": {"code": "STATUS_CODE_ERROR", "message": "broke"}})[0][0].error == "broke"


odd = (
    numbers
    | st.booleans()
    | st.none()
    | st.sampled_from(["7", " 7", "7.0", "-9223372036854775809", "NaN", "x", "\ud800"])
)
kinds = st.sampled_from(["stringValue", "boolValue", "int_value", "doubleValue", "unknown"])


lists = st.sampled_from([{"arrayValue": {"values": [{"intValue": 1}, {}]}}, {"array_value": {}}, {"kvlistValue": {}}])


@given(st.dictionaries(kinds, odd | texts, max_size=2) | lists)
def test_a_value_is_read_as_protobuf_reads_it(value: dict[str, Any]) -> None:
    """Or refused, if it is no OTLP."""
    message = Span()
    try:
        json_format.ParseDict({"attributes": [{"key": "k", "value": value}]}, message, ignore_unknown_fields=True)
    except (json_format.ParseError, OverflowError):
        expected: Any = "refused"
    else:
        body = ExportTraceServiceRequest()
        message.span_id, message.start_time_unix_nano = b"1" * 8, 1
        body.resource_spans.add().scope_spans.add().spans.append(message)
        ((span,), _) = decode(body.SerializeToString(), content_type=PROTOBUF, **LIMITS)
        expected = span.attributes["k"]
    sent = _sent({**GOOD, "attributes": [{"key": "k", "value": value}]})[0]
    got = sent[0].attributes["k"] if sent else "refused"
    assert got == expected or (got != got and expected != expected), (got, expected)


def test_two_traces_of_a_body_stay_apart() -> None:
    body = ExportTraceServiceRequest.FromString(encode([SPAN], trace_id="1" * 32, resource={}))
    body.MergeFrom(ExportTraceServiceRequest.FromString(encode([SPAN], trace_id="2" * 32, resource={})))
    by_trace, refused = otlp.decode(body.SerializeToString(), content_type=PROTOBUF, **LIMITS)
    assert by_trace == {"1" * 32: (SPAN,), "2" * 32: (SPAN,)}
    assert not refused


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(name, name): _renamed(part, names) for name, part in value.items()}
    return [_renamed(part, names) for part in value] if isinstance(value, list) else value


SNAKE = {"resourceSpans": "resource_spans", "scopeSpans": "scope_spans", "traceId": "trace_id", "spanId": "span_id"}
SNAKE |= {"parentSpanId": "parent_span_id", "startTimeUnixNano": "start_time_unix_nano", "stringValue": "string_value"}
SNAKE |= {"endTimeUnixNano": "end_time_unix_nano", "intValue": "int_value"}
OLD = {"scopeSpans": "instrumentationLibrarySpans"}


@pytest.mark.parametrize("names", [{}, SNAKE, OLD, {"resourceSpans": "batches"}])
@pytest.mark.parametrize("form", ["hex", "HEX", "base64", "base64url", "unpadded"])
@pytest.mark.parametrize("code", [2, "2", "STATUS_CODE_ERROR", "ERROR", "Error"])
def test_every_writing_of_json_is_the_same_span(names: dict[str, str], form: str, code: Any) -> None:
    raw = {
        "traceId": bytes(range(240, 256)),
        "spanId": b"\xfb\xef\xbe\xfb\xef\xbe\xfb\xef",
        "parentSpanId": b"\x01" * 8,
    }
    ids = {name: identity.hex() for name, identity in raw.items()}
    if form == "HEX":
        ids = {name: identity.upper() for name, identity in ids.items()}
    elif form != "hex":
        encode_id = base64.urlsafe_b64encode if form == "base64url" else base64.b64encode
        ids = {name: encode_id(identity).decode() for name, identity in raw.items()}
        ids = {name: text.rstrip("=") for name, text in ids.items()} if form == "unpadded" else ids
    attributes = [{"key": "n", "value": {"intValue": "7"}}, {"key": "t", "value": {"stringValue": "x"}}]
    sent = ids | {"name": "x", "kind": "SPAN_KIND_CLIENT", "startTimeUnixNano": "1000000000", "attributes": attributes}
    sent |= {"endTimeUnixNano": 2e9, "status": {"code": code, "message": "broke"}}
    tree = _renamed({"resourceSpans": [{"scopeSpans": [{"spans": [sent]}]}]}, names)
    (traces, refused) = otlp.decode(json.dumps(tree).encode(), content_type=JSON, **LIMITS)
    expected = RawSpan(
        span_id=raw["spanId"].hex(),
        parent_id=raw["parentSpanId"].hex(),
        name="x",
        started_at=1.0,
        ended_at=2.0,
        attributes={"n": 7, "t": "x"},
        error="broke",
    )
    assert (traces, dict(refused)) == ({raw["traceId"].hex(): (expected,)}, {})
