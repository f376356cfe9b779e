"""`agl score`: anyone's predictions, scored as their benchmark does.

A benchmark's scorer is examples/NAME/scorer.py with two functions:

    score(row, *, databases: Path | None = None) -> {"score": …, more figures}   # raises DataError
    totals(rows) -> {"rows": …, "score": …, …}                                   # of rows with their figures
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from agent_lightning.core.errors import DataError, UserError
from agent_lightning.rollouts.agents import load
from agent_lightning.run.tasks import read_jsonl

REPORT_EVERY_S = 5.0


def run(benchmark: str, file: Path, databases: Path | None) -> int:
    """Rows to scored rows on standard output, one by one, and the totals last; the exit code.

    At a row that cannot be scored it stops without totals; the rows before it are out already.
    Raises DataError with file and line.
    """
    if databases is not None and benchmark != "spider":
        raise UserError(f"--databases: only spider reads it, not {benchmark}")
    if str(file) != "-" and not file.is_file():
        raise DataError(f"{file} does not exist")
    score = load(f"examples/{benchmark}/scorer.py:score")
    totals = load(f"examples/{benchmark}/scorer.py:totals")
    scored: list[dict[str, Any]] = []
    reported = time.monotonic()
    try:
        for number, row in read_jsonl(file):
            try:
                figures = cast(Mapping[str, float], score(row, databases=databases))
            except DataError as error:
                raise DataError(f"{file}:{number}: {error}") from None
            scored.append({**row, **figures})
            _write(scored[-1])
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                sys.stderr.write(f"{len(scored)} rows scored\n")
        if not scored:
            raise DataError(f"{file}: there are no rows to score")
        _write(cast(Mapping[str, Any], totals(scored)))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has enough (`| head`); Python would complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def means(rows: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Any]:
    """means([{"score": 1}, {"score": 0}], "score") -> {"rows": 2, "score": 0.5}."""
    return {"rows": len(rows), **{name: sum(row[name] for row in rows) / len(rows) for name in names}}


def text_of(row: Mapping[str, Any], name: str, *, numbers: bool = False) -> str:
    """A field that must be a text, or where `numbers` is set may be a number. Raises DataError."""
    value = row.get(name)
    if value is None:
        raise DataError(f"the row has no {name!r}")
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, this is {type(value).__name__}")
    return value


def _write(row: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
