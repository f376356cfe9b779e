"""`agl score spider`: execution match of rows with `pred`, `db_id`, `query` and, if there is one, `difficulty`."""

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
    """The figures of a row: {"score": 1} if the prediction gives the rows of the gold query, else {"score": 0}.

    Both run on `databases/db_id/*.sqlite`.

    Raises DataError if a field, a database or the folder of databases is missing, or the gold query fails.
    """
    missing = [field for field in FIELDS if not isinstance(row.get(field), str)]
    if missing:
        raise DataError(f"the row has no text {' and no text '.join(map(repr, missing))}")
    if databases is None:
        raise DataError("Spider is scored on its databases: give their folder with --databases")
    return {"score": int(execution_match(row["pred"], row["query"], files(databases, row["db_id"])))}


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean score: {"rows": 3, "score": 0.667, "difficulty": {"easy": {"rows": 3, "score": 0.667}}}.

    "difficulty" is left out if no row has one.
    """
    given = {str(row["difficulty"]) for row in rows if row.get("difficulty") is not None}
    levels = [level for level in LEVELS if level in given] + sorted(given - set(LEVELS))
    by_level = {level: _mean(row for row in rows if row.get("difficulty") == level) for level in levels}
    return _mean(rows) | ({"difficulty": by_level} if by_level else {})


def _mean(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    scores = [row["score"] for row in rows]
    return {"rows": len(scores), "score": sum(scores) / len(scores) if scores else 0.0}
