"""Traces out: OTLP/JSON that a strict reader takes, with the attributes that the GenAI conventions name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import model_call, trajectory
from strict_otlp import read_strictly

from agent_lightning.core.json_values import compact
from agent_lightning.core.types import AgentSpan, Outcome, Reward, RolloutKey, ToolCall, ToolStatus, Trajectory
from agent_lightning.spans import otlp
from agent_lightning.spans.traces.export import Origin, to_otlp, to_spans
from agent_lightning.spans.traces.imports import Imported, conversations

KEY = RolloutKey(split="val", group=3, index=1, attempt=2)
CALL = {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
ASKED: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
CALLED: dict[str, Any] = {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]}
ANSWERED = [*ASKED, CALLED, {"role": "tool", "content": "error: no", "tool_call_id": "c0"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ORIGIN = Origin(run="calc-s0", step=7, task={"question": "1+1?"})


def a_rollout() -> Trajectory:
    first = model_call(KEY, [1, 2], [3], agent="writer", version=4, started_at=10.0, call_id="chatcmpl-1")
    first = replace(
        first, request=compact(ASKED), reply=compact(CALLED), finish_reason="tool_calls", parent_id="a" * 16
    )
    first = replace(first, offered=(compact(TOOL),), last_version=5, new_versions=((0, 5),))
    last = model_call(KEY, [1, 2, 3, 4], [5], agent="writer", started_at=12.0, call_id="chatcmpl-2")
    last = replace(last, request=compact(ANSWERED), reply=compact({"role": "assistant", "content": "2"}))
    other = replace(
        last, call_id="o", source="trace", model="gpt-4o", error="ValueError: no", reply="", parent_id="gone"
    )
    other = replace(
        other, prompt_T=np.zeros(0, np.int32), response_T=np.zeros(0, np.int32), logprob_T=other.logprob_T[:0]
    )
    rollout = trajectory(KEY, first, last, other, reward=0.5)
    agents = (AgentSpan(key=KEY, span_id="a" * 16, name="writer", started_at=9.0, ended_at=13.0),)
    rewards = (Reward(key=KEY, span_id="r", name="format", value=0.25, about="chatcmpl-2", at=12.5),)
    return replace(rollout, agents=agents, rewards=rewards, started_at=9.0, ended_at=13.0, output="2", task_id="row 7")


def attributes_of(span: Any) -> dict[str, Any]:
    return {pair.key: otlp._plain(pair.value) for pair in span.attributes}


def test_an_exported_rollout_is_a_trace_by_the_conventions() -> None:
    spans = read_strictly(to_otlp(a_rollout(), ORIGIN))
    client, internal, failed = 3, 1, 2  # the numbers of OTLP
    assert [(span.name, span.kind, span.status.code) for span in spans] == [
        ("rollout", internal, 0),
        ("invoke_agent writer", internal, 0),
        ("chat policy", client, 0),
        ("chat policy", client, 0),
        ("chat gpt-4o", client, failed),
        ("execute_tool add", internal, failed),
        ("reward", internal, 0),
    ]
    root, agent, call, _, other, tool, reward = map(attributes_of, spans)
    rollout = {"id": "val-3-1", "attempt": 2, "task_id": "row 7", "output": "2", "outcome": "finished", "reward": 0.5}
    rollout |= {"split": "val", "step": 7}
    assert root == {f"agl.rollout.{name}": value for name, value in rollout.items()} | {
        "gen_ai.operation.name": "invoke_workflow",
        "openinference.span.kind": "CHAIN",
        "input.value": '{"question": "1+1?"}',
        "output.value": "2",
    }
    assert (agent["gen_ai.operation.name"], agent["gen_ai.agent.name"]) == ("invoke_agent", "writer")
    messages = [json.loads(call.pop(f"gen_ai.{side}.messages")) for side in ("input", "output")]
    assert messages == [
        [
            {"role": "system", "parts": [{"type": "text", "content": "Be brief."}]},
            {"role": "user", "parts": [{"type": "text", "content": "1+1?"}]},
        ],
        [
            {
                "role": "assistant",
                "parts": [
                    {"type": "reasoning", "content": "Hm."},
                    {"type": "tool_call", "id": "c0", "name": "add", "arguments": '{"a":1}'},
                ],
                "finish_reason": "tool_calls",
            }
        ],
    ]
    assert json.loads(call.pop("gen_ai.tool.definitions")) == [TOOL]
    assert call == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "agent_lightning",
        "gen_ai.request.model": "policy",
        "gen_ai.response.model": "policy",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ["tool_calls"],
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.output_tokens": 1,
        "gen_ai.agent.name": "writer",
        "agl.policy_version": 4,
        "agl.last_policy_version": 5,
        "agl.new_policy_versions": "[[0, 5]]",
        "agl.prompt_token_ids": "[1, 2]",
        "agl.response_token_ids": "[3]",
        "agl.logprobs": "[-1.0]",
    }
    assert (other["gen_ai.request.model"], other["error.type"]) == ("gpt-4o", "_OTHER")
    assert not {"gen_ai.usage.input_tokens", "agl.policy_version"} & other.keys()
    assert tool == {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.name": "add",
        "gen_ai.tool.call.id": "c0",
        "gen_ai.tool.call.arguments": '{"a":1}',
        "gen_ai.tool.call.result": "error: no",
        "agl.tool.status": "error",
        "agl.span_id": tool["agl.span_id"],
        "agl.call_id": "chatcmpl-1",
        "error.type": "error",
    }
    assert reward == {
        "agl.reward.name": "format",
        "agl.reward.value": 0.25,
        "agl.reward.about": "chatcmpl-2",
        "agl.span_id": "r",
    }


@pytest.mark.parametrize(("offered", "tools"), [((compact(TOOL), "add"), [TOOL]), (("add",), None)])
def test_tools_on_offer_come_back_and_names_that_old_runs_wrote_define_none(offered: Any, tools: Any) -> None:
    rollout = a_rollout()
    rollout = replace(rollout, calls=tuple(replace(call, offered=offered) for call in rollout.calls))
    assert [row.get("tools") for row in conversations([Imported(trajectory=rollout)])] == [tools]
    _, _, call, *_ = map(attributes_of, read_strictly(to_otlp(rollout, ORIGIN)))
    assert json.loads(call.get("gen_ai.tool.definitions", "null")) == tools


def test_traces_of_two_runs_and_of_a_rollout_that_runs_again_share_no_id() -> None:
    again = replace(a_rollout(), started_at=8.0, agents=())
    lines = [to_otlp(again, ORIGIN), to_otlp(a_rollout(), Origin(run="x")), to_otlp(replace(a_rollout(), agents=()))]
    spans = [span for line in lines for span in read_strictly(line)]
    assert len({span.trace_id for span in spans}) == 3
    assert len({span.span_id for span in spans}) == len(spans)


def test_a_failed_rollout_says_why_and_a_live_trace_leaves_out_tokens() -> None:
    failed = replace(a_rollout(), outcome=Outcome.TIMEOUT, reward=None, error="not done after 5 s")
    root, _, call, *_ = to_spans(failed, ORIGIN, exact=False)
    assert (root.error, root.attributes["error.type"]) == ("not done after 5 s", "timeout")
    assert "agl.rollout.reward" not in root.attributes
    assert not {"agl.prompt_token_ids", "agl.response_token_ids", "agl.logprobs"} & call.attributes.keys()
    assert call.attributes["gen_ai.usage.input_tokens"] == 2


ODD: list[tuple[str, Any, Any]] = [
    ("text and an image", [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "x"}}], None),
    ("an empty text", "", None),
    ("parts that are text", ["a", "b"], None),
    ("a part of no known kind", [{"type": "uri", "uri": "x"}, 5, None], None),
    ("half a surrogate pair", "\ud83d", None),
    ("tool calls that are none", "x", [1, None, {"function": "f"}, {"function": {"name": "f", "arguments": {"a": 1}}}]),
    ("tool calls that are no list", "x", 5),
]


@pytest.mark.parametrize(("content", "calls"), [case[1:] for case in ODD], ids=[case[0] for case in ODD])
@pytest.mark.parametrize("role", ["user", "assistant", "tool", None])
def test_whatever_messages_hold_a_strict_reader_takes_them(role: str | None, content: Any, calls: Any) -> None:
    message = {"role": role, "content": content, "tool_calls": calls}
    call = replace(a_rollout().calls[0], request=json.dumps([message]), reply=json.dumps(message))
    span = read_strictly(to_otlp(replace(a_rollout(), calls=(call,)), ORIGIN))[2]
    for side in ("input", "output"):
        (sent,) = json.loads(attributes_of(span)[f"gen_ai.{side}.messages"])
        assert sent["role"] == (role or "assistant")
        for part in sent["parts"]:
            assert isinstance(part["type"], str)
            assert isinstance(part.get("content", ""), str)


def test_a_rollout_without_times_or_spans_is_still_a_trace() -> None:
    tool = ToolCall(
        key=KEY, span_id="t", name="f", arguments="", status=ToolStatus.OK, started_at=0, ended_at=0, source="trace"
    )
    rollout = Trajectory(key=KEY, task_id="", calls=(), reward=None, outcome=Outcome.CANCELLED)
    assert len(read_strictly(to_otlp(rollout))) == 1
    assert len(read_strictly(to_otlp(replace(rollout, tools=(tool,), ended_at=5.0)))) == 2
