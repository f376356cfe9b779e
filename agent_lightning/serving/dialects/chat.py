"""OpenAI chat completions and completions: the engine's own forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from agent_lightning.serving.dialects.base import Asked, BadRequest, Chat, Sampled, Stream, event, read
from agent_lightning.serving.engine import Completion, Refusal


class ChatCompletions:
    """POST /v1/chat/completions"""

    prefix = "chatcmpl-"
    request: type[BaseModel] = Chat
    kind = "chat.completion"

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        read(Chat, body)
        return dict(body)

    def reply(self, asked: Asked, completion: Completion) -> dict[str, Any]:
        """Log-probabilities only where they were asked for, under the model name that the agent used."""
        choices = [
            {key: value for key, value in choice.items() if key != "stop_reason"}
            | ({} if _logprobs_asked(asked) else {"logprobs": None})
            for choice in completion.reply["choices"]
        ]
        return {**completion.reply, **_head(asked), "object": self.kind, "choices": choices}

    def stream(self, asked: Asked) -> Stream:
        return _ChatStream(asked)

    def error(self, refusal: Refusal) -> dict[str, Any]:
        return refusal.body()


_Token = Annotated[int, Field(ge=0, lt=2**31)]
"""Of a prompt. Whether the vocabulary has it the engine says; a negative one it would look up."""


class _Completion(Sampled):
    """A completion request. Its prompts: a text, token ids, or several of either."""

    prompt: str | list[str] | list[_Token] | list[list[_Token]]
    logprobs: int | None = None
    echo: bool | None = None


class Completions(ChatCompletions):
    """POST /v1/completions: a prompt without a chat template."""

    prefix = "cmpl-"
    request = _Completion
    kind = "text_completion"

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        if read(_Completion, body).echo:
            raise BadRequest("echo is not supported: the prompt is not part of the answer", "unsupported")
        return dict(body)

    def stream(self, asked: Asked) -> Stream:
        return _TextStream(asked)


class _ChatStream:
    kind = "chat.completion.chunk"
    silence: Mapping[str, Any] = {"delta": {}}

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._sent: set[int] = set()
        """Choices of which something was sent."""

    def begin(self) -> str:
        asked = self._asked.engine
        # As OpenAI does: a client that adds up the deltas must not find an empty text beside a tool call.
        opening = {"delta": {"role": "assistant", "content": None if asked.get("tools") else ""}}
        return "".join(self._chunk({"index": index, **opening}) for index in range(asked.get("n") or 1))

    def delta(self, choice: Mapping[str, Any]) -> str:
        said = self._said(choice)
        logprobs = choice.get("logprobs") if _logprobs_asked(self._asked) else None
        if not any(said.values()) and not logprobs:
            return ""
        self._sent.add(choice["index"])
        return self._chunk({"index": choice["index"], **said, "logprobs": logprobs})

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
        if (self._asked.body.get("stream_options") or {}).get("include_usage"):
            usage = {"choices": [], "usage": completion.reply["usage"]}
            text += event({**_head(self._asked), "object": self.kind, **usage})
        return text + "data: [DONE]\n\n"

    def fail(self, refusal: Refusal) -> str:
        return event(refusal.body()) + "data: [DONE]\n\n"

    def _said(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        source = choice.get("delta") or choice.get("message") or {}
        return {"delta": {key: source[key] for key in ("content", "reasoning") if source.get(key)}}

    def _chunk(self, choice: Mapping[str, Any]) -> str:
        whole = {**self.silence, "logprobs": None, "finish_reason": None, **choice}
        return event({**_head(self._asked), "object": self.kind, "choices": [whole]})


class _TextStream(_ChatStream):
    kind = "text_completion"
    silence: Mapping[str, Any] = {"text": ""}

    def begin(self) -> str:
        return ""

    def _said(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {"text": choice.get("text") or ""}


def _head(asked: Asked) -> dict[str, Any]:
    return {"id": asked.reply_id, "created": asked.created, "model": asked.model}


def _logprobs_asked(asked: Asked) -> bool:
    return asked.body.get("logprobs") not in (None, False)
