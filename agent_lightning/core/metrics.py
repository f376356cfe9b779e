"""Metric values that can be merged: functions return them, and the loop logs one merged record for each step.

merge({"reward": Mean.of([1.0, 0.0])}, {"reward": Mean.of([1.0])})["reward"].value  # 0.6666…
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

Z95: Final = 1.96  # standard deviations on both sides of a mean that hold 95 % of a normal distribution


@dataclass(frozen=True, slots=True)
class Mean:
    """An average that knows how many values it is the average of."""

    total: float
    count: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        listed = list(values)
        return cls(float(sum(listed)), float(len(listed)))

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)


@dataclass(frozen=True, slots=True)
class Sum:
    """A total."""

    value: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Max:
    """A maximum."""

    value: float

    def merge(self, other: Max) -> Max:
        return Max(max(self.value, other.value))


Metrics = Mapping[str, Mean | Sum | Max]


def merge(*records: Metrics) -> dict[str, Mean | Sum | Max]:
    """Merge records key by key. Raises TypeError if a key has metrics of two classes."""
    merged: dict[str, Mean | Sum | Max] = {}
    for record in records:
        for name, value in record.items():
            old = merged.get(name)
            if old is not None and type(old) is not type(value):
                raise TypeError(f"metric {name!r} is both {type(old).__name__} and {type(value).__name__}")
            merged[name] = value if old is None else cast(Any, old).merge(value)
    return merged


def keep_most_counted(metrics: Metrics, prefix: str, limit: int) -> dict[str, Mean | Sum | Max]:
    """The metrics without the means below a prefix that are of the fewest values, so that `limit` of them are left.
    Names that an agent chooses go through it: one agent must not fill a run's metrics with names of its own."""
    means = {name: metric for name, metric in metrics.items() if name.startswith(prefix) and isinstance(metric, Mean)}
    kept = set(sorted(means, key=lambda name: (-means[name].count, len(name), name))[:limit])
    return {name: metric for name, metric in metrics.items() if name in kept or name not in means}


def interval(numbers: Iterable[float]) -> tuple[float, float]:
    """Mean of independent numbers, and half the width of its 95 % interval (normal approximation); NaN where unknown.
    Numbers that are not finite are left out. Example: interval([0, 1, 1, 0]) -> (0.5, 0.57)"""
    known = [number for number in numbers if math.isfinite(number)]
    count = len(known)
    mean = math.fsum(known) / count if count else math.nan
    if count < 2:
        return mean, math.nan
    variance = math.fsum((number - mean) ** 2 for number in known) / (count - 1)
    return mean, Z95 * math.sqrt(variance / count)


def values(metrics: Metrics) -> dict[str, float]:
    """Each metric as a plain number."""
    return {name: metric.value for name, metric in metrics.items()}
