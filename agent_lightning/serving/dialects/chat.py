"""OpenAI chat completions and completions, which are also the engine's own form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from agent_lightning.serving.dialects.base import BadRequest, Dialect, ListOf, RequestContext, Stream, event
from agent_lightning.serving.dialects.fields import Chat, Sampled, engine_form, known_fields
from agent_lightning.serving.engine import Completion, Refusal


class _ChatStream(Stream):
    """Writes a chat completion in chunks; a tool call is sent complete, in two chunks as OpenAI sends it."""

    kind = "chat.completion.chunk"
    empty: Mapping[str, Any] = {"delta": {}}

    def __init__(self, context: RequestContext) -> None:
        super().__init__(context)
        self._sent: set[int] = set()
        """Indices of choices with text that was sent."""

    def begin(self) -> str:
        request = self._context.engine
        # As OpenAI does: a client that adds up the deltas must not find an empty text beside a tool call.
        opening = {"delta": {"role": "assistant", "content": None if request.get("tools") else ""}}
        return "".join(self._chunk({"index": index, **opening}) for index in range(request.get("n") or 1))

    def delta(self, choice: Mapping[str, Any]) -> str:
        content = self._content(choice)
        logprobs = choice.get("logprobs") if _wants_logprobs(self._context) else None
        if not any(content.values()) and not logprobs:
            return ""
        self._sent.add(choice["index"])
        return self._chunk({"index": choice["index"], **content, "logprobs": logprobs})

    def end(self, completion: Completion) -> str:
        text = ""
        for choice in completion.reply["choices"]:
            index = choice["index"]
            text += "" if index in self._sent else self.delta(choice)
            choice = _as_wanted(self._context, choice)
            if function := choice.get("message", {}).get("function_call"):
                text += self._chunk({"index": index, "delta": {"function_call": function}})
            for number, call in enumerate(choice.get("message", {}).get("tool_calls") or ()):
                function = call["function"]
                opened = {"index": number, **call, "function": {"name": function["name"], "arguments": ""}}
                filled = {"index": number, "function": {"arguments": function["arguments"]}}
                for piece in (opened, filled):
                    text += self._chunk({"index": index, "delta": {"tool_calls": [piece]}})
            text += self._chunk({"index": index, "finish_reason": choice["finish_reason"]})
        if (self._context.body.get("stream_options") or {}).get("include_usage"):
            usage = {"choices": [], "usage": completion.reply["usage"]}
            text += event({**_head(self._context), "object": self.kind, **usage})
        return text + "data: [DONE]\n\n"

    def fail(self, refusal: Refusal) -> str:
        return event(refusal.body()) + "data: [DONE]\n\n"

    def _content(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        source = choice.get("delta") or choice.get("message") or {}
        return {"delta": {key: source[key] for key in ("content", "reasoning") if source.get(key)}}

    def _chunk(self, choice: Mapping[str, Any]) -> str:
        complete = {**self.empty, "logprobs": None, "finish_reason": None, **choice}
        return event({**_head(self._context), "object": self.kind, "choices": [complete]})


class _TextStream(_ChatStream):
    """Writes a completion in chunks."""

    kind = "text_completion"
    empty: Mapping[str, Any] = {"text": ""}

    def begin(self) -> str:
        return ""

    def _content(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": choice.get("text") or ""}


class ChatCompletions(Dialect):
    """The dialect of POST /v1/chat/completions."""

    prefix = "chatcmpl-"
    request: type[BaseModel] = Chat
    stream: type[Stream] = _ChatStream
    kind = "chat.completion"

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return engine_form(_with_tools(body))

    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        """The engine's reply, with log-probabilities only if the agent wants them."""
        choices = [_as_wanted(context, choice) for choice in completion.reply["choices"]]
        return {**completion.reply, **_head(context), "object": self.kind, "choices": choices}


_Token = Annotated[int, Field(ge=0, lt=2**31)]
"""A token id of a prompt. The engine checks it against the vocabulary, but would look up a negative id."""


class _Completion(Sampled):
    """A completion request. Its prompts are a text, token ids, or a list of either."""

    prompt: str | ListOf[str] | ListOf[_Token] | ListOf[ListOf[_Token]]
    logprobs: int | None = Field(None, ge=0, le=20)


class Completions(ChatCompletions):
    """The dialect of POST /v1/completions: a prompt without a chat template."""

    prefix = "cmpl-"
    request = _Completion
    stream = _TextStream
    kind = "text_completion"

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        request = known_fields(_Completion, body)
        prompts = request["prompt"] if isinstance(request["prompt"], list) else [request["prompt"]]
        if not prompts or "" in prompts or [] in prompts:
            raise BadRequest("prompt must not be empty", param="prompt")
        return request


def _head(context: RequestContext) -> dict[str, Any]:
    return {"id": context.reply_id, "created": context.created, "model": context.model}


def _wants_logprobs(context: RequestContext) -> bool:
    return context.body.get("logprobs") not in (None, False)


def _as_wanted(context: RequestContext, choice: Mapping[str, Any]) -> dict[str, Any]:
    """A choice of the engine's reply in the form of the request: with log-probabilities only if the agent wants them,
    and with the call of a function in place of a tool call if the request had `functions`."""
    choice = {key: value for key, value in choice.items() if key != "stop_reason"}
    if not _wants_logprobs(context):
        choice["logprobs"] = None
    message = choice.get("message") or {}
    if calls := message.get("tool_calls"):
        message = {**message, "content": message.get("content") or None}  # as OpenAI: no text is null
        if context.body.get("functions"):
            message = {key: value for key, value in message.items() if key != "tool_calls"}
            message["function_call"] = calls[0]["function"]
            choice["finish_reason"] = choice["finish_reason"].replace("tool_calls", "function_call")
        choice["message"] = message
    return choice


def _with_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat request in which the `functions`, `function_call` and messages of OpenAI's API of 2023 are today's tools,
    tool calls and tool messages."""
    body = {name: value for name, value in body.items() if value is not None}
    if functions := body.get("functions"):
        if body.get("tools"):
            raise BadRequest("tools and functions exclude each other: leave out functions", param="functions")
        choice = body.get("function_call", "auto")
        choice = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
        tools = [{"type": "function", "function": f} for f in functions] if isinstance(functions, list) else functions
        body |= {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "functions": []}
        body.pop("function_call", None)
    messages, newest = [], ""
    for index, message in enumerate(body["messages"] if isinstance(body.get("messages"), list) else ()):
        if isinstance(message, dict) and message.get("function_call"):
            newest = f"call_{index}"
            call = {"id": newest, "type": "function", "function": message["function_call"]}
            message = {**message, "function_call": None, "tool_calls": [call]}
        elif isinstance(message, dict) and message.get("role") == "function":
            message = {**message, "role": "tool", "tool_call_id": newest}
        messages.append(message)
    return body | ({"messages": messages} if messages else {})
