"""Tool calls, read from the model calls of an agent: this needs no instrumentation and works for any language.

A reply requests tools; the next request of the same conversation contains their results.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent_lightning.core.json_values import as_mapping, parse_json
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
"""Characters of a result that are searched for the words of an error: later ones may quote other errors."""


def tool_calls(calls: Sequence[ModelCall]) -> tuple[ToolCall, ...]:
    """The tool calls in the replies of `calls`, in order, with their results from later requests.

    `calls` are those of one attempt, in the order they were made. If a later reply uses an id again, it is another tool
    call: each takes the first result after its own reply.

    Example: a reply with tool call calculator({"expression": "1/0"}), and a next request that ends with
    {"role": "tool", "tool_call_id": "call_0", "content": "error: division by zero"}, give
    ToolCall(name="calculator", status=ToolStatus.ERROR, result="error: division by zero", …).
    """
    requested = [list(_requested_tools(call)) for call in calls]
    if not any(requested):
        return ()
    results = [_tool_results(call) for call in calls]
    answered = defaultdict[str, list[int]](list)  # id of a tool call -> the calls whose request has its result
    for index, by_id in enumerate(results):
        for identity in by_id:
            answered[identity].append(index)
    tools: list[ToolCall] = []
    for index, call in enumerate(calls):
        for number, request in enumerate(requested[index]):
            function = as_mapping(request.get("function"))
            identity = str(request.get("id") or "")
            arguments = _text(function.get("arguments"))
            # Each request repeats the conversation: the first later request with the id has this call's result, unless
            # the same reply occurs twice in the conversation.
            later = bisect_right(answered[identity], index)
            after = answered[identity][later] if later < len(answered[identity]) else None
            result, has_failed = (None, False) if after is None else results[after][identity]
            tools.append(
                ToolCall(
                    key=call.key,
                    span_id=f"{call.call_id}/{number}",
                    parent_id=call.call_id,
                    call_id=call.call_id,
                    tool_call_id=identity,
                    name=str(function.get("name") or ""),
                    arguments=arguments,
                    result=result or "",
                    status=tool_status(arguments, result, has_failed=has_failed),
                    started_at=call.ended_at,
                    ended_at=call.ended_at if after is None else max(call.ended_at, calls[after].started_at),
                    source="request",
                )
            )
    return tuple(tools)


def tool_status(arguments: str, result: str | None, *, has_failed: bool = False) -> ToolStatus:
    """The status of a tool call, from its arguments and its result; `result` is None if no request contains one, and
    `has_failed` if the request states that the tool failed.

    Example:

        tool_status('{"x": 1}', "3")                    # ok
        tool_status('{"x": 1}', "Error: no such file")  # error
        tool_status("x=1", "3")                         # invalid_arguments
    """
    if result is None:
        return ToolStatus.UNANSWERED
    if not isinstance(parse_json(arguments or "{}"), dict):
        return ToolStatus.INVALID_ARGUMENTS
    text = result.strip()
    if text.lower() in _EMPTY:
        return ToolStatus.ERROR if has_failed else ToolStatus.EMPTY
    if text.startswith("{"):
        fields = as_mapping(parse_json(text))
        error = fields.get("error") or fields.get("isError") or fields.get("is_error")
        complaint = f"error: {error} {fields.get('message') or ''}" if error else ""
    else:
        head = text[:_HEAD]
        complaint = head if _ERROR.match(head) or _TIMEOUT.match(head) else ""
    if not complaint:
        return ToolStatus.ERROR if has_failed else ToolStatus.OK
    if _TIMEOUT.search(complaint):
        return ToolStatus.TIMEOUT
    return ToolStatus.INVALID_ARGUMENTS if _INVALID.search(complaint) else ToolStatus.ERROR


def canonical_arguments(arguments: str) -> str:
    """Arguments in a form that is equal if they mean the same: JSON with sorted keys, or else the stripped text."""
    try:
        return json.dumps(json.loads(arguments), sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return arguments.strip()


def reply_identity(call: ModelCall) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """The text and tool calls of a reply, to compare two records of it; None if the reply is empty or unknown.

    Example: {"content": " 4 ", "tool_calls": [{"function": {"name": "f", "arguments": "{ }"}}]} gives
    ("4", (("f", "{}"),)).
    """
    text = _text(as_mapping(parse_json(call.reply)).get("content")).strip()
    functions = [as_mapping(request.get("function")) for request in _requested_tools(call)]
    if not text and not functions:
        return None
    return text, tuple((str(f.get("name") or ""), canonical_arguments(_text(f.get("arguments")))) for f in functions)


class ToolCallIndex:
    """The tool calls in the replies of an attempt, to find the tool call that a span of a tool describes. Each tool
    call matches at most one span."""

    def __init__(self, calls: Sequence[ModelCall]) -> None:
        position = {call.call_id: index for index, call in enumerate(calls)}
        self._tools = tool_calls(calls)
        self._positions = [position[tool.call_id] for tool in self._tools]
        """Index of each tool's model call in `calls`."""
        self._waiting: dict[tuple[str, ...], list[int]] = {}
        """What a span may say of its tool -> indices in `_tools` of the tool calls that no span has matched."""
        for index, tool in enumerate(self._tools):
            for key in _index_keys(tool):
                self._waiting.setdefault(key, []).append(index)

    def take(self, identity: str, name: str, arguments: str, before: int, cause: str) -> ToolCall | None:
        """Find the tool call of a span, and match it with no other span from now on. It is the newest tool call with
        the id `identity`, or else the oldest with the same name and arguments, or else the only one with the name. Only
        the first `before` calls are searched, or only the call `cause` if it is given."""
        end = len(self._tools) if cause else bisect_left(self._positions, before)

        def waiting(*key: str) -> tuple[list[int], int]:
            """Indices of tool calls with this key, and how many of them may be taken."""
            indices = self._waiting.get((*key, cause), [])
            return indices, bisect_left(indices, end)

        same_id, num_same_id = waiting("id", identity)
        same_use, num_same_use = waiting("use", name, canonical_arguments(arguments))
        same_name, num_same_name = waiting("name", name)
        if identity and num_same_id:
            match = same_id[num_same_id - 1]
        elif num_same_use:
            match = same_use[0]
        elif num_same_name == 1:
            match = same_name[0]
        else:
            return None
        for key in _index_keys(self._tools[match]):
            del self._waiting[key][bisect_left(self._waiting[key], match)]
        return self._tools[match]

    def unmatched(self) -> tuple[ToolCall, ...]:
        """The tool calls that no span has matched."""
        return tuple(self._tools[index] for index in self._waiting.get(("any", ""), ()))


def _index_keys(tool: ToolCall) -> list[tuple[str, ...]]:
    """What spans may say of a tool call, each with and without the model call that requested it."""
    use = "use", tool.name, canonical_arguments(tool.arguments)
    return [
        (*key, cause)
        for key in (("any",), ("id", tool.tool_call_id), ("name", tool.name), use)
        for cause in {"", tool.call_id}
    ]


def looks_like_tool_call(call: ModelCall) -> bool:
    """Whether a reply looks like a tool call that the engine could not parse.

    Example: content '<tool_call>\\n{"name": "calculator", "arguments": {' and no tool_calls -> True.
    """
    reply = as_mapping(parse_json(call.reply))
    content = reply.get("content")
    if reply.get("tool_calls") or not isinstance(content, str):
        return False
    text = content.strip()
    return "<tool_call>" in text or bool(re.match(r'(```(json)?\s*)?\{\s*"(name|function)"\s*:', text))


def _requested_tools(call: ModelCall) -> Iterator[Mapping[str, Any]]:
    """The tool calls in a reply, in OpenAI's form."""
    if '"tool_calls"' not in call.reply:
        return
    requests = as_mapping(parse_json(call.reply)).get("tool_calls")
    for request in requests if isinstance(requests, list) else ():
        if isinstance(request, Mapping):
            yield request


def _tool_results(call: ModelCall) -> dict[str, tuple[str, bool]]:
    """Tool call id -> result, and whether the message states that the tool failed, from the tool messages in a request;
    if an id occurs twice, the last result counts."""
    if '"tool_call_id"' not in call.request:
        return {}
    messages = parse_json(call.request)
    return {
        str(message["tool_call_id"]): (_text(message.get("content")), message.get("status") == "error")
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, Mapping) and message.get("role") == "tool" and "tool_call_id" in message
    }


def _text(value: Any) -> str:
    """Content as text; OpenAI allows a list of parts."""
    if isinstance(value, list):
        return "".join(str(as_mapping(part).get("text") or "") for part in value)
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value)
