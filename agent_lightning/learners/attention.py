"""Attention of rows that lie end to end, by PyTorch's own kernels, in Transformers' registry of attentions.

Transformers' `sdpa` masks such a batch: N tokens of any number of rows cost N x N, by PyTorch's slower kernels. Here
each row is a call of its own without a mask. flash-attn, where it is installed, does the same in one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def rows_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row: [1, H, N, D] queries, keys and values give [1, N, H, D].

    A row begins wherever `position_ids` [1, N] are 0. An attention without a mask of its own in Transformers' registry
    gets none, so a mask here is one that a model made itself; ValueError for that, soft-capping and sinks.
    """
    beyond = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if attention_mask is not None or beyond:
        what = ", ".join(beyond) or "masks"
        raise ValueError(f"{type(module).__name__} has {what}, which rows_sdpa does not know: install flash-attn")
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    sizes = [end - start for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True)]
    rows = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, _window(q, sliding_window), **options)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def _window(query: Tensor, size: int | None) -> Tensor | None:
    """bool[1, 1, T, T] of what each token sees, where the row is longer than its window."""
    length = query.shape[2]
    if size is None or length <= size:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - size)
    return seen[None, None]


AttentionInterface.register("rows_sdpa", rows_attention)
