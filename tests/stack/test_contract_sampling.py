"""What vLLM samples with is what the config says, whatever the model's own generation_config.json holds; and a reply is
clipped to the room that its prompt leaves."""

from __future__ import annotations

import httpx
import numpy as np
import pytest
import torch
from models import load
from policy_server import CONTEXT, PolicyServer

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]


def test_the_log_probabilities_are_the_model_s_own(policy_server: PolicyServer) -> None:
    with policy_server.rollout("train") as rollout:
        for n in range(16):
            body = {"model": "policy", "messages": [{"role": "user", "content": f"What is {n} + 4? Again and again."}]}
            httpx.post(f"{rollout.root}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    model, gaps = load(str(policy_server.model)), []
    for call in rollout.calls:
        tokens = torch.tensor([[*call["prompt"], *call["tokens"]]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        gaps.append(logprobs[len(call["prompt"]) - 1 :].numpy() - np.array(call["logprobs"]))
    gap = np.abs(np.concatenate(gaps))
    assert gap.size > 100
    assert gap.mean() < 1e-5
    assert gap.max() < 1e-3


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_leaves_the_log_probabilities_to_the_learner(policy_server: PolicyServer, stream: bool) -> None:
    message = {"role": "user", "content": "What is 2 + 4?"}
    body = {"messages": [message], "response_format": {"type": "json_object"}, "max_tokens": 4, "stream": stream}
    with policy_server.rollout("train") as rollout:
        httpx.post(f"{rollout.root}/v1/chat/completions", json=body, timeout=60).raise_for_status()
    (call,) = rollout.calls
    assert len(call["logprobs"]) == len(call["tokens"]) > 0
    assert all(value is None or np.isnan(value) for value in call["logprobs"])


def test_a_reply_is_clipped_and_a_prompt_without_room_is_refused(policy_server: PolicyServer) -> None:
    def ask(words: int) -> httpx.Response:
        body = {"prompt": [5] * words, "max_tokens": 64}
        return httpx.post(f"{rollout.root}/v1/completions", json=body, timeout=120)

    with policy_server.rollout("val") as rollout:
        clipped, full = ask(CONTEXT - 3), ask(CONTEXT)
    assert clipped.status_code == 200, clipped.text
    assert clipped.json()["usage"]["completion_tokens"] <= 3
    assert (full.status_code, full.json()["error"]["code"]) == (400, "context_length_exceeded")
