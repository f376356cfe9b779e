"""Questions on one table put to other tables: what a tiny policy learns from beside Spider's own.

A question whose columns and table are named in it is a pattern:

    "What are the ages of all singers?", select age from singer
    "What are the weights of all dogs?", select weight from dog

Queries are written in one way: keywords in lower case, a space between any two tokens, so that names and values stand
as in schema and question.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from databases import Limits, Table, run

KEYWORDS = {
    *("select", "distinct", "count", "sum", "avg", "min", "max", "from", "where", "and", "or", "not", "in", "like"),
    *("between", "is", "null", "group", "by", "having", "order", "asc", "desc", "limit", "as"),
}
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|`[^`]*`|[A-Za-z_]\w*(?:\.\w+)?|\d+(?:\.\d+)?|[<>!]=|<>|[^\s\w]""")
Pattern = tuple[str, list[str]]
"""A question, and the tokens of its query."""
_SAMPLE = Limits(seconds=5.0, rows=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A table: its name, its columns in their order, and for each some of its values."""

    name: str
    columns: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    database: Path

    @property
    def schema(self) -> str:
        return f"table {self.name}: {', '.join(self.columns)}"

    def is_number(self, column: str) -> bool:
        return all(re.fullmatch(r"-?[0-9.]+", value) for value in self.values[column])


def source(schema: str, database: Path) -> Source:
    """The table of a line "table singer: id, name". Values that are no short plain text are left out."""
    name, _, listed = schema.removeprefix("table ").partition(": ")
    columns = tuple(listed.split(", "))
    values = {}
    for column in columns:
        result = run(database, f'SELECT DISTINCT "{column}" FROM "{name}" WHERE "{column}" IS NOT NULL', _SAMPLE)
        cells = [str(row[0]) for row in result.rows] if isinstance(result, Table) else []
        values[column] = tuple(cell for cell in cells if re.fullmatch(r"[\w .%-]{1,30}", cell))
    return Source(name=name, columns=columns, values=values, database=database)


def plain(query: str, table: Source) -> list[str]:
    """The tokens of a query on one table, written in the one way: no alias, no ASC, names as in the schema."""
    names = {name.lower(): name for name in (*table.columns, table.name)}
    tokens: list[str] = []
    for token in _TOKEN.findall(re.sub(r"\bfrom\s+(\w+)\s+as\s+\w+", r"from \1", query, flags=re.IGNORECASE)):
        if token[0] in "\"'`" and token.strip("\"'`").lower() in names and token[0] != "'":
            token = token.strip('"`')
        if token[0] == '"':
            token = "'" + token[1:-1].replace("'", "''") + "'"
        bare = token.rpartition(".")[2] if token[0].isalpha() else token
        low = bare.lower()
        if low in KEYWORDS and low not in names:
            tokens += [low] if low != "asc" else []
        else:
            tokens.append({"<>": "!="}.get(bare) or names.get(low, bare))
    return tokens[:-1] if tokens[-1:] == [";"] else tokens


def words(name: str) -> str:
    """A name as people say it: "Birth_Date" -> "birth date"; "budgetInMillions" -> "budget in millions"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).lower().strip()


def redraw(question: str, tokens: Sequence[str], table: Source, other: Source, rng: random.Random) -> Pattern | None:
    """The same question of `other`, with other columns and values: (question, tokens), or None where it has no slots.

    With `other` the table itself, its columns stay and only the values are drawn anew.
    """
    used = list(dict.fromkeys(token for token in tokens if token in table.columns))
    chosen = _columns(used, table, other, rng)
    if chosen is None:
        return None
    renamed = {table.name: other.name} | chosen
    if other is not table:
        reworded = _rename(question, renamed)
        if reworded is None:
            return None
        question = reworded
    column, written = used[0] if used else "", []
    for i, token in enumerate(tokens):
        column = token if token in table.columns else column
        literal = token[0] == "'" or (token[0].isdigit() and tokens[i - 1] in ("=", "<", ">", "<=", ">=", "!="))
        if literal and column in chosen and "count" not in tokens[max(0, i - 5) : i]:
            value = _value(token, chosen[column], other, rng)
            old = token.strip("'").strip("%")
            reworded = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", (value or "").replace("\\", ""), question, count=1)
            if value is None or not old or (reworded == question and old != value):
                return None
            question = reworded
            token = token.replace(old, value)
        written.append(renamed.get(token, token))
    return question, written


def _rename(question: str, renamed: Mapping[str, str]) -> str | None:
    """The question with other names, in the plural where they were; None if a name does not occur in it."""
    spoken = {words(old).removesuffix("s"): words(new) for old, new in renamed.items()}
    longest_first = sorted(map(re.escape, spoken), key=len, reverse=True)
    replaced: set[str] = set()

    def other(match: re.Match[str]) -> str:
        replaced.add(match[1].lower())
        new = spoken[match[1].lower()]
        return new if match[2] is None or new.endswith("s") else f"{new}s"

    question = re.sub(rf"\b({'|'.join(longest_first)})(e?s)?\b", other, question, flags=re.IGNORECASE)
    return question if len(replaced) == len(renamed) and max(map(len, spoken.values())) <= 30 else None


def _columns(used: Sequence[str], table: Source, other: Source, rng: random.Random) -> dict[str, str] | None:
    """A column of `other` for each of those used, of the same kind."""
    if other is table:
        return {name: name for name in used}
    left = rng.sample(other.columns, len(other.columns))
    chosen: dict[str, str] = {}
    for name in used:
        match = next((column for column in left if other.is_number(column) is table.is_number(name)), None)
        if match is None:
            return None
        left.remove(match)
        chosen[name] = match
    return chosen


def _value(token: str, column: str, other: Source, rng: random.Random) -> str | None:
    """Another value of a column: of the text kind for a quoted one, else a number near those that there are."""
    known = other.values[column]
    if not known:
        return None
    value = rng.choice(known)
    if "%" in token:
        return rng.choice(value.split() or [value])
    if token[0] != "'" and re.fullmatch(r"\d{1,6}", value):
        return str(max(0, int(value) + rng.randint(-5, 5)))
    return value if (token[0] == "'") or re.fullmatch(r"\d+(\.\d+)?", value) else None


def talkative(tokens: Sequence[str], table: Source) -> list[str]:
    """The query that also shows what it filters, sorts and counts by, or else another column of the row.

    "select name from dog order by age" -> name, age; "select name from dog" -> name, and dog's first other column.
    People like to see it, and execution match counts it as wrong.
    """
    if "from" not in tokens:
        return list(tokens)
    split = tokens.index("from")
    shown, rest = tokens[1:split], list(tokens[split + 2 :])
    extra = [token for token in dict.fromkeys(rest) if token in table.columns and token not in shown]
    if "count" in rest and "count" not in shown:
        extra.append("count ( * )")
    if not extra and set(shown) <= {*table.columns, ",", "distinct"}:
        extra = [column for column in table.columns if column not in shown][:1]
    added = [part for token in extra for part in (",", *token.split())]
    return ["select", *shown, *added, *tokens[split:]]
