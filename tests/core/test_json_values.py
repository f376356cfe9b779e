"""JSON from outside: how deep it is, which of its log-probabilities can be used, and what its chunks add up to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_lightning.core.json_values import clean_logprobs, compact, is_deeper, join_chunks


@given(
    st.recursive(
        st.integers(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        ),
    )
)
def test_depth_is_what_recursion_says(value: Any) -> None:
    def depth(item: Any) -> int:
        inside = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
        return isinstance(item, dict | list | tuple) + max(map(depth, inside), default=0)

    assert [is_deeper(value, limit) for limit in range(1, 8)] == [depth(value) > limit for limit in range(1, 8)]


def test_a_value_that_would_exhaust_the_stack_is_deeper() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    assert is_deeper(value, 64)
    while value:  # or freeing it would recurse
        value = value.pop()


def test_compact_text() -> None:
    assert compact([{"a": "日本", "b": None}]) == '[{"a":"日本","b":null}]'
    with pytest.raises(ValueError, match="JSON"):
        compact([float("nan")])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], [np.nan, np.nan]),
        ([-0.5], [np.nan, np.nan]),
        ([-0.5, None], [-0.5, np.nan]),
        ([-np.inf, 2.0], [np.nan, np.nan]),
        ([1e-6, -1.0], [0.0, -1.0]),
    ],
)
def test_a_log_probability_that_cannot_be_used_is_not_a_number(values: Any, expected: list[float]) -> None:
    np.testing.assert_array_equal(clean_logprobs(values, 2), np.array(expected, np.float32))


def chunk(**choice: Any) -> dict[str, Any]:
    return {"id": "a", "choices": [{"index": 0, **choice}]}


def test_chunks_of_a_chat_add_up() -> None:
    response = join_chunks(
        [
            chunk(delta={"role": "assistant", "content": "4"}, token_ids=[7], logprobs={"content": [{"logprob": -1}]}),
            chunk(delta={"content": "2", "reasoning": "so"}, token_ids=[5], logprobs={"content": [{"logprob": -2}]}),
            chunk(delta={}, token_ids=None, logprobs=None, finish_reason="stop"),
            {"id": "a", "choices": [], "usage": {"total_tokens": 2}},
        ]
    )
    assert response == {
        "id": "a",
        "usage": {"total_tokens": 2},
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "42", "reasoning": "so"},
                "token_ids": [7, 5],
                "logprobs": {"content": [{"logprob": -1}, {"logprob": -2}]},
                "finish_reason": "stop",
            }
        ],
    }


def test_tool_calls_and_choices_are_put_in_the_order_of_their_indices() -> None:
    later = {"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}
    pieces = [{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}, later]
    rest = {"index": 0, "function": {"arguments": ": 1}"}}
    response = join_chunks(
        [
            {"choices": [{"index": 1, "text": "b"}, {"index": 0, "delta": {"tool_calls": pieces[::-1]}}]},
            {"choices": [{"index": 1, "text": "c"}, {"index": 0, "delta": {"tool_calls": [rest]}}]},
        ]
    )
    chat, text = response["choices"]
    assert text == {"index": 1, "text": "bc"}
    assert chat["message"]["tool_calls"] == [
        {"id": "a", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "b", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert "finish_reason" not in chat
