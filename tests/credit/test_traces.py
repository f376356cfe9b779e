"""Calls -> chains -> samples, as tables and as properties."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import ModelCall, Outcome, RolloutKey, Sample, Trajectory
from agent_lightning.credit import tools
from agent_lightning.credit.samples import Dropped, chain_calls, select_calls, to_samples

KEY = RolloutKey(split="train", group=0, index=0)


def call(
    name: str, prompt: Sequence[int], response: Sequence[int], *, agent: str = "main", version: int = 0
) -> ModelCall:
    return ModelCall(
        key=KEY,
        call_id=name,
        agent=agent,
        policy_version=version,
        prompt_T=np.array(prompt, np.int32),
        response_T=np.array(response, np.int32),
        logprob_T=-np.arange(1, len(response) + 1, dtype=np.float32),
        finish_reason="stop",
        started_at=0.0,
        ended_at=0.0,
    )


def names(grouped: Sequence[Sequence[ModelCall]]) -> list[str]:
    return [" ".join(c.call_id for c in chain) for chain in grouped]


def samples_of(
    calls: Sequence[ModelCall], advantage: Sequence[float] | None = None, max_tokens: int = 10**6
) -> tuple[tuple[Sample, ...], tuple[Dropped, ...]]:
    trajectory = Trajectory(key=KEY, task_id="t", calls=tuple(calls), reward=1.0, outcome=Outcome.FINISHED)
    values = np.array(range(1, len(calls) + 1) if advantage is None else advantage, np.float32)
    return to_samples(trajectory, calls, values, values, max_tokens=max_tokens)


# select ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("*", "writer judge rewriter-2"),
        ("writer", "writer"),
        ("writer,rewriter*", "writer rewriter-2"),
        (" rewriter* , writer ", "writer rewriter-2"),  # order of the calls, not of the pattern
        ("*writer*,writer", "writer rewriter-2"),  # a call that two globs match is there once
        ("Writer", ""),
        ("nobody", ""),
    ],
)
def test_select(pattern: str, selected: str) -> None:
    calls = [call(agent, [1], [2], agent=agent) for agent in ("writer", "judge", "rewriter-2")]
    assert " ".join(calls[i].call_id for i in select_calls(calls, pattern)) == selected


@pytest.mark.parametrize("pattern", ["", "  ", ",", "writer,", "a,,b"])
def test_select_refuses_an_empty_name(pattern: str) -> None:
    with pytest.raises(ConfigError, match="empty agent name"):
        select_calls([], pattern)


# chains ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([call("a1", [1, 5], [6]), call("a2", [1, 5, 6, 9], [3])], ["a1 a2"], id="two turns"),
        pytest.param(
            [
                call("a1", [1, 5], [6]),
                call("b1", [1, 7], [8]),
                call("a2", [1, 5, 6, 9], [3]),
                call("b2", [1, 7, 8, 2], [4]),
            ],
            ["a1 a2", "b1 b2"],
            id="interleaved",
        ),
        pytest.param(
            # A history that ends as the prompt does, but differs before: not a prefix.
            [call("a1", [1, 5], [6]), call("b1", [2, 5, 6, 9], [3])],
            ["a1", "b1"],
            id="edited history",
        ),
        pytest.param([call("a1", [1, 5], [6]), call("a2", [1, 5, 6], [7])], ["a1 a2"], id="prompt equals the history"),
        pytest.param(
            # a2 and again both extend a1; a1's tokens belong to one chain only.
            [call("a1", [1], [2]), call("a2", [1, 2, 3], [4]), call("again", [1, 2, 3], [5])],
            ["a1 a2", "again"],
            id="sampled twice from one prompt",
        ),
        pytest.param(
            # c extends both [1 2] (of b1) and [1 2 3 4] (of a2): the longer one.
            [call("a1", [1], [2]), call("a2", [1, 2, 3], [4]), call("b1", [1], [2]), call("c", [1, 2, 3, 4, 5], [6])],
            ["a1 a2 c", "b1"],
            id="longest wins",
        ),
        pytest.param(
            [call("a1", [1], [2]), call("b1", [1], [2]), call("c", [1, 2, 3], [4])],
            ["a1 c", "b1"],
            id="earlier of equals wins",
        ),
    ],
)
def test_chains(calls: list[ModelCall], expected: list[str]) -> None:
    assert names(chain_calls(calls)) == expected


@st.composite
def interleavings(draw: st.DrawFn) -> tuple[list[ModelCall], list[str]]:
    """1 to 4 conversations behind one system prompt, their calls shuffled together; and the chains to be found."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_turns = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    tokens = [*rng.integers(10, 14, rng.integers(0, 6)).tolist()]
    # The first own token tells conversations apart; all others come from four, so that look-alikes are common.
    histories = [[*tokens, conversation] for conversation in range(len(num_turns))]
    order = rng.permutation(np.repeat(np.arange(len(num_turns)), num_turns))
    grouped: dict[int, list[str]] = {}
    calls = []
    for index, conversation in enumerate(order.tolist()):
        prompt = [*histories[conversation], *rng.integers(10, 14, rng.integers(0, 4)).tolist()]
        response = rng.integers(10, 14, rng.integers(1, 4)).tolist()
        histories[conversation] = [*prompt, *response]
        calls.append(call(f"c{index}", prompt, response))
        grouped.setdefault(conversation, []).append(f"c{index}")
    return calls, [" ".join(chain) for chain in grouped.values()]


@settings(max_examples=1000, deadline=None)
@given(interleavings())
def test_interleaved_conversations_are_recovered(case: tuple[list[ModelCall], list[str]]) -> None:
    calls, expected = case
    assert names(chain_calls(calls)) == expected


# Few tokens and short calls, so that prompts extend each other, or almost, by chance.
tiny_calls = st.lists(
    st.tuples(st.lists(st.integers(0, 1), max_size=5), st.lists(st.integers(0, 1), max_size=2)), max_size=8
).map(lambda pairs: [call(f"c{i}", prompt, response) for i, (prompt, response) in enumerate(pairs)])


@settings(deadline=None)
@given(tiny_calls)
def test_each_call_is_in_one_chain_and_extends_the_one_before(calls: list[ModelCall]) -> None:
    grouped = chain_calls(calls)
    assert sorted(c.call_id for chain in grouped for c in chain) == sorted(c.call_id for c in calls)
    for chain in grouped:
        assert [c.call_id for c in chain] == sorted(c.call_id for c in chain)
        for earlier, later in pairwise(chain):
            history = [*earlier.prompt_T.tolist(), *earlier.response_T.tolist()]
            assert later.prompt_T.tolist()[: len(history)] == history


# to_samples -----------------------------------------------------------------------------------------------------------


def test_a_chain_becomes_one_row() -> None:
    first = replace(call("a1", [5, 6], [7, 8], version=3), new_versions=((1, 4),))
    calls = [first, call("a2", [5, 6, 7, 8, 9], [4], version=5)]
    (row,), dropped = samples_of(calls, [0.5, -1.0])
    # fmt: off
    assert row.token_T.tolist()     == [5, 6,   7,   8, 9,  4]
    assert row.mask_T.tolist()      == [0, 0,   1,   1, 0,  1]
    assert row.logprob_T.tolist()   == [0, 0,  -1,  -2, 0, -1]
    assert row.advantage_T.tolist() == [0, 0, 0.5, 0.5, 0, -1]
    assert row.reward_T.tolist()    == [0, 0,   0, 0.5, 0, -1]
    assert row.call_T.tolist()      == [0, 0,   0,   0, 0,  1]
    assert row.version_T.tolist()   == [0, 0,   3,   4, 0,  5]
    # fmt: on
    assert row.key == KEY
    assert dropped == ()


def test_calls_of_interleaved_chains_keep_their_own_advantage() -> None:
    calls = [call("a1", [1, 5], [6]), call("b1", [1, 7], [8]), call("a2", [1, 5, 6], [3])]
    (a, b), _ = samples_of(calls, [0.1, 0.2, 0.3])
    # fmt: off
    assert a.token_T.tolist() == [1, 5, 6, 3]
    np.testing.assert_allclose(a.advantage_T, [0, 0, .1, .3])
    assert b.token_T.tolist() == [1, 7, 8]
    np.testing.assert_allclose(b.advantage_T, [0, 0, .2])
    # fmt: on


@pytest.mark.parametrize(("max_tokens", "rows", "lost"), [(6, 2, 0), (5, 1, 3), (2, 0, 4)])
def test_a_row_too_long_is_dropped_whole_and_counted(max_tokens: int, rows: int, lost: int) -> None:
    calls = [
        call("a1", [5, 6], [7, 8]),
        call("a2", [5, 6, 7, 8, 9], [4]),  # with a1: 6 tokens, 3 of them sampled
        call("b1", [1, 2], [3]),  # 3 tokens, 1 sampled
    ]
    samples, dropped = samples_of(calls, max_tokens=max_tokens)
    assert len(samples) == rows
    assert {drop.reason for drop in dropped} <= {"overlong_sample"}
    assert sum(drop.tokens for drop in dropped) == lost


def test_a_chain_that_sampled_nothing_makes_no_row() -> None:
    assert samples_of([call("a1", [1, 2], [])]) == ((), ())


def test_one_advantage_for_each_call() -> None:
    with pytest.raises(ValueError, match="1 trained calls but advantages of shape"):
        samples_of([call("a1", [1], [2])], [0.5, 0.5])


@settings(deadline=None)
@given(tiny_calls, st.integers(1, 8))
def test_tokens_are_conserved(calls: list[ModelCall], max_tokens: int) -> None:
    samples, dropped = samples_of(calls, max_tokens=max_tokens)
    trained = sum(int(row.mask_T.sum()) for row in samples)
    assert trained + sum(drop.tokens for drop in dropped) == sum(c.response_T.size for c in calls)
    assert all(row.token_T.size <= max_tokens for row in samples)


@settings(deadline=None)
@given(tiny_calls)
def test_each_sampled_token_is_trained_exactly_once(calls: list[ModelCall]) -> None:
    # Advantages 1, 2, 3, … name the call a trained position came from.
    samples, _ = samples_of(calls)
    for number, c in enumerate(calls, start=1):
        hits = [(row, np.flatnonzero(row.advantage_T == number)) for row in samples]
        hits = [(row, at) for row, at in hits if at.size]
        assert len(hits) == (c.response_T.size > 0)
        for row, at in hits:
            assert row.mask_T[at].all()
            assert row.token_T[at].tolist() == c.response_T.tolist()
            assert row.logprob_T[at].tolist() == c.logprob_T.tolist()
            # What the model read before it sampled is what stands before it in the row.
            assert row.token_T[: at[0]].tolist() == c.prompt_T.tolist()
    for row in samples:
        assert not row.advantage_T[~row.mask_T].any()
        assert not row.logprob_T[~row.mask_T].any()


@pytest.mark.parametrize("tool_calls", ["1.5", "true", '"text"', "{}", "[1]", "null"])
def test_a_reply_whose_tool_calls_are_no_list_of_calls_has_none(tool_calls: str) -> None:
    odd = replace(call("a", [1], [2]), reply=f'{{"role": "assistant", "tool_calls": {tool_calls}}}')
    assert tools.tool_calls([odd]) == ()
