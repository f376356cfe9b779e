"""A single chat message, and the values in it, from any form into OpenAI's form."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from agent_lightning.core.json_values import as_mapping, is_deeper, parse_json

Message = dict[str, Any]
"""A message in OpenAI's form: role, content, tool_calls, tool_call_id, and reasoning_content if the model reasoned."""

ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "function": "tool", "developer": "system"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
_CALL_TYPES = ("tool_call", "tool-call", "tool_use")
_KEPT_PARTS = ("image_url", "input_audio", "file", "image", "video_url", "audio_url")


class UnknownFormError(Exception):
    """A message is in a form that this module does not know."""


NOT_UNDERSTOOD = (UnknownFormError, LookupError, TypeError, AttributeError, ValueError)
"""Errors that reading a value of unknown form raises: it may be any JSON."""
_MAX_DEPTH = 64
"""Deepest nesting of a value that is parsed: deeper values would exhaust the stack of recursive functions."""


def parse_value(value: Any) -> Any:
    """The value of a text that is JSON, or a dict or list in Python's notation; any other value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            content = parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return value if is_deeper(content, _MAX_DEPTH) else content
    return value


def to_text(value: Any) -> str:
    """A tool's arguments or result as text: messages and content blocks are unpacked, other values become JSON."""
    content = parse_value(value)
    if isinstance(content, Mapping):
        fields, block_names = unwrap_langchain(content), {"content", "isError", "meta", "structuredContent"}
        if fields.get("role") == "tool" and "content" in fields:
            content = fields["content"]
        elif content.keys() <= block_names and isinstance(content.get("content"), list):  # MCP's content blocks
            content = content["content"]
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        return "".join(str(part.get("text", part.get("content"))) for part in content)
    if isinstance(content, str):
        return content
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(content, default=str, ensure_ascii=False)


def _is_text(part: Any) -> bool:
    """Whether a part of a message is text."""
    if not isinstance(part, Mapping) or not isinstance(part.get("text", part.get("content")), str):
        return False
    return part.get("type", "text") in ("text", "input_text", "output_text", "summary_text", "refusal")


def arguments_as_json(arguments: Any) -> str:
    """Arguments as JSON text. Text of the model stays as it is, unless it is in Python's notation."""
    value = parse_value(arguments)
    if isinstance(arguments, str) and (isinstance(value, str) or parse_json(arguments) is not None):
        return arguments
    return json.dumps(value or {}, default=str, ensure_ascii=False)


def read_message(item: Mapping[str, Any], tools: list[Any]) -> Message | None:
    """A message in OpenAI's form; None if the item is the definition of a tool, which is added to `tools`."""
    if "toolName" in item or item.get("type") in (*_CALL_TYPES, "function"):
        return {"role": "assistant", "content": None, "tool_calls": [_tool_call(item)]}
    name, content = item.get("role"), item.get("content", item.get("contents"))
    if not isinstance(name, str) or not name:
        raise UnknownFormError
    # LangChain's callback for JavaScript writes the tool's name in place of the role.
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
        message["content"] = to_text(content)
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
    """A message from its parts: texts are joined, tool calls and results are put into OpenAI's fields."""
    texts: list[str] = []
    kept: list[Any] = []
    message: Message = {"role": role}
    for part in map(parse_value, parts):
        if isinstance(part, str) or _is_text(part):
            texts.append(part if isinstance(part, str) else str(part.get("text", part.get("content"))))
            kept.append({"type": "text", "text": texts[-1]})
            continue
        if not isinstance(part, Mapping):
            raise UnknownFormError
        kind, result = part.get("type"), _result_part(part)
        call = part if kind in _CALL_TYPES else part.get("function_call") or part.get("functionCall")
        if isinstance(call, Mapping):
            message.setdefault("tool_calls", []).append(_tool_call(call))
        elif result is not None:
            message |= {"role": "tool", **result}
        elif kind in ("thinking", "reasoning"):
            thought = to_text(part.get("thinking") or part.get("text") or part.get("content"))
            message["reasoning_content"] = message.get("reasoning_content", "") + thought
        elif kind in _KEPT_PARTS:
            kept.append(dict(part))
        elif kind != "redacted_thinking":
            raise UnknownFormError
    joined: Any = "".join(texts) or None
    return {"content": kept if len(kept) > len(texts) else joined} | message


def _result_part(part: Mapping[str, Any]) -> Message | None:
    """The fields of a tool message in a part; None if the part is something else."""
    response = part.get("function_response") or part.get("functionResponse")
    if isinstance(response, Mapping):
        result = {"content": to_text(response.get("response")), "name": str(response.get("name") or "")}
        return result | {"tool_call_id": str(response.get("id") or "")}
    if part.get("type") not in ("tool_call_response", "tool-result", "tool_result"):
        return None
    value = next((part[name] for name in ("response", "result", "output", "content") if name in part), None)
    if isinstance(value, Mapping) and set(value) == {"type", "value"}:
        value = value["value"]
    identity = part.get("id") or part.get("toolCallId") or part.get("tool_use_id")
    return {"content": to_text(value), "tool_call_id": str(identity or "")}


def _tool_call(call: Mapping[str, Any]) -> Message:
    """A tool call in OpenAI's form; its id is "" if it has none."""
    function = as_mapping(call.get("function")) or call
    name = function.get("name") or call.get("toolName")
    if not isinstance(name, str):
        raise UnknownFormError
    arguments = next((function[k] for k in ("arguments", "args", "input", "parameters") if k in function), "{}")
    identity = call.get("call_id") or call.get("id") or call.get("toolCallId")
    plain = {"name": name, "arguments": arguments_as_json(arguments)}
    return {"id": str(identity or ""), "type": "function", "function": plain}


def _calls_in_text(content: Any) -> list[Message]:
    """The tool calls that Koog writes as JSON into the text of a message."""
    value = parse_value(content) if isinstance(content, str) and content.startswith("[{") else None
    calls = value if isinstance(value, list) else []
    named = [call for call in calls if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)]
    return [_tool_call(call) for call in named] if named and len(named) == len(calls) else []


def responses_item(item: Mapping[str, Any]) -> Message | None:
    """The message of an item of OpenAI's Responses API; None if the item is something else."""
    kind = item.get("type")
    if kind == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": [_tool_call(item)]}
    if kind == "function_call_output":
        content = to_text(item.get("output"))
        return {"role": "tool", "content": content, "tool_call_id": str(item.get("call_id") or "")}
    if kind == "reasoning" and "role" not in item:
        thought = to_text(item.get("summary") or item.get("content"))
        return {"role": "assistant", "content": None} | ({"reasoning_content": thought} if thought else {})
    if kind == "message" and item.get("role") == "assistant":
        return read_message(item, [])
    return None


def join_messages(first: Message, second: Message) -> Message:
    """Two messages of the assistant as one."""
    content = "".join(text for text in (first.get("content"), second.get("content")) if isinstance(text, str))
    calls = [*first.get("tool_calls", ()), *second.get("tool_calls", ())]
    thought = first.get("reasoning_content", "") + second.get("reasoning_content", "")
    message: Message = {"role": "assistant", "content": content or None}
    return message | ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})


def unwrap_langchain(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """A LangChain message as a mapping with a role; any other item unchanged."""
    if "lc" in item and isinstance(item.get("kwargs"), Mapping):
        name = str((item.get("id") or [""])[-1])
        role = name.removesuffix("Chunk").removesuffix("Message").lower()
        return unwrap_langchain({**item["kwargs"], "type": role})
    if set(item) == {"type", "data"} and isinstance(item["data"], Mapping):  # message_to_dict
        return unwrap_langchain({**item["data"], "type": item["type"]})
    if "role" in item or str(item.get("type")) not in ("human", "ai", "system", "tool", "AIMessageChunk"):
        return item
    return {**item, "role": {"AIMessageChunk": "ai"}.get(item["type"], item["type"])}
