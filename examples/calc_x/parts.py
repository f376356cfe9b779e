"""Rows of Calc-X in the normalised layout: a folder with a file `{part}.jsonl` or `{part}.jsonl.gz` for each part.

A row has an id, a question (a text) and a result (a text such as "42", "3/4" or "B").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent_lightning.core.errors import DataError
from agent_lightning.core.types import Task
from agent_lightning.run.tasks import FIX_ROOT, load_jsonl, sample


def rows(*, root: str, names: Sequence[str], split: str, num: int, seed: int) -> list[dict[str, Any]]:
    """At most `num` rows of the parts `names`, drawn with `seed`; without names, of the part `split`.

    Example: rows(root="data/calcx", names=["mawps_train"], split="train", num=100, seed=0)

    Raises DataError: a part has no file, a row is wrong, or two rows have the same id.
    """
    return [dict(task.payload) for task in sample(_read(root, names or [split]), num, seed)]


def fifths(*, root: str, names: Sequence[str], split: str, num: int, seed: int) -> list[dict[str, Any]]:
    """As `rows`, for parts that have no training rows of their own: split "val" has every fifth row of the parts, and
    split "train" the others. A question that a part named with a minus has too is left out.

    Example: names=["asdiv_a_test", "-mawps_train"] for a model that has been trained on MAWPS
    """
    known = {task.payload["question"] for task in _read(root, [name[1:] for name in names if name.startswith("-")])}
    tasks = [
        task
        for n, task in enumerate(_read(root, [name for name in names if not name.startswith("-")]))
        if (n % 5 == 0) == (split == "val") and task.payload["question"] not in known
    ]
    return [dict(task.payload) for task in sample(tasks, num, seed)]


def _read(root: str, names: Sequence[str]) -> list[Task]:
    tasks: list[Task] = []
    part_of: dict[str, str] = {}
    for name in names:
        plain, packed = Path(root) / f"{name}.jsonl", Path(root) / f"{name}.jsonl.gz"
        if not plain.exists() and not packed.exists():
            raise DataError(f"{plain}[.gz] does not exist; {FIX_ROOT}")
        for task in load_jsonl(plain if plain.exists() else packed, required=("id", "question", "result")):
            if task.task_id in part_of:
                raise DataError(f"{name}: id {task.task_id!r} is also in {part_of[task.task_id]}")
            part_of[task.task_id] = name
            tasks.append(task)
    return tasks
