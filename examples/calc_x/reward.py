"""The reward of the example: 1.0 if the last number (or the option letter) of the answer is right, else 0.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare import same


def score(task: Mapping[str, Any], output: str) -> float:
    """1.0 if `output` answers the task, else 0.0.

    {"result": "34"}, "The answer is 34." -> 1.0; {"result": "B"}, "Option B" -> 1.0; {"result": "50%"}, "0.5" -> 1.0.
    """
    return float(same(str(task["result"]), output))


def score_sheet(task: Mapping[str, Any], output: Sequence[str]) -> float:
    """1.0 if every question of a sheet is answered right, else 0.0."""
    return float(all(score(row, answer) for row, answer in zip(task["rows"], output, strict=True)))
