"""Spans that are plain records (Phoenix, MLflow, console exporters), and the values in records of all formats."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, cast

from agent_lightning.core.errors import DataError
from agent_lightning.core.json_values import as_mapping, parse_json
from agent_lightning.core.text import one_line
from agent_lightning.spans.fields import number
from agent_lightning.spans.message_forms import parse_value
from agent_lightning.spans.tree import RawSpan

PARQUET = b"PAR1"
"""The first bytes of a file in Parquet's format."""
_STARTS = ("start_time", "start_time_unix_nano", "startTime", "start_time_ns", "timestamp")
_ENDS = ("end_time", "end_time_unix_nano", "endTime", "end_time_ns")
_LONGEST_NAME = 300
"""Most characters of an attribute's name into which nested values are flattened."""


def read_table(body: bytes) -> list[dict[str, Any]]:
    """The rows of a Parquet file. Raises DataError if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return cast(list[dict[str, Any]], pq.read_table(io.BytesIO(body)).to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"Parquet that cannot be read: {one_line(error)}") from None


def plain_span(record: Mapping[str, Any]) -> tuple[str, RawSpan]:
    """The id of the trace, and the span, of a record with plain attributes, flat or nested. Raises LookupError,
    TypeError, ValueError or AttributeError if the record is damaged.

    Example: {"context": {"trace_id": "7", "span_id": "a"}, "start_time": 1, "attributes": {"llm": {"model_name": "m"}}}
    -> ("7", RawSpan(span_id="a", attributes={"llm.model_name": "m"}, …))
    """
    known = {**record, **as_mapping(record.get("context"))}
    trace = _identity(known, "trace_id", "traceId", "context.trace_id")
    identity = _identity(known, "span_id", "spanId", "context.span_id", "id")
    parent = _identity(known, "parent_id", "parent_span_id", "parentId", "parentSpanId", "parentSpanContext")
    if not identity:
        raise ValueError("no span id")
    columns = {name.removeprefix("attributes."): v for name, v in record.items() if name.startswith("attributes.")}
    attributes = _flat({**as_mapping(parse_value(record.get("attributes"))), **columns})
    for name in ("mlflow.spanType", "mlflow.chat.tokenUsage"):  # MLflow writes all values as JSON
        attributes |= {name: parse_json(str(attributes[name]))} if name in attributes else {}
    usage = as_mapping(attributes.pop("mlflow.chat.tokenUsage", None)).items()
    attributes |= {f"gen_ai.usage.{name}": number_of_tokens for name, number_of_tokens in usage}
    if isinstance(kind := record.get("span_kind"), str):  # of Phoenix
        attributes.setdefault("openinference.span.kind", kind.upper())
    given = map(as_mapping, parse_value(record.get("events")) or ())
    events = [{"event.name": str(event.get("name")), **as_mapping(event.get("attributes"))} for event in given]
    chat = [event for event in events if event["event.name"].startswith("gen_ai.")]
    attributes |= {"gen_ai.events": chat} if chat else {}
    started, ended = _first(known, *_STARTS), _first(known, *_ENDS)
    if ended is None and (duration := read_number(record.get("duration"))) > 0:  # of JavaScript, in microseconds
        ended = read_time(started) + duration / 1e6
    status = {**as_mapping(record.get("status")), **record}
    code, error = _first(status, "status_code", "code"), ""
    if code == 2 or str(code).upper().endswith("ERROR"):
        raised = [event.get("exception.message") for event in events]
        error = _first(status, "status_message", "message", "description") or next(filter(None, raised), "error")
    return trace, make_span(identity, parent, record.get("name"), (started, ended), attributes, error)


def _first(record: Mapping[str, Any], *names: str) -> Any:
    """The first value that is there; a table has NaN where it has none."""
    values = (record.get(name) for name in names)
    return next((value for value in values if value is not None and value != "" and value == value), None)


def _identity(record: Mapping[str, Any], *names: str) -> str:
    """An id as text, "" if there is none; it may be in a mapping, or hexadecimal with "0x"."""
    value = _first(record, *names)
    text = str(as_mapping(value).get("spanId", value) or "").removeprefix("0x")
    return text if text.strip("0") else ""


def _flat(value: Any) -> dict[str, Any]:
    """Attributes with the names of nested mappings and lists of mappings joined by dots, without the empty ones.

    Example: {"llm": {"input_messages": [{"message.role": "user"}]}} -> {"llm.input_messages.0.message.role": "user"}
    """
    flat: dict[str, Any] = {}
    waiting = [("", value)]
    while waiting:
        name, at = waiting.pop()
        is_listed = isinstance(at, list | tuple) and bool(at) and all(isinstance(item, Mapping) for item in at)
        if len(name) > _LONGEST_NAME or name == "metadata" or not (isinstance(at, Mapping) or is_listed):
            flat |= {} if at is None or at != at else {name: at}
            continue
        items = enumerate(at) if is_listed else at.items()
        waiting += [(f"{name}.{key}" if name else str(key), part) for key, part in items]
    return flat


def make_span(
    identity: Any, parent_id: Any, name: Any, times: tuple[Any, Any], attributes: Mapping[str, Any], error: Any
) -> RawSpan:
    """The span of a record; it ends when it starts if the record has no end."""
    started = read_time(times[0])
    return RawSpan(
        span_id=str(identity),
        parent_id=str(parent_id or ""),
        name=str(name or ""),
        started_at=started,
        ended_at=read_time(times[1]) if times[1] else started,
        attributes=attributes,
        error=str(error or ""),
    )


_UNITS = ((1e11, 1), (1e14, 10**3), (1e17, 10**6), (math.inf, 10**9))
"""Size below which a time is in a unit, and how many of the unit are a second: all are of the years 1973 to 5138."""


def read_time(value: Any) -> float:
    """Unix seconds, NaN if the value is no time. A number, also as text, may be seconds, milliseconds, microseconds or
    nanoseconds, told by its size; a date may be ISO's or as e-mails and JavaScript write it, and is in UTC if it has no
    zone; a list is JavaScript's [seconds, nanoseconds].

    Example: read_time(1728803137170) == read_time("2024-10-13T07:05:37.170") == 1728803137.17
    """
    if isinstance(value, str) and re.fullmatch(r"-?\d{9,}(\.\d+)?", value.strip()):
        value = float(value) if "." in value else int(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value / next(per_second for size, per_second in _UNITS if not abs(value) > size)
    if isinstance(value, list | tuple) and len(value) == 2:
        return read_number(value[0]) + read_number(value[1]) / 1e9
    date = value
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        with suppress(ValueError, TypeError):
            date = read(str(value).strip().replace(" UTC", "+00:00")) if isinstance(date, str) else date
    if not isinstance(date, datetime):
        return math.nan
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def read_number(value: Any) -> float:
    """A number as a float; NaN for any other value, also for text that `number` would read."""
    return number(value) if isinstance(value, int | float) else math.nan


def as_text(value: Any) -> Any:
    """The value as text, unless it is text or a number."""
    return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
