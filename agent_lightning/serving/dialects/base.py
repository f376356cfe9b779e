"""The base class of dialects: formats in which agents send requests and get replies. Pure.

A dialect turns requests into the engine's form, an OpenAI chat request (or a completion request with a `prompt`), and
the engine's `Completion` into its own replies. It has no state; the class of its streams has.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError, model_validator

from agent_lightning.serving.engine import Completion, Refusal


class BadRequest(Exception):
    """The request cannot be answered as it is."""

    def __init__(self, message: str, code: str = "invalid_request", status: int = 400, **fields: str) -> None:
        """`fields`: further fields of the Refusal, such as `param`, the path of the field that is to be changed."""
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

    def new_id(self, body: Mapping[str, Any]) -> str:
        """The id of the reply to a request."""
        return f"{self.prefix}{uuid.uuid4().hex}"

    def recalls(self, body: Mapping[str, Any]) -> Mapping[str, bool]:
        """The ids of earlier replies to which a request refers, and of each whether its request is needed too. Raises
        BadRequest."""
        return {}

    def remembering(self, messages: Mapping[str, tuple[str, str]]) -> Dialect:
        """The same dialect, which knows request and reply (JSON texts) of earlier calls, by the ids of the replies."""
        return self

    @abstractmethod
    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The request in the engine's form. Raises BadRequest."""

    @abstractmethod
    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        """The JSON of an answer in one piece."""

    def count(self, tokens: int) -> dict[str, Any]:
        """The JSON of a count of a prompt's tokens; Anthropic's, if the dialect has no form of its own."""
        return {"input_tokens": tokens}

    def error(self, refusal: Refusal) -> dict[str, Any]:
        """The JSON of an error; OpenAI's, if the dialect has no form of its own."""
        return refusal.body()


Item = TypeVar("Item")


class _FailFast(FailFast):
    __hash__ = object.__hash__  # unions need it


ListOf = Annotated[list[Item], _FailFast()]
"""A list that is read until its first error: there may be a hundred thousand."""


class Strict(BaseModel):
    """A JSON object of which some fields are checked. Values are not converted, a null is an absent field, and unknown
    fields pass."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: Any) -> Any:
        """In Python: between two of a million objects, other threads get their turn."""
        is_object = isinstance(fields, dict)
        return {name: value for name, value in fields.items() if value is not None} if is_object else fields


Model = TypeVar("Model", bound=BaseModel)


def read(model: type[Model], body: Mapping[str, Any]) -> Model:
    """The checked fields of a body. Raises BadRequest, which names the deepest field that does not fit, and says what
    it may be, as {"messages": [{"role": "user", "content": 5}]} gives
    "messages[0].content must be a string or an array"."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        faults = [(_path(fault["loc"], body), fault) for fault in error.errors(include_url=False)]
        deepest = max((path for path, _ in faults), key=len)
        here = [fault for path, fault in faults if path == deepest]
        name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in deepest).lstrip(".")
        if discriminator := here[0].get("ctx", {}).get("discriminator"):
            name += "." + discriminator.strip("'")
        words = " or ".join(dict.fromkeys(_words(fault) for fault in here)).replace(" or must be ", " or ")
        unsupported = here[0]["type"] in ("extra_forbidden", "literal_error", "union_tag_invalid")
        code = "unsupported" if unsupported else "invalid_request"
        raise BadRequest(f"{name or 'the request'} {words}", code, param=name) from None


_WORDS = {
    "missing": "is required",
    "union_tag_not_found": "is required",
    "extra_forbidden": "is not supported: leave it out",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "must be a token id",
    "string": "must be a string",
    "int": "must be an integer",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "list": "must be an array",
    "dict": "must be an object",
    "model": "must be an object",
}
"""What is said of a field, by the type of pydantic's error or its first word."""
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _words(fault: Any) -> str:
    """What an error of pydantic says of its field, as "must be an integer"."""
    values, kind = fault.get("ctx", {}), str(fault["type"])
    for name, words in _BOUNDS.items():
        if name in values:
            return f"must be {words} {values[name]}"
    if "max_length" in values:
        return f"may have at most {values['max_length']} elements"
    if expected := values.get("expected_tags") or values.get("expected"):
        return f"must be {expected}"
    return _WORDS.get(kind) or _WORDS.get(kind.partition("_")[0], "has a form that is not taken")


def _path(loc: Sequence[int | str], body: Any) -> tuple[int | str, ...]:
    """The keys of an error's place in the body: pydantic also names the members of a union that it has tried."""
    path: list[int | str] = []
    for position, key in enumerate(loc):
        inside = isinstance(body, list) if isinstance(key, int) else isinstance(body, dict)
        known = inside and (isinstance(key, int) or key in body)
        if known or (isinstance(body, dict) and position == len(loc) - 1):
            path.append(key)
            body = body[key] if known else None
    return tuple(path)


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
