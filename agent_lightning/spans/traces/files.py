"""Trace files of other systems, and our own -> the spans in them.

Each format only says which spans a record holds; what they mean is read in one place, `conventions.read`. A file's
format is seen from what is in it, not from its name.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from agent_lightning.core.errors import DataError
from agent_lightning.core.types import Outcome, RolloutKey, Trajectory
from agent_lightning.spans import otlp
from agent_lightning.spans.forms import Message
from agent_lightning.spans.traces.export import from_row
from agent_lightning.spans.tree import RawSpan

REASONS = {
    "a line that is not JSON": "of a file of lines",
    "a record of no known format": "JSON that is none of the formats",
    "a damaged record": "of a known format, but it cannot be read",
    "an event of another attempt": "of an Agent Lightning rollout; the attempt that succeeded counts",
    "a score that is no number": "a Langfuse score of a category or a text",
    "a reward that is not a finite number": "of an Agent Lightning rollout",
}
"""Every reason that this module counts, and what it means."""
_MAX_BYTES, _MAX_SPANS = 2**31, 10**7


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A trace of a file, before its spans are read."""

    name: str
    spans: tuple[RawSpan, ...] = ()
    task_id: str = ""
    reward: float | None = None
    outcome: Outcome = Outcome.FINISHED
    error: str = ""
    output: str = ""
    key: RolloutKey | None = None
    """Where it is one of our own that was exported."""
    whole: Trajectory | None = None
    """Where the file has the rollout itself."""


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def sources(body: bytes) -> tuple[tuple[str, ...], list[Source], Counter[str]]:
    """The formats seen in a file, its traces, and what was refused."""
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
        name = next(
            (name for name, needed, _ in FORMATS if isinstance(record, Mapping) and needed <= record.keys()), ""
        )
        if name:
            by_format.setdefault(name, []).append(record)
        else:
            refused["a record of no known format"] += 1
    found = [source for name, _, adapt in FORMATS for source in adapt(by_format.get(name, []), refused)]
    return tuple(by_format), found, refused


def _records(text: str, refused: Counter[str]) -> list[Any] | None:
    """The JSON values of a file: one, a list of them, or one a line; None where it holds no JSON at all."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        lines = [line for line in text.splitlines() if line.strip()]
        values = [_line(line) for line in lines]
        if not any(values):
            return None
        refused["a line that is not JSON"] += values.count(None)
        return [value for value in values if value is not None]
    return whole if isinstance(whole, list) else [whole]


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


Adapter = Callable[[Sequence[Mapping[str, Any]], Counter[str]], list[Source]]


def _each(read_one: Callable[[Mapping[str, Any], Counter[str]], Source]) -> Adapter:
    """An adapter for a format of which each record is a trace."""

    def adapt(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[Source]:
        sources = []
        for record in records:
            try:
                sources.append(read_one(record, refused))
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError, DataError):
                refused["a damaged record"] += 1
        return sources

    return adapt


def _otlp_records(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[Source]:
    resources = [one for record in records for one in record["resourceSpans"] or () if isinstance(one, Mapping)]
    return _otlp(json.dumps({"resourceSpans": resources}).encode(), otlp.JSON, refused) if resources else []


def _otlp(body: bytes, content_type: str, refused: Counter[str]) -> list[Source]:
    traces, counted = otlp.decode_traces(body, content_type=content_type, max_bytes=_MAX_BYTES, max_spans=_MAX_SPANS)
    refused.update(counted)
    return [_of_trace(name, spans) for name, spans in traces.items()]


def _of_trace(name: str, spans: tuple[RawSpan, ...]) -> Source:
    """A trace, with what our own export says of its rollout."""
    root = next((span for span in spans if "agl.rollout.id" in span.attributes), None)
    if root is None:
        return Source(name=name, spans=spans)
    about = {key.removeprefix("agl.rollout."): value for key, value in root.attributes.items()}
    try:
        key = RolloutKey.parse(str(about["id"]), int(about["attempt"]))
        outcome = Outcome(about["outcome"])
    except (LookupError, ValueError, TypeError):
        return Source(name=name, spans=spans)
    return Source(
        name=name,
        spans=spans,
        key=key,
        outcome=outcome,
        error=root.error,
        task_id=str(about.get("task_id") or ""),
        reward=_finite(about.get("reward")),
        output=str(about.get("output") or ""),
    )


def _own(record: Mapping[str, Any], refused: Counter[str]) -> Source:
    whole = from_row(record)
    return Source(name=whole.key.rollout_id, key=whole.key, whole=whole)


def _langfuse(record: Mapping[str, Any], refused: Counter[str]) -> Source:
    trace = record.get("trace") if isinstance(record.get("trace"), Mapping) else record
    assert isinstance(trace, Mapping)
    name = str(trace.get("id") or "")
    spans = [_observation(one) for one in record.get("observations") or ()]
    for number, score in enumerate(trace.get("scores") or ()):
        if _finite(score.get("value")) is None or score.get("dataType") not in (None, "NUMERIC", "BOOLEAN"):
            refused["a score that is no number"] += 1
            continue
        at = _time(score.get("timestamp") or trace.get("timestamp"))
        about = {"name": score.get("name"), "value": score["value"], "about": score.get("observationId") or ""}
        attributes = {f"agl.reward.{part}": value for part, value in about.items()}
        identity = str(score.get("id") or f"{name}/score/{number}")
        spans.append(RawSpan(span_id=identity, name="score", started_at=at, ended_at=at, attributes=attributes))
    return Source(name=name, spans=tuple(spans))


def _observation(one: Mapping[str, Any]) -> RawSpan:
    metadata = one.get("metadata")
    metadata = json.loads(metadata) if isinstance(metadata, str) and metadata.startswith("{") else metadata
    metadata = metadata if isinstance(metadata, Mapping) else {}
    attributes = dict(metadata.get("attributes") or {})
    said = {"type": str(one.get("type") or "").lower(), "input": one.get("input"), "output": one.get("output")}
    said |= {"model.name": one.get("model"), "metadata.tools": metadata.get("tools")}
    said |= {"metadata.langgraph_node": metadata.get("langgraph_node")}
    usage = one.get("usageDetails") or {}
    said |= {f"usage_details.{side}": usage.get(side) for side in ("input", "output")}
    attributes |= {f"langfuse.observation.{name}": _as_text(value) for name, value in said.items() if value is not None}
    started = _time(one.get("startTime"))
    failed = one.get("level") == "ERROR"
    return RawSpan(
        span_id=str(one["id"]),
        parent_id=str(one.get("parentObservationId") or ""),
        name=str(one.get("name") or ""),
        started_at=started,
        ended_at=_time(one["endTime"]) if one.get("endTime") else started,
        attributes=attributes,
        error=str(one.get("statusMessage") or "error") if failed else "",
    )


def _langsmith(records: Sequence[Mapping[str, Any]], refused: Counter[str]) -> list[Source]:
    """Batches of runs that start (post) and end (patch), or runs as they are exported."""
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
    return [Source(name=name, spans=tuple(spans)) for name, spans in traces.items()]


def _run(identity: str, run: Mapping[str, Any]) -> RawSpan:
    metadata = (run.get("extra") or {}).get("metadata") or {}
    sent, said = run.get("inputs") or {}, run.get("outputs") or {}
    attributes = {"langsmith.span.kind": run.get("run_type"), "gen_ai.request.model": metadata.get("ls_model_name")}
    attributes |= {"gen_ai.response.model": said.get("model"), "gen_ai.response.id": said.get("id")}
    attributes |= {"langsmith.metadata.langgraph_node": metadata.get("langgraph_node")}
    if run.get("run_type") == "tool":
        sent, said = (one[name] if set(one) == {name} else one for one, name in ((sent, "input"), (said, "output")))
    else:
        usage = said.get("usage_metadata") or {}
        attributes |= {f"gen_ai.usage.{side}_tokens": usage.get(f"{side}_tokens") for side in ("input", "output")}
    attributes |= {name: _as_text(one) for name, one in (("input.value", sent), ("output.value", said)) if one != {}}
    started = _time(run["start_time"])
    return RawSpan(
        span_id=identity,
        parent_id=str(run.get("parent_run_id") or ""),
        name=str(run.get("name") or ""),
        started_at=started,
        ended_at=_time(run["end_time"]) if run.get("end_time") else started,
        attributes={name: value for name, value in attributes.items() if value is not None},
        error=str(run.get("error") or ""),
    )


def _agent_lightning(record: Mapping[str, Any], refused: Counter[str]) -> Source:
    rollout, spans = record["rollout"], []
    name, reward, output = str(rollout["rollout_id"]), None, ""
    chosen = rollout.get("succeeded_attempt_id")
    for number, event in enumerate(record["events"]):
        data, kind = event["data"], event["event_type"]
        if chosen and event.get("attempt_id") not in (None, chosen):
            refused["an event of another attempt"] += 1
        elif kind == "model_request":
            spans.append(_request(f"{name}/{number}", data["request"], data.get("response"), event["timestamp"]))
        elif kind == "agent_output":
            output = _as_text(data)[:2000]
        elif kind == "reward":
            reward = _finite(data.get("value"))
            refused["a reward that is not a finite number"] += reward is None
    ended = {"succeeded": Outcome.FINISHED, "cancelled": Outcome.CANCELLED}
    return Source(
        name=name,
        spans=tuple(spans),
        reward=reward,
        outcome=ended.get(str(rollout.get("status")), Outcome.AGENT_ERROR),
        error=str(rollout.get("error_message") or ""),
        output=output,
    )


def _recorded(record: Mapping[str, Any], refused: Counter[str]) -> Source:
    """A request to an OpenAI server and its response, as caches and proxies keep them."""
    span = _request("0", record["request"], record["response"], record["response"].get("created") or 0.0)
    return Source(name=str(record["response"].get("id") or "recorded"), spans=(span,))


def _request(identity: str, request: Mapping[str, Any], response: Any, at: float) -> RawSpan:
    reply = _assembled(response) if isinstance(response, list) else response or {}
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


def _assembled(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The response that a stream of chunks adds up to; of several choices the first."""
    whole: dict[str, Any] = {}
    message: Message = {"role": "assistant", "content": ""}
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": None}
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        whole |= {name: value for name, value in chunk.items() if name != "choices" and value is not None}
        for part in (part for part in chunk.get("choices") or () if part.get("index", 0) == 0):
            delta = part.get("delta") or {}
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or ():
                known = calls.setdefault(call.get("index", 0), {"id": "", "function": {"name": "", "arguments": ""}})
                known["id"] = call.get("id") or known["id"]
                for name in ("name", "arguments"):
                    known["function"][name] += (call.get("function") or {}).get(name) or ""
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]
            if part.get("token_ids"):
                choice["token_ids"] = [*choice.get("token_ids", ()), *part["token_ids"]]
            scored = (part.get("logprobs") or {}).get("content")
            if scored:
                choice["logprobs"] = {"content": [*(choice.get("logprobs") or {}).get("content", ()), *scored]}
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return whole | {"choices": [choice]}


FORMATS: tuple[tuple[str, frozenset[str], Adapter], ...] = (
    ("OTLP", frozenset(["resourceSpans"]), _otlp_records),
    ("Langfuse", frozenset(["observations"]), _each(_langfuse)),
    ("LangSmith", frozenset(["post", "patch"]), _langsmith),
    ("LangSmith runs", frozenset(["run_type", "id"]), _langsmith),
    ("Agent Lightning", frozenset(["rollout", "events"]), _each(_agent_lightning)),
    ("OpenAI calls", frozenset(["request", "response"]), _each(_recorded)),
    ("agl export", frozenset(["rollout_id", "outcome", "calls"]), _each(_own)),
)
"""Name of a format, the keys that its records have, and what reads them."""


def _time(value: Any) -> float:
    """Unix seconds of an ISO date or a number; NaN where it is neither. Without a zone it is UTC."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        found = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        return math.nan
    return (found if found.tzinfo else datetime.fromisoformat(f"{found.isoformat()}+00:00")).timestamp()


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
