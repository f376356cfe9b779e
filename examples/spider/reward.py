"""The reward of the example: 1.0 where the agent's query returns what the gold query does, else 0.0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from databases import Limits, files
from execution_match import execution_match

LIMITS = Limits(seconds=10.0)
"""A rollout waits for its reward."""


def score(task: Mapping[str, Any], output: str) -> float:
    """Execution match of the query that the agent returned. Raises DataError where the gold query fails."""
    databases = files(task["databases"], task["db_id"])
    return float(execution_match(output, task["query"], databases, limits=LIMITS))
