"""OpenAI JSON in and out: what is added to a request, what is taken from a reply. Pure.

The rule for sampling: in training the policy's sampling parameters govern (what the agent asks for is replaced or,
where the policy has no word on it, left out); in validation the agent's own parameters are respected and the policy's
fill the gaps. In both the smaller `max_tokens` wins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent_lightning.types import Floats, Ints, Split

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
    "use_beam_search",
    "seed",
)
"""What an agent may not choose in training: the learner would believe in another distribution than was sampled, and
with one seed all rollouts of a group would be the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the engine sampled for one choice of a reply."""

    response_T: Ints
    logprob_T: Floats
    finish_reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An engine's answer: the reply as OpenAI JSON, and exactly what was read and sampled."""

    reply: Mapping[str, Any]
    """Without token ids; log-probabilities as the engine gave them."""
    prompt_T: Ints
    choices: tuple[Choice, ...]
    policy_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An engine's or the gateway's error, in OpenAI's shape.

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
    body: Mapping[str, Any], *, model: str, split: Split, sampling: Mapping[str, float | int]
) -> dict[str, Any]:
    """What the engine is asked, from what the agent asked.

    Example:

        engine_request({"messages": m, "temperature": 0.2}, model="policy", split="train", sampling={"temperature": 1})
        # {"messages": m, "temperature": 1, "model": "policy", "stream": False, "logprobs": True, …}
    """
    request = {name: value for name, value in body.items() if split == "val" or name not in SAMPLING}
    for name, value in sampling.items():
        if name in MAX_TOKENS:
            asked = [int(body[key]) for key in MAX_TOKENS if body.get(key) is not None]
            for key in MAX_TOKENS:
                request.pop(key, None)
            request["max_tokens"] = min([*asked, int(value)])
        elif request.get(name) is None:
            request[name] = value
    request.update(model=model, stream=False, logprobs=True, top_logprobs=body.get("top_logprobs") or 0)
    request["return_token_ids"] = True
    request.pop("stream_options", None)
    return request


def agent_reply(body: Mapping[str, Any], completion: Completion, *, model: str) -> dict[str, Any]:
    """The reply the agent sees: log-probabilities only where it asked for them, under the model name it used."""
    reply = dict(completion.reply)
    if not body.get("logprobs"):
        reply["choices"] = [{**choice, "logprobs": None} for choice in reply["choices"]]
    reply["model"] = body.get("model") or model
    return reply


def parse_reply(raw: Mapping[str, Any], *, policy_version: int) -> Completion:
    """Split vLLM's reply into OpenAI JSON and arrays. Raises ValueError where token ids or log-probabilities lack."""
    reply = {key: value for key, value in raw.items() if key not in ("prompt_token_ids", "prompt_logprobs")}
    if raw.get("prompt_token_ids") is None:
        raise ValueError("the engine's reply has no token ids of the prompt")
    prompt_T = np.asarray(raw["prompt_token_ids"], dtype=np.int32)
    choices, kept = [], []
    for choice in raw["choices"]:
        tokens, logprobs = choice.get("token_ids"), choice.get("logprobs")
        if tokens is None or logprobs is None:
            raise ValueError("the engine's reply has no token ids or no log-probabilities")
        response_T = np.asarray(tokens, dtype=np.int32)
        logprob_T = np.asarray([entry["logprob"] for entry in logprobs["content"] or ()], dtype=np.float32)
        if response_T.shape != logprob_T.shape:
            raise ValueError(
                f"the engine's reply has {response_T.size} token ids and {logprob_T.size} log-probabilities"
            )
        choices.append(Choice(response_T=response_T, logprob_T=logprob_T, finish_reason=str(choice["finish_reason"])))
        kept.append({key: value for key, value in choice.items() if key not in ("token_ids", "stop_reason")})
    reply["choices"] = kept
    return Completion(reply=reply, prompt_T=prompt_T, choices=tuple(choices), policy_version=policy_version)


def parse_error(message: str, status: int, kind: str) -> Refusal:
    """An engine's error as a Refusal, with a code that says whether the prompt was too long."""
    too_long = "maximum context length" in message or "maximum model length" in message
    if too_long:
        return Refusal(status=400, message=message, code="context_length_exceeded")
    if 400 <= status < 500:
        return Refusal(status=status, message=message, code="invalid_request", type=kind)
    return Refusal(status=500, message=message, code="engine_error", type="server_error")


def compact(value: object) -> str:
    """JSON text without spaces, for what a span keeps."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
