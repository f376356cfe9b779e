"""The output head of a model in parts: outputs and gradients are those of all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.stack


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("share", [None, 0.5, 0.0])  # of the tokens that are wanted; 0: a micro-batch without any
def test_outputs_and_gradients_are_those_of_all_logits(
    trained: bool, with_entropy: bool, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from agent_lightning.learners import head

    monkeypatch.setattr(head, "_PART", 7)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=50, tie_word_embeddings=False, initializer_range=0.5, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.weight.requires_grad_(trained)
    tokens, (logprob_weights, entropy_weights) = torch.randint(50, (1, 24)), torch.randn(2, 24)
    wanted_N = torch.rand(24) < share if share is not None else None
    temperature = 0.7

    def gradients(log_probs: torch.Tensor, entropy: torch.Tensor) -> list[Any]:
        model.zero_grad()
        loss = (log_probs * logprob_weights).sum() + with_entropy * (entropy * entropy_weights).sum()
        loss.backward()
        return [None if part.grad is None else part.grad.clone() for part in model.parameters()]

    all_logprobs = (model(tokens).logits[0] / temperature).log_softmax(-1)
    chosen = all_logprobs.gather(1, tokens[0].roll(-1)[:, None])[:, 0]
    entropies = -(all_logprobs.exp() * all_logprobs).sum(-1)
    if wanted_N is not None:
        chosen, entropies = chosen * wanted_N, entropies * wanted_N
    expected = gradients(chosen, entropies)
    ours = head.outputs(
        model, input_ids=tokens, temperature=temperature, wanted_N=wanted_N, with_entropy=with_entropy, labels=None
    )
    torch.testing.assert_close(ours.log_probs[0], chosen, atol=1e-5, rtol=1e-5)
    if with_entropy:
        torch.testing.assert_close(ours.entropy[0], entropies, atol=1e-5, rtol=1e-5)
    for gradient, other in zip(gradients(ours.log_probs[0], ours.entropy[0]), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)
