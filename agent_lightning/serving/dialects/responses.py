"""OpenAI Responses: items instead of messages. Only functions are supported as tools, and no response is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from agent_lightning.serving.dialects import base
from agent_lightning.serving.dialects.base import BadRequest, Dialect, RequestContext, Stream, Strict, event, read
from agent_lightning.serving.dialects.fields import engine_form
from agent_lightning.serving.engine import Completion, Refusal

_STATEFUL = ("previous_response_id", "conversation", "prompt", "background")
"""Fields that are refused, because they need a conversation that is stored by the server."""
_REPLACED = ("input", "instructions", "text", "include", "max_output_tokens", "reasoning", "store", "truncation", "n")
"""Fields that are translated or that mean nothing to the engine; all others are passed on."""


class _Tool(Strict):
    type: str
    name: str | None = None


class _Item(Strict):
    type: str = "message"
    role: str | None = None
    content: str | list[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None


class _Text(Strict):
    format: dict[str, Any] | None = None


class _Request(Strict):
    input: str | list[_Item]
    instructions: str | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: _Text | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = Field(None, ge=1)


class _Stream(Stream):
    """Writes a response as numbered events, one output item after the other."""

    def __init__(self, context: RequestContext) -> None:
        super().__init__(context)
        self._number = 0
        self._text_started = False
        self._place = {"item_id": f"msg_{context.hex}", "output_index": 0, "content_index": 0}

    def begin(self) -> str:
        response = _response(self._context, "in_progress")
        return self._event("created", response=response) + self._event("in_progress", response=response)

    def delta(self, choice: Mapping[str, Any]) -> str:
        text = choice["delta"].get("content")
        if not text:
            return ""
        entries = _logprobs(self._context, choice)
        return self._open_text() + self._event("output_text.delta", **self._place, delta=text, logprobs=entries)

    def end(self, completion: Completion) -> str:
        response = Responses().reply(self._context, completion)
        (choice,) = completion.reply["choices"]
        text = "" if self._text_started else self.delta({**choice, "delta": choice["message"]})
        for index, item in enumerate(response["output"]):
            if item["type"] == "message":
                (part,) = item["content"]
                ended = {"text": part["text"], "logprobs": part["logprobs"]}
                text += self._open_text() + self._event("output_text.done", **self._place, **ended)
                text += self._event("content_part.done", **self._place, part=part)
            else:
                place, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
                opened = {**item, "arguments": "", "status": "in_progress"}
                ended = {"name": item["name"], "arguments": arguments}
                text += self._event("output_item.added", output_index=index, item=opened)
                text += self._event("function_call_arguments.delta", **place, delta=arguments)
                text += self._event("function_call_arguments.done", **place, **ended)
            text += self._event("output_item.done", output_index=index, item=item)
        return text + self._event(response["status"], response=response)

    def fail(self, refusal: Refusal) -> str:
        # The official client raises for an `error` object, and passes on an event without it.
        fields = {"code": refusal.code, "message": refusal.message, "param": None, **refusal.body()}
        return event({"type": "error", "sequence_number": self._number, **fields}, "error")

    def _open_text(self) -> str:
        """The events before the first text; "" from then on."""
        if self._text_started:
            return ""
        self._text_started = True
        item = _message(self._context, "in_progress", [])
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        added = self._event("output_item.added", output_index=0, item=item)
        return added + self._event("content_part.added", **self._place, part=part)

    def _event(self, name: str, /, **fields: Any) -> str:
        self._number += 1
        return event({"type": f"response.{name}", "sequence_number": self._number - 1, **fields}, f"response.{name}")


class Responses(Dialect):
    """The dialect of POST /v1/responses."""

    prefix = "resp_"
    request = _Request
    stream = _Stream

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        for name in _STATEFUL:
            if body.get(name):
                message = f"{name} is not supported: the gateway keeps no conversations, send the whole input"
                raise BadRequest(message, "unsupported")
        request = read(_Request, body)
        chat = {name: value for name, value in body.items() if name not in _REPLACED and value is not None}
        chat["messages"] = _messages(request)
        if request.max_output_tokens is not None:
            chat["max_tokens"] = request.max_output_tokens
        if request.tools is not None:
            chat["tools"] = [_tool(tool) for tool in request.tools]
        if isinstance(request.tool_choice, dict):
            if request.tool_choice.get("type") != "function":
                raise BadRequest("tool_choice can name a function, and nothing else", "unsupported")
            chat["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice.get("name")}}
        if request.text is not None and (form := request.text.format):
            schema, kind = {key: value for key, value in form.items() if key != "type"}, form.get("type")
            chat["response_format"] = {"type": kind} | ({"json_schema": schema} if kind == "json_schema" else {})
        return engine_form(chat)

    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        (choice,) = completion.reply["choices"]
        status = "incomplete" if choice["finish_reason"] == "length" else "completed"
        text, calls = choice["message"].get("content"), choice["message"].get("tool_calls") or ()
        output: list[dict[str, Any]] = []
        if text or not calls:
            part = {"text": text or "", "annotations": [], "logprobs": _logprobs(context, choice)}
            output.append(_message(context, status, [{"type": "output_text", **part}]))
        for number, call in enumerate(calls):
            item = {"type": "function_call", "id": f"fc_{context.hex}_{number}", "call_id": call["id"]}
            output.append(item | {"status": status} | call["function"])
        usage = completion.reply["usage"]
        return _response(context, status) | {
            "output": output,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }


def _messages(request: _Request) -> list[dict[str, Any]]:
    """The chat messages for the input items; a text and the calls after it become one assistant message."""
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
        match item.type:
            case "message" if item.role:
                messages.append({"role": item.role, "content": _content(item.content)})
            case "function_call":
                if turn is None:
                    messages.append(turn := {"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                turn["tool_calls"] = [*turn.get("tool_calls", ()), call]
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            case "reasoning":
                continue  # chat templates leave out earlier thoughts
            case _:
                raise BadRequest(f"an item of type {item.type!r} is not supported", "unsupported")
    return messages


def _content(content: str | list[dict[str, Any]] | None) -> str | list[dict[str, Any]] | None:
    if not isinstance(content, list):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        match part.get("type"):
            case "input_text" | "output_text" | "text" if isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            case "refusal" if isinstance(part.get("refusal"), str):
                parts.append({"type": "text", "text": part["refusal"]})
            case "input_image" if isinstance(part.get("image_url"), str):
                parts.append({"type": "image_url", "image_url": {"url": part["image_url"]}})
            case kind:
                raise BadRequest(f"content of type {kind!r} is not supported", "unsupported")
    return base.content_of(parts)


def _tool(tool: _Tool) -> dict[str, Any]:
    if tool.type != "function":
        raise BadRequest(f"a tool of type {tool.type!r} is not supported: the policy can call functions", "unsupported")
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _response(context: RequestContext, status: str) -> dict[str, Any]:
    """A response without its output; fields of the request are repeated, as the API does."""
    body = context.body
    repeated = ("instructions", "metadata", "temperature", "top_p", "max_output_tokens", "text", "reasoning", "user")
    head = {"id": context.reply_id, "object": "response", "created_at": context.created, "status": status}
    return {
        **head,
        "model": context.model,
        "output": [],
        **dict.fromkeys(("error", "incomplete_details", "usage", "previous_response_id")),
        "store": False,
        "tools": body.get("tools") or [],
        "tool_choice": body.get("tool_choice") or "auto",
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        **{name: body.get(name) for name in repeated},
    }


def _message(context: RequestContext, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    message = {"type": "message", "role": "assistant", "status": status, "content": content}
    return {"id": f"msg_{context.hex}", **message}


def _logprobs(context: RequestContext, choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "message.output_text.logprobs" not in (context.body.get("include") or ()):
        return []
    return (choice.get("logprobs") or {}).get("content") or []
