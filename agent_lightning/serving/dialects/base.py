"""What a wire format is: how an agent's request becomes the engine's, and the engine's answer the agent's. Pure.

Each format is one class with no state, and one that writes a stream. What they all become is the engine's own form:
an OpenAI chat request (or a completion request with a `prompt`), and its `Completion`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent_lightning.serving.engine import Completion, Refusal


class BadRequest(Exception):
    """A request that cannot be answered as it is. `code`: invalid_request, or unsupported."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, and what its reply is called."""

    body: Mapping[str, Any]
    """As it came."""
    engine: Mapping[str, Any]
    """As the engine is asked, before the rule for sampling."""
    reply_id: str
    model: str
    """The name that the agent used."""
    created: int
    """Unix seconds."""

    @property
    def hex(self) -> str:
        """Of the reply's id: ids of the parts of a reply are made of it, the same streamed or not."""
        return self.reply_id.rpartition("_")[2].rpartition("-")[2]


class Stream(Protocol):
    """Writes one answer as server-sent events."""

    def begin(self) -> str:
        """Before the first token."""
        ...

    def delta(self, choice: Mapping[str, Any]) -> str:
        """A piece of a choice, as `Part.visible` gives it. May be empty."""
        ...

    def end(self, completion: Completion) -> str:
        """What was not sent yet, which is all of it where there were no deltas, and the end."""
        ...

    def fail(self, refusal: Refusal) -> str:
        """An error after the beginning."""
        ...


class Wire(Protocol):
    """A wire format."""

    @property
    def prefix(self) -> str:
        """Of the ids of its replies."""
        ...

    @property
    def request(self) -> type[BaseModel]:
        """What is known of a request's fields."""
        ...

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The request in the engine's form. Raises BadRequest."""
        ...

    def reply(self, asked: Asked, completion: Completion) -> dict[str, Any]: ...

    def stream(self, asked: Asked) -> Stream: ...

    def error(self, refusal: Refusal) -> dict[str, Any]: ...


class Strict(BaseModel):
    """A JSON object of which some fields are known. Nothing is converted; unknown fields pass."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Function(Strict):
    name: str


class Tool(Strict):
    function: _Function


class _Called(_Function):
    arguments: str


class _ToolCall(Strict):
    id: str | None = None
    function: _Called


class _Message(Strict):
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None


class _StreamOptions(Strict):
    include_usage: bool | None = None


class Sampled(Strict):
    """What chat and completions have in common."""

    model: str | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class Chat(Sampled):
    """A chat request."""

    messages: list[_Message]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None


Model = TypeVar("Model", bound=BaseModel)


def read(model: type[Model], body: Mapping[str, Any]) -> Model:
    """The known fields of a body. Raises BadRequest, which names the field."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{where}: {first['msg']}") from None


def content_of(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]] | None:
    """The content of a chat message: one text is a text, as agents that speak chat send it."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if len(parts) == len(texts) < 2:
        return texts[0] if texts else None
    return parts


def event(data: Mapping[str, Any], name: str = "") -> str:
    """One server-sent event. ASCII: some clients take U+2028 in it for the end of a line."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n"
