"""Spider's questions as rows of tasks, from a folder in the release's own layout.

`root` holds `train_spider`, `train_others` and `dev`, each as .jsonl, .jsonl.gz or the release's .json, and the
databases as `database/{db_id}/*.sqlite`. Rows: id, question, db_id, query (the gold one), schema, databases (the
folder), and difficulty where the file has it.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from databases import Limits, Table, files, run, schema

from agent_lightning.core.errors import DataError
from agent_lightning.run.tasks import load_jsonl

logger = logging.getLogger(__name__)

PARTS = {"train": ("train_spider", "train_others"), "dev": ("dev",)}
HELD_OUT = 0.15
"""Share of the training databases' gold queries that `single_table` keeps for its split "held_out"."""

_ONE_ROW = Limits(rows=1)


def questions(*, root: str, split: str, num: int, seed: int) -> list[dict[str, Any]]:
    """At most `num` questions of "train" or "dev", drawn with `seed`.

    Those without a database, and in training those whose gold result is empty, are left out; a line in the log counts
    them. Raises DataError.
    """
    if split not in PARTS:
        raise DataError(f"Spider has no split {split!r}; it has {', '.join(PARTS)}")
    return _draw(_usable(_read(root, split), root, split), num, seed)


def lower_case(*, root: str, split: str, num: int, seed: int) -> list[dict[str, Any]]:
    """`questions` with schemas in lower case, as the tiny policy knows them."""
    return [row | {"schema": row["schema"].lower()} for row in questions(root=root, split=split, num=num, seed=seed)]


def single_table(*, root: str, split: str, num: int, seed: int) -> list[dict[str, Any]]:
    """The slice whose gold query reads one table, once: "train", "held_out" or "dev". The schema is of that table only,
    in lower case.

    "held_out" is of the training databases: no gold query of it is one of "train". "dev" has other databases.
    """
    if split not in ("train", "held_out", "dev"):
        raise DataError(f"the single-table slice has no split {split!r}; it has train, held_out, dev")
    part = "dev" if split == "dev" else "train"
    rows = [row for row in _read(root, part) if reads_one_table(row["query"])]
    if split != "dev":
        rows = [row for row in rows if _is_held_out(row) is (split == "held_out")]
    return [row | {"schema": _one_table(row).lower()} for row in _draw(_usable(rows, root, split), num, seed)]


def reads_one_table(query: str) -> bool:
    """ "SELECT a FROM t WHERE b = 1" -> True; joins, subqueries and set operations -> False."""
    text = query.lower()
    several = re.search(r"\bjoin\b|\bfrom\s+\w+\s*(?:as\s+\w+\s*)?,", text)
    return not several and len(re.findall(r"\bselect\b", text)) == 1


def _one_table(row: Mapping[str, Any]) -> str:
    name = re.search(r"\bfrom\s+[`\"\[]?(\w+)", row["query"], re.IGNORECASE)
    lines = row["schema"].split("\n")
    return next(line for line in lines if name and line.lower().startswith(f"table {name[1].lower()}:"))


def _is_held_out(row: Mapping[str, Any]) -> bool:
    """By database and gold query alone, so that all wordings of one query are on the same side, whatever the seed."""
    return random.Random(f"{row['db_id']} {' '.join(row['query'].lower().split())}").random() < HELD_OUT


def _read(root: str, split: str) -> Iterator[dict[str, Any]]:
    for name in PARTS[split]:
        packed = next(
            (path for suffix in (".jsonl", ".jsonl.gz") if (path := Path(root, name + suffix)).exists()), None
        )
        release = Path(root, f"{name}.json")
        if packed is None and not release.exists():
            raise DataError(f"{release}[l, l.gz] does not exist; set data.root to the folder of Spider")
        needed = ("question", "db_id", "query")
        rows = [dict(task.payload) for task in load_jsonl(packed, required=needed)] if packed else _release(release)
        for number, row in enumerate(rows):
            kept = {field: row[field] for field in (*needed, "difficulty") if row.get(field) is not None}
            yield {"id": str(row.get("id", f"{name}_{number}")), **kept}


def _release(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [{field: row[field] for field in ("question", "db_id", "query")} for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a file of Spider's release: {type(error).__name__}: {error}") from None


def _usable(rows: Iterable[dict[str, Any]], root: str, split: str) -> list[dict[str, Any]]:
    """The rows that can be scored, with schema and databases."""
    folder = Path(root, "database").resolve()
    kept, counted, schemas = [], Counter[str](), {}
    for row in rows:
        db_id = row["db_id"]
        try:
            path = files(folder, db_id)[0]
        except DataError:
            counted["without a database"] += 1
            continue
        gold = run(path, row["query"], _ONE_ROW)
        if not isinstance(gold, Table):
            counted["whose gold query fails"] += 1
        elif not gold.rows and split != "dev":
            counted["with an empty gold result"] += 1
        else:
            if db_id not in schemas:
                schemas[db_id] = schema(path)
            kept.append(row | {"schema": schemas[db_id], "databases": str(folder)})
    skipped = "".join(f", {number:,} {why}" for why, number in counted.most_common())
    logger.warning("Spider, %s: %s questions; skipped%s", split, f"{len(kept):,}", skipped[1:] or " none")
    return kept


def _draw(rows: list[dict[str, Any]], num: int, seed: int) -> list[dict[str, Any]]:
    chosen = random.Random(seed).sample(range(len(rows)), min(num, len(rows)))
    return [rows[i] for i in sorted(chosen)]
