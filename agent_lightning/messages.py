"""Chat messages as the many instrumentors and frameworks write them -> OpenAI's form. Pure.

Understood, as JSON text or as plain values: OpenAI's chat messages, requests, replies and Responses items;
OpenTelemetry's messages with parts; Anthropic's blocks; Gemini's contents; LangChain's messages; the Vercel AI SDK's;
and text in the form "user: …". What is not understood as a whole gives None: half a conversation would be a wrong one.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""In OpenAI's form: role, content, tool_calls, tool_call_id; and reasoning_content where there is any."""

_ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "function": "tool", "developer": "system"}
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
_SPOKEN = re.compile(r"^(system|user|human|assistant|ai|tool): ", re.MULTILINE)
_KEPT_PARTS = ("image_url", "input_audio", "file", "image", "video_url", "audio_url")


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
    except _NOT_UNDERSTOOD:
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
    except _NOT_UNDERSTOOD:
        return None
    if not found or not any(found[0].get(name) for name in ("content", "tool_calls", "reasoning_content")):
        return None
    more = [c for message in found[1:] if not message.get("content") for c in message.get("tool_calls", ())]
    if more and found[0].get("tool_calls"):
        found[0]["tool_calls"] += more
    return _named([*before, found[0]])[-1]


def parsed(value: Any) -> Any:
    """JSON text -> its value, also Python's notation of a dict or list; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return value if _is_deep(found) else found
    return value


def text_of(value: Any) -> str:
    """A tool's arguments or result as text: messages and blocks are unpacked, other values are JSON."""
    found = parsed(value)
    if isinstance(found, Mapping):
        found = _unpacked(found)
    if isinstance(found, list) and found and all(_is_text(part) for part in found):
        return "".join(str(part.get("text", part.get("content"))) for part in found)
    if isinstance(found, str):
        return found
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(found, default=str, ensure_ascii=False)


def tool_result_of(value: Any) -> Message | None:
    """The tool message that `value` is, in any form; None where it is something else."""
    value = parsed(value)
    if not isinstance(value, Mapping):
        return None
    try:
        fields = _langchain(value)
        return _message(fields, []) if fields.get("role") == "tool" and "tool_call_id" in fields else None
    except _NOT_UNDERSTOOD:
        return None


class _UnknownError(Exception):
    """A form of message that is not understood."""


_NOT_UNDERSTOOD = (_UnknownError, LookupError, TypeError, AttributeError, ValueError)
"""What reading a value raises that is built otherwise than every form we know: it comes from anybody's JSON."""
_MAX_DEPTH = 64


def _is_deep(value: Any) -> bool:
    """Whether a value is nested so deep that functions which call themselves would fail on it."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list | tuple)
        ]
        level = [one for items in inner for one in items]
        if not level:
            return False
    return True


def _messages(value: Any, tools: list[Any]) -> Iterator[Message]:
    """Messages of any container; definitions of tools found on the way are put into `tools`."""
    if isinstance(value, list):
        yield from _of_list(value, tools)
    elif not isinstance(value, Mapping):
        raise _UnknownError
    elif "choices" in value:
        choices = value["choices"] if isinstance(value["choices"], list) else []
        yield from _of_list(
            [_mapping(choice).get("message") or _mapping(choice).get("delta") for choice in choices[:1]], []
        )
    elif "generations" in value:
        first = value["generations"]
        while isinstance(first, list) and first:
            first = first[0]
        yield from _of_list(
            [_mapping(first).get("message") or {"role": "assistant", "content": _mapping(first)["text"]}], []
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
    config = _mapping(value.get("config"))
    for group in config.get("tools") or value.get("tools") or ():
        tools.extend(_mapping(group).get("function_declarations") or _mapping(group).get("functionDeclarations") or [])
    system = config.get("system_instruction") or value.get("system_instruction")
    if system:
        yield {"role": "system", "content": text_of(_mapping(system).get("parts", system))}
    candidates = [_mapping(one).get("content") for one in value.get("candidates") or ()]
    yield from _of_list(candidates[:1] or value.get("contents") or [], tools)


def _of_list(items: Sequence[Any], tools: list[Any]) -> Iterator[Message]:
    """Items of OpenAI's Responses that belong to one turn of the assistant become one message."""
    turn: Message | None = None
    while len(items) == 1 and isinstance(items[0], list):
        items = items[0]
    for item in items:
        item = parsed(item)
        if not isinstance(item, Mapping):
            raise _UnknownError
        piece = _responses_item(item)
        if piece is not None and piece["role"] == "assistant":
            turn = piece if turn is None else _joined(turn, piece)
            continue
        if turn is not None:
            yield turn
            turn = None
        message = piece or _message(_langchain(item), tools)
        if message:
            yield message
    if turn is not None:
        yield turn


def _responses_item(item: Mapping[str, Any]) -> Message | None:
    kind = item.get("type")
    if kind == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": [_tool_call(item)]}
    if kind == "function_call_output":
        content = text_of(item.get("output"))
        return {"role": "tool", "content": content, "tool_call_id": str(item.get("call_id") or "")}
    if kind == "reasoning" and "role" not in item:
        thought = text_of(item.get("summary") or item.get("content"))
        return {"role": "assistant", "content": None} | ({"reasoning_content": thought} if thought else {})
    if kind == "message" and item.get("role") == "assistant":
        return _message(item, [])
    return None


def _joined(first: Message, second: Message) -> Message:
    content = "".join(text for text in (first.get("content"), second.get("content")) if isinstance(text, str))
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    thought = first.get("reasoning_content", "") + second.get("reasoning_content", "")
    joined: Message = {"role": "assistant", "content": content or None}
    return joined | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})


def _langchain(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """LangChain's message as a mapping with a role; anything else as it is."""
    if "lc" in item and isinstance(item.get("kwargs"), Mapping):
        name = str((item.get("id") or [""])[-1])
        role = name.removesuffix("Chunk").removesuffix("Message").lower()
        return _langchain({**item["kwargs"], "type": role})
    if "role" in item or str(item.get("type")) not in ("human", "ai", "system", "tool", "AIMessageChunk"):
        return item
    return {**item, "role": {"AIMessageChunk": "ai"}.get(item["type"], item["type"])}


def _message(item: Mapping[str, Any], tools: list[Any]) -> Message | None:
    """One message; None where it is the definition of a tool, which goes into `tools`."""
    if "toolName" in item or item.get("type") in ("tool_call", "tool-call", "tool_use", "function"):
        return {"role": "assistant", "content": None, "tool_calls": [_tool_call(item)]}
    name, content = item.get("role"), item.get("content", item.get("contents"))
    if not isinstance(name, str) or not name:
        raise _UnknownError
    # LangChain's callback for JavaScript puts the tool's name where the role belongs.
    role = _ROLES.get(name, "tool")
    if name not in _ROLES and not isinstance(content, str):
        raise _UnknownError
    if role == "tool" and isinstance(content, Mapping) and content.get("type") == "function":
        tools.append(content)
        return None
    calls = _calls_in_text(content) if role in ("tool", "assistant") else []
    if calls:
        return {"role": "assistant", "content": None, "tool_calls": calls}
    message: Message = {"role": role, "content": content if isinstance(content, str) else None}
    blocks = item.get("parts") if content is None else content
    if isinstance(blocks, list):
        message = _of_parts(role, blocks)
    elif content is not None and not isinstance(content, str):
        message["content"] = text_of(content)
    return _with_tools(message, name, item)


def _with_tools(message: Message, name: str, item: Mapping[str, Any]) -> Message:
    if message["role"] == "assistant":
        extra = _mapping(item.get("additional_kwargs"))
        given = extra.get("tool_calls") or item.get("tool_calls") or ()
        calls = [_tool_call(_mapping(call)) for call in given] or message.get("tool_calls", [])
        thought = item.get("reasoning_content") or item.get("reasoning") or message.get("reasoning_content")
        if thought and isinstance(thought, str):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
    elif message["role"] == "tool":
        message.setdefault("tool_call_id", str(item.get("tool_call_id") or ""))
        label = item.get("name") or (name if name not in _ROLES else None)
        message |= {"name": str(label)} if label else {}
        message["content"] = message["content"] or ""
    return message


def _of_parts(role: str, parts: Sequence[Any]) -> Message:
    """A message of parts: texts are joined, tool calls and results go where OpenAI has them."""
    texts: list[str] = []
    kept: list[Any] = []
    message: Message = {"role": role}
    for part in map(parsed, parts):
        if isinstance(part, str) or _is_text(part):
            texts.append(part if isinstance(part, str) else str(part.get("text", part.get("content"))))
            kept.append({"type": "text", "text": texts[-1]})
            continue
        if not isinstance(part, Mapping):
            raise _UnknownError
        kind, call, result = part.get("type"), _call_part(part), _result_part(part)
        if call is not None:
            message.setdefault("tool_calls", []).append(_tool_call(call))
        elif result is not None:
            message |= {"role": "tool", **result}
        elif kind in ("thinking", "reasoning"):
            thought = text_of(part.get("thinking") or part.get("text") or part.get("content"))
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif kind in _KEPT_PARTS:
            kept.append(dict(part))
        elif kind != "redacted_thinking":
            raise _UnknownError
    joined: Any = "".join(texts) or None
    return {"content": kept if len(kept) > len(texts) else joined} | message


def _call_part(part: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if part.get("type") in ("tool_call", "tool-call", "tool_use"):
        return part
    call = part.get("function_call") or part.get("functionCall")
    return call if isinstance(call, Mapping) else None


def _result_part(part: Mapping[str, Any]) -> Message | None:
    answered = part.get("function_response") or part.get("functionResponse")
    if isinstance(answered, Mapping):
        result = {"content": text_of(answered.get("response")), "name": str(answered.get("name") or "")}
        return result | {"tool_call_id": str(answered.get("id") or "")}
    if part.get("type") not in ("tool_call_response", "tool-result", "tool_result"):
        return None
    value = next((part[name] for name in ("response", "result", "output", "content") if name in part), None)
    if isinstance(value, Mapping) and set(value) == {"type", "value"}:
        value = value["value"]
    identity = part.get("id") or part.get("toolCallId") or part.get("tool_use_id")
    return {"content": text_of(value), "tool_call_id": str(identity or "")}


def _tool_call(call: Mapping[str, Any]) -> Message:
    """A tool call in OpenAI's form; its id is "" where it has none."""
    function = _mapping(call.get("function")) or call
    name = function.get("name") or call.get("toolName")
    if not isinstance(name, str):
        raise _UnknownError
    arguments = next((function[k] for k in ("arguments", "args", "input", "parameters") if k in function), "{}")
    identity = call.get("call_id") or call.get("id") or call.get("toolCallId")
    return {"id": str(identity or ""), "type": "function", "function": {"name": name, "arguments": as_json(arguments)}}


def as_json(arguments: Any) -> str:
    """Arguments as the model wrote them, where that is text; otherwise, and from Python's notation, as JSON."""
    if isinstance(arguments, str):
        value = parsed(arguments)
        if isinstance(value, str) or _is_json(arguments):
            return arguments
        arguments = value
    return json.dumps(arguments or {}, default=str, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _calls_in_text(content: Any) -> list[Message]:
    """Koog writes tool calls as JSON in the text of a message."""
    value = parsed(content) if isinstance(content, str) and content.startswith("[{") else None
    calls = value if isinstance(value, list) else []
    named = [call for call in calls if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)]
    return [_tool_call(call) for call in named] if named and len(named) == len(calls) else []


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
            result[last] = _joined(result[last], message)
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
    return _named([{"role": _ROLES[role], "content": content} for role, content in pieces])


def _unpacked(value: Mapping[str, Any]) -> Any:
    """What a tool's wrapper holds: a tool message's content, MCP's content blocks, Gemini's response."""
    fields = _langchain(value)
    if fields.get("role") == "tool" and "content" in fields:
        return fields["content"]
    if set(value) <= {"content", "isError", "meta", "structuredContent"} and isinstance(value.get("content"), list):
        return value["content"]
    return value


def _is_text(part: Any) -> bool:
    if not isinstance(part, Mapping) or not isinstance(part.get("text", part.get("content")), str):
        return False
    return part.get("type", "text") in ("text", "input_text", "output_text", "summary_text", "refusal")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
