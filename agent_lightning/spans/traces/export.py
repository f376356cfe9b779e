"""Export of rollouts: as a line of JSON for each rollout, or as an OpenTelemetry trace for each attempt.

`imports` reads both back. A text may quote the URL of an attempt, which contains its secret: the secret is hidden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent_lightning.core import types
from agent_lightning.core.errors import DataError
from agent_lightning.core.files import replacing
from agent_lightning.core.text import hide_attempt_secrets, one_line
from agent_lightning.core.types import AgentSpan, ModelCall, RolloutKey, ToolCall, ToolStatus, Trajectory
from agent_lightning.spans import otlp
from agent_lightning.spans.message_forms import Message, parse_value
from agent_lightning.spans.messages import read_reply, read_request
from agent_lightning.spans.tree import RawSpan

Format = Literal["jsonl", "otlp"]
FILES: Mapping[Format, str] = {"jsonl": "rollouts.jsonl", "otlp": "traces.jsonl"}
_SPANS = ("calls", "tools", "rewards", "agents")
"""The fields of Trajectory that hold spans."""
_FAILED = (ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.INVALID_ARGUMENTS)


def write(trajectories: Iterable[Trajectory], out: Path, form: Format) -> tuple[Path, int]:
    """Write rollouts into a file of the folder `out`, which appears complete or not at all.

    Returns the file and the number of rollouts.

    Example: write(read_trajectories(run), Path("out"), "otlp") -> (out/traces.jsonl, 640)
    """
    lines: Mapping[Format, Callable[[Trajectory], str]] = {"jsonl": to_line, "otlp": to_otlp}
    out.mkdir(parents=True, exist_ok=True)
    path, count = out / FILES[form], 0
    with replacing(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(lines[form](trajectory) + "\n")
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


def to_otlp(trajectory: Trajectory) -> str:
    """An attempt as one trace: an OTLP request as one line of JSON.

    Example: POST it with content type application/json to any OpenTelemetry collector.
    """
    trace_id = f"{trajectory.key.rollout_id}/{trajectory.key.attempt}"
    resource = {"service.name": "agent-lightning"}
    return hide_attempt_secrets(otlp.encode_json(to_spans(trajectory), trace_id=trace_id, resource=resource))


def to_spans(trajectory: Trajectory) -> tuple[RawSpan, ...]:
    """The spans of an attempt by the GenAI conventions, below a span of the rollout; `conventions` reads them.
    Attributes named `agl.*` hold what the conventions have no attribute for: token ids, log-probabilities, rewards, and
    the exact messages if the form of the conventions would change them."""
    key = trajectory.key
    root = f"{key.rollout_id}/{key.attempt}"
    about = {"id": key.rollout_id, "attempt": key.attempt, "task_id": trajectory.task_id, "output": trajectory.output}
    about |= {"outcome": trajectory.outcome.value}
    about |= {"reward": trajectory.reward} if trajectory.reward is not None else {}
    rollout = {f"agl.rollout.{name}": value for name, value in about.items()}
    spans = [_span(trajectory, root, "", "rollout", rollout, trajectory.error)]
    for agent in trajectory.agents:
        attributes = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": agent.name}
        attributes |= {"agl.span_id": agent.span_id}
        spans.append(_span(agent, agent.span_id, agent.parent_id or root, f"invoke_agent {agent.name}", attributes))
    for call in trajectory.calls:
        name, parent_id = f"chat {call.model}".strip(), call.parent_id or root
        spans.append(_span(call, call.call_id, parent_id, name, _call_attributes(call), call.error))
    for tool in trajectory.tools:
        attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": tool.name}
        attributes |= {"gen_ai.tool.call.arguments": tool.arguments, "agl.tool.status": tool.status.value}
        attributes |= {"gen_ai.tool.call.id": tool.tool_call_id, "gen_ai.tool.call.result": tool.result}
        attributes |= {"agl.span_id": tool.span_id, "agl.call_id": tool.call_id}
        attributes = {name: value for name, value in attributes.items() if value}
        error = tool.result or tool.status.value if tool.status in _FAILED else ""
        spans.append(_span(tool, tool.span_id, tool.parent_id or root, f"execute_tool {tool.name}", attributes, error))
    for reward in trajectory.rewards:
        parts = {"reward.name": reward.name, "reward.value": reward.value, "reward.about": reward.about}
        given = {f"agl.{part}": value for part, value in (parts | {"span_id": reward.span_id}).items()}
        at, span_id = reward.at, reward.span_id
        spans += [RawSpan(span_id=span_id, parent_id=root, name="reward", started_at=at, ended_at=at, attributes=given)]
    return tuple(spans)


def _span(
    event: Trajectory | AgentSpan | ModelCall | ToolCall,
    span_id: str,
    parent_id: str,
    name: str,
    attributes: Mapping[str, Any],
    error: str = "",
) -> RawSpan:
    """The span of an event, with the event's times."""
    times = {"started_at": event.started_at, "ended_at": event.ended_at}
    return RawSpan(span_id=span_id, parent_id=parent_id, name=name, attributes=attributes, error=error, **times)


def _call_attributes(call: ModelCall) -> dict[str, Any]:
    attributes: dict[str, Any] = {"gen_ai.operation.name": "chat", "gen_ai.response.id": call.call_id}
    attributes |= {"gen_ai.agent.name": call.agent, "gen_ai.request.model": call.model}
    attributes |= {"gen_ai.response.finish_reasons": [call.finish_reason] if call.finish_reason else []}
    attributes |= _messages(call)
    if call.prompt_T.size or call.response_T.size:
        attributes |= {"gen_ai.usage.input_tokens": call.prompt_T.size, "agl.policy_version": call.policy_version}
        attributes |= {} if call.last_version is None else {"agl.last_policy_version": call.last_version}
        attributes |= {"gen_ai.usage.output_tokens": call.response_T.size}
        attributes |= {"agl.prompt_token_ids": json.dumps(call.prompt_T.tolist())}
        attributes |= {"agl.response_token_ids": json.dumps(call.response_T.tolist())}
        attributes |= {"agl.logprobs": json.dumps(_from_array(call.logprob_T))}
    return {name: value for name, value in attributes.items() if value not in ("", [])}


def _messages(call: ModelCall) -> dict[str, str]:
    """The messages of a call in the form of the conventions, and the exact text if reading that form changes it."""
    request, reply = parse_value(call.request), parse_value(call.reply)
    attributes: dict[str, str] = {}
    if isinstance(request, list):
        parts = [_with_parts(message) for message in request if isinstance(message, Mapping)]
        attributes["gen_ai.input.messages"] = json.dumps(parts, ensure_ascii=False)
    if isinstance(reply, Mapping):
        finish = {"finish_reason": call.finish_reason} if call.finish_reason else {}
        attributes["gen_ai.output.messages"] = json.dumps([{**_with_parts(reply), **finish}], ensure_ascii=False)
    if call.request and read_request(attributes.get("gen_ai.input.messages")) != (request, []):
        attributes["agl.request"] = call.request
    before = request if isinstance(request, list) else ()
    if call.reply and read_reply(attributes.get("gen_ai.output.messages"), before) != reply:
        attributes["agl.reply"] = call.reply
    return attributes


def _with_parts(message: Mapping[str, Any]) -> Message:
    """An OpenAI message in the form of the conventions: a role and a list of parts."""
    content = message.get("content")
    parts: list[Any] = list(content) if isinstance(content, list) else []
    if isinstance(content, str):
        result = {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}
        parts = [result if message.get("role") == "tool" else {"type": "text", "content": content}]
    thought = message.get("reasoning_content")
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    parts = [{"type": "reasoning", "content": thought}, *parts] if thought else parts
    parts += [{"type": "tool_call", "id": call.get("id"), **(call.get("function") or {})} for call in calls]
    return {"role": message.get("role", "assistant"), "parts": parts}


def _from_array(array: Any) -> list[Any]:
    """An array as a list in which NaN is None."""
    return [None if item != item else item for item in array.tolist()]


def _to_array(kind: Any, items: Any) -> NDArray[Any]:
    """The array of a field, e.g. of NDArray[np.int32], from a list. Raises ValueError."""
    dtype = get_args(get_args(kind)[1])[0]
    if dtype is np.int32 and not all(isinstance(token, int) and 0 <= token < 2**31 for token in items):
        raise ValueError("a token id out of any vocabulary")
    return np.array([math.nan if item is None else item for item in items], dtype)
