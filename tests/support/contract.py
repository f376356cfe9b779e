"""The contract of the gateway: requests of every format, each with what OpenAI's or Anthropic's own API answers, or
with an error that names the field. `ask` sends them all, streamed and not; `check` compares an answer with its row.

The policy is greedy, so that `like` can say that a request means the same as another one: both get the same answer to a
prompt of the same length."""

from __future__ import annotations

import asyncio
import copy
import gzip
import json
import random
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from contract_replies import Reply, read_reply, read_stream

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Task
from agent_lightning.serving.gateway import Gateway, GatewayConfig
from agent_lightning.testing.model import ToyEngine, ToyLanguage
from agent_lightning.testing.world import SAMPLING, application

SYSTEM = "Solve the problem. Use the calculator."
QUESTION = "Gita takes 76 figs out of a tray that held 85 figs. How many stay?"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
PARAMETERS = {
    "type": "object",
    "properties": {"expression": {"type": "string", "enum": ["85-76", "1+1"]}},
    "required": ["expression"],
    "additionalProperties": False,
}
FUNCTION = {"name": "calculator", "description": "Computes.", "parameters": PARAMETERS}
OTHER = {"name": "noop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
INSIDE = re.compile(r"(?i)vllm|traceback|pydantic|python|haproxy|xgrammar|validation error|input_value|\w+Error\b")
"""What no agent may read: words of the parts inside."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A request, and what is expected of its answer."""

    name: str
    path: str
    body: Mapping[str, Any] | bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    status: int = 200
    param: str = ""
    """Of a refusal: the field that it names, in its message, and as `param` in OpenAI's formats."""
    code: str = ""
    like: str = ""
    """The row of the same format that has the same answer."""
    reason: str = ""
    """The end of each choice in OpenAI's words."""
    call: str = ""
    """The function that is called."""
    keys: tuple[str, ...] | None = None
    """The keys of the JSON object that the text is; a toy policy knows no JSON."""
    num: int = 1
    """Choices."""


Answers = dict[tuple[str, bool], tuple[int, Any, str]]
"""By the name of a row and whether it was streamed: status, JSON (or None) and text of the answer."""


def tool(function: Mapping[str, Any] = FUNCTION, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {**function, **more}}


def flat(function: Mapping[str, Any] = FUNCTION, **more: Any) -> dict[str, Any]:
    return {"type": "function", **function, **more}


def anthropic(function: Mapping[str, Any] = FUNCTION, **more: Any) -> dict[str, Any]:
    parameters = {"input_schema": function["parameters"]} if "parameters" in function else {}
    return {"name": function["name"], "description": "Computes.", **parameters, **more}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER = said("user", QUESTION)
CHAT = [said("system", SYSTEM), USER]


def called(arguments: str = '{"expression": "85-76"}', name: str = "a") -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": "calculator", "arguments": arguments}}


def history(arguments: str = '{"expression": "85-76"}', result: Any = "9", **more: Any) -> list[dict[str, Any]]:
    """A chat in which the assistant has called its tool."""
    return [
        *CHAT,
        said("assistant", None, tool_calls=[called(arguments)]),
        said("tool", result, tool_call_id="a", **more),
    ]


def items(arguments: str = '{"expression": "85-76"}', result: Any = "9") -> list[dict[str, Any]]:
    """The same as items of Responses."""
    call = {"type": "function_call", "call_id": "a", "name": "calculator", "arguments": arguments}
    return [USER, call, {"type": "function_call_output", "call_id": "a", "output": result}]


def blocks(result: Any = "9", **more: Any) -> list[dict[str, Any]]:
    """The same as Anthropic's blocks."""
    use = {"type": "tool_use", "id": "a", "name": "calculator", "input": {"expression": "85-76"}}
    answer = {"type": "tool_result", "tool_use_id": "a", "content": result, **more}
    return [USER, said("assistant", [use]), said("user", [answer])]


def text(*texts: str, kind: str = "text") -> list[dict[str, Any]]:
    return [{"type": kind, "text": part} for part in texts]


def form(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def flat_form(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"format": {"type": "json_schema", "name": "answer", "schema": schema, **more}}


def named(name: str = "calculator") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
LONG = "fig " * 3000
STOP, CALLS, LENGTH = {"reason": "stop"}, {"reason": "tool_calls", "call": "calculator"}, {"reason": "length"}
THOUGHT = {"type": "thinking", "thinking": "x", "signature": "s"}
REFERENCES = {**SCHEMA, "properties": {"ok": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "boolean"}}}
HALF = {"type": "json_schema", "json_schema": {"name": "a"}}
PLAIN, BACK = {"like": "plain"}, {"like": "a tool's result"}
BOTH = [tool(), tool(OTHER)]

# By format: name of the row -> fields of the request, and what is expected.
TAKEN: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "chat/completions": {
        "plain": ({}, STOP),
        "a model's name": ({"model": "ORG/NAME:tag"}, PLAIN),
        "developer": ({"messages": [said("developer", SYSTEM), USER]}, PLAIN),
        "content as parts": ({"messages": [said("system", text(SYSTEM)), said("user", text(QUESTION))]}, PLAIN),
        "content of several parts": ({"messages": [said("user", text("What is", "1+1?"))]}, STOP),
        "content is empty": ({"messages": [*CHAT, said("assistant", ""), said("user", "")]}, {}),
        "content is no part": ({"messages": [*CHAT, said("user", [])]}, {}),
        "assistant without content": ({"messages": [*CHAT, {"role": "assistant"}, USER]}, {"like": "assistant's null"}),
        "assistant's null": ({"messages": [*CHAT, said("assistant", None, tool_calls=None), USER]}, {}),
        "assistant's refusal": (
            {"messages": [*CHAT, said("assistant", [{"type": "refusal", "refusal": "no"}]), USER]},
            {"like": "assistant's text"},
        ),
        "assistant's text": ({"messages": [*CHAT, said("assistant", "no"), USER]}, {}),
        "assistant's reply sent back": (
            {
                "messages": [
                    *CHAT,
                    said("assistant", "no", refusal=None, annotations=None, audio=None, function_call=None),
                    {**USER, "name": None},
                ]
            },
            {"like": "assistant's text"},
        ),
        "system in the middle": ({"messages": [USER, said("system", SYSTEM), USER]}, {}),
        "developer in the middle": (
            {"messages": [USER, said("developer", SYSTEM), USER]},
            {"like": "system in the middle"},
        ),
        "only system": ({"messages": [said("system", SYSTEM)]}, {}),
        "names": ({"messages": [said("system", SYSTEM), {**USER, "name": "Bob"}]}, PLAIN),
        "no tools": ({"tools": []}, PLAIN),
        "no tools, auto": ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, PLAIN),
        "no tools, none": ({"tools": None, "tool_choice": "none"}, PLAIN),
        "tools": ({"tools": [tool()]}, {}),
        "tools, null choice": ({"tools": [tool()], "tool_choice": None}, {"like": "tools"}),
        "tools, auto": ({"tools": [tool()], "tool_choice": "auto"}, {"like": "tools"}),
        "tools, none": ({"tools": [tool()], "tool_choice": "none"}, STOP),
        "tools, required": ({"tools": [tool()], "tool_choice": "required"}, CALLS),
        "tools, named": ({"tools": BOTH, "tool_choice": named()}, {"reason": "stop", "call": "calculator"}),
        "tools, strict": ({"tools": [tool(strict=True)]}, {}),
        "tools, strict and required": ({"tools": [tool(strict=True)], "tool_choice": "required"}, CALLS),
        "tools, one at a time": ({"tools": [tool()], "tool_choice": "required", "parallel_tool_calls": False}, CALLS),
        "tools, allowed": ({"tools": BOTH, "tool_choice": allowed("required", "calculator")}, CALLS),
        "tools, allowed, auto": ({"tools": BOTH, "tool_choice": allowed("auto", "calculator")}, {"like": "tools"}),
        "tool of nothing but a name": (
            {"tools": [tool({"name": "noop"})], "tool_choice": "none"},
            {"like": "tool of null parameters"},
        ),
        "tool of null parameters": (
            {"tools": [tool({"name": "noop"}, parameters=None, description=None, strict=None)], "tool_choice": "none"},
            STOP,
        ),
        "tool of empty parameters": (
            {"tools": [tool({"name": "noop"}, parameters={})], "tool_choice": "none"},
            {"like": "tool of null parameters"},
        ),
        "a tool's result": ({"messages": history()}, STOP),
        "result as parts": ({"messages": history(result=text("9"))}, BACK),
        "result is null": ({"messages": history(result=None)}, {"like": "result is empty"}),
        "result is empty": ({"messages": history(result="")}, {}),
        "result with a name": ({"messages": history(name="calculator")}, BACK),
        "result with tools": ({"messages": history(), "tools": [tool()]}, {}),
        "results of two calls": (
            {
                "messages": [
                    *CHAT,
                    said("assistant", "", tool_calls=[called(), called('{"expression": "1+1"}', "b")]),
                    said("tool", "9", tool_call_id="a"),
                    said("tool", "2", tool_call_id="b"),
                ]
            },
            {},
        ),
        "no arguments": ({"messages": history("")}, {}),
        "half of the arguments": ({"messages": history('{"expression": "2+')}, {}),
        "arguments are a list": ({"messages": history("[1]")}, {}),
        "arguments are nested": ({"messages": history('{"a": {"b": [1, null, "\\u20ac"]}}')}, {}),
        "functions": ({"functions": [FUNCTION]}, {}),
        "no functions": ({"functions": [], "function_call": "none"}, PLAIN),
        "functions, none": ({"functions": [FUNCTION], "function_call": "none"}, {"like": "tools, none"}),
        "functions, named": (
            {"functions": [FUNCTION, OTHER], "function_call": {"name": "calculator"}},
            {"reason": "stop", "call": "calculator"},
        ),
        "function's result": (
            {
                "messages": [
                    *CHAT,
                    said("assistant", None, function_call=called()["function"]),
                    said("function", "9", name="calculator"),
                ]
            },
            BACK,
        ),
        "n": ({"n": 3}, {"num": 3, "reason": "stop"}),
        "n with tools": ({"n": 2, "tools": [tool()], "tool_choice": "required"}, {"num": 2, **CALLS}),
        "n and a seed": ({"n": 2, "seed": 5, "temperature": 1.0}, {"num": 2}),
        "n is 1": ({"n": 1}, PLAIN),
        "greedy": ({"temperature": 0, "top_p": 1, "seed": 3}, PLAIN),
        "top_p is 0": ({"temperature": 1, "top_p": 0}, PLAIN),
        "penalties": ({"frequency_penalty": -2.0, "presence_penalty": 2}, {}),
        "the hottest": ({"temperature": 2.0, "seed": 7}, {}),
        "stop as text": ({"stop": "answer"}, {}),
        "stop as list": ({"stop": ["answer", "\n\n"]}, {}),
        "stop is empty": ({"stop": []}, PLAIN),
        "stop is an empty text": ({"stop": ""}, PLAIN),
        "max_tokens": ({"max_tokens": 1}, LENGTH),
        "max_completion_tokens": ({"max_completion_tokens": 1}, {"like": "max_tokens"}),
        "both limits": ({"max_completion_tokens": 30, "max_tokens": 1}, {"like": "max_tokens"}),
        "a limit beyond the model's": ({"max_tokens": 10**9}, PLAIN),
        "logprobs": ({"logprobs": True}, PLAIN),
        "top_logprobs": ({"logprobs": True, "top_logprobs": 5}, PLAIN),
        "no logprobs": ({"logprobs": False, "top_logprobs": None}, PLAIN),
        "logit_bias is empty": ({"logit_bias": {}}, PLAIN),
        "usage": ({"stream_options": {"include_usage": True, "include_obfuscation": False}}, PLAIN),
        "usage is null": ({"stream_options": {"include_usage": None}}, PLAIN),
        "format: text": ({"response_format": {"type": "text"}}, PLAIN),
        "format: null": ({"response_format": {"type": "text", "json_schema": None}}, PLAIN),
        "format: half of another": ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, PLAIN),
        "format: json": ({"response_format": {"type": "json_object"}}, {"keys": ()}),
        "format: schema": ({"response_format": form()}, {"keys": ("ok",), "reason": "stop"}),
        "format: strict schema": ({"response_format": form(strict=True)}, {"like": "format: schema"}),
        "format: not strict": ({"response_format": form(strict=None, description=None)}, {"like": "format: schema"}),
        "format: references": (
            {
                "response_format": form(
                    {**SCHEMA, "properties": {"ok": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "boolean"}}}
                )
            },
            {"keys": ("ok",)},
        ),
        "format: what no grammar knows": (
            {"response_format": form({**SCHEMA, "propertyNames": {"maxLength": 2}})},
            {"keys": ("ok",)},
        ),
        "format and tools": ({"response_format": form(), "tools": [tool()]}, {}),
        "format and a required tool": (
            {"response_format": form(), "tools": [tool()], "tool_choice": "required"},
            CALLS,
        ),
        "reasoning_effort": ({"reasoning_effort": "low"}, PLAIN),
        "harmless fields": (
            {
                "user": "u",
                "metadata": {"a": "b"},
                "store": True,
                "service_tier": "auto",
                "safety_identifier": "s",
                "prompt_cache_key": "k",
                "prompt_cache_retention": "24h",
                "prediction": {"type": "content", "content": "9"},
            },
            PLAIN,
        ),
        "fields that ask for what is done": ({"modalities": ["text"], "verbosity": "medium"}, PLAIN),
        "fields of the engine": ({"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0, "min_tokens": 1}, PLAIN),
        "more tokens than there may be": ({"min_tokens": 10**6, "max_tokens": 1}, LENGTH),
        "a continued answer": (
            {"messages": [*CHAT, said("assistant", "The answer is")], "continue_final_message": True},
            {},
        ),
    },
    "completions": {
        "plain": ({}, {}),
        "tokens": ({"prompt": [5, 6, 7]}, {}),
        "several prompts": ({"prompt": ["a", "b"]}, {"num": 2}),
        "several prompts of tokens": ({"prompt": [[5, 6], [7]]}, {"num": 2}),
        "n": ({"n": 2}, {"num": 2}),
        "several prompts, n": ({"prompt": ["a", "b"], "n": 2}, {"num": 4}),
        "max_tokens": ({"max_tokens": 1}, LENGTH),
        "logprobs": ({"logprobs": 2}, PLAIN),
        "logprobs are 0": ({"logprobs": 0}, PLAIN),
        "stop": ({"stop": ["\n"]}, {}),
        "format": ({"response_format": form(), "max_tokens": 40}, {"keys": ("ok",)}),
        "fields that ask for what is done": ({"echo": False, "best_of": 1, "user": "u"}, PLAIN),
    },
    "responses": {
        "plain": ({}, STOP),
        "input as items": ({"input": [USER]}, PLAIN),
        "input as typed items": (
            {"input": [{"type": "message", **said("user", text(QUESTION, kind="input_text"))}]},
            PLAIN,
        ),
        "developer": ({"instructions": None, "input": [said("developer", SYSTEM), USER]}, PLAIN),
        "system": ({"instructions": None, "input": [said("system", SYSTEM), USER]}, PLAIN),
        "no instructions": ({"instructions": None}, STOP),
        "empty instructions": ({"instructions": ""}, {"like": "no instructions"}),
        "no tools": ({"tools": [], "tool_choice": "auto"}, PLAIN),
        "no tools, parallel": ({"tools": [], "parallel_tool_calls": True, "tool_choice": None}, PLAIN),
        "tools": ({"tools": [flat()]}, {}),
        "tools, auto": ({"tools": [flat()], "tool_choice": "auto"}, {"like": "tools"}),
        "tools, required": ({"tools": [flat()], "tool_choice": "required"}, CALLS),
        "tools, named": (
            {"tools": [flat(), flat(OTHER)], "tool_choice": {"type": "function", "name": "calculator"}},
            CALLS,
        ),
        "tools, strict": ({"tools": [flat(strict=True)], "tool_choice": "required"}, CALLS),
        "tools, none": ({"tools": [flat()], "tool_choice": "none"}, STOP),
        "tools, allowed": (
            {
                "tools": [flat(), flat(OTHER)],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "required",
                    "tools": [{"type": "function", "name": "calculator"}],
                },
            },
            CALLS,
        ),
        "tool of null parameters": ({"tools": [flat({"name": "noop"}, parameters=None)], "tool_choice": "none"}, STOP),
        "a tool's result": ({"input": items()}, STOP),
        "result as parts": ({"input": items(result=text("9", kind="input_text"))}, BACK),
        "half of the arguments": ({"input": items('{"expression": "2+')}, {}),
        "reasoning": ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}, USER]}, PLAIN),
        "assistant's reply sent back": (
            {
                "input": [
                    USER,
                    {
                        "type": "message",
                        "id": "msg_1",
                        "role": "assistant",
                        "status": "completed",
                        "content": [{"type": "output_text", "text": "no", "annotations": [], "logprobs": []}],
                    },
                    USER,
                ]
            },
            {"like": "assistant's text"},
        ),
        "assistant's text": ({"input": [USER, said("assistant", "no"), USER]}, {}),
        "max_output_tokens": ({"max_output_tokens": 1}, LENGTH),
        "logprobs": ({"include": ["message.output_text.logprobs"]}, PLAIN),
        "top_logprobs": ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, PLAIN),
        "top_logprobs that are not shown": ({"top_logprobs": 2}, PLAIN),
        "format: text": ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, PLAIN),
        "format: schema": ({"text": flat_form(strict=True)}, {"keys": ("ok",)}),
        "format: json": ({"text": {"format": {"type": "json_object"}}}, {"keys": ()}),
        "format: null": ({"text": {"format": None}}, PLAIN),
        "greedy": ({"temperature": 0, "top_p": 0.5}, PLAIN),
        "reasoning effort": ({"reasoning": {"effort": "low", "summary": None}}, PLAIN),
        "harmless fields": (
            {"store": False, "metadata": {"a": "b"}, "truncation": "disabled", "user": "u", "service_tier": "auto"}
            | {"prompt_cache_key": "k", "safety_identifier": "s"},
            PLAIN,
        ),
    },
    "messages": {
        "plain": ({}, STOP),
        "system as blocks": ({"system": text(SYSTEM)}, PLAIN),
        "cached blocks": (
            {
                "system": [{**text(SYSTEM)[0], "cache_control": {"type": "ephemeral"}}],
                "messages": [said("user", [{**text(QUESTION)[0], "cache_control": None}])],
                "cache_control": {"type": "ephemeral"},
            },
            PLAIN,
        ),
        "no system": ({"system": None}, STOP),
        "empty system": ({"system": []}, {"like": "no system"}),
        "no tools": ({"tools": []}, PLAIN),
        "no tools, auto": ({"tools": [], "tool_choice": {"type": "auto"}}, PLAIN),
        "tools": ({"tools": [anthropic()]}, {}),
        "tools, auto": ({"tools": [anthropic(type="custom")], "tool_choice": {"type": "auto"}}, {"like": "tools"}),
        "tools, any": ({"tools": [anthropic()], "tool_choice": {"type": "any"}}, CALLS),
        "tools, named": (
            {"tools": [anthropic(), anthropic(OTHER)], "tool_choice": {"type": "tool", "name": "calculator"}},
            CALLS,
        ),
        "tools, strict": ({"tools": [anthropic(strict=True)], "tool_choice": {"type": "any"}}, CALLS),
        "tools, none": ({"tools": [anthropic()], "tool_choice": {"type": "none"}}, STOP),
        "tools, one at a time": (
            {"tools": [anthropic()], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            CALLS,
        ),
        "a tool's result": ({"messages": blocks()}, STOP),
        "result as blocks": ({"messages": blocks(text("9"))}, BACK),
        "result that failed": ({"messages": blocks(is_error=True)}, {}),
        "result that did not fail": ({"messages": blocks(is_error=False)}, BACK),
        "result of nothing": ({"messages": blocks(None)}, {"like": "result is empty"}),
        "result is empty": ({"messages": blocks("")}, {}),
        "result and text": (
            {"messages": [*blocks()[:2], said("user", [*blocks()[2]["content"], *text("And now?")])]},
            {},
        ),
        "thoughts": (
            {"messages": [USER, said("assistant", [THOUGHT, *text("no")]), USER]},
            {"like": "assistant's text"},
        ),
        "assistant's text": ({"messages": [USER, said("assistant", "no"), USER]}, {}),
        "prefill": ({"messages": [USER, said("assistant", "The answer is")]}, {}),
        "prefill as blocks": ({"messages": [USER, said("assistant", text("The answer is"))]}, {"like": "prefill"}),
        "prefill of thoughts": ({"messages": [USER, said("assistant", [THOUGHT])]}, PLAIN),
        "prefill of nothing": ({"messages": [USER, said("assistant", [])]}, PLAIN),
        "stop_sequences": ({"stop_sequences": ["answer"]}, {}),
        "no stop_sequences": ({"stop_sequences": []}, PLAIN),
        "max_tokens": ({"max_tokens": 1}, LENGTH),
        "top_k": ({"top_k": 1, "temperature": 1.0}, PLAIN),
        "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, PLAIN),
        "no thinking": ({"thinking": {"type": "disabled"}}, PLAIN),
        "effort": ({"output_config": {"effort": "low"}}, PLAIN),
        "format": ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {"keys": ("ok",)}),
        "format of the beta": ({"output_format": {"type": "json_schema", "schema": SCHEMA}}, {"keys": ("ok",)}),
        "harmless fields": ({"metadata": {"user_id": "u"}, "service_tier": "auto", "mcp_servers": []}, PLAIN),
        "thoughts that are cleared": (
            {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
            PLAIN,
        ),
    },
}

# By format: fields of the request -> the field that the refusal names, and its code.
UNSUPPORTED, INVALID = "unsupported", "invalid_request"
REFUSED: dict[str, Sequence[tuple[dict[str, Any], str, str]]] = {
    "chat/completions": [
        ({"messages": []}, "messages", INVALID),
        ({"messages": None}, "messages", INVALID),
        ({"messages": "hello"}, "messages", INVALID),
        ({"messages": [said("nobody", "a")]}, "messages[0].role", UNSUPPORTED),
        ({"messages": [{"content": "a"}]}, "messages[0].role", INVALID),
        ({"messages": [{"role": "user"}]}, "messages[0].content", INVALID),
        ({"messages": [said("user", None)]}, "messages[0].content", INVALID),
        ({"messages": [said("user", 5)]}, "messages[0].content", INVALID),
        ({"messages": [said("user", ["a"])]}, "messages[0].content[0]", INVALID),
        ({"messages": [said("user", [{"type": "text"}])]}, "messages[0].content[0].text", INVALID),
        ({"messages": [said("user", [{"type": "file", "file": {}}])]}, "messages[0].content[0].type", UNSUPPORTED),
        ({"messages": [said("user", [IMAGE])]}, "messages", UNSUPPORTED),
        ({"messages": [said("user", [SOUND])]}, "messages", UNSUPPORTED),
        ({"messages": [said("user", [{"type": "input_audio"}])]}, "messages[0].content[0].input_audio", INVALID),
        ({"messages": [said("user", LONG)]}, "messages", "context_length_exceeded"),
        (
            {"messages": [*CHAT, said("assistant", "", tool_calls=[{"id": "a"}])]},
            "messages[2].tool_calls[0].function",
            INVALID,
        ),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice", UNSUPPORTED),
        ({"tools": [tool()], "tool_choice": named("nothing")}, "tool_choice", INVALID),
        ({"tool_choice": "required"}, "tools", INVALID),
        ({"tools": [], "tool_choice": named()}, "tool_choice", INVALID),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "tools[0].type", UNSUPPORTED),
        ({"tools": [{"type": "function"}]}, "tools[0].function", INVALID),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters.type", UNSUPPORTED),
        ({"tools": [tool(parameters={"properties": 5})]}, "tools[0].function.parameters.properties", INVALID),
        ({"tools": [tool()], "functions": [FUNCTION]}, "functions", INVALID),
        ({"function_call": "auto"}, "function_call", UNSUPPORTED),
        ({"functions": 5}, "tools", INVALID),
        ({"response_format": {"type": "yaml"}}, "response_format.type", UNSUPPORTED),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", INVALID),
        ({"response_format": HALF}, "response_format.json_schema.schema", INVALID),
        ({"response_format": form({"type": "integer", "multipleOf": 5}, strict=True)}, "response_format", UNSUPPORTED),
        ({"n": 0}, "n", INVALID),
        ({"n": 17}, "n", INVALID),
        ({"n": "2"}, "n", INVALID),
        ({"temperature": 2.5}, "temperature", INVALID),
        ({"temperature": -1}, "temperature", INVALID),
        ({"top_p": 1.5}, "top_p", INVALID),
        ({"seed": 2**63}, "seed", INVALID),
        ({"stop": ["a"] * 5}, "stop", INVALID),
        ({"stop": [5]}, "stop[0]", INVALID),
        ({"max_tokens": 0}, "max_tokens", INVALID),
        ({"top_logprobs": 3}, "top_logprobs", INVALID),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", INVALID),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", INVALID),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", INVALID),
        ({"frequency_penalty": 3}, "frequency_penalty", INVALID),
        ({"modalities": ["text", "audio"], "audio": {"voice": "a", "format": "wav"}}, "modalities", UNSUPPORTED),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio", UNSUPPORTED),
        ({"web_search_options": {}}, "web_search_options", UNSUPPORTED),
        ({"verbosity": "low"}, "verbosity", UNSUPPORTED),
        ({"reasoning_effort": "most"}, "reasoning_effort", UNSUPPORTED),
        ({"guided_json": SCHEMA}, "guided_json", UNSUPPORTED),
        ({"use_beam_search": True}, "use_beam_search", UNSUPPORTED),
        ({"an_unknown_field": 1}, "an_unknown_field", UNSUPPORTED),
        ({"continue_final_message": True}, "continue_final_message", INVALID),
        ({"stream_options": "yes"}, "stream_options", INVALID),
    ],
    "completions": [
        ({"prompt": None}, "prompt", INVALID),
        ({"prompt": ""}, "prompt", INVALID),
        ({"prompt": []}, "prompt", INVALID),
        ({"prompt": [10**7]}, "prompt", INVALID),
        ({"prompt": [-1]}, "prompt[0]", INVALID),
        ({"prompt": LONG}, "messages", "context_length_exceeded"),
        ({"echo": True}, "echo", UNSUPPORTED),
        ({"best_of": 3}, "best_of", UNSUPPORTED),
        ({"suffix": "x"}, "suffix", UNSUPPORTED),
        ({"logprobs": 21}, "logprobs", INVALID),
        ({"prompt": ["a"] * 9, "n": 2}, "n", INVALID),
    ],
    "responses": [
        ({"input": None}, "input", INVALID),
        ({"input": []}, "input", INVALID),
        ({"input": [said("user", LONG)]}, "messages", "context_length_exceeded"),
        ({"conversation": "c"}, "conversation", UNSUPPORTED),
        ({"background": True}, "background", UNSUPPORTED),
        ({"prompt": {"id": "p"}}, "prompt", UNSUPPORTED),
        ({"max_output_tokens": 0}, "max_output_tokens", INVALID),
        ({"text": {"verbosity": "low"}}, "text.verbosity", UNSUPPORTED),
        ({"text": flat_form({"type": "integer", "multipleOf": 5}, strict=True)}, "text.format", UNSUPPORTED),
        ({"tools": [flat()], "tool_choice": {"type": "function", "name": "nothing"}}, "tool_choice", INVALID),
        ({"tools": [flat()], "tool_choice": {"type": "web_search"}}, "tool_choice", UNSUPPORTED),
        ({"tool_choice": "required"}, "tools", INVALID),
        ({"top_logprobs": 21}, "top_logprobs", INVALID),
        ({"an_unknown_field": 1}, "an_unknown_field", UNSUPPORTED),
    ],
    "messages": [
        ({"messages": []}, "messages", INVALID),
        ({"messages": [said("nobody", "a")]}, "messages[0].role", UNSUPPORTED),
        ({"messages": [said("user", 5)]}, "messages[0].content", INVALID),
        ({"messages": [said("user", [{"type": "document"}])]}, "document", UNSUPPORTED),
        ({"messages": [said("user", LONG)]}, "prompt is too long", "context_length_exceeded"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search", UNSUPPORTED),
        ({"tools": [anthropic()], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice", INVALID),
        ({"tool_choice": {"type": "any"}}, "tools", INVALID),
        ({"tools": [anthropic()], "tool_choice": {"type": "some"}}, "tool_choice.type", UNSUPPORTED),
        ({"max_tokens": 0}, "max_tokens", INVALID),
        ({"max_tokens": "5"}, "max_tokens", INVALID),
        ({"stop_sequences": "x"}, "stop_sequences", INVALID),
        ({"mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}]}, "mcp_servers", INVALID),
        ({"container": "c"}, "container", UNSUPPORTED),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management", UNSUPPORTED),
        ({"thinking": {"type": "much"}}, "thinking.type", UNSUPPORTED),
        ({"output_config": {"effort": "most"}}, "output_config.effort", UNSUPPORTED),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema", INVALID),
        ({"an_unknown_field": 1}, "an_unknown_field", UNSUPPORTED),
    ],
}

NULLS = {
    "chat/completions": "model n max_tokens max_completion_tokens temperature top_p frequency_penalty presence_penalty "
    "logit_bias seed stop stream_options tools tool_choice parallel_tool_calls functions function_call "
    "response_format logprobs top_logprobs reasoning_effort modalities audio prediction metadata store "
    "user service_tier verbosity web_search_options safety_identifier prompt_cache_key "
    "prompt_cache_retention stream",
    "completions": "model best_of echo suffix n logprobs stop seed user temperature top_p stream_options logit_bias",
    "responses": "model tools tool_choice parallel_tool_calls text include reasoning temperature top_p "
    "max_output_tokens max_tool_calls metadata store truncation user service_tier previous_response_id "
    "conversation prompt background prompt_cache_key safety_identifier top_logprobs stream_options "
    "context_management",
    "messages": "model tools tool_choice thinking metadata temperature top_p top_k stop_sequences service_tier "
    "container mcp_servers output_config output_format cache_control context_management inference_geo "
    "stream",
}
"""The fields of each format: a null means that the field is absent."""

BASE: Mapping[str, dict[str, Any]] = {
    "chat/completions": {"model": "policy", "messages": CHAT},
    "completions": {"model": "policy", "prompt": "The answer is", "max_tokens": 8},
    "responses": {"model": "policy", "input": QUESTION, "instructions": SYSTEM},
    "messages": {"model": "policy", "messages": [USER], "system": SYSTEM, "max_tokens": 60},
}
_JSON = {"content-type": "application/json"}


def _rows() -> Iterator[Row]:
    for path, rows in TAKEN.items():
        for name, (fields, expected) in rows.items():
            yield Row(name=f"{path}: {name}", path=path, body={**BASE[path], **fields}, **expected)
        for name in NULLS[path].split():
            yield Row(name=f"{path}: {name} is null", path=path, body={**BASE[path], name: None}, like="plain")
        raw = json.dumps(BASE[path]).encode()
        packed = {**_JSON, "content-encoding": "gzip"}
        yield Row(name=f"{path}: gzip", path=path, body=gzip.compress(raw), headers=packed, like="plain")
        yield Row(name=f"{path}: a slash at the end", path=path, body=raw, headers={"x-path": "/"}, like="plain")
        yield Row(name=f"{path}: not JSON", path=path, body=b'{"model": ', status=400, param="JSON", code=INVALID)
        yield Row(name=f"{path}: a list", path=path, body=b"[1]", status=400, param="JSON object", code=INVALID)
        half = raw.replace(b'"policy"', rb'"\ud800"')
        yield Row(name=f"{path}: half a pair", path=path, body=half, status=400, param="model", code=INVALID)
        for number, (fields, param, code) in enumerate(REFUSED[path]):
            name = f"{path}: {number} {json.dumps(fields)[:60]}"
            yield Row(name=name, path=path, body={**BASE[path], **fields}, status=400, param=param, code=code)


ROWS: Mapping[str, Row] = {row.name: row for row in _rows()}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every field of a body."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inside for place in [(*path, key), *places(part, (*path, key))]]


def mutations(seed: int, num: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests of the table in each of which one field holds something else: the path, and the body."""
    rng = random.Random(seed)
    rows = [row for row in ROWS.values() if isinstance(row.body, dict) and LONG not in str(row.body)]
    values = (None, True, -1, 0, 7, 10**12, 0.5, "", "text", "{}", [], {}, [None], [{}], {"type": "text"}, ["a", 1])
    mutated = []
    for _ in range(num):
        row = rng.choice(rows)
        body: Any = copy.deepcopy(row.body)
        *path, last = rng.choice(places(body))
        place = body
        for key in path:
            place = place[key]
        place[last] = rng.choice(values)
        mutated.append((row.path, body | {"stream": rng.random() < 0.3}))
    return mutated


async def ask(root: str, http: httpx.AsyncClient, *, at_once: int = 24) -> Answers:
    """The answers to all rows; `root`: the base URL that ends in /v1."""
    limit = asyncio.Semaphore(at_once)

    async def answer(row: Row, stream: bool) -> tuple[int, Any, str]:
        body = row.body if isinstance(row.body, bytes) else json.dumps({"stream": stream, **row.body}).encode()
        url = f"{root}/{row.path}{row.headers.get('x-path', '')}"
        async with limit:
            reply = await http.post(url, content=body, headers={**_JSON, **row.headers})
        is_json = reply.headers.get("content-type", "").startswith("application/json")
        return reply.status_code, reply.json() if is_json else None, reply.text

    keys = [
        (row, stream)
        for row in ROWS.values()
        for stream in (False, True)
        if not (stream and isinstance(row.body, bytes))
    ]
    answers = await asyncio.gather(*(answer(row, stream) for row, stream in keys))
    return {(row.name, stream): found for (row, stream), found in zip(keys, answers, strict=True)}


@asynccontextmanager
async def toy_engine(max_len: int = 512) -> AsyncIterator[tuple[str, httpx.AsyncClient]]:
    """The base URL and a client of a gateway with the toy engine, whose context has `max_len` tokens."""
    buffer = Buffer(run_secret=b"secret", agent=AgentConfig(target="", max_calls=10**6))
    engine = ToyEngine(ToyLanguage(("no", "yes")), max_len=max_len)
    gateway = Gateway(
        engine=engine, recorder=buffer, config=GatewayConfig(model="policy", run_secret=b"secret", sampling=SAMPLING)
    )
    await buffer.admit(Task(task_id="t", payload={}), split="val", num_rollouts=1)
    ((key, secret),) = [(lease.key, lease.secret) for lease in await buffer.lease(1, 1.0)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(application(gateway))) as http:
        yield f"http://gateway/rollout/{key.rollout_id}/attempt/{key.attempt}/{secret}/agent/v1", http


async def ask_mutations(root: str, http: httpx.AsyncClient, *, seed: int, num: int) -> list[httpx.Response]:
    """The answers to mutations of the table."""
    limit = asyncio.Semaphore(16)

    async def answer(path: str, body: Mapping[str, Any]) -> httpx.Response:
        async with limit:
            return await http.post(f"{root}/{path}", json=body)

    return await asyncio.gather(*(answer(path, body) for path, body in mutations(seed, num)))


def check(row: Row, answers: Answers, *, toy: bool) -> None:
    """Compare the answers to a row, streamed and not, with what it expects."""
    unstreamed, streamed = answers[row.name, False], answers.get((row.name, True), answers[row.name, False])
    if row.status != 200:
        for status, body, _ in (unstreamed, streamed):
            check_refusal(row, status, body)
        assert streamed == unstreamed
        return
    for status, _, words in (unstreamed, streamed):
        assert status == 200, words
    replies = [read_reply(row.path, unstreamed[1])]
    replies += [read_stream(row.path, streamed[2])] if streamed[1] is None else []
    assert replies[0].choices == replies[-1].choices, "streamed and not"
    for reply in replies:
        check_reply(row, reply, toy=toy)
    if row.like:
        other = read_reply(row.path, answers[f"{row.path}: {row.like}", False][1])
        mine = replies[0]
        assert [choice.text for choice in mine.choices] == [choice.text for choice in other.choices]
        assert mine.tokens == other.tokens


def check_refusal(row: Row, status: int, body: Any) -> None:
    error = body["error"]
    assert (status, error["code"]) == (row.status, row.code), error
    assert not INSIDE.search(error["message"]), error
    if row.path == "messages":
        assert body["type"] == "error"
        assert set(error) == {"type", "message", "code", "details"}
        assert row.param in error["message"], error
    else:
        assert set(error) == {"type", "message", "code", "param"}
        assert row.param in ("JSON", "JSON object", error["param"]), error
        assert row.param in error["message"] or row.code == "context_length_exceeded", error


def check_reply(row: Row, reply: Reply, *, toy: bool) -> None:
    body = row.body if isinstance(row.body, dict) else {}
    assert len(reply.choices) == row.num
    assert reply.raw["model"] == (body.get("model") or "policy")
    for choice in reply.choices:
        assert not row.reason or choice.reason == row.reason, choice
        assert not row.call or {name for name, _ in choice.calls} == {row.call}, choice
        for _, arguments in choice.calls:
            json.loads(arguments)
        assert choice.calls or choice.reason not in ("tool_calls", "function_call")
        if row.keys is not None and not toy:
            value = json.loads(choice.text)
            assert isinstance(value, dict)
            assert set(value) >= set(row.keys)
    if row.path == "chat/completions":
        for choice in reply.raw["choices"]:
            assert bool(choice["logprobs"]) == bool(body.get("logprobs"))


def check_mutation(path: str, body: Mapping[str, Any], reply: httpx.Response) -> None:
    """An answer to a request of `mutations` is a reply, or a refusal in the words of its protocol."""
    assert reply.status_code in (200, 400), (body, reply.text)
    if reply.status_code == 200:
        assert "error" not in reply.text.replace('"error":null', ""), (body, reply.text)
        return
    error = reply.json()["error"]
    assert error["code"] in (INVALID, UNSUPPORTED, "previous_response_not_found"), (body, error)
    assert not INSIDE.search(error["message"]), (body, error)
    assert path == "messages" or error["param"], (body, error)
