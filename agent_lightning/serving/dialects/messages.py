"""Anthropic messages: content blocks, tool results in the user's turn, and a stream of blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from agent_lightning.serving.dialects.base import BadRequest, Chat, RequestContext, Strict, content_of, event, read
from agent_lightning.serving.engine import Completion, Refusal

_REPLACED = ("system", "stop_sequences", "thinking", "metadata", "service_tier", "cache_control", "output_config", "n")
"""Fields that are translated or that mean nothing to the engine; all others are passed on."""
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {403: "permission_error", 404: "not_found_error", 413: "request_too_large", 500: "api_error"}


class _Tool(Strict):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class _ToolChoice(Strict):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Block(Strict):
    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[_Block] | None = None
    source: dict[str, Any] | None = None


class _Message(Strict):
    role: str
    content: str | list[_Block]


class _OutputConfig(Strict):
    format: dict[str, Any] | None = None


class _Request(Strict):
    messages: list[_Message]
    system: str | list[_Block] | None = None
    tools: list[_Tool] | None = None
    tool_choice: _ToolChoice | None = None
    output_config: _OutputConfig | None = None


class Messages:
    """The dialect of POST /v1/messages."""

    prefix = "msg_"
    request = _Request

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        request = read(_Request, body)
        chat = {name: value for name, value in body.items() if name not in _REPLACED and value is not None}
        chat["messages"] = _system(request.system) + [new for message in request.messages for new in _chat(message)]
        if request.messages and request.messages[-1].role == "assistant":  # its text is the beginning of the answer
            chat |= {"add_generation_prompt": False, "continue_final_message": True}
        if body.get("stop_sequences"):
            chat["stop"] = body["stop_sequences"]
        if request.tools is not None:
            chat["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_choice is not None:
            named = {"type": "function", "function": {"name": request.tool_choice.name}}
            chat["tool_choice"] = _CHOICES.get(request.tool_choice.type, named)
            chat["parallel_tool_calls"] = not request.tool_choice.disable_parallel_tool_use
        output = request.output_config.format if request.output_config else None
        if output:
            schema = {"name": "answer", "schema": output.get("schema")}
            chat["response_format"] = {"type": output.get("type"), "json_schema": schema}
        read(Chat, chat)
        return chat

    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        (choice,) = completion.reply["choices"]
        reason, sequence = choice["finish_reason"], choice.get("stop_reason")
        blocks = _blocks(choice["message"])
        stopped = "stop_sequence" if isinstance(sequence, str) else "end_turn"
        if reason == "tool_calls" and not any(block["type"] == "tool_use" for block in blocks):
            reason = "stop"
        return _opening(context) | {
            "content": blocks,
            "stop_reason": _REASONS.get(reason, stopped),
            "stop_sequence": sequence if isinstance(sequence, str) else None,
            "usage": _usage(completion),
        }

    def stream(self, context: RequestContext) -> _Stream:
        return _Stream(context)

    def error(self, refusal: Refusal) -> dict[str, Any]:
        kind = _ERRORS.get(refusal.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": refusal.message, "code": refusal.code}}


class _Stream:
    """Writes a message as events, one content block after the other."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context
        self._text_started = False

    def begin(self) -> str:
        return _event("message_start", message=_opening(self._context))

    def delta(self, choice: Mapping[str, Any]) -> str:
        text = choice["delta"].get("content")
        if not text:
            return ""
        opening = "" if self._text_started else _event(_START, index=0, content_block={"type": "text", "text": ""})
        self._text_started = True
        return opening + _event(_DELTA, index=0, delta={"type": "text_delta", "text": text})

    def end(self, completion: Completion) -> str:
        message = MESSAGES.reply(self._context, completion)
        text = ""
        for index, block in enumerate(message["content"]):
            if block["type"] == "tool_use":
                piece = {"type": "input_json_delta", "partial_json": _json(block["input"])}
                text += _event(_START, index=index, content_block={**block, "input": {}})
                text += _event(_DELTA, index=index, delta=piece)
            elif not self._text_started:
                text += self.delta({"delta": {"content": block["text"]}})
            text += _event("content_block_stop", index=index)
        ending = {name: message[name] for name in ("stop_reason", "stop_sequence")}
        return text + _event("message_delta", delta=ending, usage=message["usage"]) + _event("message_stop")

    def fail(self, refusal: Refusal) -> str:
        return event(MESSAGES.error(refusal), "error")


MESSAGES = Messages()
_START, _DELTA = "content_block_start", "content_block_delta"


def _event(kind: str, **fields: Any) -> str:
    return event({"type": kind, **fields}, kind)


def _opening(context: RequestContext) -> dict[str, Any]:
    return {
        "id": context.reply_id,
        "type": "message",
        "role": "assistant",
        "model": context.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }


def _usage(completion: Completion) -> dict[str, int]:
    usage = completion.reply["usage"]
    return {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]}


def _blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The blocks of an answer. A call whose arguments are no JSON object has no form here: it is shown as text."""
    text, calls = message.get("content") or "", []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        try:
            arguments = json.loads(function["arguments"] or "{}")
        except ValueError:
            arguments = None
        if isinstance(arguments, dict):
            calls.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
        else:
            text += f"{function['name']}({function['arguments']})"
    return ([{"type": "text", "text": text}] if text else []) + calls


def _system(system: str | list[_Block] | None) -> list[dict[str, Any]]:
    content = system if isinstance(system, str) else _content(system or ())
    return [{"role": "system", "content": content}] if content else []


def _chat(message: _Message) -> list[dict[str, Any]]:
    """The chat messages for one message: first a message for each tool result, then the rest."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block.content)}
        for block in message.content
        if block.type == "tool_result"
    ]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": _json(block.input)}}
        for block in message.content
        if block.type == "tool_use"
    ]
    content = _content(block for block in message.content if block.type not in ("tool_result", "tool_use"))
    turn: dict[str, Any] = {"role": message.role, "content": content}
    if calls:
        turn["tool_calls"] = calls
    return [*results, *([turn] if content or calls else [])]


def _result(content: str | list[_Block] | None) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else _content(content or ()) or ""


def _content(blocks: Iterable[_Block]) -> str | list[dict[str, Any]] | None:
    parts: list[dict[str, Any]] = []
    for block in blocks:
        match block.type:
            case "text" if block.text is not None:
                parts.append({"type": "text", "text": block.text})
            case "image" if block.source is not None:
                source = block.source
                url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
                parts.append({"type": "image_url", "image_url": {"url": url}})
            case "thinking" | "redacted_thinking":
                continue  # chat templates leave out earlier thoughts
            case kind:
                raise BadRequest(f"a content block of type {kind!r} is not supported", "unsupported")
    return content_of(parts)


def _tool(tool: _Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        message = f"a tool of type {tool.type!r} is not supported: the policy can call functions"
        raise BadRequest(message, "unsupported")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
