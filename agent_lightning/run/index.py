"""The index of a run's rollouts in memory: it lists, filters and counts them without reading their spans."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent_lightning.core.text import error_line

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.compute import Expression

COLUMNS: Final = (
    *("rollout_id", "group_id", "split", "step", "policy_version", "task_id", "outcome", "reward", "num_calls"),
    *("error", "started_at", "ended_at"),
)
"""The columns of Parquet that the index keeps in memory: about 200 bytes a rollout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """Which rollouts a page lists; "" and None stand for any."""

    split: str = ""
    step: int | None = None
    outcome: str = ""
    agent: str = ""
    tool: str = ""
    status: str = ""
    """Status of a tool call, such as "error"; together with `tool`, of a call of that tool."""
    error: str = ""
    """The form of an error, as `error_form` returns it."""
    text: str = ""
    """Text in the task, the output or the error, whatever its case."""
    min_reward: float | None = None
    max_reward: float | None = None
    task: str = ""
    sort: str = "spread"


class RolloutIndex:
    """A table with a row for each rollout of a run, in memory, with the columns `COLUMNS` and the part of each. A group
    that a resumed run wrote again counts once. Parts are never changed, so each is read once; a part that cannot be
    read is listed in `damaged`."""

    def __init__(self, rollouts: Path) -> None:
        self._folder = rollouts
        self._tables: dict[Path, pyarrow.Table] = {}
        self._merged: pyarrow.Table | None = None
        self._lock = threading.Lock()
        self.damaged: dict[str, str] = {}
        """Name of a part -> what is wrong with it."""

    def table(self) -> pyarrow.Table:
        """The index, with the parts that have been written since the last call."""
        with self._lock:
            parts = sorted(self._folder.glob("part-*.parquet"))
            new = [part for part in parts if part not in self._tables and part.name not in self.damaged]
            for part in new:
                try:
                    self._tables[part] = _read_index(part)
                except Exception as error:  # Parquet raises what it likes where a file is damaged
                    self.damaged[part.name] = error_line(error)
            if new or self._merged is None:
                self._merged = _newest([*self._tables.values()])
            return self._merged

    def part_of(self, group_id: str) -> Path | None:
        """The newest file that holds a group; None if there is no such group."""
        import pyarrow.compute as pc

        table = self.table()
        parts = table.filter(pc.equal(table.column("group_id"), group_id)).column("part")
        return list(self._tables)[max(parts.to_pylist())] if len(parts) else None

    def select(self, filters: Filters) -> pyarrow.Table:
        """The rows of the index that fit. Filters by agent, tool and text read those columns of the parts that the
        other filters leave."""
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self.table()
        conditions: list[Expression] = []
        for name in ("split", "outcome"):
            if value := getattr(filters, name):
                conditions.append(pc.field(name) == value)
        if filters.task:
            conditions.append(pc.field("task_id") == filters.task)
        if filters.step is not None:
            conditions.append(pc.field("step") == filters.step)
        if filters.min_reward is not None:
            conditions.append(pc.field("reward") >= filters.min_reward)
        if filters.max_reward is not None:
            conditions.append(pc.field("reward") <= filters.max_reward)
        if conditions:
            table = table.filter(reduce(lambda left, right: left & right, conditions))
        if filters.error:
            mask = [error_form(error) == filters.error for error in table.column("error").to_pylist()]
            table = table.filter(pa.array(mask, pa.bool_()))
        if filters.agent or filters.tool or filters.status or filters.text:
            known = {rollout_id for part in self._parts(table) for rollout_id in _matching(part, filters)}
            mask = [rollout_id in known for rollout_id in table.column("rollout_id").to_pylist()]
            table = table.filter(pa.array(mask, pa.bool_()))
        return table

    def best_and_worst(self) -> list[tuple[str, float]]:
        """(rollout id, reward) of the best and of the worst rollout of the newest training step that called the policy;
        [] if there is none."""
        import pyarrow.compute as pc

        table = self.table()
        called, scored = pc.field("num_calls") > 0, pc.field("reward").is_valid()
        table = table.filter((pc.field("split") == "train") & called & scored)
        table = table.filter(pc.equal(table.column("step"), pc.max(table.column("step"))))
        rows = sorted(table.select(["reward", "rollout_id"]).to_pylist(), key=lambda row: row["reward"])
        return [(row["rollout_id"], row["reward"]) for row in (rows[-1], rows[0])] if rows else []

    def columns(self, table: pyarrow.Table, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Read more columns of the rollouts of an index table: rollout id -> column -> value."""
        import pyarrow.compute as pc

        ids = table.column("rollout_id").combine_chunks()
        values: dict[str, dict[str, Any]] = {}
        for part in self._parts(table):
            rows = _read(part, ["rollout_id", *names])
            rows = rows.filter(pc.is_in(rows.column("rollout_id"), ids))
            values |= {row["rollout_id"]: row for row in rows.to_pylist()}
        return values

    def tools(self) -> Iterator[tuple[int, str, str, float, str]]:
        """(step, tool, status, seconds, arguments) of each tool call of the training rollouts, part by part."""
        names = [f"tools.list.element.{name}" for name in ("name", "status", "started_at", "ended_at", "arguments")]
        for part in self._parts(self.table()):
            for row in _read(part, ["step", "split", *names]).to_pylist():
                for tool in row["tools"] or () if row["split"] == "train" else ():
                    spent = tool["ended_at"] - tool["started_at"]
                    yield row["step"], tool["name"], tool["status"], spent, tool["arguments"]

    def _parts(self, table: pyarrow.Table) -> list[Path]:
        """The files that hold the rows of an index table."""
        parts = list(self._tables)
        return [parts[number] for number in sorted(set(table.column("part").to_pylist()))]


def load_libraries() -> None:
    """Import what reading an index takes: a quarter of a second, which the first reader would wait for."""
    import pyarrow.compute
    import pyarrow.parquet

    pyarrow.array([0])  # imports pandas, if it is installed


def _newest(tables: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """The rows of all parts with the columns `part` and `row`, their numbers; of rows of a rollout, the last."""
    import pyarrow as pa

    parts = [table.append_column("part", pa.array([n] * len(table), pa.int32())) for n, table in enumerate(tables)]
    merged = pa.concat_tables(parts) if parts else _read_index(None)
    numbered = merged.append_column("row", pa.array(range(len(merged)), pa.int64()))
    last = {rollout_id: row for row, rollout_id in enumerate(merged.column("rollout_id").to_pylist())}
    return numbered.take(pa.array(last.values(), pa.int64())) if len(last) < len(merged) else numbered


def _read_index(part: Path | None) -> pyarrow.Table:
    """The columns of the index of a file; an empty table for None."""
    import pyarrow as pa

    kinds = {"step": pa.int32(), "policy_version": pa.int32(), "num_calls": pa.int32()}
    kinds |= dict.fromkeys(("reward", "started_at", "ended_at"), pa.float64())
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])
    if part is None:
        return pa.schema([*schema, ("part", pa.int32())]).empty_table()
    return _read(part, COLUMNS).select(COLUMNS).cast(schema)


def _read(part: Path, columns: Sequence[str]) -> pyarrow.Table:
    """Read some columns of a file; "tools.list.element.name" is a field of the structs in a list."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(part) as file:
        return file.read(columns=list(columns), use_threads=False)


def _matching(part: Path, filters: Filters) -> Iterator[str]:
    """Ids of the rollouts of a file that fit the filters by agent, tool, status and text."""
    columns = {"calls.list.element.agent": filters.agent, "tools.list.element.name": filters.tool}
    columns["tools.list.element.status"] = filters.status
    wanted = [column for column, value in columns.items() if value]
    texts = ["task", "output", "error"] if filters.text else []
    needle = filters.text.casefold()
    for row in _read(part, ["rollout_id", *wanted, *texts]).to_pylist():
        agents = {call["agent"] for call in row.get("calls") or ()}
        tools = [tool for tool in row.get("tools") or () if not filters.tool or tool["name"] == filters.tool]
        tools = [tool for tool in tools if not filters.status or tool["status"] == filters.status]
        fits = not filters.agent or filters.agent in agents
        fits = fits and (bool(tools) or not (filters.tool or filters.status))
        if fits and (not texts or any(needle in (row[name] or "").casefold() for name in texts)):
            yield row["rollout_id"]


def error_form(error: str) -> str:
    """The part of an error that equal errors share: numbers and ids are left out.
    Example: "KeyError: 'row 12'" -> "KeyError: 'row …'" """
    return re.sub(r"\b(?:0x)?[0-9a-f-]*\d[0-9a-f.-]*\b", "…", error)
