"""What is not a request of its format is an error of its protocol: for any JSON, and never a failure of ours."""

from __future__ import annotations

import asyncio
import copy
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gateway import open_rig, url_of

from agent_lightning.buffer.buffer import Stats
from agent_lightning.serving.dialects.base import BadRequest, Dialect, RequestContext
from agent_lightning.serving.dialects.chat import ChatCompletions, Completions
from agent_lightning.serving.dialects.messages import Messages
from agent_lightning.serving.dialects.responses import Responses
from agent_lightning.serving.engine import (
    CUT,
    Choice,
    Completion,
    Part,
    Refusal,
    assistant_message,
    join_parts,
    parse_reply,
)

USER = {"role": "user", "content": "hello"}
SCHEMA = {"type": "object", "properties": {}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"expression": "2"}'}}
BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {
        "model": "m",
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "5"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
        "tool_choice": "auto",
        "n": 2,
        "stop": ["x"],
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 1,
        "response_format": {"type": "text"},
        "stream": False,
        "stream_options": {"include_usage": True},
        "parallel_tool_calls": True,
    },
    "completions": {"prompt": [3, 80, 1, 4], "model": "m", "n": 1, "logprobs": 1, "echo": False, "stream": False},
    "responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"expression": "2"}'},
            {"type": "function_call_output", "call_id": "a", "output": "5"},
        ],
        "instructions": "be brief",
        "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "text"}},
        "include": ["message.output_text.logprobs"],
        "max_output_tokens": 5,
        "temperature": 0.5,
        "previous_response_id": None,
        "metadata": {"a": "b"},
        "stream": False,
    },
    "messages": {
        "system": [{"type": "text", "text": "be brief"}],
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"expression": "2"}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "5"}]},
        ],
        "tools": [{"name": "f", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
        "max_tokens": 5,
        "stop_sequences": ["x"],
        "temperature": 0.5,
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "metadata": {"user_id": "u"},
        "stream": False,
    },
}
BODIES["models/m:generateContent"] = {
    "contents": [
        {"role": "user", "parts": [{"text": "hello"}, {"text": "a", "thought": True}]},
        {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"expression": "2"}}}]},
        {"parts": [{"functionResponse": {"name": "f", "response": {"output": "5"}}}]},
    ],
    "systemInstruction": {"parts": [{"text": "be brief"}]},
    "tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT", "minItems": "1"}}]}],
    "toolConfig": {"functionCallingConfig": {"mode": "AUTO", "allowedFunctionNames": ["f"]}},
    "generationConfig": {
        "temperature": 0.5,
        "topK": 40.0,
        "candidateCount": 2,
        "stopSequences": ["x"],
        "maxOutputTokens": 5,
        "responseMimeType": "application/json",
        "responseSchema": {"type": "OBJECT", "properties": {"a": {"type": "STRING", "nullable": True}}},
        "thinkingConfig": {"thinkingBudget": 0},
        "responseLogprobs": True,
    },
    "safetySettings": [],
}
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every field of a body."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inside for place in [(*path, key), *places(part, (*path, key))]]


@st.composite
def broken(draw: st.DrawFn) -> tuple[str, Any]:
    """A body of any format in which up to three fields hold anything."""
    name = draw(st.sampled_from(sorted(BODIES)))
    body = copy.deepcopy(BODIES[name]) | {"stream": draw(st.booleans())}
    for path in draw(st.lists(st.sampled_from(places(body)), min_size=1, max_size=3, unique=True)):
        place: Any = body
        try:
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = draw(ANY)
        except (KeyError, IndexError, TypeError):
            continue  # another change has removed this place
    return name, body


async def post(name: str, content: bytes, split: Any) -> tuple[httpx.Response, Stats]:
    async with open_rig(split=split) as rig:
        response = await rig.http.post(f"{url_of(rig.key)}/{name}", content=content)
        return response, await rig.buffer.stats()


def check(name: str, response: httpx.Response, stats: Stats) -> None:
    assert response.status_code in (200, 400), response.text
    if response.status_code == 200:
        assert stats.calls >= 1
        return
    assert stats.calls == 0
    error = response.json()
    assert error["error"]["message"]
    code = error["error"]["details"][0]["reason"] if "models" in name else error["error"]["code"]
    assert code in ("invalid_request", "unsupported", "previous_response_not_found")
    assert (error.get("type") == "error") == (name == "messages")


@given(broken(), st.sampled_from(["train", "val"]))
@settings(max_examples=400, deadline=None)
def test_anything_in_any_field_is_answered_or_refused_in_the_protocols_own_form(request: Any, split: str) -> None:
    name, body = request
    check(name, *asyncio.run(post(name, json.dumps(body).encode(), split)))


@given(st.sampled_from(sorted(BODIES)), ANY)
@settings(max_examples=100, deadline=None)
def test_any_json_is_answered_or_refused(name: str, body: Any) -> None:
    check(name, *asyncio.run(post(name, json.dumps(body).encode(), "train")))


@pytest.mark.parametrize("name", BODIES)
async def test_the_bodies_that_are_broken_here_are_whole(name: str) -> None:
    for stream in (False, True):
        for split in ("train", "val"):
            response, stats = await post(name, json.dumps(BODIES[name] | {"stream": stream}).encode(), split)
            assert response.status_code == 200, response.text
            assert stats.calls == (2 if "models" in name else BODIES[name].get("n", 1))
            streamed = stream and "models" not in name
            assert response.headers["content-type"].startswith("text/event-stream" if streamed else "application/json")


@pytest.mark.parametrize(
    ("name", "changes", "code", "message"),
    [
        ("chat/completions", {"n": 17}, "invalid_request", "n must be a number from 1 to 16"),
        ("chat/completions", {"n": 10**30}, "invalid_request", "n must be a number from 1 to 16"),
        ("completions", {"prompt": ["a"] * 9, "n": 2}, "invalid_request", "n must be a number from 1 to 16"),
        ("completions", {"echo": True}, "unsupported", "echo"),
        ("completions", {"prompt": ""}, "invalid_request", "empty"),
        ("responses", {"previous_response_id": "resp_1"}, "previous_response_not_found", "'resp_1' not found"),
        ("responses", {"conversation": "c"}, "unsupported", "send the whole input"),
        ("responses", {"background": True}, "unsupported", "background is not supported"),
        ("responses", {"tools": [{"type": "web_search"}]}, "unsupported", "a tool of type 'web_search'"),
        ("responses", {"input": []}, "invalid_request", "input must not be empty"),
        ("responses", {"input": [{"content": "a"}]}, "invalid_request", "input[0].role is required"),
        ("responses", {"tools": []}, "invalid_request", "tool_choice must name one of the tools"),
        (
            "responses",
            {"input": [{"role": "user", "content": [{"type": "input_file"}]}]},
            "unsupported",
            "'input_file'",
        ),
        ("responses", {"max_output_tokens": 0}, "invalid_request", "max_output_tokens must be at least 1"),
        ("messages", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "unsupported", "a tool of type 'bash"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "unsupported", "'document'"),
        ("messages", {"thread": {"type": "create"}}, "thread_unsupported_request", "send the whole conversation"),
        ("messages", {"max_tokens": "many"}, "invalid_request", "max_tokens must be an integer"),
    ],
)
async def test_what_is_not_supported_says_so(name: str, changes: dict[str, Any], code: str, message: str) -> None:
    response, _ = await post(name, json.dumps(BODIES[name] | changes).encode(), "train")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, code)
    assert message in error["message"]


# Answers that are half.


def completion_of(message: dict[str, Any], finish_reason: str = "tool_calls") -> Completion:
    choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return Completion(reply={"choices": [choice], "usage": usage}, choices=(), policy_version=0)


def context_of(dialect: Dialect, **body: Any) -> RequestContext:
    return RequestContext(body=body, engine={}, reply_id=f"{dialect.prefix}ab12", model="m", created=0)


def test_a_tool_call_that_is_half_json_is_text_for_anthropic_and_as_it_is_for_openai() -> None:
    half = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1'}}
    completion = completion_of({"role": "assistant", "content": None, "tool_calls": [half]})
    anthropic = Messages().reply(context_of(Messages()), completion)
    assert anthropic["content"] == [{"type": "text", "text": 'f({"x": 1)'}]
    assert anthropic["stop_reason"] == "end_turn"
    (item,) = Responses().reply(context_of(Responses()), completion)["output"]
    assert (item["type"], item["arguments"]) == ("function_call", '{"x": 1')
    (choice,) = ChatCompletions().reply(context_of(ChatCompletions()), completion)["choices"]
    assert choice["message"]["tool_calls"] == [half]


@pytest.mark.parametrize("dialect", [ChatCompletions(), Responses(), Messages()])
def test_an_answer_without_a_word_has_a_beginning_and_an_end(dialect: Dialect) -> None:
    stream, completion = dialect.stream(context_of(dialect)), completion_of({"content": None}, "stop")
    events = stream.begin() + stream.end(completion)
    assert events.endswith("\n\n")
    for line in events.splitlines():
        assert (
            not line or line.startswith("event: ") or line == "data: [DONE]" or json.loads(line.removeprefix("data: "))
        )


def test_the_answers_beginning_may_be_the_agents() -> None:
    body = {"messages": [USER, {"role": "assistant", "content": "The answer is"}], "max_tokens": 5}
    request = Messages().to_engine(body)
    assert (request["add_generation_prompt"], request["continue_final_message"]) == (False, True)


def test_what_fields_become() -> None:
    request = Responses().to_engine(BODIES["responses"] | {"top_k": 5})
    assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "tool"]
    assert request["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert (request["max_tokens"], request["top_k"]) == (5, 5)
    request = Messages().to_engine(BODIES["messages"] | {"top_k": 5})
    assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "tool"]
    assert (request["stop"], request["top_k"]) == (["x"], 5)
    assert request["response_format"]["json_schema"]["schema"] == SCHEMA
    with pytest.raises(BadRequest, match="messages"):
        Messages().to_engine({})
    with pytest.raises(BadRequest, match="prompt"):
        Completions().to_engine({})


# Streams of the engine.


def part(index: int, text: str, tokens: list[int], finish_reason: str | None = None) -> Part:
    content = [{"token": "t", "logprob": -0.5} for _ in tokens]
    choice = {"index": index, "delta": {"content": text}, "token_ids": tokens, "logprobs": {"content": content}}
    chunk = {"choices": [choice | {"finish_reason": finish_reason}], "prompt_token_ids": [1, 2]}
    return Part(chunk=chunk, policy_version=3)


@given(st.lists(st.tuples(st.text(max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=3)), min_size=1))
@settings(deadline=None)
def test_the_parts_of_a_stream_are_the_answer_wherever_it_was_cut(pieces: list[tuple[str, list[int]]]) -> None:
    text, tokens = "".join(text for text, _ in pieces), [token for _, ids in pieces for token in ids]
    parts = [part(0, text, ids) for text, ids in pieces]
    cut = join_parts(parts)
    assert (cut.choices[0].finish_reason, cut.policy_version) == (CUT, 3)
    ended = join_parts([*parts, part(0, "", [], "stop")])
    message = {"role": "assistant", "content": text}
    content = [{"token": "t", "logprob": -0.5} for _ in tokens]
    choice = {"index": 0, "message": message, "token_ids": tokens, "logprobs": {"content": content}}
    raw = {"choices": [choice | {"finish_reason": "stop"}], "prompt_token_ids": [1, 2]}
    expected = parse_reply(raw, policy_version=3)
    for joined in (cut, ended):
        assert ids_of(joined.choices[0]) == ids_of(expected.choices[0]) == ([1, 2], tokens, [-0.5] * len(tokens))
        assert assistant_message(joined.reply["choices"][0]) == assistant_message(expected.reply["choices"][0])


def ids_of(choice: Choice) -> tuple[list[int], list[int], list[float]]:
    return choice.prompt_T.tolist(), choice.response_T.tolist(), choice.logprob_T.tolist()


def test_a_part_shows_no_ids_and_no_end() -> None:
    (shown,) = part(0, "a", [1], "stop").visible()
    assert shown == {"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"token": "t", "logprob": -0.5}]}}


def test_errors_have_the_types_that_anthropic_users_know() -> None:
    for status, kind in ((403, "permission_error"), (404, "not_found_error"), (413, "request_too_large")):
        error = Messages().error(Refusal(status=status, message="m", code="c"))
        details = {"error_code": "c"}  # what Anthropic's library acts on
        assert error == {"type": "error", "error": {"type": kind, "message": "m", "code": "c", "details": details}}


async def test_a_body_that_is_not_read_is_refused_in_the_format_of_its_endpoint() -> None:
    async with open_rig(max_body_bytes=100) as rig:
        large = await rig.http.post(f"{url_of(rig.key)}/messages", content=b"x" * 101)  # without Anthropic's headers
    assert (large.status_code, large.json()["type"]) == (413, "error")
    assert large.json()["error"]["type"] == "request_too_large"
