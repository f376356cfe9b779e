"""A single chat message, and the values in it, from any form into OpenAI's form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent_lightning.core.json_values import as_mapping, is_deeper, parse_json

Message = dict[str, Any]
"""A message in OpenAI's form: role, content, tool_calls, tool_call_id, and reasoning_content if the model reasoned. A
tool message has the status "error" if its source states that the tool failed."""

ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "function": "tool", "developer": "system"}
ROLES |= {"chatbot": "assistant"} | {role: role for role in ("system", "user", "assistant", "tool")}
_CALLS = ("tool_call", "tool-call", "tool_use", "toolUse", "function_call", "functionCall", "custom_tool_call")
"""Types of a part that is a tool call, or the keys that hold one; so with the other parts."""
_RESULTS = (
    *("tool_call_response", "tool-result", "tool-error", "tool_result", "toolResult"),
    *("function_response", "functionResponse", "function_call_output", "custom_tool_call_output"),
)
_TEXTS = ("text", "input_text", "output_text", "summary_text", "refusal")
_THOUGHTS = ("thinking", "reasoning", "reasoningContent")
_WITHOUT_CONTENT = ("redacted_thinking", "cachePoint", "step-start")
_OPENAI_MEDIA = ("image_url", "input_audio", "file", "video_url", "audio_url")
_MEDIA = re.compile("image|audio|video|file|document|blob|uri|binary|inline_?data", re.IGNORECASE)


@dataclass(slots=True)
class Notes:
    """What a conversation holds beside its messages: definitions of tools, types of the parts that are not understood
    and left out, and types of the parts that are not text and kept, in OpenAI's form."""

    tools: list[Any] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    media: list[str] = field(default_factory=list)


class UnknownFormError(Exception):
    """A message is in a form that this module does not know."""


NOT_UNDERSTOOD = (UnknownFormError, LookupError, TypeError, AttributeError, ValueError)
"""Errors that reading a value of unknown form raises: it may be any JSON."""
_MAX_DEPTH = 64
"""Deepest nesting of a value that is parsed: deeper values would exhaust the stack of recursive functions."""
_PYTHON = re.compile(
    r"""'(?:[^'\\]++|\\.)*+'|"(?:[^"\\]++|\\.)*+"|\b(?:None|True|False)\b|,\s*+(?=[)\]}])|[()]""", re.DOTALL
)
"""The pieces of Python's notation that JSON writes otherwise. Python's own parser takes 5 microseconds and 500 bytes a
character: an agent could stop the process that reads its trace."""
_WORDS = {"None": "null", "True": "true", "False": "false", "(": "[", ")": "]"}
_ESCAPE = re.compile(r'\\(?:x([0-9a-fA-F]{2})|U(000[0-9a-fA-F]{5}|0010[0-9a-fA-F]{4})|.)|"', re.DOTALL)


def definitions(offered: Iterable[str]) -> list[Any]:
    """The definitions of `ModelCall.offered`. Runs before December 2026 have written names there, which define nothing.

    Example: definitions(['{"function": {"name": "add"}}', "add"]) -> [{"function": {"name": "add"}}]
    """
    return [tool for tool in map(parse_json, offered) if isinstance(tool, Mapping)]


def parse_value(value: Any) -> Any:
    """The value of a text that is JSON, or a dict or list in Python's notation; any other value unchanged. The time is
    linear in the length of the text.

    Example: parse_value("{'a': (1, None)}") -> {"a": [1, None]}
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    content = parse_json(value)
    if content is None:
        content = parse_json(_PYTHON.sub(_as_json, value))
    return value if content is None or is_deeper(content, _MAX_DEPTH) else content


def _as_json(piece: re.Match[str]) -> str:
    """A piece of Python's notation as JSON; a comma before a closing bracket is dropped."""
    text = piece[0]
    if text[0] not in "'\"":
        return _WORDS.get(text, "")

    def escape(match: re.Match[str]) -> str:
        code = match[1] or match[2]
        return json.dumps(chr(int(code, 16)))[1:-1] if code else {"\\'": "'", '"': '\\"'}.get(match[0], match[0])

    return f'"{_ESCAPE.sub(escape, text[1:-1])}"'


SHELL = {"input", "inputs", "input_str", "output", "kwargs", "tags", "metadata"}
"""Keys of what OpenLLMetry puts around a tool's arguments and result."""


def to_text(value: Any) -> str:
    """A tool's arguments or result as text: messages and content blocks are unpacked, other values become JSON."""
    content = parse_value(value)
    if isinstance(content, Mapping):
        fields, block_names = unwrap_langchain(content), {"content", "isError", "meta", "structuredContent"}
        if fields.get("role") == "tool" and "content" in fields:
            content = fields["content"]
        elif "output" in content and content.keys() <= SHELL:
            return to_text(content["output"])
        elif content.keys() <= block_names and isinstance(content.get("content"), list):  # MCP's content blocks
            content = content["content"]
    if isinstance(content, list) and content and all(_text_of(part) is not None for part in content):
        return "".join(_text_of(part) or "" for part in content)
    if isinstance(content, str):
        return content
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(content, default=str, ensure_ascii=False)


def _text_of(part: Any) -> str | None:
    """The text of a part of a message; None if the part is something else."""
    if not isinstance(part, Mapping) or (part.get("type") or "text") not in _TEXTS or part.get("thought") is True:
        return None
    if set(part) == {"json"}:  # of Bedrock
        return json.dumps(part["json"], ensure_ascii=False)
    text = next((part[name] for name in ("text", "content", "refusal") if name in part), None)
    text = text.get("value") if isinstance(text, Mapping) else text  # OpenAI's Assistants
    return text if isinstance(text, str) else None


def arguments_as_json(arguments: Any) -> str:
    """Arguments as JSON text. Text of the model stays as it is, unless it is in Python's notation."""
    value = parse_value(arguments)
    if isinstance(arguments, str) and (isinstance(value, str) or parse_json(arguments) is not None):
        return arguments
    return json.dumps(value or {}, default=str, ensure_ascii=False)


def read_messages(item: Mapping[str, Any], notes: Notes, default: str) -> Iterator[Message]:
    """The messages in a message of any form, which may hold several of OpenAI's; none if the item is the definition of
    a tool. `default` is the role of an item without role: a part, or an item of OpenAI's Responses.

    Example: a message of the user with two of Anthropic's "tool_result" blocks and a text -> two tool messages, and the
    user's.
    """
    name, role = item.get("role"), default
    is_reply = default == "assistant" and isinstance(item.get("content"), str)
    if "role" not in item and (_kind(item) or "text" in item or "toolName" in item or is_reply):
        content: Any = [item]
    elif not isinstance(name, str) or not name:
        raise UnknownFormError
    else:
        content = item.get("content") or item.get("contents") or item.get("parts") or item.get("content")
        # LangChain's callback for JavaScript writes the tool's name in place of the role.
        role = ROLES.get(name.rpartition(".")[2].lower(), "")
        if not role and not isinstance(content, str):
            raise UnknownFormError
    if role == "tool" and isinstance(content, Mapping) and content.get("type") == "function":
        notes.tools.append(content)
        return
    parts = _parts_in(content, role)
    if parts is None:
        text = content if isinstance(content, str) or content is None else to_text(content)
        messages: list[Message] = [{"role": role or "tool", "content": text}]
    else:
        messages = _of_parts(role, parts, notes)
        messages = messages or [{"role": role, "content": None}] if "role" in item else messages
    for message in messages:
        if message["role"] == "assistant" and "role" in item:
            _add_calls(message, item if message is messages[-1] else {}, notes)
        elif message["role"] == "tool":
            message["tool_call_id"] = message.get("tool_call_id") or str(item.get("tool_call_id") or "")
            label = message.get("name") or item.get("name") or (None if role else name)
            message |= {"name": str(label)} if label else {}
            message |= {"status": "error"} if item.get("status") == "error" else {}
            message["content"] = message["content"] or ""
        yield message


def _parts_in(content: Any, role: str) -> list[Any] | None:
    """The parts of a message's content; None if it has none. Koog and OpenLLMetry write parts as JSON text."""
    if isinstance(content, list):
        return content
    if isinstance(content, Mapping):
        return [content] if _kind(content) else None
    listed = parse_value(content) if role and isinstance(content, str) and content.startswith("[{") else None
    # What a tool returns may be a list of texts.
    known = (*_CALLS, *_RESULTS, *_THOUGHTS, *_OPENAI_MEDIA, "image", *(() if role == "tool" else _TEXTS))
    is_parts = isinstance(listed, list) and all(
        isinstance(part, Mapping) and (_kind(part) in known or isinstance(part.get("function"), Mapping))
        for part in listed
    )
    return listed if is_parts else None


def _add_calls(message: Message, item: Mapping[str, Any], notes: Notes) -> None:
    """Add the tool calls and the reasoning that an assistant's message has beside its content."""
    legacy = [item["function_call"]] if isinstance(item.get("function_call"), Mapping) else []
    given = as_mapping(item.get("additional_kwargs")).get("tool_calls")
    given = given or [*(item.get("tool_calls") or ()), *(item.get("invalid_tool_calls") or ())] or legacy
    calls = [call for call in (_tool_call(as_mapping(call), notes) for call in given) if call]
    calls = calls or message.pop("tool_calls", [])
    thought = item.get("reasoning_content") or item.get("reasoning")
    message |= {"reasoning_content": thought} if thought and isinstance(thought, str) else {}
    message |= {"content": message["content"] or None, "tool_calls": calls} if calls else {}


def _kind(part: Mapping[str, Any]) -> str:
    """The type of a part: its `type`, or else the key that stands for it; "" if it has neither."""
    kind = part.get("type")
    if isinstance(kind, str) and kind:
        return kind
    keys = (*_CALLS, *_RESULTS, *_THOUGHTS, *_WITHOUT_CONTENT)
    return next((key for key in keys if part.get(key)), "")


def _of_parts(role: str, parts: Iterable[Any], notes: Notes) -> list[Message]:
    """The messages of a list of parts. The results of tools are first, as OpenAI has them directly after the calls; but
    among an assistant's parts they end its message, and another begins."""
    messages: list[Message] = []
    texts: list[str] = []
    kept: list[Any] = []
    own: Message = {}

    def finish() -> None:
        content: Any = list(kept) if len(kept) > len(texts) else "".join(texts) or None
        speaker = "assistant" if own else "user" if role == "tool" and messages else role
        messages.append({"role": speaker, "content": content, **own})
        for collected in (texts, kept, own):
            collected.clear()

    for given in parts:
        parsed = as_mapping(parse_value(given))
        part = parsed if _kind(parsed) or _text_of(parsed) is not None or isinstance(given, Mapping) else given
        text = part if isinstance(part, str) else _text_of(part)
        if text is not None:
            texts.append(text)
            kept.append({"type": "text", "text": text})
            continue
        if not isinstance(part, Mapping):
            raise UnknownFormError
        kind = _kind(part)
        inner = part[kind] if isinstance(part.get(kind), Mapping) and kind != "function" else part
        if kind in _RESULTS:
            if role == "assistant" and (kept or own):
                finish()
            messages.append(_result(kind, inner))
        elif kind in (*_CALLS, "function") or "toolName" in part:
            if call := _tool_call(inner, notes):
                own.setdefault("tool_calls", []).append(call)
        elif kind in _THOUGHTS or part.get("thought") is True:
            text = _any(inner, "thinking", "reasoningText", "text", "content", "summary")
            text = to_text([text] if isinstance(text, Mapping) else text)  # "" if it is encrypted
            own |= {"reasoning_content": own.get("reasoning_content", "") + text} if text else {}
        elif kind not in _WITHOUT_CONTENT:
            name = kind or next((key for key, value in part.items() if value), "?")
            media = _media(name, part)
            (notes.media if media else notes.unread).append(name)
            kept += [media] if media else []
    if kept or own:
        finish()
    return messages


def _any(part: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of the keys that has one; "" if there is none."""
    return next((part[name] for name in names if part.get(name)), "")


def _result(kind: str, part: Mapping[str, Any]) -> Message:
    """The tool message of a part that is a tool's result."""
    value = next((part[name] for name in ("response", "result", "output", "content", "error") if name in part), None)
    failed = kind == "tool-error" or part.get("is_error") is True or part.get("status") == "error"
    if isinstance(value, Mapping) and {"type", "value"} <= set(value):  # of the Vercel AI SDK
        failed = failed or str(value["type"]).startswith(("error", "execution-denied"))
        value = value["value"]
    identity = _any(part, "tool_use_id", "toolUseId", "toolCallId", "call_id", "id")
    message: Message = {"role": "tool", "content": to_text(value), "tool_call_id": str(identity)}
    return message | ({"name": str(part["name"])} if part.get("name") else {}) | ({"status": "error"} if failed else {})


def _tool_call(call: Mapping[str, Any], notes: Notes) -> Message | None:
    """A tool call in OpenAI's form, with the id "" if it has none; None, and a note, if it has no name."""
    function = as_mapping(call.get("function")) or call
    name = function.get("name") or call.get("toolName")
    if not isinstance(name, str):
        notes.unread.append("tool_call")
        return None
    arguments = next((function[k] for k in ("arguments", "args", "input", "parameters") if k in function), "{}")
    identity = str(_any(call, "call_id", "id", "toolCallId", "toolUseId"))
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments_as_json(arguments)}}


def _media(name: str, part: Mapping[str, Any]) -> Message | None:
    """An image, a sound, a video or a file in OpenAI's form; None if the part is something else, or has no content.

    Example: {"type": "blob", "modality": "image", "mime_type": "image/png", "content": "iVBO…"}
    -> {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO…"}}
    """
    if name in _OPENAI_MEDIA and isinstance(part.get(name), Mapping):
        return dict(part)
    texts, level = dict[str, str](), [part]
    for _ in range(3):
        texts = {k: v for at in reversed(level) for k, v in at.items() if isinstance(v, str)} | texts
        level = [value for at in level for value in at.values() if isinstance(value, Mapping)]
    mime_type = _any(texts, "mime_type", "media_type", "mimeType", "mediaType")
    link = _any(texts, "url", "uri", "image_url", "fileUri", "file_uri", "image", "audio")
    data = _any(texts, "data", "content", "base64", "bytes", "binary_content", "file_data")
    if link and not re.match("[a-z]+:", link):
        link, data = "", data or link
    if data and not link:
        link = data if data.startswith("data:") else f"data:{mime_type or 'application/octet-stream'};base64,{data}"
    medium, file_id = _MEDIA.search(f"{texts.get('modality')} {mime_type} {name}"), _any(texts, "file_id", "fileId")
    if medium is None or not (link or file_id):
        return None
    if (kind := medium[0].lower()) in ("image", "audio", "video") and link:
        return {"type": f"{kind}_url", f"{kind}_url": {"url": link}}
    return {"type": "file", "file": {"file_data": link} if link else {"file_id": file_id}}


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
