"""The rollouts of a run on disk, as Parquet: a row is a rollout with all its spans."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from agent_lightning.core import types
from agent_lightning.core.errors import DataError
from agent_lightning.core.files import replacing
from agent_lightning.core.text import error_line, replace_surrogates
from agent_lightning.credit.assign import CallCredit, CreditRules, explain_credit
from agent_lightning.spans.traces.export import Origin

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

_Span = types.ModelCall | types.ToolCall | types.Reward | types.AgentSpan


class RolloutWriter:
    """Writes the rollouts of a run: each `write` makes the next Parquet file, such as rollouts/part-00002.parquet."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        numbers = [int(part.stem.removeprefix("part-")) for part in directory.glob("part-*.parquet")]
        self._next_part = max(numbers, default=-1) + 1

    def write(
        self,
        step: int,
        policy_version: int,
        groups: Sequence[types.Group],
        rules: CreditRules | None = None,
        logprobs: Mapping[tuple[str, str], types.Floats] | None = None,
    ) -> Path | None:
        """Write the rollouts of `groups`; None if they have none. With `rules`, each call of a training rollout has its
        `credit`, as `CallCredit` describes it; a value that the learner computes is null. `logprobs` has the learner's
        log-probabilities of calls, by the ids of rollout and call. Raises OSError, for example on a full disk."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {"rollout_id": rollout.key.rollout_id, "group_id": group.group_id, "split": rollout.key.split}
            | {"attempt": rollout.key.attempt, "step": step, "policy_version": policy_version}
            | {"task": json.dumps(dict(group.task.payload), default=str), "num_calls": len(rollout.calls)}
            | _with_credit(_row(rollout), credits, rollout.key.rollout_id, logprobs or {})
            for group in groups
            for rollout, credits in zip(group.trajectories, _credits(group, rules, step, policy_version), strict=True)
        ]
        if not rows:
            return None
        part = self._directory / f"part-{self._next_part:05d}.parquet"
        with replacing(part) as unfinished:
            pq.write_table(
                pa.Table.from_pylist(rows, schema=_rollout_schema()),
                unfinished,
                compression="zstd",
                write_page_checksum=True,
            )
        self._next_part += 1
        return part


def read_rollouts(path: Path) -> pyarrow.Table:
    """Read all rollouts of a run, in the order in which they were written, as a table with a row for each rollout.
    `path` is the folder of a run, its folder rollouts/, or one of the files. A file that is broken is left out with a
    warning. Raises DataError if there is no file that can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [path] if path.is_file() else sorted([*path.glob("part-*.parquet"), *path.glob("rollouts/part-*.parquet")])
    if not parts:
        raise DataError(f"no rollouts at {path}")
    tables, broken = list[pa.Table](), list[str]()
    for part in parts:
        try:
            tables.append(pq.read_table(part, partitioning=None, page_checksum_verification=True))
        except (pa.ArrowException, OSError) as error:
            broken.append(f"{part} is broken ({error_line(error)})")
    if not tables:
        raise DataError(broken[0])
    for line in broken:
        logger.warning("%s: its rollouts are left out", line)
    return pa.concat_tables(tables, promote_options="default")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of any Parquet file as plain values. Raises FileNotFoundError, and DataError if it is no such file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        yield from pq.read_table(path, partitioning=None).to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error_line(error)}") from error


def read_group(path: Path, rollout_id: str) -> types.Group:
    """Read the group of a rollout, such as "train-12" for "train-12-3". Raises DataError if `path` lacks it."""
    rows = _group_rows(path, rollout_id)
    task = types.Task(task_id=rows[0]["task_id"], payload=json.loads(rows[0]["task"]))
    group_id = rollout_id.rpartition("-")[0]
    return types.Group(group_id=group_id, task=task, trajectories=tuple(_trajectory(row) for row in rows))


def read_credits(path: Path, group: types.Group, rules: CreditRules | None) -> list[Sequence[CallCredit] | None]:
    """The credit of each call of a group, as the run wrote it: a resumed run may have other rules now than when it
    trained the group. The rules give the events that caused it, and the credit of calls that were written without. A
    rollout has None if neither knows its credit; held-out rollouts have none."""
    rollouts = _group_rows(path, group.trajectories[0].key.rollout_id)
    all_computed = _credits(group, rules, rollouts[0]["step"], rollouts[0]["policy_version"])

    def credit(call: Mapping[str, Any]) -> CallCredit:
        values: Any = {name: math.nan if value is None else value for name, value in call["credit"].items()}
        values["learner_logprobs"] = tuple(call.get("learner_logprobs") or ())
        return CallCredit(call_id=call["call_id"], tokens=len(call["response_ids"]), **values)

    def of_rollout(calls: Sequence[Mapping[str, Any]], computed: Sequence[CallCredit]) -> Sequence[CallCredit] | None:
        if not calls or not all(call.get("credit") for call in calls):
            return computed or None
        events = [own.events for own in computed] or [()] * len(calls)
        return [replace(credit(call), events=caused) for call, caused in zip(calls, events, strict=True)]

    return [of_rollout(row["calls"], computed) for row, computed in zip(rollouts, all_computed, strict=True)]


def _group_rows(path: Path, rollout_id: str) -> list[dict[str, Any]]:
    import pyarrow.compute as pc

    table = read_rollouts(path)
    group_id = rollout_id.rpartition("-")[0]
    rows = table.filter(pc.equal(table.column("group_id"), group_id)).to_pylist()
    # A resumed run may have written a group again: the later rows count.
    latest = {row["rollout_id"]: row for row in rows}
    if rollout_id not in latest:
        example = table.column("rollout_id")[0].as_py()
        raise DataError(f"{path} has no rollout {rollout_id}; `agl runs {path}` lists them, the first is {example}")
    return sorted(latest.values(), key=lambda row: types.RolloutKey.parse(row["rollout_id"], 0))


def read_trajectories(path: Path) -> Iterator[types.Trajectory]:
    """Read the rollouts of a run, in the order in which they were written. `path` and errors: see `read_rollouts`."""
    batches = _latest_rollouts(path).to_batches(max_chunksize=256)
    return (_trajectory(row) for batch in batches for row in batch.to_pylist())


def read_origins(path: Path) -> Iterator[Origin]:
    """Read what the run knows about each rollout of `read_trajectories`, in the same order."""
    rows, folder = _latest_rollouts(path).select(["step", "task"]).to_pylist(), path.resolve()
    run = next(place.name for place in (folder, *folder.parents) if place.is_dir() and place.name != "rollouts")
    return (Origin(run=run, step=row["step"], task=json.loads(row["task"])) for row in rows)


def _latest_rollouts(path: Path) -> pyarrow.Table:
    """All rollouts of a run. A resumed run may have written a rollout of a step again: the later row counts."""
    table = read_rollouts(path)
    identities = zip(table.column("rollout_id").to_pylist(), table.column("step").to_pylist(), strict=True)
    latest = {identity: index for index, identity in enumerate(identities)}
    return table.take(sorted(latest.values()))


def _trajectory(row: Mapping[str, Any]) -> types.Trajectory:
    key = types.RolloutKey.parse(row["rollout_id"], row["attempt"])
    columns = [column for column, _ in _ARRAYS.values()]
    calls = [
        {name: value for name, value in call.items() if name not in (*columns, *_ADDED, "offered", "new_versions")}
        | {"offered": tuple(call.get("offered") or ())}
        | {"new_versions": tuple(map(tuple, call.get("new_versions") or ()))}
        | {name: np.array(call[column], kind) for name, (column, kind) in _ARRAYS.items()}
        for call in row["calls"]
    ]
    tools = [tool | {"status": types.ToolStatus(tool["status"])} for tool in row["tools"]]
    return types.Trajectory(
        key=key,
        **{name: row[name] for name in ("task_id", "reward", "error", "output", "started_at", "ended_at")},
        outcome=types.Outcome(row["outcome"]),
        calls=tuple(types.ModelCall(key=key, **call) for call in calls),
        tools=tuple(types.ToolCall(key=key, **tool) for tool in tools),
        rewards=tuple(types.Reward(key=key, **reward) for reward in row["rewards"]),
        agents=tuple(types.AgentSpan(key=key, **agent) for agent in row["agents"]),
        refused_spans=dict(row["refused_spans"]),
        reward_parts=dict(row.get("reward_parts") or ()),
        trace=row.get("trace") or "",
        printed=row.get("printed") or "",
    )


_ARRAYS: Mapping[str, tuple[str, type[np.generic]]] = {
    "prompt_T": ("prompt_ids", np.int32),
    "response_T": ("response_ids", np.int32),
    "logprob_T": ("logprobs", np.float32),
}
"""Array fields of a ModelCall, and their columns and number types."""
_CREDIT: Final = ("advantage", "intermediate", "return_to_go", "status")
"""Fields of a CallCredit that a call's row has."""
_ADDED: Final = ("credit", "learner_logprobs")
"""Columns of a call that are no fields of a ModelCall."""


def _rollout_schema() -> pyarrow.Schema:
    import pyarrow as pa

    text, real, integer = pa.string(), pa.float64(), pa.int32()
    arrow_types = {"str": text, "ToolStatus": text, "Source": text, "float": real, "int": integer}
    arrow_types |= {"int | None": integer, "Ints": pa.list_(integer), "Floats": pa.list_(pa.float32())}
    arrow_types |= {"tuple[str, ...]": pa.list_(text), "tuple[tuple[int, int], ...]": pa.list_(pa.list_(integer))}

    def list_of(kind: type[_Span], **more: pyarrow.DataType) -> pyarrow.DataType:
        columns = [(_column(field.name), arrow_types[str(field.type)]) for field in fields(kind) if field.name != "key"]
        return pa.list_(pa.struct(columns + list(more.items())))

    credit = pa.struct([(name, text if name == "status" else real) for name in _CREDIT])
    calls = list_of(types.ModelCall, credit=credit, learner_logprobs=pa.list_(pa.float32()))
    row = {"rollout_id": text, "group_id": text, "split": text, "attempt": integer, "task_id": text, "task": text}
    row |= {"step": integer, "policy_version": integer, "reward": real, "outcome": text, "error": text, "output": text}
    row |= {"started_at": real, "ended_at": real, "num_calls": integer, "calls": calls}
    row |= {"tools": list_of(types.ToolCall), "rewards": list_of(types.Reward), "agents": list_of(types.AgentSpan)}
    row |= {"refused_spans": pa.map_(text, integer), "reward_parts": pa.map_(text, real)}
    row |= {"trace": text, "printed": text}
    return pa.schema(list(row.items()))


def _row(record: types.Trajectory | _Span) -> dict[str, Any]:
    """The columns of a rollout or a span, without its key, which the rollout's row has."""
    return {_column(item.name): _cell(getattr(record, item.name)) for item in fields(record) if item.name != "key"}


def _credits(group: types.Group, rules: CreditRules | None, step: int, version: int) -> Sequence[Sequence[CallCredit]]:
    if rules is None or not group.trajectories or group.trajectories[0].key.split != "train":
        return [()] * len(group.trajectories)
    return explain_credit(group, rules.at(step), version)


def _with_credit(
    row: dict[str, Any],
    credits: Sequence[CallCredit],
    rollout_id: str,
    logprobs: Mapping[tuple[str, str], types.Floats],
) -> dict[str, Any]:
    """A rollout's row with the credit of its calls, and their log-probabilities in the learner."""
    for call in row["calls"]:
        call["learner_logprobs"] = logprobs.get((rollout_id, call["call_id"]))
    for call, credit in zip(row["calls"], credits, strict=bool(credits)):
        values = {name: getattr(credit, name) for name in _CREDIT}
        call["credit"] = {name: None if value != value else value for name, value in values.items()}  # NaN: unknown
    return row


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, tuple):
        return [_cell(item) if isinstance(item, str | int | tuple) else _row(item) for item in value]
    return list(value.items()) if isinstance(value, Mapping) else value


def _column(name: str) -> str:
    return _ARRAYS[name][0] if name in _ARRAYS else name
