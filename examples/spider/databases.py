"""SQL on a SQLite file, for queries that nobody has read before: it can only read, and it always ends.

Example:

    run("singer.sqlite", "SELECT age FROM singer")  # Table(columns=("age",), rows=((52,), (32,)), cut=False)
    run("singer.sqlite", "DROP TABLE singer")       # Failure(kind="refused", message="not authorized")
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from agent_lightning.core.errors import DataError

Cell = str | int | float | bytes | None
Row = tuple[Cell, ...]
Kind = Literal["missing", "corrupt", "refused", "timeout", "too_large", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a query may take."""

    seconds: float = 20.0
    """Seconds of a query; the slowest gold query of Spider takes a third of a second."""
    rows: int = 1_000_000
    size: int = 1 << 28
    """Bytes of the result, as `size_of` counts them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The result of a query. `cut`: the limits have left out a part."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a query returned nothing; the message is one line."""

    kind: Kind
    message: str


DEFAULT = Limits()

_BOUNDS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1 << 16,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 10_000,
    sqlite3.SQLITE_LIMIT_COLUMN: 500,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
"""Bytes of a text or a row, of a pattern, of a query. A function call cannot be interrupted: these keep it short."""
_FUNCTIONS = 50
"""In one query: SQLite looks at the clock between rows, not between the calls that make one. 20 ms each, at worst."""
_SLOW = {"trim": 25, "ltrim": 25, "rtrim": 25}
"""Functions that count as so many: with two texts they take up to 0.7 s."""
_HEAP = 1 << 29
"""Bytes that SQLite may hold in this process, for all queries together; sorting is done in them, not in files."""
_LOOK_EVERY = 1000
"""Instructions of SQLite's machine between two looks at the clock."""

_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_NO_FUNCTIONS = {"load_extension", "fts3_tokenizer", "printf", "format"}
"""The last two can be told to write 2,147,483,647 characters, and take the time for it whatever the length allowed."""
_KINDS: dict[int, Kind] = {
    sqlite3.SQLITE_INTERRUPT: "timeout",
    sqlite3.SQLITE_TOOBIG: "too_large",
    sqlite3.SQLITE_NOMEM: "too_large",
    sqlite3.SQLITE_CORRUPT: "corrupt",
    sqlite3.SQLITE_NOTADB: "corrupt",
    sqlite3.SQLITE_CANTOPEN: "missing",
}


def run(path: str | Path, sql: str, limits: Limits = DEFAULT) -> Table | Failure:
    """The result of one SELECT. Bytes that are no UTF-8 are left out of texts. Raises nothing."""
    path = Path(path)
    if not path.is_file():
        return Failure(kind="missing", message=f"there is no database {path}")
    deadline = time.monotonic() + limits.seconds
    refused: list[int] = []
    functions = 0

    def authorise(action: int, _: str | None, name: str | None, *__: str | None) -> int:
        nonlocal functions
        if action == sqlite3.SQLITE_FUNCTION:
            functions += _SLOW.get(str(name), 1)
        denied = action == sqlite3.SQLITE_FUNCTION and (name in _NO_FUNCTIONS or functions > _FUNCTIONS)
        if action in _READING and not denied:
            return sqlite3.SQLITE_OK
        refused.append(action)
        return sqlite3.SQLITE_DENY

    try:
        with contextlib.closing(_open(path)) as connection:
            connection.set_authorizer(authorise)
            connection.set_progress_handler(lambda: time.monotonic() > deadline, _LOOK_EVERY)
            return _fetch(connection.execute(sql), limits)
    except sqlite3.Error as error:
        if functions > _FUNCTIONS:
            return Failure(kind="too_large", message=f"over {_FUNCTIONS} uses of functions in one query")
        if refused:
            return Failure(kind="refused", message=_one_line(error))
        # Extended codes have the plain one in their low byte. Errors of Python's own module have none.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if isinstance(error, sqlite3.DataError):  # "query string is too large"
            code = sqlite3.SQLITE_TOOBIG
        return Failure(kind=_KINDS.get(code, "error"), message=_one_line(error))
    except MemoryError:
        return Failure(kind="too_large", message="the query needs too much memory")
    except (sqlite3.Warning, ValueError, OverflowError) as error:  # two statements, a NUL, half a surrogate pair
        return Failure(kind="error", message=_one_line(error))


def files(folder: str | Path, db_id: str) -> list[Path]:
    """The databases of one id, `folder/db_id/*.sqlite`: one, or the several of a test suite. Raises DataError."""
    paths = sorted((Path(folder) / db_id).glob("*.sqlite")) if db_id == Path(db_id).name else []
    if not paths:
        raise DataError(
            f"there is no database {db_id!r}: {Path(folder) / db_id}/*.sqlite; check --databases or data.root"
        )
    return paths


def schema(path: str | Path) -> str:
    """A line a table, "table singer: id, name", then one a foreign key, "concert.singer = singer.id".

    Raises DataError where the database cannot be read.
    """
    columns = "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
    keys = 'SELECT m.name, k."from", k."table", k."to" FROM sqlite_master m, pragma_foreign_key_list(m.name) k'
    try:
        with contextlib.closing(_open(Path(path))) as connection:
            tables: dict[str, list[str]] = {}
            for table, column in connection.execute(columns):
                tables.setdefault(table, []).append(column)
            lines = [f"table {table}: {', '.join(names)}" for table, names in tables.items()]
            for table, column, other, target in connection.execute(keys):
                lines.append(f"{table}.{column} = {other}.{target}" if target else f"{table}.{column} = {other}")
    except sqlite3.Error as error:
        raise DataError(f"{path} is not a SQLite database: {_one_line(error)}") from None
    return "\n".join(lines)


def size_of(row: Sequence[Cell]) -> int:
    """Characters of texts, bytes of blobs, 8 for anything else: equal rows have equal sizes."""
    return sum(len(cell) if isinstance(cell, str | bytes) else 8 for cell in row)


def _open(path: Path) -> sqlite3.Connection:
    # A file with a journal beside it is being written, or has to be rolled back: it is not taken for a constant.
    journals = (path.with_name(path.name + suffix) for suffix in ("-journal", "-wal"))
    immutable = "" if any(journal.exists() for journal in journals) else "&immutable=1"
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro{immutable}", uri=True, isolation_level=None)
    connection.text_factory = _decode
    for bound, value in _BOUNDS.items():
        connection.setlimit(bound, value)
    for setting in (f"hard_heap_limit={_HEAP}", "temp_store=MEMORY", "trusted_schema=OFF", "cell_size_check=ON"):
        connection.execute(f"PRAGMA {setting}").close()
    return connection


def _fetch(cursor: sqlite3.Cursor, limits: Limits) -> Table | Failure:
    if cursor.description is None:
        return Failure(kind="error", message="there is no SELECT")
    rows: list[Row] = []
    left, cut = limits.size, False
    for row in cursor:
        left -= size_of(row)
        if left < 0 or len(rows) == limits.rows:
            cut = True
            break
        rows.append(row)
    return Table(columns=tuple(column[0] for column in cursor.description), rows=tuple(rows), cut=cut)


def _decode(raw: bytes) -> str:
    return raw.decode(errors="ignore")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
