"""Tasks from files, from the Hugging Face Hub, or from a function; and the order in which they are trained.

Example:

    tasks = load_calcx("data/calcx", ["mawps_train"])
    cursor = TaskCursor(seed=0)
    cursor.next(tasks, 8)  # eight tasks; the next call goes on from there, epoch after epoch
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from agent_lightning.core.errors import DataError
from agent_lightning.core.types import Task

_FIX_ROOT = "set data.root to the folder that holds it"


def load_jsonl(path: str | Path, *, required: Sequence[str] = ()) -> list[Task]:
    """One task per line of a .jsonl or .jsonl.gz file; blank lines are skipped.

    {"id": "a1", "question": "…"} -> Task(task_id="a1", payload=the whole row). Without "id", the task is named
    after the file and the line: "train-17".
    Raises DataError: no such file, not JSON, not an object, a missing field, a duplicate id; with file and line.
    """
    path = Path(path)
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    tasks: list[Task] = []
    line_of: dict[str, int] = {}
    for number, row in read_jsonl(path):
        missing = [name for name in required if row.get(name) is None]
        if missing:
            raise DataError(f"{path}:{number}: the row has no {' and no '.join(map(repr, missing))}")
        task_id = f"{stem}-{number}" if row.get("id") is None else str(row["id"])
        if task_id in line_of:
            raise DataError(f"{path}:{number}: id {task_id!r} is already used on line {line_of[task_id]}")
        line_of[task_id] = number
        tasks.append(Task(task_id=task_id, payload=row))
    return tasks


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .jsonl or .jsonl.gz file, or of standard input for "-", each with its line's number from 1.

    Raises DataError as `load_jsonl`, at the line that is wrong.
    """
    for number, line in _lines(path):
        yield number, _row(line, f"{path}:{number}")


def load_calcx(root: str | Path, names: Sequence[str]) -> list[Task]:
    """Parts of Calc-X in the normalised layout: `{root}/{name}.jsonl` or `.jsonl.gz`, one after another.

    Rows have id, question and result; a question is a text, a result a text such as "42", "3/4" or "B".
    Raises DataError as `load_jsonl`, and where two parts share an id.
    """
    tasks: list[Task] = []
    part_of: dict[str, str] = {}
    for name in names:
        plain = Path(root) / f"{name}.jsonl"
        packed = Path(root) / f"{name}.jsonl.gz"
        if not plain.exists() and not packed.exists():
            raise DataError(f"{plain}[.gz] does not exist; {_FIX_ROOT}")
        for task in load_jsonl(plain if plain.exists() else packed, required=("id", "question", "result")):
            if task.task_id in part_of:
                raise DataError(f"{name}: id {task.task_id!r} is also in {part_of[task.task_id]}")
            part_of[task.task_id] = name
            tasks.append(task)
    return tasks


def load_hub(
    path_or_id: str,
    *,
    name: str | None = None,
    split: str,
    question_field: str = "question",
    result_field: str = "result",
) -> list[Task]:
    """A split of a data set on the Hugging Face Hub, or of a local folder in the hub's layout.

    load_hub("MU-NLPC/Calc-mawps", split="train") -> tasks whose payload is the row, with "question" and "result"
    (as text) taken from the named fields. Without a column "id", tasks are named "train-0", "train-1", …
    Raises DataError: not reachable, unknown data set, configuration, split or field, or no `datasets` library.
    """
    try:
        # Heavy, and needed only here.
        import datasets
        from datasets.exceptions import DatasetNotFoundError, DatasetsError
    except ImportError:
        raise DataError("reading from the hub needs the datasets library: pip install datasets") from None
    asked = f"data set {path_or_id!r}" + (f" ({name})" if name else "")
    try:
        table = datasets.load_dataset(path_or_id, name, split=split)
    except DatasetNotFoundError as error:
        raise DataError(f"{asked} is not known; check the id, or give a local folder: {_one_line(error)}") from error
    except ConnectionError as error:
        raise DataError(f"{asked}: no network; give a local folder that holds it: {_one_line(error)}") from error
    except ValueError as error:
        raise DataError(f"{asked}, split {split!r}: check name, split and files: {_one_line(error)}") from error
    except (DatasetsError, OSError, RuntimeError) as error:
        raise DataError(f"{asked} cannot be read: {_one_line(error)}") from error
    for field in (question_field, result_field):
        if field not in table.column_names:
            raise DataError(f"{asked} has no column {field!r}; it has {', '.join(table.column_names)}")
    rows = (
        {"id": f"{split}-{i}", **row, "question": row[question_field], "result": str(row[result_field])}
        for i, row in enumerate(table)
    )
    return make(lambda: rows)


def make(function: Callable[..., Iterable[Mapping[str, Any]]], **arguments: Any) -> list[Task]:
    """Tasks from the rows that a function returns: make(problems.generate, seed=0, num=100, split="train").

    Raises DataError where a row has no "id" or two have the same.
    """
    tasks: dict[str, Task] = {}
    for number, row in enumerate(function(**arguments)):
        if row.get("id") is None:
            raise DataError(f"row {number}: it has no 'id'")
        task_id = str(row["id"])
        if task_id in tasks:
            raise DataError(f"row {number}: id {task_id!r} is already used")
        tasks[task_id] = Task(task_id=task_id, payload=dict(row))
    return list(tasks.values())


def sample(tasks: Sequence[Task], num: int, seed: int) -> list[Task]:
    """`num` tasks drawn without replacement, in their own order; all of them where there are not more."""
    if num >= len(tasks):
        return list(tasks)
    chosen = np.random.default_rng(seed).choice(len(tasks), size=num, replace=False)
    return [tasks[i] for i in np.sort(chosen)]


@dataclass(slots=True)
class TaskCursor:
    """A place in an endless order of tasks that is shuffled anew each epoch.

    The order depends on `seed` and the number of tasks only, so `epoch` and `position` are all that a
    checkpoint needs: TaskCursor(seed=0, epoch=2, position=5) goes on exactly where another stood.
    """

    seed: int
    epoch: int = 0
    position: int = 0
    """How many tasks of this epoch are already taken."""

    def next(self, tasks: Sequence[Task], num: int) -> list[Task]:
        """The next `num` tasks; may cross from one epoch into the next. Raises DataError where there are none."""
        if not tasks:
            raise DataError("there are no tasks to draw from; check data")
        drawn: list[Task] = []
        while len(drawn) < num:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(tasks))
            chosen = order[self.position : self.position + num - len(drawn)]
            drawn.extend(tasks[i] for i in chosen)
            self.position += len(chosen)
            # A restored position may lie beyond the end where the data has shrunk.
            if self.position >= len(tasks):
                self.epoch, self.position = self.epoch + 1, 0
        return drawn


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a text file, plain or gzip, or of standard input, with their numbers from 1."""
    number = 0
    try:
        with _open(path) as file:
            # Decoded line by line, so that the line which is not UTF-8 is known.
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.decode()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; {_FIX_ROOT}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: cannot be read ({_one_line(error)}); {_FIX_ROOT}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read beyond line {number} ({_one_line(error)}); {_FIX_ROOT}") from error


def _open(path: Path) -> IO[bytes]:
    if str(path) == "-":
        # A duplicate, which can be closed.
        return open(os.dup(sys.stdin.fileno()), "rb")
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {_one_line(error)}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be an object, this is {type(row).__name__}")
    return row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
