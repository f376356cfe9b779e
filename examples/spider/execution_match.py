"""Execution match, as the test-suite evaluation of Spider defines it (Zhong et al., EMNLP 2020, arXiv 2010.02840).

Two queries match where they return the same table on every given database. Columns may come in any order; rows too,
unless the gold query orders them; how often a row occurs counts. DISTINCT is taken out of both queries first, as
questions hardly ever say whether repeats are wanted; `keep_distinct` leaves it in.

Example:

    execution_match("SELECT age, name FROM singer", "SELECT name, age FROM singer", [path])   # True
    execution_match("SELECT max(age) FROM singer", "SELECT age FROM singer", [path])          # False
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from databases import DEFAULT, Cell, Failure, Limits, Row, run, size_of

from agent_lightning.core.errors import DataError

_SPLIT_OPERATOR = re.compile(r"([<>!]) =")
_CURRENT_YEAR = re.compile(r"year\s*\(\s*curdate\s*\(\s*\)\s*\)\s*", re.IGNORECASE)
_THIS_YEAR = "2020"
"""What "YEAR(CURDATE())", which SQLite does not have, stands for in the evaluation."""
_PARTS = re.compile(
    r"""(?P<quoted> '(?:[^']|'')*' | "(?:[^"]|"")*" | `[^`]*` | (?<![\w\])])\[[^\[\]]+\] | --[^\r\n]* | /\*.*?\*/ )
      | (?P<end> ; ) | (?P<word> [\w$]+ )""",
    re.VERBOSE | re.DOTALL,
)

Column = tuple[Cell, ...]


def execution_match(
    predicted: str, gold: str, databases: Iterable[str | Path], *, keep_distinct: bool = False, limits: Limits = DEFAULT
) -> bool:
    """Whether both queries return the same table on each database. A prediction that fails does not match.

    Raises DataError where the gold query itself fails or returns more than `limits` allow.
    """
    predicted, gold = (prepare(sql, keep_distinct=keep_distinct) for sql in (predicted, gold))
    return all(_match_on(Path(path), predicted, gold, limits) for path in databases)


def prepare(sql: str, *, keep_distinct: bool = False) -> str:
    """The query that is run: "SELECT DISTINCT a FROM t WHERE b > = 1; …" -> "SELECT  a FROM t WHERE b >= 1;"."""
    sql = _SPLIT_OPERATOR.sub(r"\1=", sql)
    return sql if keep_distinct else without_distinct(sql)


def without_distinct(sql: str) -> str:
    """The first statement without the word DISTINCT, which stays in texts, quoted names and comments."""
    kept: list[str] = []
    start = 0
    for part in _PARTS.finditer(sql):
        if part["end"]:
            return "".join((*kept, sql[start : part.end()]))
        if part["word"] and part["word"].lower() == "distinct":
            kept.append(sql[start : part.start()])
            start = part.end()
    return "".join((*kept, sql[start:]))


def same_table(wanted: Sequence[Row], given: Sequence[Row], *, ordered: bool) -> bool:
    """Whether the rows are the same under some order of the columns, and of the rows unless `ordered`.

    [(1, "a")], [("a", 1)] -> True; [(1,), (1,)], [(1,)] -> False. Numbers are equal by value: 1 and 1.0 are.
    Two tables without rows are the same, whatever their columns.
    """
    if len(wanted) != len(given):
        return False
    if not wanted:
        return True
    if len(wanted[0]) != len(given[0]):
        return False
    columns, candidates = list(zip(*wanted, strict=True)), list(zip(*given, strict=True))
    arranged = Counter(columns) == Counter(candidates) if ordered else _can_arrange(columns, candidates)
    return arranged and _same_cells(wanted, given, ordered=ordered)


def _match_on(path: Path, predicted: str, gold: str, limits: Limits) -> bool:
    wanted = run(path, _year(gold), limits)
    if isinstance(wanted, Failure):
        raise DataError(f"the gold query fails on {path}: {wanted.message}: {gold[:200]}")
    if wanted.cut:
        raise DataError(f"the gold query returns more than {limits.rows} rows or {limits.size} bytes on {path}")
    # Equal tables are equally large: what exceeds the gold's is wrong, and need not be fetched.
    bounds = Limits(seconds=limits.seconds, rows=len(wanted.rows), size=sum(map(size_of, wanted.rows)))
    given = run(path, _year(predicted), bounds)
    if isinstance(given, Failure) or given.cut:
        return False
    # Anywhere in the query, as in the definition: an ORDER BY of a subquery counts too.
    return same_table(wanted.rows, given.rows, ordered="order by" in gold.lower())


def _year(sql: str) -> str:
    return _CURRENT_YEAR.sub(_THIS_YEAR, sql)


def _can_arrange(wanted: Sequence[Column], left: list[Column], chosen: tuple[Column, ...] = ()) -> bool:
    """Whether some order of the columns `left`, after those already chosen, makes the multiset of rows `wanted`.

    Column by column; a choice stands only while the multisets of the rows so far are the same.
    """
    if not left:
        return True
    rows = Counter(zip(*wanted[: len(chosen) + 1], strict=True))
    for column in dict.fromkeys(left):
        if Counter(zip(*chosen, column, strict=True)) == rows:
            rest = left.copy()
            rest.remove(column)
            if _can_arrange(wanted, rest, (*chosen, column)):
                return True
    return False


def _same_cells(wanted: Sequence[Row], given: Sequence[Row], *, ordered: bool) -> bool:
    """The evaluation's first look at the rows: the cells of each, sorted as text with their type.

    It tells apart what is equal by value where 1 and 1.0 sort differently among the other cells of their row.
    """
    left, right = ([tuple(sorted(row, key=_text_and_type)) for row in rows] for rows in (wanted, given))
    return left == right if ordered else set(left) == set(right)


def _text_and_type(cell: Cell) -> str:
    return f"{cell}{type(cell)}"
