"""What the fields of a request become before an engine sees them, and what is refused, for every dialect."""

from __future__ import annotations

from typing import Any

import pytest

from agent_lightning.serving.dialects.base import BadRequest
from agent_lightning.serving.dialects.chat import ChatCompletions, Completions
from agent_lightning.serving.dialects.fields import engine_form
from agent_lightning.serving.dialects.messages import Messages
from agent_lightning.serving.dialects.responses import Responses
from agent_lightning.serving.engine import engine_request, repeat_choices, without_copies

USER = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
OTHER = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}


def chat(**fields: Any) -> dict[str, Any]:
    """What the engine gets for a chat request, beside its messages."""
    request = ChatCompletions().to_engine({"messages": [USER], **fields})
    assert request.pop("messages") == [USER]
    return request


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"tools": []}, {}),
        ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
        ({"tools": None, "tool_choice": "none"}, {}),
        ({"tool_choice": "auto"}, {}),
        ({"tools": [TOOL]}, {"tools": [TOOL], "tool_choice": "auto"}),
        ({"tools": [TOOL], "tool_choice": None}, {"tools": [TOOL], "tool_choice": "auto"}),
        ({"tools": [TOOL], "tool_choice": "required"}, {"tools": [TOOL], "tool_choice": "required"}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "add"}}},
        ),
        (
            {
                "tools": [TOOL, OTHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "sub"}}]},
                },
            },
            {"tools": [OTHER], "tool_choice": "required"},
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "add", "parameters": None, "strict": None}}]},
            {
                "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
                "tool_choice": "auto",
            },
        ),
        (dict.fromkeys(("n", "stop", "seed", "response_format", "logprobs", "stream_options", "anything")), {}),
        ({"metadata": {"a": "b"}, "store": True, "user": "u", "service_tier": "auto", "prediction": {}}, {}),
        ({"verbosity": "medium", "modalities": ["text"], "functions": []}, {}),
        ({"response_format": {"type": "text", "json_schema": None}}, {"response_format": {"type": "text"}}),
        ({"stop": ["", "x"]}, {"stop": ["x"]}),
        ({"top_k": 5, "chat_template_kwargs": {"a": None}}, {"top_k": 5, "chat_template_kwargs": {"a": None}}),
    ],
)
def test_what_asks_for_nothing_is_left_out_and_the_rest_stays(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert chat(**fields) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "be brief"}, {"role": "system", "content": "be brief"}),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "user", "content": "a"}),
        (
            {"role": "assistant", "content": None, "tool_calls": None, "refusal": None, "audio": None},
            {"role": "assistant", "content": ""},
        ),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": None, "tool_calls": [CALL]}),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            {"role": "assistant", "content": "no"},
        ),
        ({"role": "tool", "tool_call_id": "a", "content": None}, {"role": "tool", "tool_call_id": "a", "content": ""}),
        ({"role": "user", "content": "a", "name": None}, {"role": "user", "content": "a"}),
    ],
)
def test_messages_in_the_words_of_templates(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert engine_form({"messages": [message]})["messages"] == [expected]


def test_functions_of_2023_are_todays_tools() -> None:
    request = ChatCompletions().to_engine(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}},
                {"role": "function", "name": "add", "content": "5"},
            ],
            "functions": [TOOL["function"]],
            "function_call": {"name": "add"},
        }
    )
    call, result = request["messages"][1:]
    assert call["tool_calls"] == [{**CALL, "id": "call_1"}]
    assert (result["role"], result["tool_call_id"], result["content"]) == ("tool", "call_1", "5")
    assert request["tools"] == [TOOL]
    assert request["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert request["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tool_choice": "required"}, "tools", "invalid_request"),
        ({"tools": [], "tool_choice": "required"}, "tools", "invalid_request"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "invalid_request",
        ),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice", "unsupported"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "unsupported"),
        ({"tools": [TOOL], "functions": [TOOL["function"]]}, "functions", "invalid_request"),
        ({"function_call": "auto"}, "function_call", "unsupported"),
        ({"web_search_options": {}}, "web_search_options", "unsupported"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", "unsupported"),
        ({"verbosity": "low"}, "verbosity", "unsupported"),
        ({"guided_json": {}}, "guided_json", "unsupported"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_request"),
        ({"messages": []}, "messages", "invalid_request"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_request"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, "messages[0].role", "unsupported"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "messages[0].content[0].type", "unsupported"),
        ({"n": 0}, "n", "invalid_request"),
        ({"seed": 2**63}, "seed", "invalid_request"),
        ({"stop": [1]}, "stop[0]", "invalid_request"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as error:
        ChatCompletions().to_engine({"messages": [USER], **fields})
    assert (error.value.refusal.param, error.value.refusal.code) == (param, code)
    assert param in str(error.value)


@pytest.mark.parametrize("tools", [[], None])
@pytest.mark.parametrize("choice", ["auto", "none", None])
def test_no_tools_are_no_tools_in_every_format(tools: Any, choice: Any) -> None:
    anthropic = None if choice is None else {"type": choice}
    for request in (
        ChatCompletions().to_engine({"messages": [USER], "tools": tools, "tool_choice": choice}),
        Responses().to_engine({"input": "hello", "tools": tools, "tool_choice": choice}),
        Messages().to_engine({"messages": [USER], "tools": tools, "tool_choice": anthropic}),
    ):
        assert request == {"messages": [USER]}


@pytest.mark.parametrize(
    ("content", "continued"),
    [
        ("The answer is", True),
        ([{"type": "text", "text": "The answer is"}], True),
        ([{"type": "thinking", "thinking": "5", "signature": "s"}], False),
        ([], False),
    ],
)
def test_only_text_of_the_assistant_is_continued(content: Any, continued: bool) -> None:
    request = Messages().to_engine({"messages": [USER, {"role": "assistant", "content": content}]})
    assert ("continue_final_message" in request) is continued
    assert request["messages"][-1]["role"] == ("assistant" if continued else "user")


def test_a_failed_tool_is_a_failed_tool() -> None:
    results = [{"type": "tool_result", "tool_use_id": i, "content": "4", "is_error": i == "b"} for i in "ab"]
    messages = Messages().to_engine({"messages": [USER, {"role": "user", "content": results}]})["messages"]
    assert [message.get("status") for message in messages[1:]] == [None, "error"]


def test_greedy_choices_are_made_once_and_repeated() -> None:
    assert without_copies({"n": 3, "temperature": 0.0}) == ({"n": 1, "temperature": 0.0}, 3)
    assert without_copies({"n": 3, "temperature": 0.5}) == ({"n": 3, "temperature": 0.5}, 1)
    usage = {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    reply = {"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}], "usage": usage}
    repeated = repeat_choices(reply, 2)
    assert [(choice["index"], choice["text"]) for choice in repeated["choices"]] == [
        (0, "a"),
        (1, "a"),
        (2, "b"),
        (3, "b"),
    ]
    assert repeated["usage"] == {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}


def test_our_sampling_makes_no_valid_request_invalid() -> None:
    settings: dict[str, Any] = {"model": "policy", "sampling": {"temperature": 0.0, "max_tokens": 8}}
    request = engine_request({"messages": [USER], "top_p": 0.0, "min_tokens": 20}, split="val", **settings)
    assert (request["max_tokens"], request["min_tokens"]) == (8, 8)
    assert 0 < request["top_p"] < 1e-4


@pytest.mark.parametrize("prompt", ["", [], ["a", ""], [[]]])
def test_an_empty_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(BadRequest, match="prompt must not be empty"):
        Completions().to_engine({"prompt": prompt})
