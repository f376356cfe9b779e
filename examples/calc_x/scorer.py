"""`agl score calc_x`: rows with `pred` and `result`. The score is 1 if the answer is right, else 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare import same

from agent_lightning.api.cli.benchmarks import means, text_of


def score(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row: {"score": 0 or 1}. Raises DataError."""
    return {"score": int(same(text_of(row, "result", numbers=True), text_of(row, "pred", numbers=True)))}


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"rows": …, "score": …}: the mean over the scored rows."""
    return means(rows, "score")
