"""The fields of a single span, read from the attributes of any instrumentor; `attributes` has the table."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agent_lightning.core.json_values import as_mapping, clean_logprobs, parse_json
from agent_lightning.core.types import Floats, Ints
from agent_lightning.spans.attributes import FIELDS
from agent_lightning.spans.message_forms import Message, Notes, parse_value, to_text
from agent_lightning.spans.messages import read_reply, read_request


def values(attributes: Mapping[str, Any], field: str) -> Iterator[Any]:
    """All values that the attributes have for a field (a key of FIELDS), the best first."""
    for name in FIELDS[field]:
        if name == "agentlightning.link.*":
            links = map(as_mapping, unflattened(attributes, "agentlightning.link."))
            value = next((link.get("value_match") for link in links if link.get("key_match") == "span_id"), None)
        elif name.endswith(".*"):
            value = unflattened(attributes, name[:-1])
        elif (value := attributes.get(name)) is None:
            continue
        elif name in ("gen_ai.events", "events"):
            value = _from_events(parse_value(value), field)
        elif name in _JSON and isinstance(value, str) and value.startswith('"'):
            value = parse_json(value) or value
        if value is not None and value != "" and value != []:
            yield value


_JSON = ("ai.toolCall.result", "mlflow.spanInputs", "mlflow.spanOutputs")
"""Attributes whose text is always JSON: text is in quotation marks."""


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
        name = str(event.get("event.name"))
        if field not in ("request", "reply"):
            continue
        if role := _EVENT.fullmatch(name):
            calls, content = parse_value(event.get("tool_calls")), _of_strands(event.get("content"))
            identity = event.get("id") or ""
            messages.append({"role": role[1], "content": content, "tool_calls": calls, "tool_call_id": identity})
        elif name == "gen_ai.choice":
            reply = _of_strands(event.get("message"))
            fields = as_mapping(parse_value(reply)) or {"content": reply}
            return messages if field == "request" else [{**event, **fields, "role": "assistant"}]
    # Logfire has the items of OpenAI's Responses as the last messages of the assistant, without a choice.
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end] if field == "request" else messages[end:]


def _of_strands(text: Any) -> Any:
    """A list of Bedrock's parts, which Strands writes as JSON text into its events; any other value unchanged."""
    parts, kinds = parse_value(text), {"text", "toolUse", "toolResult", "reasoningContent", "image", "document"}
    is_parts = isinstance(parts, list) and all(len(as_mapping(p)) == 1 and set(p) <= kinds for p in parts)
    return parts if is_parts else text


def unflattened(attributes: Mapping[str, Any], prefix: str) -> list[Any]:
    """A list whose items are spread over several attributes.

    Example: unflattened({"p.0.role": "user", "p.0.content": "hi"}, "p.") -> [{"role": "user", "content": "hi"}]
    """
    tree: dict[str, Any] = {}
    for name in [name for name in attributes if name.startswith(prefix)]:
        path = name[len(prefix) :].split(".")
        if not _is_path(path):
            continue
        at = tree
        for part in path[:-1]:
            inner = at.setdefault(part, {})
            at = inner if isinstance(inner, dict) else {}
        at[path[-1]] = attributes[name]
    items = _listed(tree)
    return items if isinstance(items, list) else []


def _is_path(path: Sequence[str]) -> bool:
    return len(path) <= _MAX_PATH and path[0].isdecimal()


def unread_names(attributes: Mapping[str, Any]) -> int:
    """How many attributes of a list have names that `unflattened` does not read: they go too deep, or they are a
    reward's and begin with no number."""
    names = [(name, prefix) for name in attributes for prefix in _PREFIXES if name.startswith(prefix)]
    paths = [(name[len(prefix) :].split("."), prefix) for name, prefix in names]
    return sum(len(path) > _MAX_PATH or ("reward" in prefix and not _is_path(path)) for path, prefix in paths)


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


_HELD: defaultdict[str, set[str]] = defaultdict(set)
"""Attribute, or the prefix of a name that ends in ".*" -> the fields that it may hold."""
for _field, _names in FIELDS.items():
    for _name in _names:
        _HELD[_name.removesuffix("*")].add(_field)
_PREFIXES = [name for name in _HELD if name.endswith(".")]


def join(accounts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The attributes of the spans that describe one event as those of one span; each field is taken from the first span
    that has it. The time is linear in the number of attributes."""
    joined, known = dict(accounts[0]), set[str]()
    for attributes in accounts if len(accounts) > 1 else ():
        added = {name: _fields_in(name, value) - known for name, value in attributes.items()}
        joined |= {name: attributes[name] for name, fields in added.items() if fields}
        known = known.union(*added.values())
    return joined


def _fields_in(attribute: str, value: Any) -> set[str]:
    """The fields that an attribute holds: none if it is empty."""
    if value in (None, "", []):
        return set()
    return _HELD.get(attribute, set()).union(*(_HELD[name] for name in _PREFIXES if attribute.startswith(name)))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The request of a model call, and the definitions of the tools that it offers. If the server keeps the messages
    before it, `previous` is the id of the reply, and `conversation` that of the conversation, that it continues."""

    messages: list[Message] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    previous: str = ""
    conversation: str = ""
    is_whole: bool = True  # every part of the messages is understood


def request_of(accounts: Sequence[Mapping[str, Any]], refused: Counter[str]) -> Request:
    """The request of a model call. `accounts` are the attributes of all spans that describe the call, the innermost
    first: messages with structure count more than text, wherever they stand; then the first account counts."""
    given = [parse_value(value) for attributes in accounts for value in values(attributes, "request")]
    _, best, is_whole = _best(read_request, given, refused)
    messages, tools = best or (list[Message](), [])
    refused["repaired: a request that is not understood"] += best is None and any(given)
    offered = next(filter(None, (offered_of(attributes, ()) for attributes in accounts)), None) or offered_of({}, tools)
    system = next(filter(None, (to_text(first(attributes, "system prompt")) for attributes in accounts)), "")
    if messages and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    # The ids of the reply and of the conversation that the request continues on the server, as OpenAI writes them.
    parameters = [parse_value(value) for attributes in accounts for value in values(attributes, "parameters")]
    replies, conversations = [first(attributes, "previous reply") for attributes in accounts], list[Any]()
    for value in map(as_mapping, (*given, *parameters)):
        replies.append(value.get("previous_response_id"))
        conversations.append(as_mapping(value.get("conversation")).get("id") or value.get("conversation"))
    for name in (str(first(attributes, "conversation")) for attributes in accounts):
        (replies if name.startswith("resp_") else conversations).append(name)
    previous = next((name for name in replies if name and isinstance(name, str)), "")
    known = (name for name in conversations if isinstance(name, str) and name.startswith(("conv_", "thread_")))
    return Request(messages=messages, tools=offered, previous=previous, conversation=next(known, ""), is_whole=is_whole)


def _best(read: Callable[..., Any], given: Sequence[Any], refused: Counter[str]) -> tuple[Any, Any, bool]:
    """The best of several values that hold the same messages, what is read from it, and whether that is all of it; None
    if nothing is understood. A structure is better than text, complete messages are better than others, and a reply
    with tool calls is better than a reply without. Counts what is lost in the best."""
    best: tuple[tuple[bool, ...], Any, Any, Notes] = ((), None, None, Notes())
    for value in given:
        reading = read(value, notes=(notes := Notes()))
        is_text = isinstance(value, str)
        if reading is None or (is_text and value.strip().lower() in ("none", "null")):  # nothing, as Python prints it
            continue
        rank = (not is_text, not notes.unread, read is read_request or "tool_calls" in reading)
        best = (rank, value, reading, notes) if rank > best[0] else best
        if all(rank):
            break  # nothing can be better
    for reason, names in (("not understood", best[3].unread), ("not text", best[3].media)):
        refused.update(named(f"repaired: a part that is {reason}", name) for name in names)
    return best[1], best[2], not best[3].unread


def named(reason: str, name: str) -> str:
    """A reason with the name of what it is about, which may be anything, in parentheses.

    Example: named("repaired: a part that is not understood", "compaction")
    -> "repaired: a part that is not understood (compaction)"
    """
    return f"{reason} ({name if re.fullmatch(r'[A-Za-z0-9_.:-]{1,40}', name) else '?'})"


def has_any(accounts: Sequence[Mapping[str, Any]], side: str) -> bool:
    """Whether one of the spans of a model call has a value for its request, or for its reply."""
    names = [name for name in FIELDS if name.partition("'s ")[0] == side]
    return any(first(attributes, name) is not None for attributes in accounts for name in names)


def unread_messages(accounts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of attributes that hold chat messages and are in no table; at most three."""
    names = []
    for name, value in (item for attributes in accounts for item in attributes.items()):
        content = None if _fields_in(name, value) else parse_value(value)
        if isinstance(content, list | Mapping) and read_request(content, notes := Notes()) and not notes.unread:
            names.append(name)
    return names[:3]


_SCHEMAS = ("parameters", "inputSchema", "input_schema", "parameters_json_schema", "parametersJsonSchema")


def offered_of(attributes: Mapping[str, Any], tools: Sequence[Any]) -> list[Any]:
    """The definitions of the tools that a request offers, in OpenAI's form, each once. They come from the attributes,
    or else from `tools`, the definitions among the messages."""
    given = parse_value(next(values(attributes, "tools offered"), None)) or tools
    if isinstance(given, Mapping):  # of pydantic-ai
        given = given.get("function_tools")
    offered: dict[str, Any] = {}
    for definition in given if isinstance(given, list | tuple) else ():
        definition = as_mapping(parse_value(as_mapping(definition).get("tool", definition)))
        definition = as_mapping(parse_value(definition.get("json_schema", definition)))
        function = as_mapping(definition.get("function")) or as_mapping(definition.get("toolSpec")) or definition
        schema: Any = next((function[k] for k in _SCHEMAS if function.get(k)), {})
        name = str(function.get("name") or "")
        if name:
            described = {"description": function["description"]} if function.get("description") else {}
            schema = as_mapping(schema).get("json", schema)  # of Bedrock
            plain = {"name": name, **described, "parameters": parse_value(schema)}
            offered.setdefault(name, {"type": "function", "function": plain})
    return list(offered.values())


def reply_of(
    accounts: Sequence[Mapping[str, Any]], before: Sequence[Message], refused: Counter[str]
) -> tuple[Message | None, bool]:
    """The reply as a message, None if there is none or it is not understood; and whether all of it is understood.
    `accounts` are as in `request_of`; `before` is the request."""
    given: list[Any] = []
    for attributes in accounts:
        text, calls = first(attributes, "reply's text"), parse_value(first(attributes, "reply's tool calls"))
        thought = to_text(first(attributes, "reply's reasoning"))
        message: dict[str, Any] = {"role": "assistant"} | ({"content": to_text(text)} if text else {})
        message |= {"reasoning_content": thought} if thought else {}
        if (isinstance(calls, list) and calls) or len(message) > 1:
            given.append(message | ({"tool_calls": calls} if isinstance(calls, list) else {}))
        given += map(parse_value, values(attributes, "reply"))
    value, reply, is_whole = _best(read_reply, given, refused)
    refused["repaired: a reply that is not understood"] += reply is None and any(given)
    if reply and "tool_calls" in reply and any("tool_calls" in message for message in before):
        reply = read_reply(value, before)  # with ids that no call before has
    return reply, is_whole


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
    replies = (as_mapping(parse_value(value)).get(name) for value in values(attributes, "reply"))
    return str(first(attributes, field) or next(filter(None, replies), ""))


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
