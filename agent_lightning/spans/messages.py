"""Conversations, from the forms of many instrumentors and frameworks into OpenAI's form.

These forms are read, as JSON text or as plain values: OpenAI's chat messages, requests, replies and Responses items;
OpenTelemetry's messages with parts; Anthropic's blocks; Gemini's contents; LangChain's messages; the Vercel AI SDK's
messages; Bedrock's; and text in the form "user: …". A part or a message that is not understood is noted and left out.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent_lightning.core.json_values import as_mapping
from agent_lightning.spans import message_forms as forms
from agent_lightning.spans.message_forms import Message, Notes, parse_value

_ROLE = re.compile(r"^(system|user|human|assistant|ai|tool): ", re.MULTILINE)


def read_request(value: Any, notes: Notes | None = None) -> tuple[list[Message], list[Any]] | None:
    """The messages of a request to a model, and the definitions of the tools among them; None if not understood.
    `notes` collects the types of the parts that are left out, or are not text.

    Example: read_request('{"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}')
    -> ([{"role": "user", "content": "hi"}], [])
    """
    value, notes = parse_value(value), notes or Notes()
    if isinstance(value, str):
        return (_split_roles(value), []) if value.strip() else None
    try:
        messages = _ordered(list(_messages(value, notes, "user")))
    except forms.NOT_UNDERSTOOD:
        return None
    return (_with_call_ids(messages), notes.tools) if messages else None


def read_reply(value: Any, before: Sequence[Message] = (), notes: Notes | None = None) -> Message | None:
    """A model's reply as one assistant message; `before` is the conversation before it. None if not understood.

    If there are several choices, the first counts; further choices that consist of tool calls are added to it. `notes`
    is as in `read_request`.

    Example: read_reply('{"candidates": [{"content": {"role": "model", "parts": [{"text": "hi"}]}}]}')
    -> {"role": "assistant", "content": "hi"}
    """
    value = parse_value(value)
    if isinstance(value, str):
        return {"role": "assistant", "content": value} if value else None
    if isinstance(value, Mapping) and "role" not in value:
        inner = next((value[name] for name in ("content", "combined_chunk_content") if value.get(name)), None)
        message = {**value, "content": inner, "role": "assistant"}
        value = inner if isinstance(inner, Mapping) else message if inner else value
    try:
        messages = _messages(value, notes or Notes(), "assistant")
        replies = [message for message in messages if message["role"] == "assistant"]
    except forms.NOT_UNDERSTOOD:
        return None
    if not replies or not any(replies[0].get(name) for name in ("content", "tool_calls", "reasoning_content")):
        return None
    more = [c for message in replies[1:] if not message.get("content") for c in message.get("tool_calls", ())]
    if more and replies[0].get("tool_calls"):
        replies[0]["tool_calls"] += more
    return _with_call_ids([*before, replies[0]])[-1]


def begins_midway(messages: Sequence[Message]) -> str:
    """The id of the first tool call that a tool message answers and no message before it has requested; "" if there is
    none. Then the messages before it are missing: the server has kept them, or the trace has lost them."""
    requested: set[str] = set()
    for message in messages:
        requested.update(str(as_mapping(call).get("id")) for call in message.get("tool_calls") or ())
        if message.get("role") == "tool" and str(message.get("tool_call_id")) not in requested:
            return str(message.get("tool_call_id"))
    return ""


def read_tool_result(value: Any) -> Message | None:
    """The value as a tool message in OpenAI's form; None if it is not a tool message in any form."""
    value = parse_value(value)
    if not isinstance(value, Mapping):
        return None
    try:
        fields = forms.unwrap_langchain(value)
        if fields.get("role") != "tool" or "tool_call_id" not in fields:
            return None
        return next(forms.read_messages(fields, Notes(), "tool"), None)
    except forms.NOT_UNDERSTOOD:
        return None


_CONTAINERS = {
    "user": ("messages", "prompt", "prompts", "input", "inputs", "message"),
    "assistant": ("output", "message", "messages", "outputs", "response"),
}
"""Keys under which a request, and a reply, has its messages."""


def _messages(value: Any, notes: Notes, role: str) -> Iterator[Message]:
    """The messages in a container of any form; `role` is that of messages without role."""
    if isinstance(value, list):
        yield from _of_list(value, notes, role)
    elif not isinstance(value, Mapping):
        raise forms.UnknownFormError
    elif "choices" in value:
        choices = map(as_mapping, value["choices"][:1] if isinstance(value["choices"], list) else ())
        # A choice of a chat, of its stream, or of a completion.
        inside = (as_mapping(c.get("message") or c.get("delta")) or {"content": c["text"]} for c in choices)
        yield from _of_list([{"role": role, **message} for message in inside], notes, role)
    elif "generations" in value:
        first = value["generations"]
        while isinstance(first, list) and first:
            first = first[0]
        first = as_mapping(first)
        yield from _of_list([first.get("message") or {"role": "assistant", "content": first["text"]}], notes, role)
    elif "contents" in value or "candidates" in value:  # Gemini
        yield from _of_gemini(value, notes, role)
    else:
        system, config = value.get("system") or value.get("instructions"), as_mapping(value.get("toolConfig"))
        offered = next((g for g in (value.get("tools"), value.get("functions"), config.get("tools")) if g), None)
        inner = next((value[name] for name in _CONTAINERS[role] if value.get(name)), None)
        if inner is None or "role" in value:
            yield from _of_list([value], notes, role)
            return
        notes.tools.extend(offered if isinstance(offered, list) else [])
        if system:
            yield {"role": "system", "content": forms.to_text(system)}
        inner = inner[0] if isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], str) else inner
        parsed = parse_value(inner)
        yield from [{"role": role, "content": inner}] if isinstance(parsed, str) else _messages(parsed, notes, role)


def _of_gemini(value: Mapping[str, Any], notes: Notes, role: str) -> Iterator[Message]:
    """The messages of a request to Gemini, or of its response."""
    config = as_mapping(value.get("config"))
    for group in map(as_mapping, config.get("tools") or value.get("tools") or ()):
        notes.tools.extend(group.get("function_declarations") or group.get("functionDeclarations") or [])
    names = ("system_instruction", "systemInstruction")
    system = next((at[name] for at in (config, value) for name in names if at.get(name)), None)
    if system:
        yield {"role": "system", "content": forms.to_text(as_mapping(system).get("parts", system))}
    candidates = [as_mapping(candidate).get("content") for candidate in value.get("candidates") or ()]
    contents = candidates[:1] or value.get("contents") or []
    for content in contents if isinstance(contents, list) else [contents]:
        plain = {"role": role, "content": content} if isinstance(content, str) else content
        without_role = isinstance(plain, Mapping) and plain.get("parts") and not plain.get("role")
        yield from _of_list([{**plain, "role": role} if without_role else plain], notes, role)


def _of_list(items: Sequence[Any], notes: Notes, role: str) -> Iterator[Message]:
    """The messages of a list; items of OpenAI's Responses that belong to one turn of the assistant are joined. An item
    that is not understood is noted, and left out."""
    turn: Message | None = None
    while len(items) == 1 and isinstance(items[0], list):
        items = items[0]
    for item in map(parse_value, items):
        try:
            fields = forms.unwrap_langchain(item)
            messages = list(forms.read_messages(fields, notes, role))
        except forms.NOT_UNDERSTOOD:
            notes.unread.append("message")
            continue
        is_piece = "role" not in fields or fields.get("type") == "message"
        for message in messages:
            if is_piece and message["role"] == "assistant":
                turn = message if turn is None else forms.join_messages(turn, message)
                continue
            if turn is not None:
                yield turn
                turn = None
            yield message
    if turn is not None:
        yield turn


def _ordered(messages: list[Message]) -> list[Message]:
    """Messages in which the tool calls of one turn are one message, then the results. OpenAI's Responses, as some trace
    them, have a message for each call; Koog lists call, result, call, result, without a `tool_call_id`."""
    result: list[Message] = []
    for message in messages:
        last = len(result) - 1
        while last >= 0 and result[last]["role"] == "tool" and not result[last].get("tool_call_id"):
            last -= 1
        is_turn = last >= 0 and bool(result[last].get("tool_calls"))
        if is_turn and message.get("tool_calls") and not message.get("content"):
            result[last] = forms.join_messages(result[last], message)
        else:
            result.append(message)
    return result


def _with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """The messages with an id for every tool call and tool message. Tool calls without an id get call_0, call_1, … in
    order. A tool message without an id gets that of the oldest unanswered call of the tool that it names, or else of
    any tool."""
    result: list[Message] = []
    waiting: dict[int, str] = {}  # number of a call without a tool message so far -> its id
    queues: defaultdict[tuple[str, str], deque[int]] = defaultdict(deque)  # what a tool message may say -> the calls

    def oldest(*key: str) -> int | None:
        queue = queues[key[0], key[1]]
        while queue and queue[0] not in waiting:
            queue.popleft()
        return queue[0] if queue else None

    count = 0
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            calls.append({**call, "id": call["id"] or f"call_{count}"})
            waiting[count] = calls[-1]["id"]
            for key in (("id", waiting[count]), ("name", call["function"]["name"]), ("any", "")):
                queues[key].append(count)
            count += 1
        message = {**message, "tool_calls": calls} if calls else dict(message)
        if message["role"] == "tool":
            keys = ("id", message.get("tool_call_id") or ""), ("name", message.pop("name", "")), ("any", "")
            match = next((number for key in keys if (number := oldest(*key)) is not None), -1)
            message["tool_call_id"] = message.get("tool_call_id") or waiting.get(match, f"call_{count}")
            if waiting.get(match) == message["tool_call_id"]:
                del waiting[match]
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
