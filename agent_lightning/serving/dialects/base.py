"""The base class of dialects: formats in which agents send requests and get replies. Pure.

A dialect turns requests into the engine's form, an OpenAI chat request (or a completion request with a `prompt`), and
the engine's `Completion` into its own replies. It has no state; the class of its streams has.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent_lightning.serving.engine import Completion, Refusal


class BadRequest(Exception):
    """The request cannot be answered as it is."""

    def __init__(self, message: str, code: str = "invalid_request", status: int = 400, **fields: str) -> None:
        super().__init__(message)
        self.refusal = Refusal(status=status, message=message, code=code, **fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """A request, and the fields that identify its reply."""

    body: Mapping[str, Any]
    """The agent's JSON, unchanged."""
    engine: Mapping[str, Any]
    """The request in the engine's form, before the sampling rule is applied."""
    reply_id: str
    model: str
    """The model's name as the agent wrote it."""
    created: int
    """Unix seconds."""

    @property
    def hex(self) -> str:
        """The reply's id without its prefix; the ids of its items contain it, so that a streamed reply has the same."""
        return self.reply_id.rpartition("_")[2].rpartition("-")[2]


class Stream(ABC):
    """Writes one answer as the text of server-sent events."""

    def __init__(self, context: RequestContext) -> None:
        self._context = context

    @abstractmethod
    def begin(self) -> str:
        """The events before the first token."""

    @abstractmethod
    def delta(self, choice: Mapping[str, Any]) -> str:
        """The events for a piece of a choice, as `Part.visible` gives it; "" if there is nothing to send."""

    @abstractmethod
    def end(self, completion: Completion) -> str:
        """The last events: what was not sent yet, which is everything if there were no deltas, and the end."""

    @abstractmethod
    def fail(self, refusal: Refusal) -> str:
        """The events for an error after `begin`."""


class Dialect(ABC):
    """A format in which agents speak to the gateway."""

    prefix: str
    """Prefix of the ids of its replies."""
    request: type[BaseModel]
    """The fields of a request that are checked."""
    stream: type[Stream]
    """The writer of an answer in parts."""

    @abstractmethod
    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The request in the engine's form. Raises BadRequest."""

    @abstractmethod
    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        """The JSON of an answer in one piece."""

    def error(self, refusal: Refusal) -> dict[str, Any]:
        """The JSON of an error; OpenAI's, if the dialect has no form of its own."""
        return refusal.body()


class Strict(BaseModel):
    """A JSON object of which some fields are checked. Values are not converted; unknown fields pass."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Function(Strict):
    name: str


class Tool(Strict):
    function: _Function


class _CalledFunction(_Function):
    arguments: str


class _ToolCall(Strict):
    id: str | None = None
    function: _CalledFunction


class _Message(Strict):
    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None


class _StreamOptions(Strict):
    include_usage: bool | None = None


class Sampled(Strict):
    """The fields that chat and completion requests share."""

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
    """The checked fields of a body. Raises BadRequest, whose message names the field."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise BadRequest(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def content_of(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]] | None:
    """The content of a chat message: a single text part becomes a string, as agents that speak chat send it."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    if len(parts) == len(texts) < 2:
        return texts[0] if texts else None
    return parts


def event(data: Mapping[str, Any], name: str = "") -> str:
    """The text of a server-sent event, in ASCII: some clients take U+2028 for the end of a line."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, separators=(',', ':'))}\n\n"
