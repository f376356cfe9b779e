"""`agl score` and `agl reproduce`. The library knows no benchmark: each is a folder of examples/, found by its
benchmark.yaml, which benchmarks/reproduce/report.py reads, and its scorer.py, which has two functions:

    score(row, **paths) -> {"score": 1.0, ...}                   # figures of a row; raises DataError
    totals(rows) -> {"rows": 2, "score": 0.5, ...}               # of the rows, each with its figures

`paths` are the options that benchmark.yaml lists under `score_paths`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from agent_lightning.config.load import project_folder
from agent_lightning.core.errors import DataError, UserError
from agent_lightning.rollouts.agents import load
from agent_lightning.run.tasks import read_jsonl


def names() -> list[str]:
    """The benchmarks that there are: ["calc_x", "musique", "spider"]."""
    return sorted(file.parent.name for file in project_folder("examples").glob("*/benchmark.yaml"))


def facts(name: str) -> dict[str, Any]:
    """A benchmark's own benchmark.yaml."""
    return cast(dict[str, Any], yaml.safe_load((project_folder("examples") / name / "benchmark.yaml").read_text()))


def score_paths() -> dict[str, dict[str, str]]:
    """The options of `agl score`, and for each the benchmarks that read it, with a text for the help.
    Example: {"databases": {"spider": "the folder of DB/DB.sqlite"}}"""
    paths: dict[str, dict[str, str]] = {}
    for name in names():
        for option, text in facts(name).get("score_paths", {}).items():
            paths.setdefault(option, {})[name] = text
    return paths


def reproduce(benchmark: str, **settings: Any) -> int:
    """`agl reproduce`: train with several seeds, and write a report. Returns the exit code. Raises UserError."""
    return cast(int, load("benchmarks/reproduce/report.py:reproduce")(benchmark, **settings))


def score(benchmark: str, file: Path, paths: Mapping[str, Path]) -> int:
    """Write the rows of a file with their scores to standard output, one by one, and the totals last. A row that cannot
    be scored ends it without totals; the rows before it are written. Returns the exit code. Raises DataError with file
    and line, and UserError for a path that the benchmark does not read."""
    readers = score_paths()
    for option in paths:
        if benchmark not in readers[option]:
            raise UserError(f"--{option}: only {', '.join(readers[option])} reads it, not {benchmark}")
    if str(file) != "-" and not file.is_file():
        raise DataError(f"{file} does not exist")
    score_row, totals = (load(f"examples/{benchmark}/scorer.py:{name}") for name in ("score", "totals"))

    def write(row: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(row) + "\n")

    scored: list[dict[str, Any]] = []
    reported = time.monotonic()
    try:
        for number, row in read_jsonl(file):
            try:
                figures = cast(Mapping[str, float], score_row(row, **paths))
            except DataError as error:
                raise DataError(f"{file}:{number}: {error}") from None
            scored.append({**row, **figures})
            write(scored[-1])
            if time.monotonic() - reported > 5.0:  # seconds between two lines of progress
                reported = time.monotonic()
                sys.stderr.write(f"{len(scored)} rows scored\n")
        if not scored:
            raise DataError(f"{file}: there are no rows to score")
        write(cast(Mapping[str, Any], totals(scored)))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has enough (`| head`). Python would raise again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def means(rows: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Any]:
    """The means of figures, for `totals` of a scorer: [{"score": 1}, {"score": 0}] -> {"rows": 2, "score": 0.5}."""
    return {"rows": len(rows), **{name: sum(row[name] for row in rows) / len(rows) for name in names}}


def text_of(row: Mapping[str, Any], name: str, *, numbers: bool = False) -> str:
    """A field of a row that must be a text, or with `numbers` a number. Raises DataError."""
    if (value := row.get(name)) is None:
        raise DataError(f"the row has no {name!r}")
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{name} must be a text, this is {type(value).__name__}")
    return value
