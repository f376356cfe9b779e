"""What an agent's tools did, read from its model calls: no instrumentation, any language. Pure.

A reply asks for tools; the next request that carries on the conversation shows what they returned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent_lightning.core.types import ModelCall, ToolCall, ToolStatus

_INVALID = re.compile(
    r"\b(invalid|missing|unexpected|unknown|bad) [\w ]{0,24}(argument|parameter|field|input|keyword)"
    r"|validation error|arguments? (is|are) (not|missing|invalid)|not valid json",
    re.IGNORECASE,
)
_TIMEOUT = re.compile(r"\btime[d]?[ -]?out\b|\btimeouterror\b|deadline exceeded", re.IGNORECASE)
_ERROR = re.compile(r"^\W*(\w*error|\w*exception|traceback|failed|failure|cannot|could not)\b", re.IGNORECASE)
_EMPTY = frozenset(["", "null", "none", "[]", "{}", '""'])
_HEAD = 400
"""Characters of a result that are searched for the words of an error: a long result is one, whatever it quotes."""


def tool_calls(calls: Sequence[ModelCall]) -> tuple[ToolCall, ...]:
    """The tool calls that the replies of `calls` asked for, in order, with what later requests say of their results.

    `calls` are one attempt's, in the order they were made. An id that a later reply uses again is another call: each
    takes the first answer after its own reply.

    Example: a reply with tool call calculator({"expression": "1/0"}), and a next request that ends with
    {"role": "tool", "tool_call_id": "call_0", "content": "error: division by zero"}, give
    ToolCall(name="calculator", status=ToolStatus.ERROR, result="error: division by zero", …).
    """
    asked = [list(_asked(call)) for call in calls]
    if not any(asked):
        return ()
    answers = [_answers(call) for call in calls]
    found: list[ToolCall] = []
    for index, requests in enumerate(asked):
        call = calls[index]
        for number, request in enumerate(requests):
            function = _mapping(request.get("function"))
            identity = str(request.get("id") or "")
            arguments = _text(function.get("arguments"))
            # A conversation is sent whole each time: the first later request that has the id has this call's answer,
            # unless its own reply comes twice in it.
            after = next((i for i in range(index + 1, len(calls)) if identity in answers[i]), None)
            result = None if after is None else answers[after][identity]
            found.append(
                ToolCall(
                    key=call.key,
                    span_id=f"{call.call_id}/{number}",
                    parent_id=call.call_id,
                    call_id=call.call_id,
                    tool_call_id=identity,
                    name=str(function.get("name") or ""),
                    arguments=arguments,
                    result=result or "",
                    status=status_of(arguments, result),
                    started_at=call.ended_at,
                    ended_at=call.ended_at if after is None else max(call.ended_at, calls[after].started_at),
                    source="request",
                )
            )
    return tuple(found)


def status_of(arguments: str, result: str | None) -> ToolStatus:
    """How a tool call went, from its arguments and its result; `result` is None where no request has one.

    Example:

        status_of('{"x": 1}', "3")                    # ok
        status_of('{"x": 1}', "Error: no such file")  # error
        status_of("x=1", "3")                         # invalid_arguments
    """
    if result is None:
        return ToolStatus.UNANSWERED
    try:
        valid = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        valid = False
    if not valid:
        return ToolStatus.INVALID_ARGUMENTS
    text = result.strip()
    if text.lower() in _EMPTY:
        return ToolStatus.EMPTY
    complaint = _complaint(text)
    if complaint is None:
        return ToolStatus.OK
    if _TIMEOUT.search(complaint):
        return ToolStatus.TIMEOUT
    return ToolStatus.INVALID_ARGUMENTS if _INVALID.search(complaint) else ToolStatus.ERROR


def canonical(arguments: str) -> str:
    """Arguments that mean the same have the same text: JSON with sorted keys, or else without outer blanks."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return arguments.strip()


def reply_identity(call: ModelCall) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """What a reply says and asks for, so that two accounts of it can be compared; None where nothing is known of it.

    Example: {"content": " 4 ", "tool_calls": [{"function": {"name": "f", "arguments": "{ }"}}]} gives
    ("4", (("f", "{}"),)).
    """
    reply = _mapping(_json(call.reply))
    asked = [_mapping(request.get("function")) for request in _asked(call)]
    said = _text(reply.get("content")).strip()
    if not said and not asked:
        return None
    return said, tuple((str(one.get("name") or ""), canonical(_text(one.get("arguments")))) for one in asked)


def looks_like_tool_call(call: ModelCall) -> bool:
    """Whether a reply tried to be a tool call and could not be parsed as one.

    Example: content '<tool_call>\\n{"name": "calculator", "arguments": {' and no tool_calls -> True.
    """
    reply = _mapping(_json(call.reply))
    content = reply.get("content")
    if reply.get("tool_calls") or not isinstance(content, str):
        return False
    text = content.strip()
    return "<tool_call>" in text or bool(re.match(r'(```(json)?\s*)?\{\s*"(name|function)"\s*:', text))


def _complaint(text: str) -> str | None:
    """The words in which a result says that it is an error, None where it does not."""
    if text.startswith("{"):
        fields = _mapping(_json(text))
        error = fields.get("error") or fields.get("isError") or fields.get("is_error")
        return f"error: {error} {fields.get('message') or ''}" if error else None
    head = text[:_HEAD]
    return head if _ERROR.match(head) or _TIMEOUT.match(head) else None


def _asked(call: ModelCall) -> Iterator[Mapping[str, Any]]:
    """The tool calls in a reply, in the OpenAI form."""
    if '"tool_calls"' not in call.reply:
        return
    for request in _mapping(_json(call.reply)).get("tool_calls") or ():
        if isinstance(request, Mapping):
            yield request


def _answers(call: ModelCall) -> dict[str, str]:
    """Tool call id -> result, of the tool messages in a request; the last of an id counts."""
    if '"tool_call_id"' not in call.request:
        return {}
    messages = _json(call.request)
    return {
        str(message["tool_call_id"]): _text(message.get("content"))
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, Mapping) and message.get("role") == "tool" and "tool_call_id" in message
    }


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    """Content as text: OpenAI allows a list of parts."""
    if isinstance(value, list):
        return "".join(str(_mapping(part).get("text") or "") for part in value)
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value)
