"""OpenAI Responses: items instead of messages. Only functions are supported as tools.

A request may continue an earlier response of its attempt (`previous_response_id`), or refer to items of earlier ones
(`item_reference`): both are taken from what was recorded. What the record does not say is in the response's id: whether
the request had instructions, which a request that continues it does not inherit, and whether it may be continued.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field

from agent_lightning.serving.dialects import base
from agent_lightning.serving.dialects.base import BadRequest, Dialect, RequestContext, Stream, Strict, event, read
from agent_lightning.serving.dialects.fields import engine_form
from agent_lightning.serving.engine import Completion, Refusal

_UNSUPPORTED = {
    "conversation": "continue a response by previous_response_id, or send the whole input",
    "prompt": "no prompts are stored here: send instructions and input",
    "background": "a response is given when it is complete, or as a stream",
}
"""Fields that are refused, and what to do instead."""
_ITEMS = "Items are those of this rollout's own responses, unless `store` was set to false."
_ITEM_ID = re.compile(r"(?:msg|fc)_([0-9a-f]{32})(?:_\d+)?")
_HAS_INSTRUCTIONS, _NOT_STORED = 1, 2
"""Bits of the last digit of a response's id."""
_REPLACED = (
    *("input", "instructions", "previous_response_id", "text", "include", "max_output_tokens", "reasoning", "store"),
    *("truncation", "n", "tools", "tool_choice", "max_tool_calls"),
)
"""Fields that are translated or that mean nothing to the engine; all others are passed on."""


class _Tool(Strict):
    type: str
    name: str | None = None


class _Item(Strict):
    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | base.ListOf[dict[str, Any]] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | base.ListOf[dict[str, Any]] | None = None

    @property
    def kind(self) -> str:
        """The type, which may be left out of messages and of references."""
        return self.type or ("item_reference" if self.id and not self.role else "message")


class _Text(Strict):
    format: dict[str, Any] | None = None
    verbosity: Literal["medium"] | None = None


class _Request(Strict):
    input: str | base.ListOf[_Item] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    tools: base.ListOf[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
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
        item = _message(self._context.hex, "in_progress", [])
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

    def __init__(self, earlier: Mapping[str, tuple[str, str]] = MappingProxyType({})) -> None:
        """`earlier`: request and reply of recorded calls to which the request refers, by the ids of their responses."""
        self._earlier = earlier

    def new_id(self, body: Mapping[str, Any]) -> str:
        flags = (_HAS_INSTRUCTIONS if body.get("instructions") else 0) | (_NOT_STORED if _unstored(body) else 0)
        return f"{super().new_id(body)[:-1]}{flags}"

    def recalls(self, body: Mapping[str, Any]) -> Mapping[str, bool]:
        request = read(_Request, body)
        previous, items = request.previous_response_id, request.input if isinstance(request.input, list) else ()
        matches = (_ITEM_ID.fullmatch(item.id or "") for item in items if item.kind == "item_reference")
        wanted = {f"resp_{match[1]}": False for match in matches if match} | ({previous: True} if previous else {})
        return {name: with_request for name, with_request in wanted.items() if _is_stored(name)}

    def remembering(self, messages: Mapping[str, tuple[str, str]]) -> Responses:
        return Responses(messages)

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        for name, advice in _UNSUPPORTED.items():
            if body.get(name):
                raise BadRequest(f"{name} is not supported: {advice}", "unsupported", param=name)
        request = read(_Request, body)
        chat = {name: value for name, value in body.items() if name not in _REPLACED and value is not None}
        if not request.input and not request.previous_response_id:
            raise BadRequest("input must not be empty", param="input")
        chat["messages"] = [*self._beginning(request), *self._messages(request.input)]
        if request.max_output_tokens is not None:
            chat["max_tokens"] = request.max_output_tokens
        if request.tools is not None:
            chat["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_choice is not None:
            chat["tool_choice"] = _tool_choice(request.tool_choice)
        chat |= {"reasoning_effort": (request.reasoning or {}).get("effort")}
        if chat.get("top_logprobs"):  # here they need no other field: `include` says whether they are shown
            chat["logprobs"] = True
        if request.text is not None and (form := request.text.format):
            schema, kind = {key: value for key, value in form.items() if key != "type"}, form.get("type")
            chat["response_format"] = {"type": kind} | ({"json_schema": schema} if kind == "json_schema" else {})
        return engine_form(chat, schema_field="text.format")

    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        (choice,) = completion.reply["choices"]
        status = "incomplete" if choice["finish_reason"] == "length" else "completed"
        output = _output(context.hex, choice["message"], status, _logprobs(context, choice))
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

    def _beginning(self, request: _Request) -> list[dict[str, Any]]:
        """The messages before the input: the instructions, and the conversation that the request continues."""
        messages: list[dict[str, Any]] = []
        if request.instructions:
            messages.append({"role": "system", "content": request.instructions})
        if name := request.previous_response_id:
            if name not in self._earlier:
                message = f"Previous response with id '{name[:100]}' not found."
                raise BadRequest(message, "previous_response_not_found", param="previous_response_id")
            recorded, reply = map(json.loads, self._earlier[name])
            messages += recorded[1:] if int(name[-1], 16) & _HAS_INSTRUCTIONS else recorded
            messages.append({key: reply[key] for key in ("role", "content", "tool_calls") if key in reply})
        return messages

    def _messages(self, items: str | list[_Item]) -> list[dict[str, Any]]:
        """The chat messages for the input items; a text and the calls after it become one assistant message."""
        if isinstance(items, str):
            return [{"role": "user", "content": items}]
        messages: list[dict[str, Any]] = []
        recorded = self._recorded()
        for index, item in enumerate(items):
            if item.kind == "item_reference":
                if item.id not in recorded:
                    message = f"Item with id '{str(item.id)[:100]}' not found. {_ITEMS}"
                    raise BadRequest(message, "not_found", 404, param="input")
                item = recorded[item.id]
            turn = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
            match item.kind:
                case "message" if item.role:
                    messages.append({"role": item.role, "content": _content(item.content)})
                case "function_call":
                    if turn is None:
                        messages.append(turn := {"role": "assistant", "content": None})
                    function = {"name": item.name, "arguments": item.arguments}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    turn.setdefault("tool_calls", []).append(call)
                case "function_call_output":
                    messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
                case "reasoning":
                    continue  # chat templates leave out earlier thoughts
                case "message":
                    raise BadRequest(f"input[{index}].role is required", param=f"input[{index}].role")
                case kind:
                    message = f"input[{index}]: an item of type {kind!r} is not supported"
                    raise BadRequest(message, "unsupported", param=f"input[{index}].type")
        return messages

    def _recorded(self) -> dict[str, _Item]:
        """The items of the earlier responses, by their ids."""
        replies = ((name.removeprefix("resp_"), json.loads(reply)) for name, (_, reply) in self._earlier.items())
        items = (item for name, reply in replies for item in _output(name, reply, "completed", []))
        return {item["id"]: _Item.model_validate(item) for item in items}


def _unstored(body: Mapping[str, Any]) -> bool:
    return body.get("store") is False


def _is_stored(response_id: str) -> bool:
    return not int(response_id[-1:], 16) & _NOT_STORED if re.fullmatch("resp_[0-9a-f]{32}", response_id) else False


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
                message = f"input: content of type {kind!r} is not supported, or is not complete"
                raise BadRequest(message, "unsupported", param="input")
    return base.content_of(parts)


def _tool_choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    """A chat request's form of `tool_choice`. Raises BadRequest."""
    match choice if isinstance(choice, dict) else {}:
        case {"type": "function", "name": name}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "tools": list(tools), "mode": mode}:
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [_tool_choice(t) for t in tools]}}
        case {"type": kind}:
            message = f"a tool_choice of type {kind!r} is not supported: it can be auto, none, required or functions"
            raise BadRequest(message, "unsupported", param="tool_choice")
    return choice


def _tool(tool: _Tool) -> dict[str, Any]:
    if tool.type != "function":
        message = f"a tool of type {tool.type!r} is not supported: the policy can call functions"
        raise BadRequest(message, "unsupported", param="tools")
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _output(name: str, message: Mapping[str, Any], status: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of an assistant's message; `name` is the end of the response's id, which the items' ids contain."""
    text, calls = message.get("content"), message.get("tool_calls") or ()
    output: list[dict[str, Any]] = []
    if text or not calls:
        part = {"type": "output_text", "text": text or "", "annotations": [], "logprobs": logprobs}
        output.append(_message(name, status, [part]))
    for number, call in enumerate(calls):
        item = {"type": "function_call", "id": f"fc_{name}_{number}", "call_id": call["id"]}
        output.append(item | {"status": status} | call["function"])
    return output


def _response(context: RequestContext, status: str) -> dict[str, Any]:
    """A response without its output; fields of the request are repeated, as the API does."""
    body = context.body
    repeated = ("instructions", "metadata", "temperature", "top_p", "max_output_tokens", "text", "reasoning", "user")
    head = {"id": context.reply_id, "object": "response", "created_at": context.created, "status": status}
    return {
        **head,
        "model": context.model,
        "output": [],
        **dict.fromkeys(("error", "incomplete_details", "usage")),
        "store": not _unstored(body),
        "previous_response_id": body.get("previous_response_id"),
        "tools": body.get("tools") or [],
        "tool_choice": body.get("tool_choice") or "auto",
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        **{name: body.get(name) for name in repeated},
    }


def _message(name: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    message = {"type": "message", "role": "assistant", "status": status, "content": content}
    return {"id": f"msg_{name}", **message}


def _logprobs(context: RequestContext, choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "message.output_text.logprobs" not in (context.body.get("include") or ()):
        return []
    return (choice.get("logprobs") or {}).get("content") or []
