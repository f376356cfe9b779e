"""A reply of any format as the contract looks at it: checked against the types of the official clients, and brought
into one form, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

_EVENTS = {
    "chat/completions": TypeAdapter(ChatCompletionChunk),
    "responses": TypeAdapter(ResponseStreamEvent),
    "messages": TypeAdapter(RawMessageStreamEvent),
}
_REPLIES = {"chat/completions": ChatCompletion, "completions": Completion, "responses": Response, "messages": Message}
_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "max_tokens": "length"}
"""Anthropic's reasons in OpenAI's words."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One choice of a reply."""

    text: str
    calls: tuple[tuple[str, str], ...] = ()
    """Name and arguments of each tool call."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an agent reads."""

    choices: tuple[Choice, ...]
    tokens: tuple[int | None, int | None]
    """Of the prompt and of the answer; None in a stream without usage."""
    raw: Mapping[str, Any]


def read_reply(path: str, raw: dict[str, Any]) -> Reply:
    """A reply in one piece. Raises ValidationError if it has not the form of its format."""
    _REPLIES[path].model_validate(raw)
    usage = raw["usage"] or {}  # a stream may have none
    if path in ("chat/completions", "completions"):
        choices = tuple(_choice(choice) for choice in raw["choices"])
        return Reply(choices=choices, tokens=(usage.get("prompt_tokens"), usage.get("completion_tokens")), raw=raw)
    if path == "messages":
        text = "".join(block["text"] for block in raw["content"] if block["type"] == "text")
        calls = [(b["name"], json.dumps(b["input"])) for b in raw["content"] if b["type"] == "tool_use"]
        reason = _REASONS[raw["stop_reason"]]
    else:
        parts = [part for item in raw["output"] if item["type"] == "message" for part in item["content"]]
        text = "".join(part["text"] for part in parts)
        calls = [(item["name"], item["arguments"]) for item in raw["output"] if item["type"] == "function_call"]
        reason = "length" if raw["status"] == "incomplete" else "tool_calls" if calls else "stop"
    choice = Choice(text=text, calls=tuple(calls), reason=reason)
    return Reply(choices=(choice,), tokens=(usage["input_tokens"], usage["output_tokens"]), raw=raw)


def _choice(choice: Mapping[str, Any]) -> Choice:
    message = choice.get("message") or {"content": choice["text"]}
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    functions += [message["function_call"]] if message.get("function_call") else []
    calls = tuple((function["name"], function["arguments"]) for function in functions)
    return Choice(text=message.get("content") or "", calls=calls, reason=choice["finish_reason"])


def read_stream(path: str, text: str) -> Reply:
    """A stream of server-sent events, put together as its client does. Raises ValidationError or AssertionError if it
    has not the form of its format."""
    events: list[dict[str, Any]] = []
    for block in text.strip().split("\n\n"):
        *names, data = block.split("\n")
        if data != "data: [DONE]":
            events.append(json.loads(data.removeprefix("data: ")))
            assert "error" not in events[-1], events[-1]
            if path in _EVENTS:  # chunks of completions have no type of their own
                _EVENTS[path].validate_python(events[-1])
            assert not names or names == [f"event: {events[-1]['type']}"]
    if path in ("chat/completions", "completions"):
        assert text.endswith("data: [DONE]\n\n")
        return read_reply(path, _joined(path, events))
    if path == "messages":
        return read_reply(path, _message(events))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    written = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    reply = read_reply(path, events[-1]["response"])
    assert written == reply.choices[0].text
    return reply


def _joined(path: str, events: list[dict[str, Any]]) -> dict[str, Any]:
    """The reply that the chunks of OpenAI's formats add up to."""
    choices: dict[int, dict[str, Any]] = {}
    usage: Any = None
    empty: dict[str, Any]
    for event in events:
        usage = event.get("usage") or usage
        for piece in event["choices"]:
            empty = {"index": piece["index"], "text": "", "message": {"role": "assistant", "content": None}}
            choice = choices.setdefault(piece["index"], empty | {"logprobs": None})
            assert "finish_reason" not in choice, "a chunk after the last one"
            choice["text"] += piece.get("text") or ""
            if piece["finish_reason"]:
                choice["finish_reason"] = piece["finish_reason"]
            if piece.get("logprobs"):
                logged = choice["logprobs"] = choice["logprobs"] or {}
                for name, entries in piece["logprobs"].items():
                    logged[name] = logged.get(name, []) + (entries or [])
            message, delta = choice["message"], piece.get("delta", {})
            if delta.get("content") is not None:
                message["content"] = (message["content"] or "") + delta["content"]
            if delta.get("function_call"):
                message["function_call"] = delta["function_call"]
            for part in delta.get("tool_calls") or ():
                calls = message.setdefault("tool_calls", [])
                if part["index"] == len(calls):
                    calls.append({"id": part["id"], "type": part["type"], "function": dict(part["function"])})
                else:
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    for choice in choices.values():
        choice.pop("message" if path == "completions" else "text")
    head = {name: events[0][name] for name in ("id", "model", "created")}
    kind = {"object": "text_completion" if path == "completions" else "chat.completion"}
    return {**head, **kind, "choices": [choices[index] for index in sorted(choices)], "usage": usage}


def _message(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that Anthropic's events add up to."""
    (first, *middle, delta, last) = events
    assert (first["type"], delta["type"], last["type"]) == ("message_start", "message_delta", "message_stop")
    blocks: list[dict[str, Any]] = []
    for event in middle:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append({**event["content_block"], "partial": ""})
            case "content_block_delta" if event["delta"]["type"] == "text_delta":
                blocks[event["index"]]["text"] += event["delta"]["text"]
            case "content_block_delta":
                blocks[event["index"]]["partial"] += event["delta"]["partial_json"]
    for block in blocks:
        if partial := block.pop("partial"):
            block["input"] = json.loads(partial)
    usage = {"usage": first["message"]["usage"] | delta["usage"]}
    return {**first["message"], "content": blocks, **delta["delta"], **usage}
