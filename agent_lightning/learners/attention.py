"""Attention for rows that are laid end to end, by PyTorch's kernels, in Transformers' registry of attentions.

Transformers' `sdpa` uses a mask for such a batch: N tokens cost N x N, by PyTorch's slower kernels, however many rows
they are. Here each row is a call without a mask. flash-attn, if it is installed, does the same in one call.
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
    """Causal attention within each row: from queries, keys and values of shape [1, H, N, D] to [1, N, H, D].

    A row starts wherever `position_ids`, of shape [1, N], are 0. Raises ValueError for masks, soft-capping and sinks.
    Transformers passes no mask to an attention that has no mask function in its registry, so a mask comes from a model
    that makes its own.
    """
    unsupported = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if attention_mask is not None or unsupported:
        features = ", ".join(unsupported) or "masks"
        raise ValueError(f"{type(module).__name__} has {features}, which rows_sdpa does not know: install flash-attn")
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    sizes = [end - start for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True)]
    rows = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, _window(q, sliding_window), **options)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def _window(query: Tensor, size: int | None) -> Tensor | None:
    """The mask of a row that is longer than its sliding window, bool[1, 1, T, T]; None for shorter rows."""
    length = query.shape[2]
    if size is None or length <= size:
        return None
    visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - size)
    return visible[None, None]


AttentionInterface.register("rows_sdpa", rows_attention)
