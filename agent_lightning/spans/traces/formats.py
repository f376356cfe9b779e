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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agent_lightning.core.errors import DataError
from agent_lightning.core.json_values import as_mapping, join_chunks, parse_json
from agent_lightning.core.types import Outcome, RolloutKey, Trajectory, is_reward
from agent_lightning.spans import otlp
from agent_lightning.spans.conventions import reward_refusal
from agent_lightning.spans.fields import number
from agent_lightning.spans.traces.export import from_row
from agent_lightning.spans.tree import RawSpan

REASONS = {
    "a line that is not JSON": "of a file of lines",
    "a record of no known format": "JSON that is none of the formats",
    "a damaged record": "of a known format, but it cannot be read",
    "an event of another attempt": "of an Agent Lightning rollout; the attempt that succeeded counts",
    "a score that is no number": "a Langfuse score of a category or a text",
    "a reward that is not a finite number": "of an Agent Lightning rollout",
    "a reward beyond 1e15": "of an Agent Lightning rollout",
}
"""Every reason for which this module refuses something, and its meaning."""
_MAX_BYTES, _MAX_SPANS = 2**31, 10**7


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
        records = _records(body.decode("utf-8-sig"), refused)
    except UnicodeDecodeError:
        records = None
    if records is None:
        try:
            return ("OTLP",), _otlp(body, otlp.PROTOBUF, refused), refused
        except DataError:
            refused["a record of no known format"] += 1
            return (), [], refused
    by_format: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        name = next((name for name, needed, _ in FORMATS if needed <= as_mapping(record).keys()), "")
        if name:
            by_format.setdefault(name, []).append(record)
        else:
            refused["a record of no known format"] += 1
    traces = [source for name, _, adapt in FORMATS for source in adapt(by_format.get(name, []), refused)]
    return tuple(by_format), traces, refused


def _records(text: str, refused: Counter[str]) -> list[Any] | None:
    """The records of a file: a JSON value, a list of them, or a value on each line; None if the file has no JSON."""
    content = parse_json(text)
    if content is not None:
        return content if isinstance(content, list) else [content]
    values = [parse_json(line) for line in text.splitlines() if line.strip()]
    if not any(values):
        return None
    refused["a line that is not JSON"] += values.count(None)
    return [value for value in values if value is not None]


Adapter = Callable[[Sequence[Mapping[str, Any]], Counter[str]], list[FileTrace]]


def _each(read: Callable[[Mapping[str, Any], Counter[str]], FileTrace]) -> Adapter:
    """The adapter of a format in which each record is a trace, from a function that reads one record."""

    def adapt(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[FileTrace]:
        sources = []
        for record in records:
            try:
                sources.append(read(record, refused))
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError, DataError):
                refused["a damaged record"] += 1
        return sources

    return adapt


def _otlp_records(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[FileTrace]:
    resources = [part for record in records for part in record["resourceSpans"] or () if isinstance(part, Mapping)]
    return _otlp(json.dumps({"resourceSpans": resources}).encode(), otlp.JSON, refused) if resources else []


def _otlp(body: bytes, content_type: str, refused: Counter[str]) -> list[FileTrace]:
    traces, counted = otlp.decode(body, content_type=content_type, max_bytes=_MAX_BYTES, max_spans=_MAX_SPANS)
    refused.update(counted)
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
                    reward=reward if is_reward(reward := _number(about.get("reward"))) else None,
                    output=str(about.get("output") or ""),
                )
        sources.append(source)
    return sources


def _own_export(record: Mapping[str, Any], refused: Counter[str]) -> FileTrace:
    trajectory = from_row(record)
    return FileTrace(name=trajectory.key.rollout_id, key=trajectory.key, trajectory=trajectory)


def _langfuse(record: Mapping[str, Any], refused: Counter[str]) -> FileTrace:
    trace = as_mapping(record.get("trace")) or record
    name = str(trace.get("id") or "")
    spans = [_observation(observation) for observation in record.get("observations") or ()]
    for index, score in enumerate(trace.get("scores") or ()):
        if math.isnan(_number(score.get("value"))) or score.get("dataType") not in (None, "NUMERIC", "BOOLEAN"):
            refused["a score that is no number"] += 1
            continue
        at = _time(score.get("timestamp") or trace.get("timestamp"))
        about = {"name": score.get("name"), "value": score["value"], "about": score.get("observationId") or ""}
        attributes = {f"agl.reward.{part}": value for part, value in about.items()}
        identity = str(score.get("id") or f"{name}/score/{index}")
        spans.append(RawSpan(span_id=identity, name="score", started_at=at, ended_at=at, attributes=attributes))
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
    attributes |= {f"langfuse.observation.{name}": _as_text(value) for name, value in own.items() if value is not None}
    error = (record.get("statusMessage") or "error") if record.get("level") == "ERROR" else ""
    times = record.get("startTime"), record.get("endTime")
    return _span(record["id"], record.get("parentObservationId"), record.get("name"), times, attributes, error)


def _langsmith(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[FileTrace]:
    """The traces in LangSmith's batches of runs that start (post) and end (patch), or in its exported runs."""
    runs: dict[str, dict[str, Any]] = {}
    for record in records:
        for run in [*(record.get("post") or ()), *(record.get("patch") or ())] if "post" in record else [record]:
            if not isinstance(run, Mapping) or not run.get("id"):
                refused["a damaged record"] += 1
                continue
            given = {name: value for name, value in run.items() if value not in (None, {}, [])}
            runs[str(run["id"])] = runs.get(str(run["id"]), {}) | given
    traces: dict[str, list[RawSpan]] = {}
    for identity, run in runs.items():
        try:
            traces.setdefault(str(run.get("trace_id") or identity), []).append(_run(identity, run))
        except (LookupError, TypeError, ValueError, AttributeError):
            refused["a damaged record"] += 1
    return [FileTrace(name=name, spans=tuple(spans)) for name, spans in traces.items()]


def _run(identity: str, run: Mapping[str, Any]) -> RawSpan:
    """The span of a LangSmith run."""
    metadata = (run.get("extra") or {}).get("metadata") or {}
    inputs, outputs = run.get("inputs") or {}, run.get("outputs") or {}
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
    attributes |= {name: _as_text(value) for name, value in texts.items() if value != {}}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    times = run["start_time"], run.get("end_time")
    return _span(identity, run.get("parent_run_id"), run.get("name"), times, attributes, run.get("error"))


def _span(
    identity: Any, parent_id: Any, name: Any, times: tuple[Any, Any], attributes: Mapping[str, Any], error: Any
) -> RawSpan:
    """The span of an observation or a run; it ends when it starts if the record has no end."""
    started = _time(times[0])
    return RawSpan(
        span_id=str(identity),
        parent_id=str(parent_id or ""),
        name=str(name or ""),
        started_at=started,
        ended_at=_time(times[1]) if times[1] else started,
        attributes=attributes,
        error=str(error or ""),
    )


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
            output = _as_text(data)[:2000]
        elif kind == "reward":
            reward = _number(data.get("value"))
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


def _request(identity: str, request: Mapping[str, Any], response: Any, at: float) -> RawSpan:
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
        "input.value": _as_text(request),
        "output.value": _as_text(reply),
        "agl.prompt_token_ids": reply.get("prompt_token_ids"),
        "agl.response_token_ids": choice.get("token_ids"),
        "agl.logprobs": (choice.get("logprobs") or {}).get("content"),
    }
    return RawSpan(
        span_id=identity,
        name="chat",
        started_at=min(float(reply.get("created") or at), float(at)),
        ended_at=float(at),
        attributes={name: value for name, value in attributes.items() if value is not None},
        error=_as_text(reply["error"]) if reply.get("error") else "",
    )


FORMATS: tuple[tuple[str, frozenset[str], Adapter], ...] = (
    ("OTLP", frozenset(["resourceSpans"]), _otlp_records),
    ("Langfuse", frozenset(["observations"]), _each(_langfuse)),
    ("LangSmith", frozenset(["post", "patch"]), _langsmith),
    ("LangSmith runs", frozenset(["run_type", "id"]), _langsmith),
    ("Agent Lightning", frozenset(["rollout", "events"]), _each(_agent_lightning)),
    ("OpenAI calls", frozenset(["request", "response"]), _each(_recorded)),
    ("agl export", frozenset(["rollout_id", "outcome", "calls"]), _each(_own_export)),
)
"""Name of a format, the keys that its records have, and the adapter that reads them."""


def _time(value: Any) -> float:
    """Unix seconds from an ISO date or a number; NaN for any other value. A date without a zone is in UTC."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        date = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        return math.nan
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _number(value: Any) -> float:
    """A number as a float; NaN for any other value, also for text that `number` would read."""
    return number(value) if isinstance(value, int | float) else math.nan


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
