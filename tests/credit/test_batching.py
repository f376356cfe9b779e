"""Packing keeps every row, keeps rollouts together, and lets each rollout weigh the same."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.types import Floats, RolloutKey, Sample
from agent_lightning.credit.batching import pack, unpack


def row(index: int, tokens: Sequence[int], mask: Sequence[int]) -> Sample:
    mask_T = np.array(mask, np.bool_)
    return Sample(
        key=RolloutKey(split="train", group=index // 4, index=index % 4),
        token_T=np.array(tokens, np.int32),
        mask_T=mask_T,
        logprob_T=np.where(mask_T, -0.5, 0.0).astype(np.float32),
        advantage_T=np.where(mask_T, index + 1.0, 0.0).astype(np.float32),
        reward_T=np.where(mask_T, index / 2, 0.0).astype(np.float32),
        call_T=np.where(mask_T, index, 0).astype(np.int32),
        version_T=np.where(mask_T, np.arange(mask_T.size), 0).astype(np.int32),
    )


def test_the_example_of_the_docstring() -> None:
    (batch,) = pack(
        [row(0, [5, 6, 7], [0, 1, 1]), row(0, [5, 8], [0, 1]), row(1, [5, 9], [0, 1])],
        rollouts_per_batch=None,
        pad_token=0,
        row_multiple=4,
    )
    # fmt: off
    assert batch.token_NT.tolist() == [[5, 6, 7],
                                       [5, 8, 0],
                                       [5, 9, 0],
                                       [0, 0, 0]]
    assert batch.mask_NT.tolist()  == [[0, 1, 1],
                                       [0, 1, 0],
                                       [0, 1, 0],
                                       [0, 0, 0]]
    assert batch.weight_NT == pytest.approx(np.array(
                                      [[0, 1 / 6, 1 / 6],
                                       [0, 1 / 6,     0],
                                       [0, 1 / 2,     0],
                                       [0,     0,     0]]))
    assert batch.advantage_NT.tolist() == [[0, 1, 1],
                                           [0, 1, 0],
                                           [0, 2, 0],
                                           [0, 0, 0]]
    # fmt: on
    assert batch.logprob_NT.tolist() == (-0.5 * batch.mask_NT).tolist()
    assert batch.length_N.tolist() == [3, 2, 2, 1]
    assert batch.version_NT.tolist() == [[0, 1, 2], [0, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert batch.num_rollouts == 2


def test_padding_uses_the_pad_token_in_rows_and_columns() -> None:
    (batch,) = pack([row(0, [5, 6], [0, 1])], rollouts_per_batch=1, pad_token=9, pad_multiple=4, row_multiple=2)
    assert batch.token_NT.tolist() == [[5, 6, 9, 9], [9, 9, 9, 9]]
    assert batch.length_N.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("num_rollouts", "rollouts_per_batch", "sizes"),
    [(9, 8, [5, 4]), (8, 8, [8]), (10, 4, [4, 3, 3]), (3, 1, [1, 1, 1]), (3, 100, [3]), (5, None, [5]), (0, 4, [])],
)
def test_batches_are_of_near_equal_size(num_rollouts: int, rollouts_per_batch: int | None, sizes: list[int]) -> None:
    samples = [row(index, [1, 2], [0, 1]) for index in range(num_rollouts)]
    batches = pack(samples, rollouts_per_batch=rollouts_per_batch, pad_token=0)
    assert [batch.num_rollouts for batch in batches] == sizes


def test_rows_of_a_rollout_that_arrive_apart_are_brought_together() -> None:
    samples = [row(0, [1], [1]), row(1, [2], [1]), row(0, [3], [1])]
    batches = pack(samples, rollouts_per_batch=1, pad_token=0)
    assert [batch.token_NT.tolist() for batch in batches] == [[[1], [3]], [[2]]]
    values: list[Floats | None] = [batch.token_NT.astype(np.float32) for batch in batches]
    assert [(s.token_T[0], value_T.tolist()) for s, value_T in unpack(samples, batches, values)] == [
        (1, [1]),
        (3, [3]),
        (2, [2]),
    ]
    assert [s.token_T[0] for s, _ in unpack(samples, batches, [None, *values[1:]])] == [2]


def test_a_rollout_without_a_trained_token_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout train-0-1 has no trained token"):
        pack([row(0, [1], [1]), row(1, [1, 2], [0, 0])], rollouts_per_batch=None, pad_token=0)


@pytest.mark.parametrize("name", ["rollouts_per_batch", "pad_multiple", "row_multiple"])
def test_sizes_below_one_are_refused(name: str) -> None:
    sizes = {"rollouts_per_batch": 1, "pad_multiple": 1, "row_multiple": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        pack(
            [],
            rollouts_per_batch=sizes["rollouts_per_batch"],
            pad_token=0,
            pad_multiple=sizes["pad_multiple"],
            row_multiple=sizes["row_multiple"],
        )


@st.composite
def rows(draw: st.DrawFn) -> list[Sample]:
    """Rows of up to 6 rollouts in any order; each row has at least one trained token. Token values name the row."""
    owners = draw(st.lists(st.integers(0, 5), max_size=12))
    drawn = []
    for number, owner in enumerate(owners, start=1):
        mask = [*draw(st.lists(st.integers(0, 1), max_size=4)), 1]
        drawn.append(row(owner, [number] * len(mask), mask))
    return drawn


@settings(deadline=None, max_examples=100)
@given(rows(), st.none() | st.integers(1, 4), st.sampled_from([1, 4]), st.sampled_from([1, 3]))
def test_packing_keeps_its_promises(
    samples: list[Sample], rollouts_per_batch: int | None, pad_multiple: int, row_multiple: int
) -> None:
    batches = pack(
        samples,
        rollouts_per_batch=rollouts_per_batch,
        pad_token=0,
        pad_multiple=pad_multiple,
        row_multiple=row_multiple,
    )
    by_number = {int(s.token_T[0]): s for s in samples}
    seen: list[int] = []
    batches_of: dict[str, set[int]] = {}
    for b, batch in enumerate(batches):
        assert batch.token_NT.shape[0] % row_multiple == 0
        assert batch.token_NT.shape[1] % pad_multiple == 0
        assert (batch.length_N >= 1).all()
        assert float(batch.weight_NT.sum()) == pytest.approx(1.0, abs=1e-5)
        assert ((batch.weight_NT > 0) == batch.mask_NT).all()
        weight_of: dict[str, float] = {}
        for n, number in enumerate(batch.token_NT[:, 0].tolist()):
            if number == 0:
                assert batch.length_N[n] == 1
                assert not batch.mask_NT[n].any()
                continue
            sample = by_number[number]
            length = sample.token_T.size
            assert batch.length_N[n] == length
            assert batch.token_NT[n, :length].tolist() == sample.token_T.tolist()
            assert batch.mask_NT[n, :length].tolist() == sample.mask_T.tolist()
            assert batch.advantage_NT[n, :length].tolist() == sample.advantage_T.tolist()
            assert not batch.token_NT[n, length:].any()
            assert not batch.mask_NT[n, length:].any()
            seen.append(number)
            batches_of.setdefault(sample.key.rollout_id, set()).add(b)
            weight_of[sample.key.rollout_id] = weight_of.get(sample.key.rollout_id, 0) + float(batch.weight_NT[n].sum())
        # Each rollout weighs the same, whatever its number of rows and tokens.
        assert batch.num_rollouts == len(weight_of)
        assert list(weight_of.values()) == pytest.approx([1 / batch.num_rollouts] * batch.num_rollouts, abs=1e-5)
    assert sorted(seen) == sorted(by_number)  # every row once
    assert all(len(where) == 1 for where in batches_of.values())  # no rollout is split
    assert list(batches_of) == list(dict.fromkeys(s.key.rollout_id for s in samples))  # order of first appearance
    if batches:
        sizes = [batch.num_rollouts for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert rollouts_per_batch is None or max(sizes) <= rollouts_per_batch
