"""The fields of a single span, read from the attributes of any instrumentor; `attributes` has the table."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from agent_lightning.core.json_values import as_mapping, clean_logprobs
from agent_lightning.core.types import Floats, Ints
from agent_lightning.spans.attributes import FIELDS
from agent_lightning.spans.message_forms import Message, parse_value, to_text
from agent_lightning.spans.messages import read_reply, read_request


def values(attributes: Mapping[str, Any], field: str) -> Iterator[Any]:
    """All values that the attributes have for a field (a key of FIELDS), the best first."""
    for name in FIELDS[field]:
        if name == "gen_ai.events":
            value = _from_events(attributes.get(name), field)
        elif name == "agentlightning.link.*":
            links = map(as_mapping, unflattened(attributes, "agentlightning.link."))
            value = next((link.get("value_match") for link in links if link.get("key_match") == "span_id"), None)
        else:
            value = unflattened(attributes, name[:-1]) if name.endswith(".*") else attributes.get(name)
        if value is not None and value != "" and value != []:
            yield value


def first(attributes: Mapping[str, Any], field: str) -> Any:
    """The best value that the attributes have for a field (a key of FIELDS); None if they have none.

    Example: first({"gen_ai.request.model": "gpt-4o"}, "model") -> "gpt-4o"
    """
    return next(values(attributes, field), None)


_EVENT = re.compile(r"gen_ai\.(system|user|assistant|tool)\.message")


def _from_events(events: Any, field: str) -> Any:
    """The messages among a span's events: an event holds all of them, or each has an event of its own."""
    messages: list[Any] = []
    for event in map(as_mapping, events if isinstance(events, list) else ()):
        all_messages = next((event[name] for name in FIELDS[field] if event.get(name)), None)
        if all_messages is not None:
            return all_messages
        role, is_choice = _EVENT.fullmatch(str(event.get("event.name"))), event.get("event.name") == "gen_ai.choice"
        if role and field == "request":
            fields = {"content": event.get("content"), "tool_calls": parse_value(event.get("tool_calls"))}
            messages.append({"role": role[1], **fields, "tool_call_id": event.get("id") or ""})
        elif is_choice and field == "reply":
            messages.append({**event, **as_mapping(parse_value(event.get("message"))), "role": "assistant"})
    return messages


def unflattened(attributes: Mapping[str, Any], prefix: str) -> list[Any]:
    """A list whose items are spread over several attributes.

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
"""Most parts of a name that `unflattened` reads."""
_SHELLS = ("message", "message_content", "tool_call")
"""Names that OpenInference puts around each item of a list."""


def _listed(value: Any) -> Any:
    """The tree with lists in place of dicts whose keys are numbers, and without shells around items."""
    if not isinstance(value, dict):
        return value
    if value and all(name.isdecimal() for name in value):
        # By number, without int(), which refuses more than 4,300 digits.
        by_number = sorted(value, key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))
        return [_listed(value[name]) for name in by_number]
    if len(value) == 1 and next(iter(value)) in _SHELLS and isinstance(inner := next(iter(value.values())), dict):
        return _listed(inner)
    return {name: _listed(part) for name, part in value.items()}


def has(attributes: Mapping[str, Any], name: str) -> bool:
    """Whether an attribute is present and not empty; `name` may end in ".*"."""
    if name.endswith(".*"):
        return any(attribute.startswith(name[:-1]) for attribute in attributes)
    return attributes.get(name) not in (None, "", [])


def matches(attribute: str, name: str) -> bool:
    """Whether `name`, which may end in ".*", stands for an attribute."""
    return attribute.startswith(name[:-1]) if name.endswith(".*") else attribute == name


def number(value: Any) -> float:
    """The value as a number, also from text; NaN if it is no number."""
    try:
        return math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def integer(value: Any) -> int:
    """The value as an integer, rounded towards 0; 0 if it is no number."""
    return int(number(value)) if math.isfinite(number(value)) else 0


def dump(value: Any) -> str:
    """The value as JSON text in the form of ModelCall.request and ModelCall.reply."""
    return json.dumps(value, ensure_ascii=False)


def request_of(attributes: Mapping[str, Any], refused: Counter[str]) -> tuple[list[Message], list[Any]]:
    """The messages of the request, and the definitions of the tools that it offers."""
    given = list(values(attributes, "request"))
    request = next((request for request in map(read_request, given) if request is not None), None)
    if request is None:
        refused["repaired: a request that is not understood"] += any(given)
        return [], offered_of(attributes, ())
    messages, tools = request
    system = to_text(first(attributes, "system prompt"))
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages, offered_of(attributes, tools)


def offered_of(attributes: Mapping[str, Any], tools: Sequence[Any]) -> list[Any]:
    """The definitions of the tools that a request offers, in OpenAI's form, each once. They come from the attributes,
    or else from `tools`, the definitions among the messages."""
    given = parse_value(next(values(attributes, "tools offered"), None)) or tools
    offered: dict[str, Any] = {}
    for definition in given if isinstance(given, list | tuple) else ():
        definition = as_mapping(parse_value(as_mapping(definition).get("tool", definition)))
        definition = as_mapping(parse_value(definition.get("json_schema", definition)))
        function = as_mapping(definition.get("function")) or definition
        schema: Any = next((function[k] for k in ("parameters", "inputSchema", "input_schema") if function.get(k)), {})
        name = str(function.get("name") or "")
        if name:
            described = {"description": function["description"]} if function.get("description") else {}
            plain = {"name": name, **described, "parameters": parse_value(schema)}
            offered.setdefault(name, {"type": "function", "function": plain})
    return list(offered.values())


def reply_of(attributes: Mapping[str, Any], request: Sequence[Message], refused: Counter[str]) -> Message | None:
    """The reply as a message; None if there is none, or it is not understood."""
    text, calls = first(attributes, "reply's text"), parse_value(first(attributes, "reply's tool calls"))
    given = list(values(attributes, "reply"))
    message: dict[str, Any] = {"role": "assistant"} | ({"content": to_text(text)} if text else {})
    if isinstance(calls, list) and calls:
        given.insert(0, {**message, "tool_calls": calls})
    elif text:
        given.insert(0, message)
    reply = next((reply for reply in (read_reply(value, request) for value in given) if reply is not None), None)
    refused["repaired: a reply that is not understood"] += reply is None and any(given)
    return reply


def finish_reason_of(attributes: Mapping[str, Any]) -> str:
    """The finish reason of the reply, in OpenAI's words; "" if it is unknown."""
    value = parse_value(first(attributes, "finish reason"))
    if value is None:
        reply = as_mapping(parse_value(first(attributes, "reply")))
        choices = reply.get("choices")
        value = as_mapping(choices[0] if isinstance(choices, list) and choices else reply).get("finish_reason")
    while isinstance(value, list):
        value = value[0] if value else None
    word = str(value or "").lower().replace("-", "_")
    return {"tool_call": "tool_calls", "max_tokens": "length", "end_turn": "stop"}.get(word, word)


def tokens_of(attributes: Mapping[str, Any], refused: Counter[str]) -> tuple[Ints, Ints, Floats]:
    """prompt_T, response_T and logprob_T: empty if the trace has no ids; NaN for a token without log-probability."""
    prompt, response = (_items(first(attributes, name)) for name in ("prompt token ids", "reply token ids"))
    if any(not isinstance(token, int) or not 0 <= token < 2**31 for token in (*prompt, *response)):
        refused["repaired: token ids out of any vocabulary"] += 1
        prompt, response = [], []
    entries = _items(first(attributes, "log-probabilities"))
    logprobs = [number(entry.get("logprob") if isinstance(entry, Mapping) else entry) for entry in entries]
    logprob_T = clean_logprobs(logprobs, len(response))
    refused["repaired: log-probabilities missing"] += bool(np.isnan(logprob_T).any())
    return np.array(prompt, np.int32), np.array(response, np.int32), logprob_T


def _items(value: Any) -> list[Any]:
    """The items of a list, which may be JSON text or inside another list."""
    value = parse_value(value)
    while isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]
    return list(value) if isinstance(value, list | tuple) else []


def stated_or_replied(attributes: Mapping[str, Any], field: str, name: str) -> str:
    """The text of a field, or else of the key `name` in the server's reply; "" if neither is known."""
    return str(first(attributes, field) or as_mapping(parse_value(first(attributes, "reply"))).get(name) or "")


_AGENT_NAME = re.compile(r"(?:agent_run|invoke_agent)\s+\[?(.+?)\]?|(.+)\.(?:_execute_core|agent|run)")
_CREW_ROLE = re.compile(r"\brole='([^']+)'")


def agent_name_of(name: str, attributes: Mapping[str, Any]) -> str:
    """The name of the agent whose work a span describes; `name` is the span's name.

    Example: agent_name_of("invoke_agent writer", {}) -> "writer"
    """
    if is_graph_node(name, attributes):
        return langchain_agent(attributes) or name
    role = _CREW_ROLE.search(str(attributes.get("input.value"))) if name == "Task._execute_core" else None
    stated = first(attributes, "agent") or (role and role[1])
    in_name = _AGENT_NAME.fullmatch(name)
    return str(stated or (in_name and (in_name[1] or in_name[2])) or name)


def langchain_agent(attributes: Mapping[str, Any]) -> str:
    """The name given to LangChain's `create_agent`; the nodes of its graph are all called "model"."""
    return str(as_mapping(parse_value(attributes.get("metadata"))).get("lc_agent_name") or "")


def is_graph_node(name: str, attributes: Mapping[str, Any]) -> bool:
    """Whether a span is LangGraph's span of a node: then it has the node's name."""
    metadata = as_mapping(parse_value(attributes.get("metadata"))).get("langgraph_node")
    return name in (first(attributes, "graph node"), metadata)
