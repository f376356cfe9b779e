"""A strict reader of OTLP/JSON: what https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding demands."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

IDS = {"traceId": 32, "spanId": 16, "parentSpanId": 16}
LONG = (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64)


def read_strictly(text: str) -> list[Span]:
    """The spans of an OTLP/JSON request, which is one trace with one root. Raises AssertionError, or the ParseError of
    protobuf's own reader, if a strict reader would refuse it."""
    tree = json.loads(text)
    _check(tree, ExportTraceServiceRequest.DESCRIPTOR)
    request = json_format.ParseDict(tree, ExportTraceServiceRequest(), ignore_unknown_fields=False)
    spans = [span for part in request.resource_spans for scope in part.scope_spans for span in scope.spans]
    ids = [span.span_id for span in spans]
    assert len({span.trace_id for span in spans}) == 1
    assert len(set(ids)) == len(ids)
    assert [span.parent_span_id for span in spans if span.parent_span_id not in ids] == [b""]
    for span in spans:
        assert 0 < span.start_time_unix_nano <= span.end_time_unix_nano
        assert len({pair.key for pair in span.attributes}) == len(span.attributes)
    return spans


def _check(tree: dict[str, Any], descriptor: Descriptor) -> None:
    """Check what protobuf's reader lets pass, and put the ids into the base64 that it reads."""
    for name, value in tree.items():
        field = next(field for field in descriptor.fields if field.json_name == name)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if name in IDS:
                assert re.fullmatch(f"[0-9a-f]{{{IDS[name]}}}", item)
                assert set(item) != {"0"}
                tree[name] = base64.b64encode(bytes.fromhex(item)).decode()
            elif field.message_type is not None:
                _check(value[index] if isinstance(value, list) else value, field.message_type)
            elif field.enum_type is not None:
                assert type(item) is int, f"{name} is {item!r}: an enum is a number"
            elif field.type in LONG:
                assert isinstance(item, str), f"{name} is {item!r}: an integer of 64 bits is text"
