"""What the engine is asked, and what it answered: its JSON, split into what an agent sees and exact arrays. Pure.

The rule for sampling: in training the policy's sampling parameters govern (what the agent asks for is replaced or,
where the policy has no word on it, left out); in validation the agent's own parameters are respected and the policy's
fill the gaps. In both the smaller `max_tokens` wins. It is the same for every wire format: they all become the one
request that is made here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent_lightning.core.types import Floats, Ints, Split

MAX_TOKENS = ("max_tokens", "max_completion_tokens")
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "min_tokens",
    "seed",
)
"""What an agent may not choose in training: the learner would believe in another distribution than was sampled, and
with one seed all rollouts of a group would be the same."""
_NEVER = ("stream_options", "request_id", "use_beam_search")
"""What no agent may choose: the gateway's own, and what leaves no log-probabilities."""
CUT = "cancelled"
"""The finish reason of a choice that the agent left before its end."""
_IDS = ("token_ids", "prompt_token_ids", "prompt_logprobs")
_END = ("stop_reason", "finish_reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the engine read and sampled for one choice of a reply."""

    prompt_T: Ints
    response_T: Ints
    logprob_T: Floats
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An engine's answer: the reply as OpenAI JSON, and exactly what was read and sampled."""

    reply: Mapping[str, Any]
    """Without token ids; log-probabilities as the engine gave them."""
    choices: tuple[Choice, ...]
    policy_version: int
    last_version: int | None = None
    """That at its end, where an update came between; None: one version answered it all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a streamed answer: one chunk of the engine's own JSON, token ids and log-probabilities in it."""

    chunk: Mapping[str, Any]
    policy_version: int
    """That at the beginning of the whole answer."""
    last_version: int | None = None
    """The newest one that can have sampled it, where that is another."""

    def visible(self) -> Iterator[dict[str, Any]]:
        """What an agent may see of its choices at once: no ids, and no end, which waits until the call is recorded."""
        for choice in self.chunk["choices"]:
            yield {key: value for key, value in choice.items() if key not in (*_IDS, *_END)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An engine's or the gateway's error; each wire format has its own shape for it.

    `code` is what a program can act on: context_length_exceeded, engine_error, too_many_calls, invalid_request, …
    """

    status: int
    message: str
    code: str
    type: str = "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The JSON of an OpenAI error."""
        return {"error": {"message": self.message, "type": self.type, "param": None, "code": self.code}}


def engine_request(
    body: Mapping[str, Any], *, model: str, split: Split, sampling: Mapping[str, float | int], stream: bool = False
) -> dict[str, Any]:
    """What the engine is asked: a chat request, or a completion request where `body` has a `prompt`.

    Example:

        engine_request({"messages": m, "temperature": 0.2}, model="policy", split="train", sampling={"temperature": 1})
        # {"messages": m, "temperature": 1, "model": "policy", "stream": False, "logprobs": True, …}
    """
    left_out = (*_NEVER, *(SAMPLING if split == "train" else ()))
    request = {name: value for name, value in body.items() if name not in left_out}
    for name, value in sampling.items():
        if name in MAX_TOKENS:
            asked = [int(body[key]) for key in MAX_TOKENS if body.get(key) is not None]
            for key in MAX_TOKENS:
                request.pop(key, None)
            request["max_tokens"] = min([*asked, int(value)])
        elif request.get(name) is None:
            request[name] = value
    request |= {"model": model, "stream": stream, "return_token_ids": True}
    if "prompt" in body:
        request["logprobs"] = body.get("logprobs") or 0
    else:  # vLLM hides ids and log-probabilities together with reasoning
        request |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0, "include_reasoning": True}
    if stream:
        request["stream_options"] = {"include_usage": True}
    return request


def parse_reply(raw: Mapping[str, Any], *, policy_version: int, last_version: int | None = None) -> Completion:
    """Split vLLM's reply into OpenAI JSON and arrays. Log-probabilities that are missing are NaN.

    Raises ValueError where token ids are missing or none of any vocabulary.
    """
    choices, kept = [], []
    for choice in raw["choices"]:
        prompt = raw.get("prompt_token_ids", choice.get("prompt_token_ids"))
        tokens, logprobs = choice.get("token_ids"), choice.get("logprobs")
        if prompt is None:
            raise ValueError("the engine's reply has no token ids of the prompt")
        if tokens is None:
            raise ValueError("the engine's reply has no token ids")
        if any(not 0 <= token < 2**31 for token in (*prompt, *tokens)):
            raise ValueError("the engine's reply has token ids out of any vocabulary")
        response_T = np.asarray(tokens, dtype=np.int32)
        prompt_T = np.asarray(prompt, dtype=np.int32)
        logprob_T = _logprobs(logprobs or {}, response_T.size)
        reason = str(choice["finish_reason"])
        choices.append(Choice(prompt_T=prompt_T, response_T=response_T, logprob_T=logprob_T, finish_reason=reason))
        kept.append({key: value for key, value in choice.items() if key not in _IDS})
    reply = {key: value for key, value in raw.items() if key not in _IDS} | {"choices": kept}
    return Completion(reply=reply, choices=tuple(choices), policy_version=policy_version, last_version=last_version)


def within(found: Completion | Refusal, vocab_size: int) -> Completion | Refusal:
    """The answer, or a refusal where a token id in it is none of the model's: no row is made of what it cannot be."""
    if isinstance(found, Refusal):
        return found
    for choice in found.choices:
        if any(tokens_T.size and tokens_T.max() >= vocab_size for tokens_T in (choice.prompt_T, choice.response_T)):
            message = f"the engine's reply has token ids out of the model's vocabulary of {vocab_size}"
            return Refusal(status=500, message=message, code="engine_error", type="server_error")
    return found


def _logprobs(held: Mapping[str, Any], size: int) -> Floats:
    """Of `size` tokens. All are NaN where their number is another: nobody could say which are whose."""
    values = [entry["logprob"] for entry in held.get("content") or ()] or held.get("token_logprobs") or []
    if len(values) != size:
        return np.full(size, np.nan, np.float32)
    logprob_T = np.array([np.nan if value is None else value for value in values], np.float32)
    logprob_T[np.isinf(logprob_T) | (logprob_T > _ROUNDING)] = np.nan
    return np.minimum(logprob_T, np.float32(0.0))  # NaN stays


_ROUNDING = 1e-3
"""A log-probability of a certain token may come out so much above 0."""


def join(parts: Sequence[Part]) -> Completion:
    """What the parts of a stream are together: the same as if it had not been streamed. A choice that was cut has the
    finish reason CUT. Raises ValueError as `parse_reply` does.

    Example: {"delta": {"content": "4"}, "token_ids": [7], …}, {"delta": {"content": "2"}, "token_ids": [5], …}
    -> {"message": {"role": "assistant", "content": "42"}}, response_T [7 5].
    """
    raw: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for part in parts:
        raw |= {key: value for key, value in part.chunk.items() if key != "choices" and value is not None}
        for piece in part.chunk["choices"]:
            _extend(choices.setdefault(piece["index"], {"finish_reason": CUT, "token_ids": []}), piece)
    raw["choices"] = [choices[index] for index in sorted(choices)]
    return parse_reply(raw, policy_version=parts[0].policy_version, last_version=parts[-1].last_version)


def _extend(choice: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add a piece of a streamed choice to what came before it."""
    for name, value in piece.items():
        if name == "delta":
            message = choice.setdefault("message", {"role": "assistant", "content": ""})
            for key in ("content", "reasoning"):
                if value.get(key):
                    message[key] = message.get(key, "") + value[key]
        elif name == "text":
            choice["text"] = choice.get("text", "") + value
        elif name == "token_ids":
            choice["token_ids"] += value or []
        elif name == "logprobs":
            held = choice.setdefault("logprobs", {})
            for key, entries in (value or {}).items():
                if isinstance(entries, list):
                    held[key] = held.get(key, []) + entries
        elif value is not None:
            choice[name] = value


def spoken(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The assistant's message in a choice of any reply, the same whether it was streamed or not."""
    message = choice.get("message") or {"content": choice.get("text")}
    said = {key: value for key, value in message.items() if value and key not in ("role", "content")}
    return {"role": "assistant", "content": message.get("content") or None, **said}


def parse_error(message: str, status: int, kind: str) -> Refusal:
    """An engine's error as a Refusal, with a code that says whether the prompt was too long."""
    too_long = "maximum context length" in message or "maximum model length" in message
    if too_long:
        return Refusal(status=400, message=message, code="context_length_exceeded")
    if 400 <= status < 500:
        return Refusal(status=status, message=message, code="invalid_request", type=kind)
    return Refusal(status=500, message=message, code="engine_error", type="server_error")


def compact(value: object) -> str:
    """JSON text without spaces, for what a span keeps. Raises ValueError for numbers that JSON does not have."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
