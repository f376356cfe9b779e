"""Requests to the engine by the sampling rule, and its replies split into JSON and arrays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from contract import INSIDE

from agent_lightning.core.types import Split
from agent_lightning.serving.engine import (
    Part,
    Refusal,
    engine_request,
    is_constrained,
    join_parts,
    parse_error,
    parse_reply,
)

MESSAGES = [{"role": "user", "content": "hello"}]
POLICY: dict[str, float | int] = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 64}


def ask(split: Split, **body: Any) -> dict[str, Any]:
    return engine_request({"messages": MESSAGES, **body}, model="policy", split=split, sampling=POLICY)


def vllm_reply(**changes: Any) -> dict[str, Any]:
    """A reply of vLLM with token ids and log-probabilities."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "yes"},
        "logprobs": {"content": [{"token": "yes", "logprob": -0.5}, {"token": "<end>", "logprob": -0.25}]},
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": [7, 1],
    }
    reply = {"id": "chatcmpl-1", "model": "policy", "prompt_token_ids": [3, 4], "prompt_logprobs": None}
    return {**reply, "usage": {"total_tokens": 4}, "choices": [{**choice, **changes}]}


def test_what_is_always_asked() -> None:
    for split in ("train", "val"):
        request = ask(split, model="gpt-4o", stream=True, stream_options={"include_usage": True}, tools=["a tool"])
        always = {"model": "policy", "stream": False, "logprobs": True, "top_logprobs": 0, "return_token_ids": True}
        assert request == {"messages": MESSAGES, "tools": ["a tool"], "include_reasoning": True, **POLICY, **always}
        streamed = engine_request(request, model="policy", split=split, sampling=POLICY, stream=True)
        assert streamed == request | {"stream": True, "stream_options": {"include_usage": True}}


def test_a_prompt_without_a_template_is_sent_with_the_number_of_log_probabilities() -> None:
    for agents, sent in ((None, 0), (0, 0), (3, 3)):
        body = {"prompt": [1, 2], "logprobs": agents}
        request = engine_request(body, model="policy", split="val", sampling=POLICY)
        assert (request["logprobs"], request["prompt"]) == (sent, [1, 2])
        assert not {"top_logprobs", "include_reasoning"} & set(request)


def test_the_agents_request_is_left_as_it_is() -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 5, "stream": False}
    before = json.dumps(body)
    engine_request(body, model="policy", split="train", sampling=POLICY)
    assert json.dumps(body) == before


@pytest.mark.parametrize(
    ("name", "agents", "in_training", "in_validation"),
    [
        ("temperature", 0.2, 1.0, 0.2),
        ("temperature", 0, 1.0, 0),
        ("temperature", None, 1.0, 0.9999),
        ("top_p", 0.5, 0.9, 0.5),
        # The policy does not set these: with the agent's, the learner would assume another distribution.
        ("top_k", 5, None, 5),
        ("min_p", 0.1, None, 0.1),
        ("frequency_penalty", 1.0, None, 1.0),
        ("logit_bias", {"7": 100}, None, {"7": 100}),
        ("seed", 3, None, 3),
        # These do not change the distribution that is sampled.
        ("stop", ["\n"], ["\n"], ["\n"]),
        ("tool_choice", "auto", "auto", "auto"),
        ("top_logprobs", 2, 2, 2),
    ],
)
def test_who_chooses_the_sampling_parameters(name: str, agents: Any, in_training: Any, in_validation: Any) -> None:
    assert ask("train", **{name: agents}).get(name) == in_training
    expected = POLICY[name] if in_validation == 0.9999 else in_validation
    assert ask("val", **{name: agents}).get(name) == expected


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("agents", "limit"),
    [
        ({}, 64),
        ({"max_tokens": 10}, 10),
        ({"max_tokens": 100}, 64),
        ({"max_tokens": None}, 64),
        ({"max_completion_tokens": 10}, 10),
        ({"max_completion_tokens": 10, "max_tokens": 20}, 10),
    ],
)
def test_the_smaller_limit_of_tokens_wins(split: Split, agents: dict[str, Any], limit: int) -> None:
    request = ask(split, **agents)
    assert request["max_tokens"] == limit
    assert "max_completion_tokens" not in request


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"tools": [TOOL]}, False),
        ({"tools": [TOOL], "tool_choice": "auto"}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"tools": [TOOL], "tool_choice": "required"}, True),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}, True),
        ({"tools": [TOOL, {"type": "function", "function": {"name": "see", "strict": True}}]}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"choice": ["a", "b"]}}, True),
    ],
)
def test_what_a_grammar_samples_has_log_probabilities_of_its_own(fields: dict[str, Any], expected: bool) -> None:
    assert is_constrained(fields) is expected


def test_a_reply_is_split_into_json_and_arrays() -> None:
    completion = parse_reply(vllm_reply(), policy_version=3)
    (choice,) = completion.choices
    assert completion.policy_version == 3
    assert choice.prompt_T.tolist() == [3, 4]
    assert (choice.response_T.tolist(), choice.logprob_T.tolist(), choice.finish_reason) == (
        [7, 1],
        [-0.5, -0.25],
        "stop",
    )
    assert {choice.response_T.dtype, choice.prompt_T.dtype, choice.logprob_T.dtype} == {
        np.dtype(np.int32),
        np.dtype(np.float32),
    }
    assert "token_ids" not in json.dumps(completion.reply)
    assert completion.reply["usage"] == {"total_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": None}, "no token ids"),
        ({"token_ids": [7, -1]}, "out of any vocabulary"),
        ({"token_ids": [7, 2**31]}, "out of any vocabulary"),
    ],
)
def test_a_reply_without_what_is_trained_on_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_reply(vllm_reply(**changes), policy_version=0)


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        (None, [np.nan, np.nan]),
        ({"content": None}, [np.nan, np.nan]),
        ({"token_logprobs": [-0.5]}, [np.nan, np.nan]),  # one for two tokens: of which?
        ({"token_logprobs": [-0.5, None]}, [-0.5, np.nan]),
        ({"token_logprobs": [-np.inf, 2.0]}, [np.nan, np.nan]),
        ({"token_logprobs": [1e-6, -1.0]}, [0.0, -1.0]),  # rounding
    ],
)
def test_a_log_probability_that_is_missing_is_not_a_number(logprobs: Any, expected: list[float]) -> None:
    (choice,) = parse_reply(vllm_reply(logprobs=logprobs), policy_version=0).choices
    np.testing.assert_array_equal(choice.logprob_T, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("noted", "new_versions"),
    [
        ([], ()),
        ([(1, 4)], ((1, 4),)),
        ([(0, 4), (1, 5)], ((0, 4), (1, 5))),
        ([(1, 4), (1, 5)], ((1, 5),)),  # no token between two updates
        ([(1, 4), (2, 5)], ((1, 4),)),  # an update after the last token
    ],
)
def test_the_first_token_of_each_new_version_is_kept(noted: list[tuple[int, int]], new_versions: Any) -> None:
    completion = parse_reply(vllm_reply(new_versions=noted), policy_version=3)
    assert (completion.policy_version, completion.choices[0].new_versions) == (3, new_versions)
    assert "new_versions" not in json.dumps(completion.reply)


def test_a_stream_knows_the_new_versions_of_what_was_read_of_it() -> None:
    def part(token: int, index: int, **noted: Any) -> Part:
        choice = {"index": index, "token_ids": [token], "delta": {}, "prompt_token_ids": [5], **noted}
        return Part(chunk={"choices": [choice]}, policy_version=3)

    before = [part(7, index) for index in (0, 1)]
    after = [part(8, 0, new_versions=[(1, 4)]), part(8, 1, new_versions=[(1, 4)]), part(9, 1, new_versions=[(1, 4)])]
    noted = [[c.new_versions for c in join_parts([*before, *after[:n]]).choices] for n in range(4)]
    assert noted == [[(), ()], [((1, 4),), ()], [((1, 4),)] * 2, [((1, 4),)] * 2]


@pytest.mark.parametrize("prompt", [{}, {"prompt_token_ids": None}])
def test_a_reply_without_its_prompt_is_refused(prompt: dict[str, Any]) -> None:
    reply = {name: value for name, value in vllm_reply().items() if name != "prompt_token_ids"}
    with pytest.raises(ValueError, match="prompt"):
        parse_reply({**reply, **prompt}, policy_version=0)


def test_an_empty_response_is_no_error() -> None:
    (choice,) = parse_reply(vllm_reply(token_ids=[], logprobs={"content": []}), policy_version=0).choices
    assert choice.response_T.size == choice.logprob_T.size == 0


@pytest.mark.parametrize(
    ("message", "status", "code", "seen"),
    [
        ("This model's maximum context length is 64 tokens", 400, "context_length_exceeded", 400),
        ("longer than the maximum model length of 64", 500, "context_length_exceeded", 400),
        ("n must be at least 1", 400, "invalid_request", 400),
        ("CUDA error", 500, "engine_error", 500),
        ("no status at all", 0, "engine_error", 500),
    ],
)
def test_errors_get_a_code(message: str, status: int, code: str, seen: int) -> None:
    refusal = parse_error(message, status)
    assert (refusal.code, refusal.status, refusal.detail) == (code, seen, message)
    assert refusal.message != message


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ("policy is not a multimodal model", "messages", "unsupported"),
        ("At most 0 image(s) may be provided in one prompt.", "messages", "unsupported"),
        ("Token id 1000000 is out of vocabulary", "prompt", "invalid_request"),
        (
            "[7] in logit_bias contain out-of-vocab token ids (parameter=logit_bias, value=[7])",
            "logit_bias",
            "invalid_request",
        ),
        ("Failed to transform json schema into a grammar: <path>:4944: no type", "response_format", "invalid_request"),
        ("Invalid structural tag specification.", "tools", "invalid_request"),
        ("Failed to transform regex into a grammar", "structured_outputs", "invalid_request"),
        ("VLLMValidationError: it is odd (parameter=min_tokens, value=-3)", "min_tokens", "invalid_request"),
        ("'int object' has no attribute 'keys'", None, "invalid_request"),
    ],
)
def test_an_engines_refusal_in_the_words_of_the_protocol(message: str, param: str | None, code: str) -> None:
    refusal = parse_error(message, 400)
    assert (refusal.param, refusal.code, refusal.detail) == (param, code, message)
    assert not INSIDE.search(refusal.message)
    assert (param or "request") in refusal.message


def test_a_refusal_is_in_openais_shape() -> None:
    assert Refusal(status=400, message="m", code="c").body() == {
        "error": {"message": "m", "type": "invalid_request_error", "param": None, "code": "c"}
    }
