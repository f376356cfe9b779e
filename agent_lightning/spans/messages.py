"""Chat messages as the many instrumentors and frameworks write them -> OpenAI's form. Pure.

Understood, as JSON text or as plain values: OpenAI's chat messages, requests, replies and Responses items;
OpenTelemetry's messages with parts; Anthropic's blocks; Gemini's contents; LangChain's messages; the Vercel AI SDK's;
and text in the form "user: …". What is not understood as a whole gives None: half a conversation would be a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent_lightning.spans.forms import (
    NOT_UNDERSTOOD,
    ROLES,
    Message,
    UnknownFormError,
    as_mapping,
    joined,
    langchain,
    message_of,
    parsed,
    responses_item,
    text_of,
)

_SPOKEN = re.compile(r"^(system|user|human|assistant|ai|tool): ", re.MULTILINE)


def conversation(value: Any) -> tuple[list[Message], list[Any]] | None:
    """What was sent to a model: its messages, and the definitions of the tools offered among them.

    Example:

        conversation('{"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}')
        # ([{"role": "user", "content": "hi"}], [])
    """
    value = parsed(value)
    if isinstance(value, str):
        return (_spoken(value), []) if value.strip() else None
    try:
        tools: list[Any] = []
        messages = _ordered(list(_messages(value, tools)))
    except NOT_UNDERSTOOD:
        return None
    return (_named(messages), tools) if messages else None


def answer(value: Any, before: Sequence[Message] = ()) -> Message | None:
    """What a model replied, as one assistant message; `before` is the conversation that it answers.

    Of several choices the first counts, with the tool calls of further ones that are nothing else.

    Example:

        answer('[{"toolCallId": "c", "toolName": "add", "input": "{}"}]')["tool_calls"][0]["function"]["name"]  # "add"
    """
    value = parsed(value)
    if isinstance(value, str):
        return {"role": "assistant", "content": value} if value else None
    if isinstance(value, Mapping) and "role" not in value and "content" in value:
        inner = value["content"]
        value = inner if isinstance(inner, Mapping) else {**value, "role": "assistant"}
    try:
        found = [message for message in _messages(value, []) if message["role"] == "assistant"]
    except NOT_UNDERSTOOD:
        return None
    if not found or not any(found[0].get(name) for name in ("content", "tool_calls", "reasoning_content")):
        return None
    more = [c for message in found[1:] if not message.get("content") for c in message.get("tool_calls", ())]
    if more and found[0].get("tool_calls"):
        found[0]["tool_calls"] += more
    return _named([*before, found[0]])[-1]


def tool_result_of(value: Any) -> Message | None:
    """The tool message that `value` is, in any form; None where it is something else."""
    value = parsed(value)
    if not isinstance(value, Mapping):
        return None
    try:
        fields = langchain(value)
        return message_of(fields, []) if fields.get("role") == "tool" and "tool_call_id" in fields else None
    except NOT_UNDERSTOOD:
        return None


def _messages(value: Any, tools: list[Any]) -> Iterator[Message]:
    """Messages of any container; definitions of tools found on the way are put into `tools`."""
    if isinstance(value, list):
        yield from _of_list(value, tools)
    elif not isinstance(value, Mapping):
        raise UnknownFormError
    elif "choices" in value:
        choices = value["choices"] if isinstance(value["choices"], list) else []
        yield from _of_list(
            [as_mapping(choice).get("message") or as_mapping(choice).get("delta") for choice in choices[:1]], []
        )
    elif "generations" in value:
        first = value["generations"]
        while isinstance(first, list) and first:
            first = first[0]
        yield from _of_list(
            [as_mapping(first).get("message") or {"role": "assistant", "content": as_mapping(first)["text"]}], []
        )
    elif "contents" in value or "candidates" in value:
        yield from _gemini(value, tools)
    else:
        yield from _of_mapping(value, tools)


def _of_mapping(value: Mapping[str, Any], tools: list[Any]) -> Iterator[Message]:
    offered = value.get("tools")
    tools.extend(offered if isinstance(offered, list) else [])
    system = value.get("system") or value.get("instructions")
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


def _gemini(value: Mapping[str, Any], tools: list[Any]) -> Iterator[Message]:
    config = as_mapping(value.get("config"))
    for group in config.get("tools") or value.get("tools") or ():
        tools.extend(
            as_mapping(group).get("function_declarations") or as_mapping(group).get("functionDeclarations") or []
        )
    system = config.get("system_instruction") or value.get("system_instruction")
    if system:
        yield {"role": "system", "content": text_of(as_mapping(system).get("parts", system))}
    candidates = [as_mapping(one).get("content") for one in value.get("candidates") or ()]
    yield from _of_list(candidates[:1] or value.get("contents") or [], tools)


def _of_list(items: Sequence[Any], tools: list[Any]) -> Iterator[Message]:
    """Items of OpenAI's Responses that belong to one turn of the assistant become one message."""
    turn: Message | None = None
    while len(items) == 1 and isinstance(items[0], list):
        items = items[0]
    for item in items:
        item = parsed(item)
        if not isinstance(item, Mapping):
            raise UnknownFormError
        piece = responses_item(item)
        if piece is not None and piece["role"] == "assistant":
            turn = piece if turn is None else joined(turn, piece)
            continue
        if turn is not None:
            yield turn
            turn = None
        message = piece or message_of(langchain(item), tools)
        if message:
            yield message
    if turn is not None:
        yield turn


def _ordered(messages: list[Message]) -> list[Message]:
    """Parallel tool calls that are listed call, result, call, result -> one message with both calls, then the results.

    Only Koog lists them so, under the role "tool"; its messages have no `tool_call_id`.
    """
    result: list[Message] = []
    for message in messages:
        last = len(result) - 1
        while last >= 0 and result[last]["role"] == "tool" and not result[last].get("tool_call_id"):
            last -= 1
        parallel = last < len(result) - 1 and last >= 0 and bool(result[last].get("tool_calls"))
        if parallel and message.get("tool_calls") and not message.get("content"):
            result[last] = joined(result[last], message)
        else:
            result.append(message)
    return result


def _named(messages: Sequence[Message]) -> list[Message]:
    """Every tool call and tool message with an id: call_0, call_1, … in order, and the oldest open call of its name."""
    named: list[Message] = []
    waiting: list[tuple[str, str]] = []
    count = 0
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            calls.append({**call, "id": call["id"] or f"call_{count}"})
            waiting.append((calls[-1]["id"], call["function"]["name"]))
            count += 1
        message = {**message, "tool_calls": calls} if calls else dict(message)
        if message["role"] == "tool":
            name, known = message.pop("name", ""), [one for one in waiting if one[0] == message.get("tool_call_id")]
            found = known or [one for one in waiting if one[1] == name] or waiting
            message["tool_call_id"] = message.get("tool_call_id") or (found[0][0] if found else f"call_{count}")
            if found and found[0][0] == message["tool_call_id"]:
                waiting.remove(found[0])
        named.append({"role": message.pop("role"), "content": message.pop("content", None), **message})
    return named


def _spoken(text: str) -> list[Message]:
    """Text in the form "system: … user: …", or else one message of the user."""
    starts = list(_SPOKEN.finditer(text))
    if not starts or starts[0].start() != 0:
        return [{"role": "user", "content": text}]
    ends = [*(start.start() for start in starts[1:]), len(text)]
    pieces = [(start[1], text[start.end() : end].strip()) for start, end in zip(starts, ends, strict=True)]
    return _named([{"role": ROLES[role], "content": content} for role, content in pieces])
