"""Rollouts that leave the system: as lines of JSON, one a rollout, and as OpenTelemetry traces, one an attempt.

`imports` reads both back. The secret of an attempt is part of its URL; where a text quotes that URL, it is cut out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agent_lightning.core.errors import DataError
from agent_lightning.core.types import (
    AgentSpan,
    ModelCall,
    Outcome,
    Reward,
    RolloutKey,
    ToolCall,
    ToolStatus,
    Trajectory,
)
from agent_lightning.spans import otlp
from agent_lightning.spans.forms import Message, parsed
from agent_lightning.spans.messages import answer, conversation
from agent_lightning.spans.tree import RawSpan

Format = Literal["jsonl", "otlp"]
FILES: Mapping[Format, str] = {"jsonl": "rollouts.jsonl", "otlp": "traces.jsonl"}
_SECRET = re.compile(r"(/rollout/[^/\s\"]+/attempt/\d+/)[0-9a-f]{32}")
_FAILED = (ToolStatus.ERROR, ToolStatus.TIMEOUT, ToolStatus.INVALID_ARGUMENTS)


def write(trajectories: Iterable[Trajectory], out: Path, form: Format) -> tuple[Path, int]:
    """Write rollouts into the folder `out`: the file, and how many. It appears whole or not at all.

    Example: write(read_trajectories(run), Path("out"), "otlp") -> (out/traces.jsonl, 640)
    """
    lines: Mapping[Format, Callable[[Trajectory], str]] = {"jsonl": to_line, "otlp": to_otlp}
    out.mkdir(parents=True, exist_ok=True)
    path, count = out / FILES[form], 0
    unfinished = out / f".{path.name}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        for trajectory in trajectories:
            file.write(lines[form](trajectory) + "\n")
            count += 1
    unfinished.replace(path)
    return path, count


def to_line(trajectory: Trajectory) -> str:
    """A rollout as one line of JSON: the fields of Trajectory and of its spans; tokens are lists, NaN is null.

    Example: to_line(trajectory) -> '{"rollout_id": "train-0-0", "attempt": 0, "task_id": "7", "calls": […], …}'
    """
    key = {"rollout_id": trajectory.key.rollout_id, "attempt": trajectory.key.attempt}
    return _clean(json.dumps({**key, **_plain(trajectory)}))


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """A rollout from the value of its line. Raises DataError where it is none.

    Example: from_row(json.loads(to_line(trajectory))) is equal to `trajectory`, but for its arrays' identity.
    """
    try:
        key = RolloutKey.parse(row["rollout_id"], int(row["attempt"]))
        spans: dict[str, Any] = {
            "calls": tuple(_call(key, one) for one in row["calls"]),
            "tools": tuple(
                ToolCall(key=key, **_known(ToolCall, one) | {"status": ToolStatus(one["status"])})
                for one in row.get("tools", ())
            ),
            "rewards": tuple(Reward(key=key, **_known(Reward, one)) for one in row.get("rewards", ())),
            "agents": tuple(AgentSpan(key=key, **_known(AgentSpan, one)) for one in row.get("agents", ())),
        }
        return Trajectory(key=key, **_known(Trajectory, row) | spans | {"outcome": Outcome(row["outcome"])})
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"no exported rollout: {' '.join(str(error).split())}") from None


def to_otlp(trajectory: Trajectory) -> str:
    """An attempt as one trace: an OTLP request as one line of JSON.

    Example: POST it with content type application/json to any OpenTelemetry collector.
    """
    trace_id = f"{trajectory.key.rollout_id}/{trajectory.key.attempt}"
    return _clean(
        otlp.encode_json(to_spans(trajectory), trace_id=trace_id, resource={"service.name": "agent-lightning"})
    )


def to_spans(trajectory: Trajectory) -> tuple[RawSpan, ...]:
    """The spans of an attempt by the GenAI conventions, under one span of the rollout; `conventions.read` reads them.

    Attributes named `agl.*` say what the conventions have no word for: token ids, log-probabilities, rewards, and the
    messages word for word where the conventions' form would change them.
    """
    key = trajectory.key
    root = f"{key.rollout_id}/{key.attempt}"
    about = {"id": key.rollout_id, "attempt": key.attempt, "task_id": trajectory.task_id, "output": trajectory.output}
    about |= {"outcome": trajectory.outcome.value}
    about |= {"reward": trajectory.reward} if trajectory.reward is not None else {}
    whole = RawSpan(
        span_id=root,
        name="rollout",
        started_at=trajectory.started_at,
        ended_at=trajectory.ended_at,
        attributes={f"agl.rollout.{name}": value for name, value in about.items()},
        error=trajectory.error,
    )
    return (
        whole,
        *(_agent_span(one, root) for one in trajectory.agents),
        *(_call_span(one, root) for one in trajectory.calls),
        *(_tool_span(one, root) for one in trajectory.tools),
        *(_reward_span(one, root) for one in trajectory.rewards),
    )


def _agent_span(agent: AgentSpan, root: str) -> RawSpan:
    return RawSpan(
        span_id=agent.span_id,
        parent_id=agent.parent_id or root,
        name=f"invoke_agent {agent.name}",
        started_at=agent.started_at,
        ended_at=agent.ended_at,
        attributes={
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.name": agent.name,
            "agl.span_id": agent.span_id,
        },
    )


def _call_span(call: ModelCall, root: str) -> RawSpan:
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
        attributes |= {"agl.logprobs": json.dumps(_plain(call.logprob_T))}
    return RawSpan(
        span_id=call.call_id,
        parent_id=call.parent_id or root,
        name=f"chat {call.model}".strip(),
        started_at=call.started_at,
        ended_at=call.ended_at,
        attributes={name: value for name, value in attributes.items() if value not in ("", [])},
        error=call.error,
    )


def _messages(call: ModelCall) -> dict[str, str]:
    """The conventions' messages, and ours where those would not give the same back."""
    sent, said = parsed(call.request), parsed(call.reply)
    found: dict[str, str] = {}
    if isinstance(sent, list):
        parts = [_with_parts(message) for message in sent if isinstance(message, Mapping)]
        found["gen_ai.input.messages"] = json.dumps(parts, ensure_ascii=False)
    if isinstance(said, Mapping):
        finish = {"finish_reason": call.finish_reason} if call.finish_reason else {}
        found["gen_ai.output.messages"] = json.dumps([{**_with_parts(said), **finish}], ensure_ascii=False)
    request = conversation(found.get("gen_ai.input.messages"))
    if call.request and (request is None or request != (sent, [])):
        found["agl.request"] = call.request
    if call.reply and answer(found.get("gen_ai.output.messages"), sent if isinstance(sent, list) else ()) != said:
        found["agl.reply"] = call.reply
    return found


def _with_parts(message: Mapping[str, Any]) -> Message:
    content = message.get("content")
    parts: list[Any] = list(content) if isinstance(content, list) else []
    if isinstance(content, str):
        answered = {"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content}
        parts = [answered if message.get("role") == "tool" else {"type": "text", "content": content}]
    thought = message.get("reasoning_content")
    calls = [one for one in message.get("tool_calls") or () if isinstance(one, Mapping)]
    parts = [{"type": "reasoning", "content": thought}, *parts] if thought else parts
    parts += [{"type": "tool_call", "id": one.get("id"), **(one.get("function") or {})} for one in calls]
    return {"role": message.get("role", "assistant"), "parts": parts}


def _tool_span(tool: ToolCall, root: str) -> RawSpan:
    attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": tool.name}
    attributes |= {"gen_ai.tool.call.arguments": tool.arguments, "agl.tool.status": tool.status.value}
    attributes |= {"gen_ai.tool.call.id": tool.tool_call_id, "gen_ai.tool.call.result": tool.result}
    attributes |= {"agl.span_id": tool.span_id, "agl.call_id": tool.call_id}
    return RawSpan(
        span_id=tool.span_id,
        parent_id=tool.parent_id or root,
        name=f"execute_tool {tool.name}",
        started_at=tool.started_at,
        ended_at=tool.ended_at,
        attributes={name: value for name, value in attributes.items() if value},
        error=tool.result or tool.status.value if tool.status in _FAILED else "",
    )


def _reward_span(reward: Reward, root: str) -> RawSpan:
    attributes = {"agl.reward.name": reward.name, "agl.reward.value": reward.value, "agl.reward.about": reward.about}
    return RawSpan(
        span_id=reward.span_id,
        parent_id=root,
        name="reward",
        started_at=reward.at,
        ended_at=reward.at,
        attributes={**attributes, "agl.span_id": reward.span_id},
    )


def _call(key: RolloutKey, row: Mapping[str, Any]) -> ModelCall:
    logprobs = [math.nan if one is None else one for one in row["logprob_T"]]
    if not all(isinstance(one, int) and 0 <= one < 2**31 for one in (*row["prompt_T"], *row["response_T"])):
        raise ValueError(f"call {row['call_id']}: a token id out of any vocabulary")
    arrays = {name: np.array(row[name], np.int32) for name in ("prompt_T", "response_T")}
    return ModelCall(key=key, **_known(ModelCall, row) | arrays | {"logprob_T": np.array(logprobs, np.float32)})


def _known(kind: type[Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: row[one.name] for one in fields(kind) if one.name in row and one.name != "key"}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value) if one.name != "key"}
    if isinstance(value, np.ndarray):
        return [None if one != one else one for one in value.tolist()]
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _clean(line: str) -> str:
    return _SECRET.sub(r"\1***", line)
