"""Requests to the engine, and its replies, split into what an agent sees and the exact arrays to train on. Pure.

The sampling rule, the same for every dialect: in training the policy's sampling parameters replace the agent's, and
those that the policy does not set are left out. In validation the agent's parameters hold, and the policy's fill the
gaps. In both, the smaller `max_tokens` wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent_lightning.core.json_values import clean_logprobs, compact, join_chunks
from agent_lightning.core.types import Floats, Ints, Split

MAX_TOKENS = ("max_tokens", "max_completion_tokens")
_PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty")
_MASKS = ("logit_bias", "min_tokens", "allowed_token_ids", "bad_words")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", *_PENALTIES, *_MASKS, "seed")
"""Parameters that an agent may not choose in training: the learner would assume another distribution than the sampled
one, and with a fixed seed all rollouts of a group would be the same."""
_NEVER = ("stream_options", "request_id", "use_beam_search")
"""Parameters that an agent may never choose: the gateway sets them, or they leave no log-probabilities."""
_SMALLEST_TOP_P = 1e-6
_GREEDY = 1e-5  # vLLM takes a lower temperature for 0
CUT = "cancelled"
"""Finish reason of a choice whose agent went away before its end."""
_IDS = ("token_ids", "prompt_token_ids", "prompt_logprobs", "new_versions")
_END = ("stop_reason", "finish_reason")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The tokens of one choice of a reply, exactly as the engine read and sampled them."""

    prompt_T: Ints
    response_T: Ints
    logprob_T: Floats
    """Log-probability of each response token, with the shape of `response_T`; NaN if the engine gave none."""
    finish_reason: str
    new_versions: tuple[tuple[int, int], ...] = ()
    """As in a ModelCall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An engine's answer: the reply as OpenAI JSON, and the tokens of each of its choices."""

    reply: Mapping[str, Any]
    """The JSON without token ids, with log-probabilities as the engine gave them."""
    choices: tuple[Choice, ...]
    policy_version: int
    """The policy's version when the call began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a streamed answer: one chunk of the engine's JSON, with token ids and log-probabilities, and with the
    `new_versions` of each choice so far, if there are any."""

    chunk: Mapping[str, Any]
    policy_version: int
    """The policy's version when the call began."""

    def visible(self) -> Iterator[dict[str, Any]]:
        """The choices as an agent may see them at once: without ids, and without the end, which is sent only after the
        call is recorded."""
        for choice in self.chunk["choices"]:
            yield {key: value for key, value in choice.items() if key not in (*_IDS, *_END)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An error of the engine or the gateway, which each dialect writes in its own shape."""

    status: int
    """The HTTP status."""
    message: str
    code: str
    """What a program can act on: context_length_exceeded, engine_error, too_many_calls, invalid_request, …"""
    type: str = "invalid_request_error"
    param: str | None = None
    """The field of the request that is to be changed, such as "messages[0].content"."""
    detail: str = ""
    """What happened inside, in the words of the part that failed: for the run's records, never for the agent."""

    def body(self) -> dict[str, Any]:
        """The JSON of an OpenAI error."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def engine_error(message: str, status: int = 500, detail: str = "") -> Refusal:
    """A failure that is not the agent's."""
    return Refusal(status=status, message=message, code="engine_error", type="server_error", detail=detail)


def engine_request(
    body: Mapping[str, Any], *, model: str, split: Split, sampling: Mapping[str, float | int], stream: bool = False
) -> dict[str, Any]:
    """The request that the engine gets: a completion request if `body` has a `prompt`, else a chat request.

    Example:

        engine_request({"messages": m, "temperature": 0.2}, model="policy", split="train", sampling={"temperature": 1})
        # {"messages": m, "temperature": 1, "model": "policy", "stream": False, "logprobs": True, …}
    """
    left_out = (*_NEVER, *(SAMPLING if split == "train" else ()))
    request = {name: value for name, value in body.items() if name not in left_out}
    for name, value in sampling.items():
        if name in MAX_TOKENS:
            limits = [limit for key in MAX_TOKENS if (limit := request.pop(key, None)) is not None]
            request["max_tokens"] = int(min([*limits, value]))
        elif request.get(name) is None:
            request[name] = value
    if "top_p" in request:  # with less, vLLM refuses; the likeliest token alone has as much
        request["top_p"] = max(request["top_p"], _SMALLEST_TOP_P)
    if "min_tokens" in request and "max_tokens" in request:  # the policy's limit may be below the agent's wish
        request["min_tokens"] = min(request["min_tokens"], request["max_tokens"])
    request |= {"model": model, "stream": stream, "return_token_ids": True}
    if "prompt" in body:
        request["logprobs"] = body.get("logprobs") or 0
    else:  # vLLM hides ids and log-probabilities together with reasoning
        request |= {"logprobs": True, "top_logprobs": body.get("top_logprobs") or 0, "include_reasoning": True}
    return request | ({"stream_options": {"include_usage": True}} if stream else {})


def without_copies(request: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The request with n = 1 if it is greedy, and how often each choice of its answer is to be repeated: greedy choices
    are all the same, and vLLM refuses to make several."""
    greedy = request.get("temperature", 1.0) < _GREEDY
    return {**request, "n": 1 if greedy else request.get("n", 1)}, request.get("n", 1) if greedy else 1


def repeat_choices(reply: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """A reply or a chunk of a stream in which each choice occurs `copies` times, as if that had been its `n`."""
    choices = [
        {**choice, "index": choice["index"] * copies + number}
        for choice in reply["choices"]
        for number in range(copies)
    ]
    usage = dict(reply.get("usage") or {})
    if usage:
        usage["completion_tokens"] *= copies
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    return {**reply, "choices": choices, "usage": usage or None}


def is_constrained(request: Mapping[str, Any]) -> bool:
    """Whether a grammar limits which tokens a request samples: a format, a tool that is forced, or a strict tool. Their
    log-probabilities are then those among the tokens that the grammar allows, which the learner cannot know."""
    has_format = (request.get("response_format") or {}).get("type", "text") != "text"
    is_forced = request.get("tool_choice", "auto") not in ("auto", "none")
    is_strict = any((tool.get("function") or {}).get("strict") for tool in request.get("tools") or ())
    return has_format or is_forced or is_strict or request.get("structured_outputs") is not None


def parse_reply(raw: Mapping[str, Any], *, policy_version: int) -> Completion:
    """Split vLLM's reply into OpenAI JSON and arrays. Log-probabilities that are missing are NaN. Raises ValueError if
    token ids are missing, or if an id is outside any vocabulary."""
    choices, visible = [], []
    for choice in raw["choices"]:
        prompt = raw.get("prompt_token_ids", choice.get("prompt_token_ids"))
        tokens, logprobs = choice.get("token_ids"), choice.get("logprobs") or {}
        if prompt is None or tokens is None:
            raise ValueError(f"the engine's reply has no token ids{' of the prompt' if prompt is None else ''}")
        if any(not 0 <= token < 2**31 for token in (*prompt, *tokens)):
            raise ValueError("the engine's reply has token ids out of any vocabulary")
        values = [entry["logprob"] for entry in logprobs.get("content") or ()] or logprobs.get("token_logprobs") or []
        prompt_T, response_T = (np.asarray(ids, dtype=np.int32) for ids in (prompt, tokens))
        logprob_T, reason = clean_logprobs(values, len(tokens)), str(choice["finish_reason"])
        # Two updates may have come before a token, and one after the last that the agent waited for.
        new_versions = dict(choice.get("new_versions", ()))
        new = tuple((first, version) for first, version in new_versions.items() if first < len(tokens))
        ends: Any = {"finish_reason": reason, "new_versions": new}
        choices.append(Choice(prompt_T=prompt_T, response_T=response_T, logprob_T=logprob_T, **ends))
        visible.append({key: value for key, value in choice.items() if key not in _IDS})
    reply = {key: value for key, value in raw.items() if key not in _IDS} | {"choices": visible}
    return Completion(reply=reply, choices=tuple(choices), policy_version=policy_version)


def join_parts(parts: Sequence[Part]) -> Completion:
    """The completion that the parts of a stream add up to, the same as if it had not been streamed. A choice whose end
    is missing has the finish reason CUT. Raises ValueError as `parse_reply` does."""
    raw = join_chunks(part.chunk for part in parts)
    raw["choices"] = [{"finish_reason": CUT, "token_ids": []} | choice for choice in raw["choices"]]
    return parse_reply(raw, policy_version=parts[0].policy_version)


def check_vocabulary(answer: Completion | Refusal, vocab_size: int) -> Completion | Refusal:
    """The answer itself, or a Refusal if it holds a token id that is not below `vocab_size`."""
    if isinstance(answer, Refusal):
        return answer
    arrays = (tokens_T for choice in answer.choices for tokens_T in (choice.prompt_T, choice.response_T))
    if any(tokens_T.max(initial=0) >= vocab_size for tokens_T in arrays):
        return engine_error(f"the engine's reply has token ids out of the model's vocabulary of {vocab_size}")
    return answer


def offered_tools(request: Mapping[str, Any]) -> tuple[str, ...]:
    """JSON text of the definition of each tool that a request offers."""
    return tuple(compact(tool) for tool in request.get("tools") or ())


def assistant_message(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The assistant's message in a choice of a chat or text completion, streamed or not."""
    message = choice.get("message") or {"content": choice.get("text")}
    others = {key: value for key, value in message.items() if value and key not in ("role", "content")}
    return {"role": "assistant", "content": message.get("content") or None, **others}


_MEANINGS: Sequence[tuple[str, str, str, str]] = (
    (
        "multimodal|At most 0 |multi-modal|audio|image|video",
        "messages",
        "unsupported",
        "messages may hold text only: the policy reads no media",
    ),
    ("out[- ]of[- ]vocab", "", "invalid_request", "{param} has token ids that are not in the policy's vocabulary"),
    ("json schema into a grammar", "response_format", "invalid_request", "{param} has a JSON schema that is not valid"),
    ("structural tag", "tools", "invalid_request", "{param} has a JSON schema that is not valid"),
    ("into a grammar|[Gg]rammar|structured", "structured_outputs", "invalid_request", "{param} is not valid"),
    ("thinking_token_budget", "thinking_token_budget", "unsupported", "{param} is not supported by this policy"),
    ("chat template", "chat_template_kwargs", "unsupported", "{param} may not hold a chat template"),
)
"""What an engine's error means, by words in it: the field that is to be changed, the code, and what an agent reads."""


def parse_error(message: str, status: int, *, field: str = "") -> Refusal:
    """An engine's error as a Refusal, whose words are the protocol's; `field` is the name that it gives of a field. Its
    code tells a prompt that is too long from other errors."""
    if too_long := re.search(r"maximum (?:context|model) length\D*(\d+)|max_tokens must be at least", message):
        limit = f" is {too_long[1]} tokens" if too_long[1] else " is reached"
        words = f"This model's maximum context length{limit}: the prompt leaves no room for an answer."
        return Refusal(status=400, message=words, code="context_length_exceeded", param="messages", detail=message)
    if not 400 <= status < 500:
        return engine_error("the policy's engine failed", detail=message)
    match = re.search(r"\(parameter=([\w.]+)", message)
    field = match[1] if match else field
    for words, usual_field, code, meaning in _MEANINGS:
        if re.search(words, message):
            field = field or usual_field or "prompt"
            return Refusal(status=400, message=meaning.format(param=field), code=code, param=field, detail=message)
    words = f"{field} has a value that the policy does not take" if field else "the policy does not take this request"
    return Refusal(status=400, message=words, code="invalid_request", param=field or None, detail=message)
