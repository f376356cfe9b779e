"""Export of rollouts: as a line of JSON each, or as an OpenTelemetry trace for each attempt; `imports` reads both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent_lightning.core import types
from agent_lightning.core.errors import DataError
from agent_lightning.core.files import replacing
from agent_lightning.core.json_values import as_mapping
from agent_lightning.core.text import hide_attempt_secrets, one_line, replace_surrogates
from agent_lightning.core.types import AgentSpan, ModelCall, Reward, RolloutKey, ToolCall, ToolStatus, Trajectory
from agent_lightning.spans import otlp
from agent_lightning.spans.message_forms import Message, definitions, parse_value
from agent_lightning.spans.messages import read_reply, read_request
from agent_lightning.spans.tree import RawSpan

Format = Literal["jsonl", "otlp"]
FILES: Mapping[Format, str] = {"jsonl": "rollouts.jsonl", "otlp": "traces.jsonl"}
_SPANS = ("calls", "tools", "rewards", "agents")
"""The fields of Trajectory that hold spans."""
_Event = Trajectory | AgentSpan | ModelCall | ToolCall | Reward
_MOMENT = 1e-9
"""The start, in seconds, of a rollout of which no time is known: a time of 0 is none in OTLP."""
_FAILED = (ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.INVALID_ARGUMENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a run knows about a rollout, beside the rollout itself."""

    run: str = ""
    """The run's name."""
    step: int | None = None
    """The step that the rollout was made for; of an evaluation, the step before it."""
    task: Mapping[str, Any] = field(default_factory=dict)
    """The row of the data set."""


NOWHERE = Origin()


def write(
    trajectories: Iterable[Trajectory], out: Path, form: Format, origins: Iterable[Origin] = repeat(NOWHERE)
) -> tuple[Path, int]:
    """Write rollouts into a file of the folder `out`, which appears complete or not at all. `origins` has an item for
    each rollout. Returns the file and the number of rollouts.

    Example: write(read_trajectories(run), Path("out"), "otlp") -> (out/traces.jsonl, 640)
    """
    out.mkdir(parents=True, exist_ok=True)
    path, count = out / FILES[form], 0
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for trajectory, origin in zip(trajectories, origins, strict=False):
            file.write((to_line(trajectory) if form == "jsonl" else to_otlp(trajectory, origin)) + "\n")
            count += 1
    return path, count


def to_line(trajectory: Trajectory) -> str:
    """A rollout as one line of JSON: the fields of Trajectory and of its spans. Tokens are lists, NaN is null.

    Example: to_line(trajectory) -> '{"rollout_id": "train-0-0", "attempt": 0, "task_id": "7", "calls": […], …}'
    """
    row = msgspec.to_builtins(trajectory, enc_hook=_from_array)
    for span in (row, *(span for kind in _SPANS for span in row[kind])):
        del span["key"]
    key = {"rollout_id": trajectory.key.rollout_id, "attempt": trajectory.key.attempt}
    return hide_attempt_secrets(json.dumps({**key, **row}))


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The rollout of a line that `to_line` wrote. Raises DataError if the line holds something else.

    Example: from_row(json.loads(to_line(trajectory))) is equal to `trajectory`, but for its arrays' identity.
    """
    try:
        key = msgspec.to_builtins(RolloutKey.parse(row["rollout_id"], int(row["attempt"])))
        spans = {kind: [{**span, "key": key} for span in row.get(kind, ())] for kind in _SPANS}
        trajectory = msgspec.convert({**row, **spans, "key": key}, Trajectory, dec_hook=_to_array)
        if not all(map(types.is_reward, [trajectory.reward or 0.0, *(reward.value for reward in trajectory.rewards)])):
            raise ValueError(f"a reward is not a finite number up to {types.LARGEST_REWARD:g}")
        return trajectory
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, msgspec.MsgspecError) as error:
        raise DataError(f"no exported rollout: {one_line(error)}") from None


def to_otlp(trajectory: Trajectory, origin: Origin = NOWHERE) -> str:
    """An attempt as one trace: an OTLP request as one line of JSON.

    Example: POST it with content type application/json to any OpenTelemetry collector.
    """
    spans, resource = to_spans(trajectory, origin), resource_of(origin.run)
    return otlp.encode_json(spans, trace_id=trace_name(trajectory, origin), resource=resource)


def trace_name(trajectory: Trajectory, origin: Origin) -> str:
    """The name from which the id of an attempt's trace is made. Rollouts of several runs have the same ids, and a
    resumed run may run a rollout again, which then starts at another time."""
    key = trajectory.key
    return f"{origin.run}/{key.rollout_id}/{key.attempt}/{trajectory.started_at}"


def resource_of(run: str) -> dict[str, str]:
    """The attributes of the sender of a trace, which OpenTelemetry calls its resource."""
    return {"service.name": "agent-lightning"} | ({"agl.run": run} if run else {})


def to_spans(trajectory: Trajectory, origin: Origin = NOWHERE, *, exact: bool = True) -> tuple[RawSpan, ...]:
    """The spans of an attempt by the GenAI conventions, below the span of its rollout; `conventions` reads them.

    Attributes named `agl.*` hold what the conventions have no attribute for: rewards, outcome, task, split and step;
    and, if `exact`, what an import needs and a viewer does not: token ids, log-probabilities, and the exact messages if
    the form of the conventions would change them. The secrets of attempts are hidden.
    """
    root = f"{trajectory.key.rollout_id}/{trajectory.key.attempt}"
    spans = [_span(trajectory, root, "rollout", _rollout_attributes(trajectory, origin), trajectory.error)]
    for agent in trajectory.agents:
        attributes = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": agent.name}
        attributes |= {"agl.span_id": agent.span_id}
        spans.append(_span(agent, agent.span_id, f"invoke_agent {agent.name}", attributes))
    for call in trajectory.calls:
        name = f"chat {_model_name(call)}".strip()
        spans.append(_span(call, call.call_id, name, _call_attributes(call, exact), call.error))
    for tool in trajectory.tools:
        error = tool.result or tool.status.value if tool.status in _FAILED else ""
        spans.append(_span(tool, tool.span_id, f"execute_tool {tool.name}", _tool_attributes(tool), error))
    for reward in trajectory.rewards:
        parts = {"reward.name": reward.name, "reward.value": reward.value, "reward.about": reward.about}
        given = {f"agl.{part}": value for part, value in (parts | {"span_id": reward.span_id}).items()}
        spans.append(_span(reward, reward.span_id, "reward", given))
    names = {span.span_id for span in spans}
    # A time of 0 would mean that it is unknown.
    began = min((time for span in spans for time in (span.started_at, span.ended_at) if time > 0), default=_MOMENT)
    return tuple(
        replace(
            span,
            # The span above an agent may be one that is no event of a rollout.
            parent_id=(span.parent_id if span.parent_id in names else root) if span is not spans[0] else "",
            started_at=span.started_at or began,
            ended_at=max(span.started_at or began, span.ended_at),
        )
        for span in spans
    )


def _span(event: _Event, span_id: str, name: str, attributes: Mapping[str, Any], error: str = "") -> RawSpan:
    """The span of an event, with the event's times, the id of the event above, and the type of an error."""
    started, ended = (event.at, event.at) if isinstance(event, Reward) else (event.started_at, event.ended_at)
    kind = event.outcome if isinstance(event, Trajectory) else event.status if isinstance(event, ToolCall) else None
    attributes = {**attributes, "error.type": kind or "_OTHER"} if error else attributes
    return RawSpan(
        span_id=span_id,
        parent_id="" if isinstance(event, Trajectory | Reward) else event.parent_id,
        name=_clean(name),
        started_at=started,
        ended_at=ended,
        attributes={name: _clean(value) if isinstance(value, str) else value for name, value in attributes.items()},
        error=_clean(error),
    )


def _clean(text: str) -> str:
    return hide_attempt_secrets(replace_surrogates(text))


def _rollout_attributes(rollout: Trajectory, origin: Origin) -> dict[str, Any]:
    """The attributes of the span of a rollout. Viewers show OpenInference's input and output in their lists."""
    key = rollout.key
    about = {"id": key.rollout_id, "attempt": key.attempt, "task_id": rollout.task_id, "output": rollout.output}
    about |= {"outcome": rollout.outcome.value, "reward": rollout.reward, "split": key.split, "step": origin.step}
    attributes = {f"agl.rollout.{name}": value for name, value in about.items() if value is not None}
    attributes |= {"gen_ai.operation.name": "invoke_workflow", "openinference.span.kind": "CHAIN"}
    task = json.dumps(dict(origin.task), ensure_ascii=False, default=str) if origin.task else rollout.task_id
    return attributes | {"input.value": task, "output.value": rollout.output}


def _tool_attributes(tool: ToolCall) -> dict[str, Any]:
    attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": tool.name}
    attributes |= {"gen_ai.tool.type": "function", "gen_ai.tool.call.arguments": tool.arguments}
    attributes |= {"gen_ai.tool.call.id": tool.tool_call_id, "gen_ai.tool.call.result": tool.result}
    attributes |= {"agl.tool.status": tool.status.value, "agl.span_id": tool.span_id, "agl.call_id": tool.call_id}
    return {name: value for name, value in attributes.items() if value}


def _model_name(call: ModelCall) -> str:
    """The name of the model that was called; "" if a trace does not have it."""
    return call.model or (types.POLICY if call.source == "gateway" else "")


def _call_attributes(call: ModelCall, exact: bool) -> dict[str, Any]:
    provider = "agent_lightning" if call.source == "gateway" else "_OTHER"
    attributes: dict[str, Any] = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": provider}
    attributes |= {"gen_ai.agent.name": call.agent, "gen_ai.request.model": _model_name(call)}
    attributes |= {"gen_ai.response.id": call.call_id, "gen_ai.response.model": _model_name(call)}
    attributes |= {"gen_ai.response.finish_reasons": [call.finish_reason] if call.finish_reason else []}
    attributes |= _messages(call, exact)
    if tools := definitions(call.offered):
        attributes["gen_ai.tool.definitions"] = json.dumps(tools)
    if call.source == "gateway":
        attributes |= {"agl.policy_version": call.policy_version}
        attributes |= {} if call.last_version is None else {"agl.last_policy_version": call.last_version}
        attributes |= {"agl.new_policy_versions": json.dumps(call.new_versions)} if call.new_versions else {}
    if call.prompt_T.size or call.response_T.size:
        attributes |= {"gen_ai.usage.input_tokens": call.prompt_T.size}
        attributes |= {"gen_ai.usage.output_tokens": call.response_T.size}
        if exact:
            attributes |= {"agl.prompt_token_ids": json.dumps(call.prompt_T.tolist())}
            attributes |= {"agl.response_token_ids": json.dumps(call.response_T.tolist())}
            attributes |= {"agl.logprobs": json.dumps(_from_array(call.logprob_T))}
    return {name: value for name, value in attributes.items() if value not in ("", [])}


def _messages(call: ModelCall, exact: bool) -> dict[str, str]:
    """The messages of a call in the form of the conventions; if `exact`, also the text that this form changes."""
    request, reply = parse_value(call.request), parse_value(call.reply)
    attributes: dict[str, str] = {}
    if isinstance(request, list):
        parts = [_with_parts(message) for message in request if isinstance(message, Mapping)]
        attributes["gen_ai.input.messages"] = json.dumps(parts, ensure_ascii=False)
    if isinstance(reply, Mapping):
        finish = {"finish_reason": call.finish_reason or "stop"}
        attributes["gen_ai.output.messages"] = json.dumps([{**_with_parts(reply), **finish}], ensure_ascii=False)
    again = read_request(attributes.get("gen_ai.input.messages"))
    if exact and call.request and again != (request, []):
        attributes["agl.request"] = call.request
    if (
        exact
        and call.reply
        and read_reply(attributes.get("gen_ai.output.messages"), again[0] if again else ()) != reply
    ):
        attributes["agl.reply"] = call.reply
    return attributes


def _with_parts(message: Mapping[str, Any]) -> Message:
    """An OpenAI message in the form of the conventions: a role and a list of parts."""
    content, role = message.get("content"), message.get("role") or "assistant"
    if role == "tool":
        result = {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}
        return {"role": role, "parts": [result]}
    thought, given = message.get("reasoning_content"), content if isinstance(content, list) else [content or ""]
    parts: list[Any] = [{"type": "reasoning", "content": thought}] if thought else []
    for part in given:  # an image stays as OpenAI has it: the conventions allow parts of further types
        text = as_mapping(part).get("text") if as_mapping(part).get("type") == "text" else part
        parts += [text] if isinstance(text, Mapping) else [{"type": "text", "content": str(text)}] if text else []
    calls = message.get("tool_calls")
    for call in map(as_mapping, calls if isinstance(calls, list) else ()):
        parts.append({"type": "tool_call", "id": call.get("id"), **as_mapping(call.get("function"))})
    return {"role": role, "parts": parts}


def _from_array(array: Any) -> list[Any]:
    """An array as a list in which NaN is None."""
    return [None if item != item else item for item in array.tolist()]


def _to_array(kind: Any, items: Any) -> NDArray[Any]:
    """The array of a field, e.g. of NDArray[np.int32], from a list. Raises ValueError."""
    dtype = get_args(get_args(kind)[1])[0]
    if dtype is np.int32 and not all(isinstance(token, int) and 0 <= token < 2**31 for token in items):
        raise ValueError("a token id out of any vocabulary")
    return np.array([math.nan if item is None else item for item in items], dtype)
