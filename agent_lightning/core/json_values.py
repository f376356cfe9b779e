"""JSON from outside or for keeping: parsing, depth, text, log-probabilities in it, and streamed chunks joined."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from agent_lightning.core.types import Floats

_ROUNDING = 1e-3  # the log-probability of a certain token may exceed 0 by this much, by rounding


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; None if the text is not JSON, or is nested too deep for the parser."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, Mapping) else {}


def is_deeper(value: Any, limit: int) -> bool:
    """Whether lists, tuples and dicts are nested in each other more than `limit` times. Goes level by level instead of
    calling itself, so that a value made to exhaust a stack cannot exhaust this one.
    Example: {"messages": [{}]} is deeper than 2, and not deeper than 3."""
    level = [value]
    for _ in range(limit + 1):
        containers = [item for item in level if isinstance(item, dict | list | tuple)]
        if not containers:
            return False
        level = [inner for item in containers for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def compact(value: object) -> str:
    """JSON text without spaces. Raises ValueError for numbers that JSON does not have."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def clean_logprobs(values: Sequence[float | None], size: int) -> Floats:
    """Log-probabilities of `size` tokens, float32[size]; NaN for each value that is missing, infinite or above 0. All
    are NaN if there are not exactly `size` values, because nobody could assign them to tokens. Values that exceed 0 by
    rounding become 0.
    Example: clean_logprobs([-0.5, None, 1e-6], 3) -> [-0.5, NaN, 0.0]; clean_logprobs([-0.5], 3) -> three NaN"""
    if len(values) != size:
        return np.full(size, np.nan, np.float32)
    logprob_T = np.array([np.nan if value is None else value for value in values], np.float32)
    logprob_T[np.isinf(logprob_T) | (logprob_T > _ROUNDING)] = np.nan
    return np.minimum(logprob_T, np.float32(0.0))  # NaN stays


def join_chunks(chunks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The response that streamed chunks add up to, in OpenAI's form, as if it had not been streamed.

    Joins chat and text completions, tool calls, and vLLM's token ids and log-probabilities. A choice whose last chunk
    never came has no `finish_reason`.

        {"choices": [{"index": 0, "delta": {"content": "4"}, "token_ids": [7]}]}
        {"choices": [{"index": 0, "delta": {"content": "2"}, "token_ids": [5], "finish_reason": "stop"}]}
        # -> {"choices": [{"index": 0, "message": {"role": "assistant", "content": "42"},
        #                  "token_ids": [7, 5], "finish_reason": "stop"}]}
    """
    response: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        response |= {name: value for name, value in chunk.items() if name != "choices" and value is not None}
        for piece in chunk.get("choices") or ():
            _extend_choice(choices.setdefault(piece.get("index", 0), {}), piece)
    for choice in choices.values():
        message = choice.get("message", {})
        if "tool_calls" in message:
            message["tool_calls"] = [call for _, call in sorted(message["tool_calls"].items())]
    return response | {"choices": [choices[index] for index in sorted(choices)]}


def _extend_choice(choice: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add a chunk's piece of a choice to the pieces before it; tool calls are a dict by their index until the end."""
    for name, value in piece.items():
        if name == "delta":
            message, delta = choice.setdefault("message", {"role": "assistant", "content": ""}), value or {}
            message |= {key: message.get(key, "") + delta[key] for key in ("content", "reasoning") if delta.get(key)}
            for part in delta.get("tool_calls") or ():
                calls = message.setdefault("tool_calls", {})
                call = calls.setdefault(part.get("index", 0), {"id": "", "function": {"name": "", "arguments": ""}})
                call["id"] = part.get("id") or call["id"]
                for key in ("name", "arguments"):
                    call["function"][key] += (part.get("function") or {}).get(key) or ""
        elif name == "text":
            choice["text"] = choice.get("text", "") + (value or "")
        elif name == "token_ids":
            choice["token_ids"] = choice.get("token_ids", []) + (value or [])
        elif name == "logprobs":
            logprobs = choice.setdefault("logprobs", {})
            for key, entries in (value or {}).items():
                if isinstance(entries, list):
                    logprobs[key] = logprobs.get(key, []) + entries
        elif value is not None:
            choice[name] = value
