"""Spans of any instrumentor -> model calls, tool calls, rewards and agents."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.types import RolloutKey, ToolStatus
from agent_lightning.spans.attributes import FIELDS, KINDS, PRESENT, Kind
from agent_lightning.spans.conventions import REASONS, TraceContent, read_spans
from agent_lightning.spans.tree import RawSpan, span_kind

KEY = RolloutKey(split="train", group=0, index=0)


def span(identity: str, parent: str = "", *, at: float = 0.0, to: float = 9.0, error: str = "", **more: Any) -> RawSpan:
    """A span whose attributes have dots for double underscores: gen_ai__tool__name."""
    attributes = {name.replace("__", "."): value for name, value in more.items()}
    name = attributes.pop("name", identity)
    return RawSpan(
        span_id=identity, parent_id=parent, name=name, started_at=at, ended_at=to, attributes=attributes, error=error
    )


def chat(identity: str, parent: str = "", *, at: float = 0.0, reply: str = "hello", **more: Any) -> RawSpan:
    request_text = json.dumps([{"role": "user", "content": "hi"}])
    reply_text = json.dumps([{"role": "assistant", "content": reply}])
    more = {"gen_ai.input.messages": request_text, "gen_ai.output.messages": reply_text, **more}
    return span(identity, parent, at=at, gen_ai__operation__name="chat", **more)


def agent(identity: str, name: str, parent: str = "") -> RawSpan:
    return span(identity, parent, gen_ai__operation__name="invoke_agent", gen_ai__agent__name=name)


def ids(traced: TraceContent) -> list[str]:
    return [call.call_id for call in traced.calls]


@pytest.mark.parametrize(("name", "value", "kind"), [(n, v, k) for n, kinds in KINDS for v, k in kinds.items()])
def test_a_span_is_what_an_attribute_of_the_table_says(name: str, value: str, kind: Kind) -> None:
    assert span_kind(span("s", **{name: value})) is kind


@pytest.mark.parametrize(("name", "kind"), PRESENT)
def test_a_span_is_what_the_presence_of_an_attribute_says(name: str, kind: Kind) -> None:
    assert span_kind(span("s", **{name.replace("*", "0.value"): "1"})) is kind


FORMS: dict[str, dict[str, Any]] = {
    "GenAI conventions": {
        "gen_ai.operation.name": "chat",
        "gen_ai.system_instructions": '[{"type": "text", "content": "Be brief."}]',
        "gen_ai.input.messages": '[{"role": "user", "parts": [{"type": "text", "content": "6*7?"}]}]',
        "gen_ai.output.messages": '[{"role": "assistant", "finish_reason": "tool_call", "parts": [{"type": "tool_call",'
        ' "id": "c1", "name": "mul", "arguments": {"a": 6, "b": 7}}]}]',
    },
    "GenAI conventions, events": {
        "gen_ai.operation.name": "chat",
        "gen_ai.events": [
            {"event.name": "gen_ai.system.message", "content": "Be brief."},
            {"event.name": "gen_ai.user.message", "content": "6*7?"},
            {
                "event.name": "gen_ai.choice",
                "index": 0,
                "message": '{"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "mul", "arguments":'
                ' "{\\"a\\": 6, \\"b\\": 7}"}}]}',
            },
        ],
    },
    "OpenLLMetry": {
        "llm.request.type": "chat",
        "gen_ai.prompt.0.role": "system",
        "gen_ai.prompt.0.content": "Be brief.",
        "gen_ai.prompt.1.role": "user",
        "gen_ai.prompt.1.content": "6*7?",
        "gen_ai.completion.0.role": "assistant",
        "gen_ai.completion.0.finish_reason": "tool_calls",
        "gen_ai.completion.0.tool_calls.0.id": "c1",
        "gen_ai.completion.0.tool_calls.0.name": "mul",
        "gen_ai.completion.0.tool_calls.0.arguments": '{"a": 6, "b": 7}',
    },
    "OpenInference": {
        "openinference.span.kind": "LLM",
        "llm.input_messages.0.message.role": "system",
        "llm.input_messages.0.message.content": "Be brief.",
        "llm.input_messages.1.message.role": "user",
        "llm.input_messages.1.message.contents.0.message_content.type": "text",
        "llm.input_messages.1.message.contents.0.message_content.text": "6*7?",
        "llm.output_messages.0.message.role": "assistant",
        "llm.output_messages.0.message.tool_calls.0.tool_call.id": "c1",
        "llm.output_messages.0.message.tool_calls.0.tool_call.function.name": "mul",
        "llm.output_messages.0.message.tool_calls.0.tool_call.function.arguments": '{"a": 6, "b": 7}',
    },
    "Vercel AI SDK": {
        "ai.operationId": "ai.generateText.doGenerate",
        "ai.prompt.messages": '[{"role": "system", "content": "Be brief."},'
        ' {"role": "user", "content": [{"type": "text", "text": "6*7?"}]}]',
        "ai.response.toolCalls": '[{"toolCallId": "c1", "toolName": "mul", "input": "{\\"a\\": 6, \\"b\\": 7}"}]',
    },
    "Google ADK": {
        "gen_ai.operation.name": "generate_content",
        "gcp.vertex.agent.llm_request": '{"config": {"system_instruction": "Be brief."},'
        ' "contents": [{"role": "user", "parts": [{"text": "6*7?"}]}]}',
        "gcp.vertex.agent.llm_response": '{"content": {"role": "model", "parts": [{"function_call":'
        ' {"id": "c1", "name": "mul", "args": {"a": 6, "b": 7}}}]}}',
    },
    "Langfuse, LangChain messages": {
        "langfuse.observation.type": "generation",
        "langfuse.observation.input": '[{"type": "system", "content": "Be brief."},'
        ' {"type": "human", "content": "6*7?"}]',
        "langfuse.observation.output": '{"type": "ai", "content": "", "tool_calls":'
        ' [{"name": "mul", "args": {"a": 6, "b": 7}, "id": "c1"}]}',
    },
    "Anthropic's blocks": {
        "openinference.span.kind": "LLM",
        "input.value": '{"system": "Be brief.", "messages": [{"role": "user", "content": "6*7?"}]}',
        "output.value": '{"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "mul",'
        ' "input": {"a": 6, "b": 7}}]}',
    },
    "OpenAI's Responses": {
        "openinference.span.kind": "LLM",
        "input.value": '{"instructions": "Be brief.", "input": "6*7?"}',
        "output.value": '{"id": "resp_1", "output": [{"type": "reasoning", "summary": []}, {"type": "function_call",'
        ' "call_id": "c1", "name": "mul", "arguments": "{\\"a\\": 6, \\"b\\": 7}"}]}',
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_messages_is_read_into_openais(form: str) -> None:
    traced = read_spans([span("s", **FORMS[form])], KEY)
    (call,) = traced.calls
    assert not traced.refused
    assert json.loads(call.request) == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}]
    arguments = {"name": "mul", "arguments": '{"a": 6, "b": 7}'}
    called = [{"id": "c1", "type": "function", "function": arguments}]
    assert json.loads(call.reply) == {"role": "assistant", "content": None, "tool_calls": called}
    assert (call.source, call.policy_version, call.prompt_T.size) == ("trace", -1, 0)


def test_the_agent_of_a_call_is_the_nearest_above_it() -> None:
    spans = [agent("a", "writer"), agent("b", "checker", "a"), span("x", "b"), chat("1", "a"), chat("2", "x", at=1.0)]
    traced = read_spans(spans, KEY)
    assert [(call.agent, call.parent_id) for call in traced.calls] == [("writer", "a"), ("checker", "b")]
    assert [(item.name, item.parent_id) for item in traced.agents] == [("writer", ""), ("checker", "a")]


def test_a_call_around_a_call_is_one_call_with_what_both_say() -> None:
    outer = chat("outer", **{"gen_ai.response.id": "r1", "gen_ai.request.model": "m"})
    middle = span("middle", "outer")
    inner = span("inner", "middle", at=1.0, gen_ai__operation__name="chat", gen_ai__usage__input_tokens=3)
    tool = span("t", "outer", at=2.0, gen_ai__operation__name="execute_tool", gen_ai__tool__name="f")
    traced = read_spans([outer, middle, inner, tool], KEY)
    (call,) = traced.calls
    assert (call.call_id, call.model, call.started_at) == ("r1", "m", 1.0)
    assert json.loads(call.reply)["content"] == "hello"
    assert traced.usage == {"r1": (3, 0)}
    assert [(item.parent_id, item.call_id) for item in traced.tools] == [("r1", "r1")]


def test_a_call_under_a_tool_under_a_call_is_a_call_of_its_own() -> None:
    tool = span("t", "1", at=1.0, gen_ai__operation__name="execute_tool", gen_ai__tool__name="ask")
    traced = read_spans([chat("1"), tool, chat("2", "t", at=2.0)], KEY)
    assert [(call.call_id, call.parent_id) for call in traced.calls] == [("1", ""), ("2", "t")]


def test_several_calls_in_one_wrapper_are_all_kept() -> None:
    wrapper = chat("w", **{"gen_ai.response.id": "last"})
    assert ids(read_spans([wrapper, chat("1", "w", at=1.0), chat("2", "w", at=2.0)], KEY)) == ["1", "2"]


def test_two_instrumentors_of_one_library_tell_of_one_call() -> None:
    bare = span("1", at=1.0, to=2.0, gen_ai__operation__name="chat", gen_ai__response__id="x", llm__model_name="m")
    told = chat("2", at=1.1, **{"gen_ai.response.id": "x"})
    (call,) = read_spans([bare, told], KEY).calls
    assert (call.call_id, call.model, json.loads(call.reply)["content"]) == ("x", "m", "hello")


def test_a_reply_id_for_the_second_time_names_nothing() -> None:
    spans = [chat("1", **{"gen_ai.response.id": "x"}), chat("2", at=10.0, **{"gen_ai.response.id": "x"})]
    assert ids(read_spans(spans, KEY)) == ["x", "2"]


def test_disorder_is_put_in_order_or_counted() -> None:
    early_child = chat("child", "late", at=1.0)
    late = agent("late", "late")
    late = RawSpan(span_id="late", name="", started_at=2.0, ended_at=3.0, attributes=late.attributes)
    spans = [chat("3", at=5.0), early_child, late, chat("orphan", "nobody", at=0.5)]
    spans += [chat("3", at=5.0), chat("x", "y", at=7.0), span("y", "x"), chat("never", at=math.nan)]
    traced = read_spans(spans, KEY)
    assert [(call.call_id, call.parent_id) for call in traced.calls] == [
        ("orphan", ""),
        ("child", "late"),
        ("3", ""),
        ("x", ""),
    ]
    assert traced.refused == {
        "a span id for the second time": 1,
        "a time that is not a number": 1,
        "repaired: a parent that is its own descendant": 1,
    }


def test_a_tool_is_of_the_call_whose_reply_asked_for_it() -> None:
    def asks(identity: str, at: float, *calls: tuple[str, str]) -> RawSpan:
        tool_calls = [{"id": i, "function": {"name": "f", "arguments": a}} for i, a in calls]
        reply_text = json.dumps([{"role": "assistant", "content": None, "tool_calls": tool_calls}])
        return chat(identity, at=at, **{"gen_ai.output.messages": reply_text})

    def tool(identity: str, at: float, **more: Any) -> RawSpan:
        return span(identity, at=at, gen_ai__operation__name="execute_tool", gen_ai__tool__name="f", **more)

    spans = [
        asks("1", 0.0, ("a", '{"x":1}'), ("b", '{"x":2}')),
        tool("by id", 1.0, gen_ai__tool__call__id="b", gen_ai__tool__call__result="two"),
        tool("by arguments", 1.5, gen_ai__tool__call__arguments='{"x": 1}', error="TimeoutError: timed out"),
        asks("2", 2.0, ("c", '{"x":3}')),
        tool("only one", 3.0, gen_ai__tool__call__arguments='{"x": 4}', gen_ai__tool__call__result=""),
        tool("not asked for", 4.0, gen_ai__tool__call__arguments="{}", gen_ai__tool__call__result="[]"),
    ]
    results = [(t.call_id, t.tool_call_id, t.arguments, t.result, t.status) for t in read_spans(spans, KEY).tools]
    assert results == [
        ("1", "b", '{"x":2}', "two", ToolStatus.OK),
        ("1", "a", '{"x":1}', "TimeoutError: timed out", ToolStatus.TIMEOUT),
        ("2", "c", '{"x":3}', "", ToolStatus.EMPTY),
        ("2", "", "{}", "[]", ToolStatus.EMPTY),
    ]


def test_rewards_are_of_our_client_and_of_agent_lightning_and_finite() -> None:
    spans = [
        chat("1", **{"gen_ai.response.id": "r1"}),
        span("p", at=1.0, agl__reward__name="format", agl__reward__value=0.5, agl__reward__about="1"),
        span("q", at=2.0, agl__reward__name="", agl__reward__value=1, agl__reward__about="chatcmpl-elsewhere"),
        span("n", at=3.0, agl__reward__value=math.nan),
        span("i", at=3.0, agl__reward__value="inf"),
        span("b", at=3.0, agl__reward__value=True),
        span(
            "old",
            at=4.0,
            **{
                "agentlightning.reward.0.name": "primary",
                "agentlightning.reward.0.value": 0.25,
                "agentlightning.reward.1.name": "style",
                "agentlightning.reward.1.value": 0.75,
                "agentlightning.link.0.key_match": "span_id",
                "agentlightning.link.0.value_match": "1",
            },
        ),
    ]
    traced = read_spans(spans, KEY)
    assert [(item.span_id, item.name, item.value, item.about, item.at) for item in traced.rewards] == [
        ("p", "format", 0.5, "r1", 1.0),
        ("q", "reward", 1.0, "chatcmpl-elsewhere", 2.0),
        ("old", "primary", 0.25, "r1", 4.0),
        ("old/1", "style", 0.75, "r1", 4.0),
    ]
    assert traced.refused == {"a reward that is not a finite number": 3}


@pytest.mark.parametrize(
    ("prompt", "response", "logprobs", "kept", "reason"),
    [
        ([1, 2], [3, 4], [-0.5, -1.0], [-0.5, -1.0], None),
        ("[1, 2]", "[[3, 4]]", '[{"logprob": -0.5}, {"logprob": -1}]', [-0.5, -1.0], None),
        ([1], [3, 4], [-0.5], [math.nan] * 2, "repaired: log-probabilities missing"),
        ([1], [3, 4], [-0.5, None], [-0.5, math.nan], "repaired: log-probabilities missing"),
        ([1], [3, 4], [-0.5, 0.5], [-0.5, math.nan], "repaired: log-probabilities missing"),
        ([1], [3, -4], [-0.5, -1.0], [], "repaired: token ids out of any vocabulary"),
        ([2**31], [3], [-0.5], [], "repaired: token ids out of any vocabulary"),
        (["a"], [3], [-0.5], [], "repaired: token ids out of any vocabulary"),
    ],
)
def test_tokens_in_a_trace_are_kept_where_they_can_be(
    prompt: Any, response: Any, logprobs: Any, kept: list[float], reason: str | None
) -> None:
    tokens = {"agl.prompt_token_ids": prompt, "agl.response_token_ids": response, "agl.logprobs": logprobs}
    traced = read_spans([chat("1", **tokens)], KEY)
    (call,) = traced.calls
    assert call.logprob_T.tolist() == pytest.approx(kept, nan_ok=True)
    assert call.response_T.tolist() == ([3, 4] if kept else [])
    assert dict(traced.refused) == ({reason: 1} if reason else {})


def test_a_request_or_reply_that_is_not_understood_is_empty_and_counted() -> None:
    bad = {"gen_ai.input.messages": '{"content": "role"}', "gen_ai.output.messages": '[{"role": "assistant"}]'}
    traced = read_spans([chat("1", **bad), chat("2", at=1.0, **bad, error="APIError: overloaded")], KEY)
    assert [(call.request, call.reply, call.error) for call in traced.calls] == [
        ("", "", ""),
        ("", "", "APIError: overloaded"),
    ]
    assert traced.refused == {
        "repaired: a request that is not understood": 2,
        "repaired: a reply that is not understood": 1,
    }


names = st.sampled_from(
    [name.replace("*", "0.message.content") for names in FIELDS.values() for name in names]
    + [name for name, _ in KINDS]
    + ["gen_ai.prompt.0.role", "gen_ai.completion.0.tool_calls.0.name", "metadata"]
)
words = st.sampled_from([v for _, kinds in KINDS for v in kinds] + ["role", "[", '{"role": 1}', '{"choices": 3}'])
json_keys = st.sampled_from(["role", "content", "parts", "type", "tool_calls", "messages", "choices", "lc", "kwargs"])
json_words = st.sampled_from(["assistant", "tool", "tool_call", "function_call", "reasoning", "x"])
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | json_words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_keys, inner, max_size=4),
    max_leaves=10,
)
attributes = st.dictionaries(names, words | json_values | json_values.map(json.dumps), max_size=8)
spans_of_anybody = st.builds(
    RawSpan,
    span_id=st.sampled_from("abcdef"),
    parent_id=st.sampled_from(["", *"abcdefg"]),
    name=st.sampled_from(["x", "role", "Task._execute_core"]),
    started_at=st.sampled_from([0.0, 1.0, 2.0]) | st.floats(),
    ended_at=st.floats(),
    attributes=attributes,
    error=st.sampled_from(["", "boom"]),
)


@settings(max_examples=500, deadline=None)
@given(st.lists(spans_of_anybody, max_size=6), st.randoms())
def test_any_spans_in_any_order_give_the_same_without_a_crash(spans: list[RawSpan], random: Any) -> None:
    traced = read_spans(spans, KEY)
    random.shuffle(spans)
    again = read_spans(spans, KEY)
    assert dict(again.refused) == dict(traced.refused)
    assert repr(replace(again, refused={})) == repr(replace(traced, refused={}))
    assert {reason.partition(" (")[0] for reason in traced.refused} <= set(REASONS)
    kept = {*ids(traced), *(item.span_id for item in (*traced.tools, *traced.agents)), ""}
    assert all(item.parent_id in kept for item in (*traced.calls, *traced.tools, *traced.agents))
    assert len(set(ids(traced))) == len(traced.calls)
    assert all(call.started_at <= call.ended_at for call in traced.calls)


def test_text_nested_without_end_is_no_crash() -> None:
    deep = "[" * 900 + "]" * 900
    attributes = {"gen_ai.input.messages": deep, "gen_ai.output.messages": deep, "gen_ai.tool.definitions": deep}
    spans = [chat("1", **attributes), span("t", gen_ai__tool__name="f", input__value=deep)]
    assert len(read_spans(spans, KEY).calls) == 1


@pytest.mark.parametrize(
    ("inner", "tools"),
    [
        ({}, ["in"]),  # an instrumentor's span around a framework's own: what both say
        ({"gen_ai__tool__call__arguments": '{"a": 1}'}, ["in"]),
        ({"gen_ai__tool__call__arguments": '{"a": 0}'}, ["out", "in"]),  # a tool that calls itself
        ({"gen_ai__tool__name": "other"}, ["out", "in"]),
    ],
)
def test_a_tool_in_a_tool_is_one_use_where_name_and_arguments_agree(inner: dict[str, Any], tools: list[str]) -> None:
    outer = {"openinference__span__kind": "TOOL", "tool__name": "f", "tool__parameters": '{"a": 1}'}
    around = span("out", at=1, to=4, output__value="7", **outer)
    within = {"gen_ai__operation__name": "execute_tool", "gen_ai__tool__name": "f", **inner}
    seen = read_spans([around, span("in", "out", at=2, to=3, **within)], KEY).tools
    assert [tool.span_id for tool in seen] == tools
    if tools == ["in"]:
        assert (seen[0].arguments, seen[0].result, seen[0].started_at) == ('{"a": 1}', "7", 2.0)


def test_langchain_s_agent_has_its_own_name_and_not_its_node_s() -> None:
    node = '{"langgraph_node": "model", "lc_agent_name": "adder"}'
    spans = [span("n", name="model", metadata=node), chat("c", "n", metadata=node)]
    assert read_spans(spans, KEY).calls[0].agent == "adder"
    assert [agent.name for agent in read_spans(spans, KEY).agents] == ["adder"]


def test_attributes_whose_names_are_not_understood_are_counted() -> None:
    deep = "llm.input_messages.0.message" + ".x" * 12
    attributes = {deep: 1, "agentlightning.reward.x.value": 0.5, "agentlightning.reward.0.value": 0.5, "other.x": 1}
    span = RawSpan(span_id="1", name="s", started_at=0.0, ended_at=1.0, attributes=attributes)
    content = read_spans([span], KEY)
    assert content.refused["repaired: an attribute's name that is not understood"] == 2
    assert [reward.value for reward in content.rewards] == [0.5]
