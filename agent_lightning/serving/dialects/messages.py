"""Anthropic messages: content blocks, tool results in the user's turn, and a stream of blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from agent_lightning.core.json_values import parse_json
from agent_lightning.serving.dialects import base
from agent_lightning.serving.dialects.base import BadRequest, Dialect, RequestContext, Stream, Strict, event, read
from agent_lightning.serving.dialects.fields import engine_form
from agent_lightning.serving.engine import Completion, Refusal

_IGNORED = ("cache_control", "context_management", "mcp_servers", "n")
_REPLACED = (*_IGNORED, "system", "stop_sequences", "thinking", "output_config", "output_format")
"""Fields that are translated or that mean nothing to the engine; all others are passed on."""
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_START, _DELTA = "content_block_start", "content_block_delta"
_ERRORS = {
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
}


class _Tool(Strict):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class _ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class _Block(Strict):
    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | base.ListOf[_Block] | None = None
    source: dict[str, Any] | None = None
    is_error: bool | None = None


class _Message(Strict):
    role: Literal["user", "assistant", "system"]
    content: str | base.ListOf[_Block]


class _Format(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class _OutputConfig(Strict):
    format: _Format | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class _Thinking(Strict):
    type: Literal["enabled", "adaptive", "disabled"]


class _Edit(Strict):
    type: Literal["clear_thinking_20251015"]


class _ContextManagement(Strict):
    edits: list[_Edit] | None = None


class _Request(Strict):
    messages: Annotated[base.ListOf[_Message], Field(min_length=1)]
    system: str | base.ListOf[_Block] | None = None
    tools: base.ListOf[_Tool] | None = None
    tool_choice: _ToolChoice | None = None
    output_config: _OutputConfig | None = None
    output_format: _Format | None = None
    stop_sequences: Annotated[base.ListOf[str], Field(max_length=4)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    thinking: _Thinking | None = None
    context_management: _ContextManagement | None = None
    mcp_servers: Annotated[list[Any], Field(max_length=0)] | None = None


class _Stream(Stream):
    """Writes a message as events, one content block after the other."""

    _text_started = False

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
        message = Messages().reply(self._context, completion)
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
        return event(Messages().error(refusal), "error")


class Messages(Dialect):
    """The dialect of POST /v1/messages."""

    prefix = "msg_"
    request = _Request
    stream = _Stream

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if body.get("thread"):  # at this code Anthropic's tool runner sends the whole conversation, and no thread
            message = "thread is not supported: send the whole conversation"
            raise BadRequest(message, "thread_unsupported_request", param="thread")
        request = read(_Request, body)
        chat = {name: value for name, value in body.items() if name not in _REPLACED and value is not None}
        system = _content(request.system)
        chat["messages"] = [{"role": "system", "content": system}] if system else []
        chat["messages"] += [new for message in request.messages for new in _chat(message)]
        last = chat["messages"][-1] if request.messages[-1].role == "assistant" and chat["messages"] else {}
        if last.get("role") == "assistant" and not last.get("tool_calls"):  # its text is the beginning of the answer
            chat |= {"add_generation_prompt": False, "continue_final_message": True}
        if request.stop_sequences:
            chat["stop"] = request.stop_sequences
        if request.thinking is not None:
            chat["chat_template_kwargs"] = {"enable_thinking": request.thinking.type != "disabled"}
        if request.tools is not None:
            chat["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_choice is not None:
            named = {"type": "function", "function": {"name": request.tool_choice.name}}
            chat["tool_choice"] = _CHOICES.get(request.tool_choice.type, named)
            chat["parallel_tool_calls"] = not request.tool_choice.disable_parallel_tool_use
        config = request.output_config or _OutputConfig()
        if output := config.format or request.output_format:
            schema = {"name": "answer", "schema": output.schema_, "strict": True}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        return engine_form(chat | {"reasoning_effort": config.effort}, schema_field="output_config.format")

    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        (choice,) = completion.reply["choices"]
        text, calls = choice["message"].get("content") or "", []
        for call in choice["message"].get("tool_calls") or ():
            function = call["function"]
            arguments = parse_json(function["arguments"] or "{}")
            if isinstance(arguments, dict):
                calls.append({"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments})
            else:  # a call whose arguments are no JSON object has no form here: it is shown as text
                text += f"{function['name']}({function['arguments']})"
        sequence = choice["stop_reason"] if isinstance(choice.get("stop_reason"), str) else None
        end = "end_turn" if sequence is None else "stop_sequence"
        usage = completion.reply["usage"]
        return _opening(context) | {
            "content": ([{"type": "text", "text": text}] if text else []) + calls,
            "stop_reason": "max_tokens" if choice["finish_reason"] == "length" else "tool_use" if calls else end,
            "stop_sequence": sequence,
            "usage": {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"]},
        }

    def error(self, refusal: Refusal) -> dict[str, Any]:
        kind = _ERRORS.get(refusal.status, "invalid_request_error")
        # What Anthropic says: clients look for these words, and shorten the conversation.
        words = "prompt is too long: " if refusal.code == "context_length_exceeded" else ""
        error = {"type": kind, "message": words + refusal.message, "code": refusal.code}
        return {"type": "error", "error": {**error, "details": {"error_code": refusal.code}}}


def _event(kind: str, **fields: Any) -> str:
    return event({"type": kind, **fields}, kind)


def _opening(context: RequestContext) -> dict[str, Any]:
    """A message before its first token."""
    message = {"id": context.reply_id, "type": "message", "role": "assistant", "model": context.model, "content": []}
    usage = {"input_tokens": 0, "output_tokens": 0}
    return message | {"stop_reason": None, "stop_sequence": None, "usage": usage}


def _chat(message: _Message) -> list[dict[str, Any]]:
    """The chat messages for one message: first a message for each tool result, then the rest."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results = [
        {"role": "tool", "tool_call_id": block.tool_use_id, "content": _content(block.content) or ""}
        | ({"status": "error"} if block.is_error else {})
        for block in message.content
        if block.type == "tool_result"
    ]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": _json(block.input or {})}}
        for block in message.content
        if block.type == "tool_use"
    ]
    content = _content([block for block in message.content if block.type not in ("tool_result", "tool_use")])
    turn = {"role": message.role, "content": content} | ({"tool_calls": calls} if calls else {})
    return [*results, *([turn] if content or calls else [])]


def _content(content: str | base.ListOf[_Block] | None) -> str | list[dict[str, Any]] | None:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for block in content or ():
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
    return base.content_of(parts)


def _tool(tool: _Tool) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise BadRequest(f"a tool of type {tool.type!r} is not supported: the policy can call functions", "unsupported")
    function = tool.model_dump(include={"name", "description", "strict"}) | {"parameters": tool.input_schema}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
