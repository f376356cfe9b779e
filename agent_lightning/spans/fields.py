"""What the attributes of one span say, whoever wrote them: the fields of `attributes.FIELDS`. Pure."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from agent_lightning.core.types import Floats, Ints
from agent_lightning.spans.attributes import FIELDS
from agent_lightning.spans.forms import Message, as_mapping, parsed, text_of
from agent_lightning.spans.messages import answer, conversation


def values(attributes: Mapping[str, Any], what: str) -> Iterator[Any]:
    """What the attributes of a field hold, the best first."""
    for name in FIELDS[what]:
        value = _value(attributes, name, what)
        if value is not None and value != "" and value != []:
            yield value


def first(attributes: Mapping[str, Any], what: str) -> Any:
    """The best that the attributes have of a field; None where there is none.

    Example: first({"gen_ai.request.model": "gpt-4o"}, "model") -> "gpt-4o"
    """
    return next(values(attributes, what), None)


def _value(attributes: Mapping[str, Any], name: str, what: str) -> Any:
    if name == "gen_ai.events":
        return _from_events(attributes.get(name), what)
    if name == "agentlightning.link.*":
        links = map(as_mapping, unflattened(attributes, "agentlightning.link."))
        return next((link.get("value_match") for link in links if link.get("key_match") == "span_id"), None)
    if name.endswith(".*"):
        return unflattened(attributes, name[:-1])
    return attributes.get(name)


_EVENT = re.compile(r"gen_ai\.(system|user|assistant|tool)\.message")


def _from_events(events: Any, what: str) -> Any:
    """Messages that are a span's events: one event with all of them, or one for each."""
    messages: list[Any] = []
    for event in map(as_mapping, events if isinstance(events, list) else ()):
        whole = next((event[name] for name in FIELDS[what] if event.get(name)), None)
        if whole is not None:
            return whole
        found, choice = _EVENT.fullmatch(str(event.get("event.name"))), event.get("event.name") == "gen_ai.choice"
        if found and what == "request":
            fields = {"content": event.get("content"), "tool_calls": parsed(event.get("tool_calls"))}
            messages.append({"role": found[1], **fields, "tool_call_id": event.get("id") or ""})
        elif choice and what == "reply":
            messages.append({**event, **as_mapping(parsed(event.get("message"))), "role": "assistant"})
    return messages


def unflattened(attributes: Mapping[str, Any], prefix: str) -> list[Any]:
    """The list whose items are spread over attributes.

    Example: unflattened({"p.0.role": "user", "p.0.content": "hi"}, "p.") -> [{"role": "user", "content": "hi"}]
    """
    tree: dict[str, Any] = {}
    for name, value in attributes.items():
        path = name.removeprefix(prefix).split(".")
        if not name.startswith(prefix) or len(path) > _MAX_PATH or not path[0].isdecimal():
            continue
        at = tree
        for part in path[:-1]:
            inner = at.setdefault(part, {})
            at = inner if isinstance(inner, dict) else {}
        at[path[-1]] = value
    items = _listed(tree)
    return items if isinstance(items, list) else []


_MAX_PATH = 12
_SHELLS = ("message", "message_content", "tool_call")


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(name.isdecimal() for name in value):
        return [_listed(value[name]) for name in sorted(value, key=int)]
    if len(value) == 1 and next(iter(value)) in _SHELLS and isinstance(inner := next(iter(value.values())), dict):
        return _listed(inner)
    return {name: _listed(part) for name, part in value.items()}


def has(attributes: Mapping[str, Any], name: str) -> bool:
    """Whether an attribute is there and not empty; `name` may end in ".*"."""
    if name.endswith(".*"):
        return any(one.startswith(name[:-1]) for one in attributes)
    return attributes.get(name) not in (None, "", [])


def matches(attribute: str, name: str) -> bool:
    """Whether an attribute is the one, or one of those, that `name` means."""
    return attribute.startswith(name[:-1]) if name.endswith(".*") else attribute == name


def number(value: Any) -> float:
    """A number, also as text; NaN where it is none."""
    try:
        return math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def whole_number(value: Any) -> int:
    """As `number`, without what is behind the point; 0 where it is none."""
    found = number(value)
    return int(found) if math.isfinite(found) else 0


def dump(value: Any) -> str:
    """JSON text, as `ModelCall` has it."""
    return json.dumps(value, ensure_ascii=False)


def request_of(attributes: Mapping[str, Any], refused: Counter[str]) -> tuple[list[Message], list[Any]]:
    """The messages that were sent, and the tools offered."""
    given = list(values(attributes, "request"))
    found = next((one for one in map(conversation, given) if one is not None), None)
    if found is None:
        refused["repaired: a request that is not understood"] += any(given)
        return [], offered_of(attributes, ())
    messages, tools = found
    system = text_of(first(attributes, "system prompt"))
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages, offered_of(attributes, tools)


def offered_of(attributes: Mapping[str, Any], tools: Sequence[Any]) -> list[Any]:
    """Definitions of tools in OpenAI's form, each once."""
    given = parsed(next(values(attributes, "tools offered"), None)) or tools
    found: dict[str, Any] = {}
    for one in given if isinstance(given, list | tuple) else ():
        one = as_mapping(parsed(as_mapping(one).get("tool", one)))
        one = as_mapping(parsed(one.get("json_schema", one)))
        function = as_mapping(one.get("function")) or one
        schema: Any = next((function[k] for k in ("parameters", "inputSchema", "input_schema") if function.get(k)), {})
        name = str(function.get("name") or "")
        if name:
            described = {"description": function["description"]} if function.get("description") else {}
            plain = {"name": name, **described, "parameters": parsed(schema)}
            found.setdefault(name, {"type": "function", "function": plain})
    return list(found.values())


def reply_of(attributes: Mapping[str, Any], request: Sequence[Message], refused: Counter[str]) -> Message | None:
    """The message that was replied; None where there is none, or it is not understood."""
    text, calls = first(attributes, "reply's text"), parsed(first(attributes, "reply's tool calls"))
    said: dict[str, Any] = {"role": "assistant", "content": text_of(text)} if text else {"role": "assistant"}
    told = [{**said, "tool_calls": calls}] if isinstance(calls, list) and calls else [said] if text else []
    given = [*told, *values(attributes, "reply")]
    found = next((one for one in (answer(value, request) for value in given) if one is not None), None)
    refused["repaired: a reply that is not understood"] += found is None and any(given)
    return found


def finish_reason_of(attributes: Mapping[str, Any]) -> str:
    """Why the reply ended, in OpenAI's words; "" where nothing says so."""
    value = parsed(first(attributes, "finish reason"))
    if value is None:
        reply = as_mapping(parsed(first(attributes, "reply")))
        choices = reply.get("choices")
        value = as_mapping(choices[0] if isinstance(choices, list) and choices else reply).get("finish_reason")
    while isinstance(value, list):
        value = value[0] if value else None
    word = str(value or "").lower().replace("-", "_")
    return {"tool_call": "tool_calls", "max_tokens": "length", "end_turn": "stop"}.get(word, word)


def tokens_of(attributes: Mapping[str, Any], refused: Counter[str]) -> tuple[Ints, Ints, Floats]:
    """prompt_T, response_T and logprob_T: empty where the trace has no ids, NaN where it has no log-probability."""
    prompt, response = (_numbers(first(attributes, name)) for name in ("prompt token ids", "reply token ids"))
    if any(not isinstance(one, int) or not 0 <= one < 2**31 for one in (*prompt, *response)):
        refused["repaired: token ids out of any vocabulary"] += 1
        prompt, response = [], []
    logprobs = [_logprob(one) for one in _numbers(first(attributes, "log-probabilities"))]
    if len(logprobs) != len(response):
        logprobs = [math.nan] * len(response)
    refused["repaired: log-probabilities missing"] += any(map(math.isnan, logprobs))
    return np.array(prompt, np.int32), np.array(response, np.int32), np.array(logprobs, np.float32)


def _numbers(value: Any) -> list[Any]:
    value = parsed(value)
    while isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]
    return list(value) if isinstance(value, list | tuple) else []


def _logprob(value: Any) -> float:
    found = number(value.get("logprob") if isinstance(value, Mapping) else value)
    return found if found <= 0 and math.isfinite(found) else math.nan


def reply_id_of(attributes: Mapping[str, Any]) -> str:
    """The id of a reply, as its server gave it; "" where nothing says so."""
    return str(first(attributes, "reply id") or as_mapping(parsed(first(attributes, "reply"))).get("id") or "")


def model_of(attributes: Mapping[str, Any]) -> str:
    """The model that replied, or else that was asked for; "" where nothing says so."""
    return str(first(attributes, "model") or as_mapping(parsed(first(attributes, "reply"))).get("model") or "")


_AGENT_NAME = re.compile(r"(?:agent_run|invoke_agent)\s+\[?(.+?)\]?|(.+)\.(?:_execute_core|agent|run)")
_CREW_ROLE = re.compile(r"\brole='([^']+)'")


def agent_name_of(name: str, attributes: Mapping[str, Any]) -> str:
    """What the agent is called of whose work a span is.

    Example: agent_name_of("invoke_agent writer", {}) -> "writer"
    """
    if is_graph_node(name, attributes):
        return langchain_agent(attributes) or name
    role = _CREW_ROLE.search(str(attributes.get("input.value"))) if name == "Task._execute_core" else None
    said = first(attributes, "agent") or (role and role[1])
    found = _AGENT_NAME.fullmatch(name)
    return str(said or (found and (found[1] or found[2])) or name)


def langchain_agent(attributes: Mapping[str, Any]) -> str:
    """The name that LangChain's `create_agent` was given; the nodes of its graph are all called "model"."""
    return str(as_mapping(parsed(attributes.get("metadata"))).get("lc_agent_name") or "")


def is_graph_node(name: str, attributes: Mapping[str, Any]) -> bool:
    """Whether a span is LangGraph's of a node, which has the node's name."""
    metadata = as_mapping(parsed(attributes.get("metadata"))).get("langgraph_node")
    return name in (first(attributes, "graph node"), metadata)
