"""Merging records in any grouping gives what one record of everything would say."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_lightning.core.metrics import Max, Mean, Metrics, Sum, interval, merge, values

numbers = st.lists(st.integers(-1000, 1000).map(float), min_size=1, max_size=10)


@given(st.lists(numbers, min_size=1, max_size=5))
def test_merging_parts_equals_the_whole(parts: list[list[float]]) -> None:
    everything = [number for part in parts for number in part]
    records: list[Metrics] = [{"mean": Mean.of(p), "sum": Sum(sum(p)), "max": Max(max(p))} for p in parts]
    merged = merge(*records)
    assert values(merged) == {
        "mean": pytest.approx(sum(everything) / len(everything)),
        "sum": sum(everything),
        "max": max(everything),
    }


def test_a_mean_weighs_values_not_records() -> None:
    assert merge({"reward": Mean.of([1.0, 0.0])}, {"reward": Mean.of([1.0])})["reward"].value == pytest.approx(2 / 3)


def test_keys_of_either_record_are_kept() -> None:
    assert values(merge({"a": Sum(1.0)}, {"b": Sum(2.0)})) == {"a": 1.0, "b": 2.0}


def test_an_empty_mean_is_not_a_number_and_merges_away() -> None:
    assert math.isnan(Mean.of([]).value)
    assert merge({"reward": Mean.of([])}, {"reward": Mean.of([3.0])})["reward"].value == 3.0


@pytest.mark.parametrize(("first", "second"), [(Sum(1.0), Max(1.0)), (Mean.of([1.0]), Sum(1.0))])
def test_one_name_has_one_kind(first: Sum | Mean, second: Max | Sum) -> None:
    with pytest.raises(TypeError, match="metric 'tokens' is both"):
        merge({"tokens": first}, {"tokens": second})


def test_merging_nothing_is_empty() -> None:
    assert merge() == {}


@pytest.mark.parametrize(
    ("numbers", "mean", "half"),
    [
        ([0, 1, 1, 0], 0.5, 1.96 * (1 / 3) ** 0.5 / 2),
        ([0, 1, math.nan, 1, math.inf, 0], 0.5, 1.96 * (1 / 3) ** 0.5 / 2),
        ([0.25, 0.25], 0.25, 0.0),
        ([1], 1, math.nan),
        ([], math.nan, math.nan),
    ],
)
def test_an_interval_is_of_the_known_numbers(numbers: list[float], mean: float, half: float) -> None:
    assert interval(numbers) == pytest.approx((mean, half), nan_ok=True)
