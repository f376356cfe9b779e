"""Execution match of anyone's predictions, row by row: {"id", "pred", "db_id", "query"}, and "difficulty" at will."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from databases import files
from execution_match import execution_match

from agent_lightning.core.errors import DataError

FIELDS = ("pred", "db_id", "query")
LEVELS = ("easy", "medium", "hard", "extra")
"""Spider's difficulties, in their order."""


def score(row: Mapping[str, Any], *, databases: Path | None = None) -> dict[str, float]:
    """{"score": 1} where the prediction matches the gold query on `databases/db_id/*.sqlite`, else {"score": 0}.

    Raises DataError: a missing field or database, no folder of databases, a gold query that fails.
    """
    missing = [field for field in FIELDS if not isinstance(row.get(field), str)]
    if missing:
        raise DataError(f"the row has no text {' and no text '.join(map(repr, missing))}")
    if databases is None:
        raise DataError("Spider is scored on its databases: give their folder with --databases")
    return {"score": int(execution_match(row["pred"], row["query"], files(databases, row["db_id"])))}


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of scored rows: {"rows": 3, "score": 0.667, "difficulty": {"easy": {"rows": 3, "score": 0.667}}}.

    "difficulty" is there where rows carry one.
    """
    given = {str(row["difficulty"]) for row in rows if row.get("difficulty") is not None}
    levels = [level for level in LEVELS if level in given] + sorted(given - set(LEVELS))
    by_level = {level: _mean(row for row in rows if row.get("difficulty") == level) for level in levels}
    return _mean(rows) | ({"difficulty": by_level} if by_level else {})


def _mean(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [row["score"] for row in rows]
    return {"rows": len(scores), "score": sum(scores) / len(scores) if scores else 0.0}
