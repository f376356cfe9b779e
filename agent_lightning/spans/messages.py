"""Conversations, from the forms of many instrumentors and frameworks into OpenAI's form.

These forms are read, as JSON text or as plain values: OpenAI's chat messages, requests, replies and Responses items;
OpenTelemetry's messages with parts; Anthropic's blocks; Gemini's contents; LangChain's messages; the Vercel AI SDK's
messages; and text in the form "user: …". If a part of a conversation is not understood, the result is None: half of a
conversation would be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent_lightning.core.json_values import as_mapping
from agent_lightning.spans import message_forms as forms
from agent_lightning.spans.message_forms import Message, parse_value, read_message

_ROLE = re.compile(r"^(system|user|human|assistant|ai|tool): ", re.MULTILINE)


def read_request(value: Any) -> tuple[list[Message], list[Any]] | None:
    """The messages of a request to a model, and the definitions of the tools among them; None if not understood.

    Example: read_request('{"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}')
    -> ([{"role": "user", "content": "hi"}], [])
    """
    value = parse_value(value)
    if isinstance(value, str):
        return (_split_roles(value), []) if value.strip() else None
    try:
        tools: list[Any] = []
        messages = _ordered(list(_messages(value, tools)))
    except forms.NOT_UNDERSTOOD:
        return None
    return (_with_call_ids(messages), tools) if messages else None


def read_reply(value: Any, before: Sequence[Message] = ()) -> Message | None:
    """A model's reply as one assistant message; `before` is the conversation before it. None if not understood.

    If there are several choices, the first counts; further choices that consist of tool calls are added to it.

    Example: read_reply('{"candidates": [{"content": {"role": "model", "parts": [{"text": "hi"}]}}]}')
    -> {"role": "assistant", "content": "hi"}
    """
    value = parse_value(value)
    if isinstance(value, str):
        return {"role": "assistant", "content": value} if value else None
    if isinstance(value, Mapping) and "role" not in value and "content" in value:
        inner = value["content"]
        value = inner if isinstance(inner, Mapping) else {**value, "role": "assistant"}
    try:
        replies = [message for message in _messages(value, []) if message["role"] == "assistant"]
    except forms.NOT_UNDERSTOOD:
        return None
    if not replies or not any(replies[0].get(name) for name in ("content", "tool_calls", "reasoning_content")):
        return None
    more = [c for message in replies[1:] if not message.get("content") for c in message.get("tool_calls", ())]
    if more and replies[0].get("tool_calls"):
        replies[0]["tool_calls"] += more
    return _with_call_ids([*before, replies[0]])[-1]


def read_tool_result(value: Any) -> Message | None:
    """The value as a tool message in OpenAI's form; None if it is not a tool message in any form."""
    value = parse_value(value)
    if not isinstance(value, Mapping):
        return None
    try:
        fields = forms.unwrap_langchain(value)
        return read_message(fields, []) if fields.get("role") == "tool" and "tool_call_id" in fields else None
    except forms.NOT_UNDERSTOOD:
        return None


def _messages(value: Any, tools: list[Any]) -> Iterator[Message]:
    """The messages in a container of any form; definitions of tools in it are added to `tools`."""
    if isinstance(value, list):
        yield from _of_list(value, tools)
    elif not isinstance(value, Mapping):
        raise forms.UnknownFormError
    elif "choices" in value:
        choices = map(as_mapping, value["choices"][:1] if isinstance(value["choices"], list) else ())
        yield from _of_list([choice.get("message") or choice.get("delta") for choice in choices], [])
    elif "generations" in value:
        first = value["generations"]
        while isinstance(first, list) and first:
            first = first[0]
        first = as_mapping(first)
        yield from _of_list([first.get("message") or {"role": "assistant", "content": first["text"]}], [])
    elif "contents" in value or "candidates" in value:  # Gemini
        config = as_mapping(value.get("config"))
        for group in map(as_mapping, config.get("tools") or value.get("tools") or ()):
            tools.extend(group.get("function_declarations") or group.get("functionDeclarations") or [])
        system = config.get("system_instruction") or value.get("system_instruction")
        if system:
            yield {"role": "system", "content": forms.to_text(as_mapping(system).get("parts", system))}
        candidates = [as_mapping(candidate).get("content") for candidate in value.get("candidates") or ()]
        yield from _of_list(candidates[:1] or value.get("contents") or [], tools)
    else:
        offered, system = value.get("tools"), value.get("system") or value.get("instructions")
        tools.extend(offered if isinstance(offered, list) else [])
        inner = next((value[name] for name in ("messages", "prompt", "input", "output") if value.get(name)), None)
        if inner is None or "role" in value:
            yield from _of_list([value], tools)
            return
        if system and isinstance(system, str):
            yield {"role": "system", "content": system}
        if isinstance(inner, str):
            yield {"role": "assistant" if "output" in value and "input" not in value else "user", "content": inner}
        else:
            yield from _messages(inner, tools)


def _of_list(items: Sequence[Any], tools: list[Any]) -> Iterator[Message]:
    """The messages of a list; items of OpenAI's Responses that belong to one turn of the assistant are joined."""
    turn: Message | None = None
    while len(items) == 1 and isinstance(items[0], list):
        items = items[0]
    for item in items:
        item = parse_value(item)
        if not isinstance(item, Mapping):
            raise forms.UnknownFormError
        piece = forms.responses_item(item)
        if piece is not None and piece["role"] == "assistant":
            turn = piece if turn is None else forms.join_messages(turn, piece)
            continue
        if turn is not None:
            yield turn
            turn = None
        message = piece or read_message(forms.unwrap_langchain(item), tools)
        if message:
            yield message
    if turn is not None:
        yield turn


def _ordered(messages: list[Message]) -> list[Message]:
    """Messages in which parallel tool calls listed as call, result, call, result are one message, then the results.
    Only Koog lists tool calls so, with the role "tool"; its messages have no `tool_call_id`."""
    result: list[Message] = []
    for message in messages:
        last = len(result) - 1
        while last >= 0 and result[last]["role"] == "tool" and not result[last].get("tool_call_id"):
            last -= 1
        parallel = last < len(result) - 1 and last >= 0 and bool(result[last].get("tool_calls"))
        if parallel and message.get("tool_calls") and not message.get("content"):
            result[last] = forms.join_messages(result[last], message)
        else:
            result.append(message)
    return result


def _with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with an id for every tool call and tool message. Tool calls without an id get call_0, call_1, … in
    order. A tool message without an id gets that of the oldest unanswered call of the tool that it names, or else of
    any tool."""
    result: list[Message] = []
    waiting: list[tuple[str, str]] = []  # ids and tool names of calls without a tool message so far
    count = 0
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            calls.append({**call, "id": call["id"] or f"call_{count}"})
            waiting.append((calls[-1]["id"], call["function"]["name"]))
            count += 1
        message = {**message, "tool_calls": calls} if calls else dict(message)
        if message["role"] == "tool":
            name, same_id = message.pop("name", ""), [w for w in waiting if w[0] == message.get("tool_call_id")]
            candidates = same_id or [w for w in waiting if w[1] == name] or waiting
            oldest = candidates[0][0] if candidates else f"call_{count}"
            message["tool_call_id"] = message.get("tool_call_id") or oldest
            if candidates and oldest == message["tool_call_id"]:
                waiting.remove(candidates[0])
        result.append({"role": message.pop("role"), "content": message.pop("content", None), **message})
    return result


def _split_roles(text: str) -> list[Message]:
    """The messages of a text in the form "system: … user: …", or else a single message of the user."""
    starts = list(_ROLE.finditer(text))
    if not starts or starts[0].start() != 0:
        return [{"role": "user", "content": text}]
    ends = [*(start.start() for start in starts[1:]), len(text)]
    pieces = [(start[1], text[start.end() : end].strip()) for start, end in zip(starts, ends, strict=True)]
    return _with_call_ids([{"role": forms.ROLES[role], "content": content} for role, content in pieces])
