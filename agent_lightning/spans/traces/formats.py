"""The spans in trace files of other systems, and in our own exports.

A format only decides which spans a record holds; `conventions` reads their meaning. The format of a file is recognised
by its content, not by its name.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from agent_lightning.core.errors import DataError
from agent_lightning.core.json_values import as_mapping, is_deeper, join_chunks, parse_json
from agent_lightning.core.types import Outcome, RolloutKey, Trajectory, is_reward
from agent_lightning.spans import otlp
from agent_lightning.spans.conventions import reward_refusal
from agent_lightning.spans.message_forms import parse_value
from agent_lightning.spans.traces.export import from_row
from agent_lightning.spans.traces.records import (
    PARQUET,
    as_text,
    make_span,
    plain_span,
    read_number,
    read_table,
    read_time,
)
from agent_lightning.spans.tree import RawSpan

REASONS = {
    "a line that is not JSON": "of a file of lines",
    "a record of no known format": "JSON that is none of the formats",
    "a record nested too deep": "lists and objects in each other more than 200 times",
    "a damaged record": "of a known format, but it cannot be read",
    "an event of another attempt": "of an Agent Lightning rollout; the attempt that succeeded counts",
    "a score that is no number": "a Langfuse score of a category or a text",
    "a reward that is not a finite number": "of an Agent Lightning rollout",
    "a reward beyond 1e15": "of an Agent Lightning rollout",
}
"""Every reason for which this module refuses something, and its meaning."""
_MAX_BYTES, _MAX_SPANS, _MAX_DEPTH = 2**31, 10**7, 200


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTrace:
    """A trace in a file, before the meaning of its spans is read."""

    name: str
    """The trace's id in the file."""
    spans: tuple[RawSpan, ...] = ()
    task_id: str = ""
    reward: float | None = None
    outcome: Outcome = Outcome.FINISHED
    error: str = ""
    output: str = ""
    key: RolloutKey | None = None
    """The rollout's key, if the trace is our own export."""
    trajectory: Trajectory | None = None
    """The rollout itself, if the file is our own export in JSON lines."""


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def read_traces(body: bytes) -> tuple[tuple[str, ...], list[FileTrace], Counter[str]]:
    """The formats that occur in a file, its traces, and the number of refused lines and records for each reason."""
    refused: Counter[str] = Counter()
    try:
        try:
            records = read_table(body) if body.startswith(PARQUET) else _records(body.decode("utf-8-sig"), refused)
        except UnicodeDecodeError:
            records = None
        if records is None:
            kind = otlp.PROTOBUF
            spans, counted = otlp.decode(body, content_type=kind, max_bytes=_MAX_BYTES, max_spans=_MAX_SPANS)
            return ("OTLP",), _sources(spans), Counter(counted)
    except DataError:
        return (), [], Counter({"a record of no known format": 1})
    by_format: dict[str, list[Mapping[str, Any]]] = {}
    for record in chain.from_iterable(map(_unpacked, records)):
        name = _format_of(as_mapping(record))
        if not name or is_deeper(record, _MAX_DEPTH):
            refused["a record nested too deep" if name else "a record of no known format"] += 1
        else:
            by_format.setdefault(name, []).append(record)
    traces = [source for name, _, adapt in FORMATS for source in adapt(by_format.get(name, []), refused)]
    return tuple(by_format), traces, refused


def _records(text: str, refused: Counter[str]) -> list[Any] | None:
    """The records of a file: a JSON value, a list of them, or a value on each line; None if the file has no JSON."""
    content = parse_json(text)
    if content is not None:
        return content if isinstance(content, list) else [content]
    # Only a line feed ends a line: JSON may have other separators in a text.
    values = [parse_json(line) for line in text.split("\n") if line.strip()]
    if not any(values):
        return None
    refused["a line that is not JSON"] += values.count(None)
    return [value for value in values if value is not None]


def _format_of(record: Mapping[str, Any]) -> str:
    """The name of a record's format; "" if it is unknown."""
    return next((name for name, needed, _ in FORMATS if any(keys <= record.keys() for keys in needed)), "")


def _unpacked(record: Any) -> list[Any]:
    """The records in a record that is a page of an API's answer, a trace of Tempo, or a table by columns of pandas."""
    if not isinstance(record, Mapping):
        return [record]
    if isinstance(rows := record.get("context.span_id"), Mapping):
        return [{name: as_mapping(cells).get(row) for name, cells in record.items()} for row in rows]
    if _format_of(record) and not isinstance(record.get("data"), list):
        return [record]
    inner = next(
        (record[name] for name in ("data", "traces", "runs", "observations", "trace") if record.get(name)), None
    )
    return inner if isinstance(inner, list) else [inner] if isinstance(inner, Mapping) else [record]


Adapter = Callable[[Sequence[Mapping[str, Any]], Counter[str]], list[FileTrace]]
_DAMAGED = (LookupError, TypeError, ValueError, AttributeError, OverflowError, DataError)
"""Errors that reading a damaged record raises: it may be any JSON."""


def _each(read: Callable[[Mapping[str, Any], Counter[str]], FileTrace]) -> Adapter:
    """The adapter of a format in which each record is a trace, from a function that reads one record."""

    def adapt(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[FileTrace]:
        sources = []
        for record in records:
            try:
                sources.append(read(record, refused))
            except _DAMAGED:
                refused["a damaged record"] += 1
        return sources

    return adapt


def _grouped(read: Callable[[Mapping[str, Any]], tuple[str, RawSpan]]) -> Adapter:
    """The adapter of a format in which each record is a span, from a function that reads its trace's id and it."""

    def adapt(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[FileTrace]:
        traces: dict[str, list[RawSpan]] = {}
        for record in records:
            try:
                name, span = read(record)
            except _DAMAGED:
                refused["a damaged record"] += 1
            else:
                traces.setdefault(name, []).append(span)
        return [FileTrace(name=name, spans=tuple(spans)) for name, spans in traces.items()]

    return adapt


_plain_spans = _grouped(plain_span)


def _sources(traces: Mapping[str, tuple[RawSpan, ...]]) -> list[FileTrace]:
    sources = []
    for name, spans in traces.items():
        source = FileTrace(name=name, spans=spans)
        root = next((span for span in spans if "agl.rollout.id" in span.attributes), None)
        if root is not None:  # our own export, which has the rollout's data
            about = {key.removeprefix("agl.rollout."): value for key, value in root.attributes.items()}
            with suppress(LookupError, ValueError, TypeError):
                source = replace(
                    source,
                    key=RolloutKey.parse(str(about["id"]), int(about["attempt"])),
                    outcome=Outcome(about["outcome"]),
                    error=root.error,
                    task_id=str(about.get("task_id") or ""),
                    reward=reward if is_reward(reward := read_number(about.get("reward"))) else None,
                    output=str(about.get("output") or ""),
                )
        sources.append(source)
    return sources


def _mlflow(record: Mapping[str, Any], refused: Counter[str]) -> FileTrace:
    """A trace of MLflow: about the trace, and its spans; the numbers that people or judges gave it are rewards."""
    about, data = as_mapping(record.get("info")), as_mapping(parse_value(record.get("data")))
    sources = _plain_spans(data.get("spans") or record.get("spans") or (), refused)
    spans = [span for source in sources for span in source.spans]
    name = str(about.get("trace_id") or about.get("request_id") or record.get("trace_id") or "")
    for index, given in enumerate(about.get("assessments") or ()):
        value = as_mapping(given.get("feedback")).get("value")
        if math.isnan(read_number(value)):
            refused["a score that is no number"] += 1
            continue
        score = {"name": given.get("assessment_name"), "value": value, "about": given.get("span_id") or ""}
        spans.append(_score(f"{name}/score/{index}", score, given.get("create_time") or about.get("request_time")))
    return FileTrace(name=name, spans=tuple(spans))


def _score(identity: str, score: Mapping[str, Any], at: Any) -> RawSpan:
    """The span of a score: its name, its value, and the id of the span that it is about."""
    attributes = {f"agl.reward.{part}": value for part, value in score.items()}
    return make_span(identity, "", "score", (at, None), attributes, "")


def _own_export(record: Mapping[str, Any], refused: Counter[str]) -> FileTrace:
    trajectory = from_row(record)
    return FileTrace(name=trajectory.key.rollout_id, key=trajectory.key, trajectory=trajectory)


def _langfuse(record: Mapping[str, Any], refused: Counter[str]) -> FileTrace:
    trace = as_mapping(record.get("trace")) or record
    name = str(trace.get("id") or "")
    spans = [_observation(observation) for observation in record.get("observations") or ()]
    for index, score in enumerate(trace.get("scores") or ()):
        if math.isnan(read_number(score.get("value"))) or score.get("dataType") not in (None, "NUMERIC", "BOOLEAN"):
            refused["a score that is no number"] += 1
            continue
        about = {"name": score.get("name"), "value": score["value"], "about": score.get("observationId") or ""}
        at = score.get("timestamp") or trace.get("timestamp")
        spans.append(_score(str(score.get("id") or f"{name}/score/{index}"), about, at))
    return FileTrace(name=name, spans=tuple(spans))


def _observation(record: Mapping[str, Any]) -> RawSpan:
    """The span of a Langfuse observation."""
    metadata = record.get("metadata")
    metadata = as_mapping(json.loads(metadata) if isinstance(metadata, str) and metadata[:1] == "{" else metadata)
    attributes = dict(metadata.get("attributes") or {})
    own = {"type": str(record.get("type") or "").lower(), "input": record.get("input"), "output": record.get("output")}
    own |= {"model.name": record.get("model"), "metadata.tools": metadata.get("tools")}
    own |= {"metadata.langgraph_node": metadata.get("langgraph_node")}
    usage = record.get("usageDetails") or {}
    own |= {f"usage_details.{side}": usage.get(side) for side in ("input", "output")}
    attributes |= {f"langfuse.observation.{name}": as_text(value) for name, value in own.items() if value is not None}
    error = (record.get("statusMessage") or "error") if record.get("level") == "ERROR" else ""
    times = record.get("startTime"), record.get("endTime")
    return make_span(record["id"], record.get("parentObservationId"), record.get("name"), times, attributes, error)


def _langfuse_observations(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[FileTrace]:
    """The traces in observations that are a record each, as Langfuse's table of observations is exported."""
    traces: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        traces.setdefault(str(record["traceId"]), []).append(record)
    return _each(_langfuse)([{"id": name, "observations": group} for name, group in traces.items()], refused)


def _langsmith(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[FileTrace]:
    """The traces in LangSmith's batches of runs that start (post) and end (patch), or in its exported runs."""
    runs: dict[str, dict[str, Any]] = {}
    for record in records:
        batch = [value for value in (record.get("post"), record.get("patch")) if isinstance(value, list)]
        for run in chain(*batch) if "post" in record else [record]:
            if not isinstance(run, Mapping) or not run.get("id"):
                refused["a damaged record"] += 1
                continue
            given = {name: value for name, value in run.items() if value not in (None, {}, [])}
            runs[str(run["id"])] = runs.get(str(run["id"]), {}) | given
    return _grouped(_run)(list(runs.values()), refused)


def _run(run: Mapping[str, Any]) -> tuple[str, RawSpan]:
    """The id of the trace, and the span, of a LangSmith run."""
    # In LangSmith's bulk export mappings are JSON text.
    inputs, outputs, extra = (as_mapping(parse_value(run.get(name))) for name in ("inputs", "outputs", "extra"))
    metadata = as_mapping(extra.get("metadata"))
    attributes = {"langsmith.span.kind": run.get("run_type"), "gen_ai.request.model": metadata.get("ls_model_name")}
    attributes |= {"gen_ai.response.model": outputs.get("model"), "gen_ai.response.id": outputs.get("id")}
    attributes |= {"langsmith.metadata.langgraph_node": metadata.get("langgraph_node")}
    if run.get("run_type") == "tool":
        inputs = inputs["input"] if set(inputs) == {"input"} else inputs
        outputs = outputs["output"] if set(outputs) == {"output"} else outputs
    else:
        usage = outputs.get("usage_metadata") or {}
        attributes |= {f"gen_ai.usage.{side}_tokens": usage.get(f"{side}_tokens") for side in ("input", "output")}
    texts = {"input.value": inputs, "output.value": outputs}
    attributes |= {name: as_text(value) for name, value in texts.items() if value != {}}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    times = run["start_time"], run.get("end_time")
    span = make_span(run["id"], run.get("parent_run_id"), run.get("name"), times, attributes, run.get("error"))
    return str(run.get("trace_id") or run["id"]), span


def _agent_lightning(record: Mapping[str, Any], refused: Counter[str]) -> FileTrace:
    rollout, spans = record["rollout"], []
    name, output = str(rollout["rollout_id"]), ""
    reward: float | None = None
    chosen = rollout.get("succeeded_attempt_id")
    for index, event in enumerate(record["events"]):
        data, kind = event["data"], event["event_type"]
        if chosen and event.get("attempt_id") not in (None, chosen):
            refused["an event of another attempt"] += 1
        elif kind == "model_request":
            spans.append(_request(f"{name}/{index}", data["request"], data.get("response"), event["timestamp"]))
        elif kind == "agent_output":
            output = as_text(data)[:2000]
        elif kind == "reward":
            reward = read_number(data.get("value"))
            if refusal := reward_refusal(reward):
                reward = None
                refused[refusal] += 1
    ended = {"succeeded": Outcome.FINISHED, "cancelled": Outcome.CANCELLED}
    return FileTrace(
        name=name,
        spans=tuple(spans),
        reward=reward,
        outcome=ended.get(str(rollout.get("status")), Outcome.AGENT_ERROR),
        error=str(rollout.get("error_message") or ""),
        output=output,
    )


def _recorded(record: Mapping[str, Any], refused: Counter[str]) -> FileTrace:
    """The trace of a request to an OpenAI server and its response, as caches and proxies keep them."""
    span = _request("0", record["request"], record["response"], record["response"].get("created") or 0.0)
    return FileTrace(name=str(record["response"].get("id") or "recorded"), spans=(span,))


def _request(identity: str, request: Mapping[str, Any], response: Any, at: Any) -> RawSpan:
    """The span of a request to an OpenAI server; the response may be a list of streamed chunks."""
    reply = join_chunks(response) if isinstance(response, list) else response or {}
    choice = (reply.get("choices") or [{}])[0]
    usage = reply.get("usage") or {}
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": request.get("model"),
        "gen_ai.response.model": reply.get("model"),
        "gen_ai.response.id": reply.get("id"),
        "gen_ai.usage.input_tokens": usage.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": usage.get("completion_tokens"),
        "gen_ai.response.finish_reasons": [choice.get("finish_reason") or ""],
        "input.value": as_text(request),
        "output.value": as_text(reply),
        "agl.prompt_token_ids": reply.get("prompt_token_ids"),
        "agl.response_token_ids": choice.get("token_ids"),
        "agl.logprobs": (choice.get("logprobs") or {}).get("content"),
    }
    return RawSpan(
        span_id=identity,
        name="chat",
        started_at=min(read_time(reply.get("created") or at), read_time(at)),
        ended_at=read_time(at),
        attributes={name: value for name, value in attributes.items() if value is not None},
        error=as_text(reply["error"]) if reply.get("error") else "",
    )


def _keys(*alternatives: str) -> tuple[frozenset[str], ...]:
    """Sets of keys, each from a text of keys separated by blanks."""
    return tuple(frozenset(keys.split()) for keys in alternatives)


FORMATS: tuple[tuple[str, tuple[frozenset[str], ...], Adapter], ...] = (
    ("OTLP", _keys(*otlp.RESOURCES), lambda records, refused: _sources(otlp.read_json(records, refused))),
    ("Langfuse", _keys("observations"), _each(_langfuse)),
    ("Langfuse observations", _keys("traceId type startTime"), _langfuse_observations),
    ("LangSmith", _keys("post", "patch"), _langsmith),
    ("LangSmith runs", _keys("run_type id"), _langsmith),
    ("Agent Lightning", _keys("rollout events"), _each(_agent_lightning)),
    ("MLflow", _keys("info data", "trace_id spans", "request_id spans"), _each(_mlflow)),
    ("OpenAI calls", _keys("request response"), _each(_recorded)),
    ("agl export", _keys("rollout_id outcome calls"), _each(_own_export)),
    (
        "spans",
        _keys("context attributes", "context.span_id", "trace_id span_id", "traceId spanId", "traceId id"),
        _plain_spans,
    ),
)
"""Name of a format, the keys that its records have, in one or another way, and the adapter that reads them."""
