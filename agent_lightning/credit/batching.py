"""From samples to right-padded batches. Rows of one rollout stay together, and each rollout has the same weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from agent_lightning.core.types import Batch, Floats, Sample


def pack(
    samples: Sequence[Sample],
    *,
    rollouts_per_batch: int | None = None,
    pad_token: int,
    pad_multiple: int = 1,
    row_multiple: int = 1,
) -> tuple[Batch, ...]:
    """Batches of at most `rollouts_per_batch` rollouts (None: a single batch), in order of first appearance.

    The rollouts are spread evenly: 9 rollouts with rollouts_per_batch=8 make batches of 5 and 4, not of 8 and 1. The
    number of rows is rounded up to a multiple of `row_multiple`, the number of columns to one of `pad_multiple`.

    Example, rollouts A (rows 5 6* 7* and 5 8*) and B (row 5 9*), * = trained, pad_token=0, row_multiple=4:

        token_NT    5 6 7    weight_NT      0 1/6 1/6    length_N    3
                    5 8 0                   0 1/6   0                2
                    5 9 0                   0 1/2   0                2
                    0 0 0                   0   0   0                1

    A padding row has weight 0 and mask False everywhere, and length 1, so that no engine meets an empty sequence.
    No samples make no batches. Raises ValueError if a number is below 1, or if a rollout has no trained token that
    could bear its weight.
    """
    numbers = {"pad_multiple": pad_multiple, "row_multiple": row_multiple, "rollouts_per_batch": rollouts_per_batch}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, must be at least 1")
    rollouts = _by_rollout(samples)
    for rollout_id, rows in rollouts.items():
        if not any(row.mask_T.any() for row in rows):
            raise ValueError(f"rollout {rollout_id} has no trained token")
    if not rollouts:
        return ()
    # As few parts as possible: their sizes differ by at most 1, and larger parts come first.
    num_parts = 1 if rollouts_per_batch is None else -(-len(rollouts) // rollouts_per_batch)
    parts = np.array_split(np.array(list(rollouts)), num_parts)
    return tuple(_pad([rollouts[name] for name in part], pad_token, pad_multiple, row_multiple) for part in parts)


def unpack(
    samples: Sequence[Sample], batches: Sequence[Batch], values: Sequence[Floats | None]
) -> Iterator[tuple[Sample, Floats]]:
    """The samples of `pack`, each with its row of `values`, which has an array float32[N, T] for each batch, or None
    for a batch whose samples are left out. A row has the shape of the sample's arrays."""
    in_order = (sample for rows in _by_rollout(samples).values() for sample in rows)
    for batch, value_NT in zip(batches, values, strict=True):
        for n in np.flatnonzero(batch.rollout_N >= 0):
            sample = next(in_order)
            if value_NT is not None:
                yield sample, value_NT[n, : batch.length_N[n]]


def _by_rollout(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    rollouts: dict[str, list[Sample]] = {}
    for sample in samples:
        rollouts.setdefault(sample.key.rollout_id, []).append(sample)
    return rollouts


def _pad(rollouts: Sequence[Sequence[Sample]], pad_token: int, pad_multiple: int, row_multiple: int) -> Batch:
    num_rows = _round_up(sum(len(rows) for rows in rollouts), row_multiple)
    shape = num_rows, _round_up(max(row.token_T.size for rows in rollouts for row in rows), pad_multiple)
    token_NT = np.full(shape, pad_token, np.int32)
    mask_NT = np.zeros(shape, np.bool_)
    call_NT, version_NT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    logprob_NT, advantage_NT, reward_NT, weight_NT = (np.zeros(shape, np.float32) for _ in range(4))
    length_N = np.ones(num_rows, np.int32)
    rollout_N = np.full(num_rows, -1, np.int32)
    n = 0
    for rollout, rows in enumerate(rollouts):
        weight = 1.0 / (len(rollouts) * sum(int(row.mask_T.sum()) for row in rows))
        for row in rows:
            length = row.token_T.size
            token_NT[n, :length] = row.token_T
            mask_NT[n, :length] = row.mask_T
            logprob_NT[n, :length] = row.logprob_T
            advantage_NT[n, :length] = row.advantage_T
            reward_NT[n, :length] = row.reward_T
            call_NT[n, :length] = row.call_T
            version_NT[n, :length] = row.version_T
            weight_NT[n, :length] = row.mask_T * weight
            length_N[n] = length
            rollout_N[n] = rollout
            n += 1
    return Batch(
        token_NT=token_NT,
        mask_NT=mask_NT,
        logprob_NT=logprob_NT,
        advantage_NT=advantage_NT,
        reward_NT=reward_NT,
        call_NT=call_NT,
        version_NT=version_NT,
        weight_NT=weight_NT,
        length_N=length_N,
        rollout_N=rollout_N,
        num_rollouts=len(rollouts),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
