"""Tasks from files, from the Hugging Face Hub or from a function, and the order in which they are trained."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast

import numpy as np

from agent_lightning.core.errors import DataError
from agent_lightning.core.text import one_line
from agent_lightning.core.types import Task
from agent_lightning.run.archive import read_rows

T = TypeVar("T")
FIX_ROOT = "set data.root to the folder that holds it, or write the path from here"


def load_file(path: str | Path, *, required: Sequence[str] = ()) -> list[Task]:
    """Read a task from each row of a file: .jsonl, .json (a list of objects, or lines), .csv, .tsv or .parquet, the
    texts also as .gz. {"id": "a1", "question": "…"} -> Task(task_id="a1", payload=the row). A row without "id" is named
    after the file and the row: "train-17". The columns of a CSV file are text. A row in veRL's layout (prompt,
    reward_model, extra_info) also gets `question`, its last message, and `result`, its ground truth. Raises DataError
    with file and row: no such file, not of this format, not an object, a missing field, a duplicate id."""
    path = Path(path)
    stem, _, end = path.name.removesuffix(".gz").rpartition(".")
    read = _READERS.get(end, read_jsonl)
    try:
        rows = ((number, with_verl(row)) for number, row in read(path))
        return _tasks(((f"{path}:{number}", f"{stem or end}-{number}", row) for number, row in rows), required)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {FIX_ROOT}") from None


load_jsonl = load_file


def with_verl(row: dict[str, Any]) -> dict[str, Any]:
    """A row, and if it is in veRL's layout, its question and its result under these names too."""
    prompt, reward = row.get("prompt"), row.get("reward_model")
    if not (isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict) and isinstance(reward, dict)):
        return row
    return {"question": prompt[-1].get("content"), "result": reward.get("ground_truth"), **row}


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON list, or of the first list in an object, each with its number from 1."""
    with _open(path) as file:
        text = file.read().decode("utf-8-sig", "replace")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        yield from read_jsonl(path)  # many files of this name hold an object a line
        return
    rows = next((item for item in value.values() if isinstance(item, list)), None) if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a list of objects, or an object a line")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number} must be an object, this is {type(row).__name__}")
        yield number, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines below the names of the columns, as text, each with its number from 1."""
    csv.field_size_limit(2**31 - 1)
    with _open(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        rows = csv.DictReader(lines, delimiter="\t" if ".tsv" in path.suffixes else ",", strict=True)
        try:
            names = rows.fieldnames or ()
            if len(set(names)) < len(names) or (len(names) == 1 and set(";\t|") & set(names[0])):
                raise DataError(
                    f"{path}:1: columns {list(names)}: each needs a name of its own, and a comma between two"
                )
            for number, row in enumerate(rows, start=1):
                if None in row or None in row.values():
                    raise DataError(f"{path}:{rows.line_num}: the row has other columns than {rows.fieldnames}")
                yield number, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{rows.line_num}: not CSV in UTF-8: {one_line(error)[:300]}") from error


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the rows of a .jsonl or .jsonl.gz file, or of standard input for "-", each with its line number from 1.
    Raises DataError at the first wrong line, with the messages of `load_jsonl`."""
    number = 0
    try:
        with _open(path) as file:
            # Decoded line by line, so that the message can name the line that is not UTF-8.
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _row(line.decode("utf-8-sig" if number == 1 else "utf-8"), f"{path}:{number}")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {FIX_ROOT}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: cannot be read ({one_line(error)[:300]}); {FIX_ROOT}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read beyond line {number} ({one_line(error)[:300]}); {FIX_ROOT}") from error


def load_hub(
    path_or_id: str,
    *,
    name: str | None = None,
    split: str,
    question_field: str | None = None,
    result_field: str | None = None,
) -> list[Task]:
    """Read a split of a data set on the Hugging Face Hub, or of a local folder in the hub's layout. A task's payload is
    the row, with "question" and "result" (as text) from the fields of these names, if given. Without a column "id",
    tasks are named "train-0", "train-1", … Raises DataError: the data set is not reachable, it, its configuration, its
    split or a field is unknown, or there is no `datasets` library.
    Example: load_hub("MU-NLPC/Calc-mawps", split="train")"""
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
    except ImportError:
        raise DataError("reading from the hub needs the datasets library: pip install datasets") from None
    source = f"data set {path_or_id!r}" + (f" ({name})" if name else "")
    try:
        table = datasets.load_dataset(path_or_id, name, split=split)
    except (DatasetsError, OSError, RuntimeError, ValueError) as error:
        problems: dict[type[Exception], str] = {
            DatasetNotFoundError: " is not known; check the id, or give a local folder",
            ConnectionError: ": no network; give a local folder that holds it",
            ValueError: f", split {split!r}: check name, split and files",
        }
        problem = next((text for kind, text in problems.items() if isinstance(error, kind)), " cannot be read")
        raise DataError(f"{source}{problem}: {one_line(error)[:300]}") from error
    for field in filter(None, (question_field, result_field)):
        if field not in table.column_names:
            raise DataError(f"{source} has no column {field!r}; it has {', '.join(table.column_names)}")

    def rows() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(table):
            renamed = {"question": row[question_field]} if question_field else {}
            renamed |= {"result": str(row[result_field])} if result_field else {}
            yield {"id": f"{split}-{number}"} | with_verl({**row, **renamed})

    return make(rows)


def make(function: Callable[..., Iterable[Mapping[str, Any]]], **arguments: Any) -> list[Task]:
    """Make a task from each row that a function returns. Raises DataError if a row has no "id" or a used one.
    Example: make(problems.generate, seed=0, num=100, split="train")"""
    return _tasks(((f"row {number}", "", row) for number, row in enumerate(function(**arguments))), ["id"])


def _tasks(rows: Iterable[tuple[str, str, Mapping[str, Any]]], required: Sequence[str]) -> list[Task]:
    """A task from each row, which comes with its location and the id that it gets if it has none. Raises DataError."""
    tasks: list[Task] = []
    location_of: dict[str, str] = {}
    for location, default_id, row in rows:
        if missing := [name for name in required if row.get(name) is None]:
            raise DataError(f"{location}: the row has no {' and no '.join(map(repr, missing))}")
        task_id = default_id if row.get("id") is None else str(row["id"])
        if task_id in location_of:
            raise DataError(f"{location}: id {task_id!r} is already used in {location_of[task_id]}")
        location_of[task_id] = location
        tasks.append(Task(task_id=task_id, payload=dict(row)))
    return tasks


def sample(tasks: Sequence[Task], num: int, seed: int) -> list[Task]:
    """Draw `num` tasks without replacement and keep their order; all tasks if there are at most `num`."""
    if num >= len(tasks):
        return list(tasks)
    chosen = np.random.default_rng(seed).choice(len(tasks), size=num, replace=False)
    return [tasks[i] for i in np.sort(chosen)]


# The readers of formats other than an object a line, by the ends of file names.
_READERS: Final[Mapping[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]]] = {
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": lambda path: enumerate(read_rows(path), start=1),
}


@dataclass(slots=True)
class TaskCursor:
    """A position in an endless order of tasks, which is shuffled again in each epoch.
    Example: TaskCursor(seed=0).next(load_jsonl("data/train.jsonl"), 8) -> eight tasks
    A cursor with the same seed, epoch and position draws the same tasks from as many tasks: a checkpoint needs no
    more."""

    seed: int
    epoch: int = 0
    position: int = 0
    """The number of tasks of this epoch that have been drawn."""

    def next(self, tasks: Sequence[T], num: int) -> list[T]:
        """Draw the next `num` tasks, across epochs if need be. Raises DataError if `tasks` is empty."""
        if not tasks:
            raise DataError("there are no tasks to draw from; check data")
        drawn: list[T] = []
        while len(drawn) < num:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(tasks))
            chosen = order[self.position : self.position + num - len(drawn)]
            drawn.extend(tasks[i] for i in chosen)
            self.position += len(chosen)
            # A restored position lies beyond the end if the data has shrunk.
            if self.position >= len(tasks):
                self.epoch, self.position = self.epoch + 1, 0
        return drawn


def _open(path: Path) -> IO[bytes]:
    if str(path) == "-":
        # A duplicate, since the caller closes the file.
        return open(os.dup(sys.stdin.fileno()), "rb")
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _row(line: str, location: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON: {one_line(error)[:300]}") from None
    if not isinstance(row, dict):
        raise DataError(f"{location}: a row must be an object, this is {type(row).__name__}")
    return row
