"""Attention for rows that are laid end to end, by PyTorch's kernels, in Transformers' registry of attentions.

Transformers' `sdpa` uses a mask for such a batch: N tokens cost N x N, by PyTorch's slower kernels, however many rows
they are. Here each row is a call without a mask. flash-attn, if it is installed, does the same in one call.

Rows that begin alike, such as the rollouts of a group, can share their prompt: it is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def share_prefixes(rows: Sequence[Tensor]) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """Rows of tokens, int64[T] each, without what they have in common at their beginning.

    In alphabetical order each row keeps the tokens that the row before it has not, and one more: what a model puts out
    at a row's last common token is about the next token, which differs. Returns for each row in that order its tokens
    and the position of the first one; and the index of each token of all rows, in the order given, among these.

    >>> kept, index = share_prefixes([torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 7, 9, 4])])
    >>> kept
    [(tensor([5, 6, 7, 8]), 0), (tensor([7, 9, 4]), 2)]
    >>> index
    tensor([0, 1, 2, 3, 0, 1, 4, 5, 6])
    """
    lists = [row.tolist() for row in rows]
    kept: list[tuple[Tensor, int]] = []
    indices: list[list[int]] = [[]] * len(rows)
    before: list[int] = []
    before_index: list[int] = []
    size = 0
    for n in sorted(range(len(rows)), key=lists.__getitem__):
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, lists[n], strict=False)))
        start = max(0, common - 1)
        kept.append((rows[n][start:], start))
        before, before_index = lists[n], [*before_index[:start], *range(size, size + len(lists[n]) - start)]
        indices[n] = before_index
        size += len(lists[n]) - start
    return kept, torch.tensor([place for index in indices for place in index])


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

    A row starts wherever `position_ids`, of shape [1, N], do not go on. If it starts at P > 0, it continues the first P
    tokens of the row before it, as in `share_prefixes`. Raises ValueError for masks, soft-capping and sinks.
    Transformers passes no mask to an attention that has no mask function in its registry, so a mask comes from a model
    that makes its own.
    """
    unsupported = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if attention_mask is not None or unsupported:
        features = ", ".join(unsupported) or "masks"
        raise ValueError(f"{type(module).__name__} has {features}, which rows_sdpa does not know: install flash-attn")
    positions = position_ids[0]
    breaks = (positions[1:] != positions[:-1] + 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    sizes = [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    rows = zip(*(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True)
    for (q, k, v), shared in zip(rows, positions[starts].tolist(), strict=True):
        keys, values = [*_first(keys, shared), k], [*_first(values, shared), v]
        mask = _mask(q, shared, sliding_window)
        outputs.append(
            sdpa_attention_forward(module, q, torch.cat(keys, dim=2), torch.cat(values, dim=2), mask, **options)[0]
        )
    return torch.cat(outputs, dim=1), None


def _first(pieces: Sequence[Tensor], size: int) -> list[Tensor]:
    """The first `size` places of pieces [1, H, N, D] that lie one after the other."""
    kept: list[Tensor] = []
    for piece in pieces:
        if size > 0:
            kept.append(piece[:, :, :size])
            size -= piece.shape[2]
    return kept


def _mask(query: Tensor, shared: int, window: int | None) -> Tensor | None:
    """What the queries of a row see, bool[1, 1, T, shared + T]; None for a row that shares nothing and is not longer
    than its sliding window."""
    length = query.shape[2]
    window = window or shared + length
    if not shared and length <= window:
        return None
    visible = torch.ones(length, shared + length, dtype=torch.bool, device=query.device)
    return visible.tril(shared).triu(shared + 1 - window)[None, None]


AttentionInterface.register("rows_sdpa", rows_attention)
