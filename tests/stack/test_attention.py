"""Rows that lie end to end must not see each other, nor anything that they would not see alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.stack
SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {"model_type": "llama"},
    "window": {"model_type": "mistral", "sliding_window": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_end_to_end_give_what_each_gives_alone(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import agent_lightning.learners.attention  # noqa: F401  (registers rows_sdpa)

    torch.manual_seed(0)
    config = AutoConfig.for_model(**CONFIGS[name], **SHAPE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    rows = [torch.randint(50, (length,)) for length in (7, 1, 2, 12)]
    alone = torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])
    model.set_attn_implementation("rows_sdpa")
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    together = model(torch.cat(rows)[None], position_ids=positions[None], use_cache=False).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_share_their_beginning_give_what_each_gives_alone(name: str) -> None:
    """Log-probabilities and gradients: rows of a group, the turns of a conversation, and two rows that are equal."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from agent_lightning.learners.attention import share_prefixes

    torch.manual_seed(0)
    config = AutoConfig.for_model(**CONFIGS[name], **SHAPE | {"initializer_range": 0.1})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    prompt, *pieces = (torch.randint(50, (length,)) for length in (9, 4, 6, 1, 5, 2, 3))
    rows = [torch.cat([prompt, piece]) for piece in pieces[:3]]
    rows += [prompt, torch.cat([rows[1], pieces[3]]), torch.cat([prompt[:5], pieces[4]]), pieces[5], rows[1].clone()]

    def outputs(logits: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(1, row.roll(-1)[:, None])[:, 0]

    def gradients(values: list[torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        sum(row[:-1].sum() for row in values).backward()  # type: ignore[union-attr]
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    alone = [outputs(model(row[None], use_cache=False).logits[0], row) for row in rows]
    expected = gradients(alone)
    model.set_attn_implementation("rows_sdpa")
    kept, index = share_prefixes(rows)
    assert sum(len(tokens) for tokens, _ in kept) < 0.5 * sum(len(row) for row in rows)
    tokens = torch.cat([tokens for tokens, _ in kept])
    positions = torch.cat([torch.arange(start, start + len(tokens)) for tokens, start in kept])
    flat = outputs(model(tokens[None], position_ids=positions[None], use_cache=False).logits[0], tokens)
    together = list(flat[index].split([len(row) for row in rows]))
    for row, other in zip(together, alone, strict=True):
        torch.testing.assert_close(row[:-1], other[:-1], atol=1e-5, rtol=1e-5)
    for gradient, other in zip(gradients(together), expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-3, rtol=1e-3)


def test_rows_of_similar_lengths_are_one_call() -> None:
    """No row is missing, and a block's padding is bounded; a padded query sees a key also with a window."""
    from agent_lightning.learners.attention import _blocks

    lengths = [12, *range(1, 9), 40, 300]
    rows = [(0, 30), *((25, length) for length in lengths), (0, 500), (0, 8)]
    positions = tuple(position for start, length in rows for position in range(start, start + length))
    blocks, order = _blocks(positions, 3, torch.device("cpu"))
    assert len(blocks) < 8
    places = torch.cat([block.query_RT.flatten() for block in blocks])[order]
    assert places.tolist() == list(range(len(positions)))
    work = sum(length * (start + length) for start, length in rows)
    assert sum(block.query_RT.numel() * block.key_RL.shape[1] for block in blocks) < 2.1 * work
    assert all(block.mask_R1TL is not None and block.mask_R1TL.any(dim=-1).all() for block in blocks)


def test_what_it_would_leave_out_is_refused() -> None:
    from agent_lightning.learners.attention import rows_attention

    query, positions = torch.zeros(1, 1, 2, 4), torch.arange(2)[None]
    with pytest.raises(ValueError, match="softcap"):
        rows_attention(torch.nn.Module(), query, query, query, None, position_ids=positions, softcap=30.0)
