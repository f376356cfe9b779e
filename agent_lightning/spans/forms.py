"""One chat message, and what stands in it, in any form -> OpenAI's form. Pure."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""In OpenAI's form: role, content, tool_calls, tool_call_id; and reasoning_content where there is any."""

ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "function": "tool", "developer": "system"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
_KEPT_PARTS = ("image_url", "input_audio", "file", "image", "video_url", "audio_url")


class UnknownFormError(Exception):
    """A form of message that is not understood."""


NOT_UNDERSTOOD = (UnknownFormError, LookupError, TypeError, AttributeError, ValueError)
"""What reading a value raises that is built otherwise than every form we know: it comes from anybody's JSON."""
_MAX_DEPTH = 64


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


def _unpacked(value: Mapping[str, Any]) -> Any:
    """What a tool's wrapper holds: a tool message's content, MCP's content blocks, Gemini's response."""
    fields = langchain(value)
    if fields.get("role") == "tool" and "content" in fields:
        return fields["content"]
    if set(value) <= {"content", "isError", "meta", "structuredContent"} and isinstance(value.get("content"), list):
        return value["content"]
    return value


def _is_text(part: Any) -> bool:
    if not isinstance(part, Mapping) or not isinstance(part.get("text", part.get("content")), str):
        return False
    return part.get("type", "text") in ("text", "input_text", "output_text", "summary_text", "refusal")


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


def message_of(item: Mapping[str, Any], tools: list[Any]) -> Message | None:
    """One message; None where it is the definition of a tool, which goes into `tools`."""
    if "toolName" in item or item.get("type") in ("tool_call", "tool-call", "tool_use", "function"):
        return {"role": "assistant", "content": None, "tool_calls": [_tool_call(item)]}
    name, content = item.get("role"), item.get("content", item.get("contents"))
    if not isinstance(name, str) or not name:
        raise UnknownFormError
    # LangChain's callback for JavaScript puts the tool's name where the role belongs.
    role = ROLES.get(name, "tool")
    if name not in ROLES and not isinstance(content, str):
        raise UnknownFormError
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
        extra = as_mapping(item.get("additional_kwargs"))
        given = extra.get("tool_calls") or item.get("tool_calls") or ()
        calls = [_tool_call(as_mapping(call)) for call in given] or message.get("tool_calls", [])
        thought = item.get("reasoning_content") or item.get("reasoning") or message.get("reasoning_content")
        if thought and isinstance(thought, str):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
    elif message["role"] == "tool":
        message.setdefault("tool_call_id", str(item.get("tool_call_id") or ""))
        label = item.get("name") or (name if name not in ROLES else None)
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
            raise UnknownFormError
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
            raise UnknownFormError
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
    function = as_mapping(call.get("function")) or call
    name = function.get("name") or call.get("toolName")
    if not isinstance(name, str):
        raise UnknownFormError
    arguments = next((function[k] for k in ("arguments", "args", "input", "parameters") if k in function), "{}")
    identity = call.get("call_id") or call.get("id") or call.get("toolCallId")
    return {"id": str(identity or ""), "type": "function", "function": {"name": name, "arguments": as_json(arguments)}}


def _calls_in_text(content: Any) -> list[Message]:
    """Koog writes tool calls as JSON in the text of a message."""
    value = parsed(content) if isinstance(content, str) and content.startswith("[{") else None
    calls = value if isinstance(value, list) else []
    named = [call for call in calls if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)]
    return [_tool_call(call) for call in named] if named and len(named) == len(calls) else []


def responses_item(item: Mapping[str, Any]) -> Message | None:
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
        return message_of(item, [])
    return None


def joined(first: Message, second: Message) -> Message:
    content = "".join(text for text in (first.get("content"), second.get("content")) if isinstance(text, str))
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    thought = first.get("reasoning_content", "") + second.get("reasoning_content", "")
    joined: Message = {"role": "assistant", "content": content or None}
    return joined | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})


def langchain(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """LangChain's message as a mapping with a role; anything else as it is."""
    if "lc" in item and isinstance(item.get("kwargs"), Mapping):
        name = str((item.get("id") or [""])[-1])
        role = name.removesuffix("Chunk").removesuffix("Message").lower()
        return langchain({**item["kwargs"], "type": role})
    if set(item) == {"type", "data"} and isinstance(item["data"], Mapping):  # message_to_dict
        return langchain({**item["data"], "type": item["type"]})
    if "role" in item or str(item.get("type")) not in ("human", "ai", "system", "tool", "AIMessageChunk"):
        return item
    return {**item, "role": {"AIMessageChunk": "ai"}.get(item["type"], item["type"])}


def as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
