"""`agl score musique`: rows with `pred`, `answer` and, if there are any, `answer_aliases`. The score is F1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from answers import exact_match, f1

from agent_lightning.api.cli.benchmarks import means, text_of
from agent_lightning.core.errors import DataError


def score(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a row: {"score": F1, "em": …, "f1": …}. Raises DataError."""
    aliases = row.get("answer_aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise DataError("answer_aliases must be a list of texts")
    pred, golds = text_of(row, "pred"), [text_of(row, "answer"), *aliases]
    fit = f1(pred, golds)
    return {"score": fit, "em": exact_match(pred, golds), "f1": fit}


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{"rows": …, "score": …, "em": …, "f1": …}: means over the scored rows."""
    return means(rows, "score", "em", "f1")
