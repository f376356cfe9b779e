"""OpenAI chat completions and completions, which are also the engine's own form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from agent_lightning.serving.dialects import base
from agent_lightning.serving.dialects.base import BadRequest, Dialect, RequestContext, Stream, event, read
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
    request: type[BaseModel] = base.Chat
    stream: type[Stream] = _ChatStream
    kind = "chat.completion"

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        read(base.Chat, body)
        return dict(body)

    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        """The engine's reply, with log-probabilities only if the agent wants them."""
        choices = [
            {key: value for key, value in choice.items() if key != "stop_reason"}
            | ({} if _wants_logprobs(context) else {"logprobs": None})
            for choice in completion.reply["choices"]
        ]
        return {**completion.reply, **_head(context), "object": self.kind, "choices": choices}


_Token = Annotated[int, Field(ge=0, lt=2**31)]
"""A token id of a prompt. The engine checks it against the vocabulary, but would look up a negative id."""


class _Completion(base.Sampled):
    """A completion request. Its prompts are a text, token ids, or a list of either."""

    prompt: str | list[str] | list[_Token] | list[list[_Token]]
    logprobs: int | None = None
    echo: bool | None = None


class Completions(ChatCompletions):
    """The dialect of POST /v1/completions: a prompt without a chat template."""

    prefix = "cmpl-"
    request = _Completion
    stream = _TextStream
    kind = "text_completion"

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if read(_Completion, body).echo:
            raise BadRequest("echo is not supported: the prompt is not part of the answer", "unsupported")
        return dict(body)


def _head(context: RequestContext) -> dict[str, Any]:
    return {"id": context.reply_id, "created": context.created, "model": context.model}


def _wants_logprobs(context: RequestContext) -> bool:
    return context.body.get("logprobs") not in (None, False)
