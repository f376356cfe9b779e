"""Attention for rows that are laid end to end, by PyTorch's kernels, in Transformers' registry of attentions.

Transformers' `sdpa` uses a mask for such a batch: N tokens cost N x N, by PyTorch's slower kernels, however many rows
they are. Here rows see themselves only, in a few calls. flash-attn, if it is installed, does the same in one call.

Rows that begin alike, such as the rollouts of a group, can share their prompt: it is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_PADDED: Final = 2.0
"""Largest share of the work of a block to the work of its rows."""
_MAX_KEYS: Final = 32_768
"""Most keys of all rows of a block, which bounds its memory."""


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
    tokens of the row before it, as in `share_prefixes`. Rows of similar lengths are one call: a call for each would
    cost more than its work, forward, backward and when its graph is freed. Raises ValueError for masks, soft-capping
    and sinks. Transformers passes no mask to an attention that has no mask function in its registry, so a mask comes
    from a model that makes its own.
    """
    unsupported = [name for name in ("softcap", "s_aux") if options.get(name) is not None]
    if attention_mask is not None or unsupported:
        features = ", ".join(unsupported) or "masks"
        raise ValueError(f"{type(module).__name__} has {features}, which rows_sdpa does not know: install flash-attn")
    tokens = [tensor[0].transpose(0, 1).flatten(1) for tensor in (query, key, value)]  # [N, H * D]
    blocks, order_N = _blocks(tuple(position_ids[0].tolist()), sliding_window, query.device)
    outputs = []
    for block in blocks:
        q, k, v = (
            embedding(index, flat).unflatten(2, (tensor.shape[1], -1)).transpose(1, 2)
            for index, flat, tensor in zip(
                (block.query_RT, block.key_RL, block.key_RL), tokens, (query, key, value), strict=True
            )
        )
        outputs.append(sdpa_attention_forward(module, q, k, v, block.mask_R1TL, **options)[0].flatten(0, 1).flatten(1))
    return embedding(order_N, torch.cat(outputs)).unflatten(1, (query.shape[1], -1))[None], None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """R rows that go through one call, with T queries and L keys each: what a row has less is padded."""

    query_RT: Tensor
    """int64[R, T], the places of the rows' own tokens in the batch."""
    key_RL: Tensor
    """int64[R, L], the places of all tokens that the rows see, from their first one on."""
    mask_R1TL: Tensor | None
    """bool[R, 1, T, L], whether a query sees a key; None if each query sees the keys up to its own."""


@lru_cache(maxsize=8)  # the layers of a model ask for the same blocks
def _blocks(positions: tuple[int, ...], window: int | None, device: torch.device) -> tuple[list[_Block], Tensor]:
    """The blocks of a batch, and for each of its tokens the place of its output in theirs, one after the other."""
    starts = [n for n, position in enumerate(positions) if n == 0 or position != positions[n - 1] + 1]
    rows: list[tuple[range, list[int]]] = []
    seen: list[int] = []
    for start, end in pairwise([*starts, len(positions)]):
        seen = [*seen[: positions[start]], *range(start, end)]
        rows.append((range(start, end), seen))
    rows.sort(key=lambda row: (len(row[0]), len(row[1])), reverse=True)
    blocks, order = [], torch.empty(len(positions), dtype=torch.int64)
    size = 0
    for part in _similar(rows):
        longest, most = max(len(own) for own, _ in part), max(len(keys) for _, keys in part)
        query_RT = pad_sequence([torch.tensor(own) for own, _ in part], batch_first=True)
        key_RL = pad_sequence([torch.tensor(keys) for _, keys in part], batch_first=True)
        for row, (own, _) in enumerate(part):
            order[own.start : own.stop] = torch.arange(len(own)) + size + row * longest
        size += len(part) * longest
        mask = None
        if len(part) > 1 or most > longest or (window is not None and most > window):
            own_R, all_R = (torch.tensor([len(row[n]) for row in part])[:, None, None] for n in (0, 1))
            query_T1 = torch.arange(longest)[:, None]
            ahead_RTL = torch.arange(most) - (all_R - own_R) - query_T1
            # A padded query sees all keys: the softmax of nothing is not a number.
            visible_RTL = (ahead_RTL <= 0) & (ahead_RTL > -(window or most)) | (query_T1 >= own_R)
            mask = visible_RTL[:, None].to(device)
        blocks.append(_Block(query_RT=query_RT.to(device), key_RL=key_RL.to(device), mask_R1TL=mask))
    return blocks, order.to(device)


def _similar(rows: Sequence[tuple[range, list[int]]]) -> Iterator[list[tuple[range, list[int]]]]:
    """Rows, the longest first, in parts that are padded to at most _PADDED times their own work."""
    part: list[tuple[range, list[int]]] = []
    work = most = 0
    for own, keys in rows:
        longest, most = len(part[0][0] if part else own), max(most, len(keys))
        work += len(own) * len(keys)
        count = len(part) + 1
        if part and (count * longest * most > _PADDED * work or count * most > _MAX_KEYS):
            yield part
            part, work, most = [], len(own) * len(keys), len(keys)
        part.append((own, keys))
    if part:
        yield part


AttentionInterface.register("rows_sdpa", rows_attention)
