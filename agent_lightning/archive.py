"""The rollouts of a run on disk: Parquet, one row a rollout with all its calls, and back to the nouns.

pyarrow is imported when it is used, so importing this module costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent_lightning.errors import DataError
from agent_lightning.types import Group, ModelCall, Outcome, RolloutKey, Task, Trajectory

if TYPE_CHECKING:
    import pyarrow


class RolloutWriter:
    """All rollouts that ended, as Parquet: one file a `write`, one row a rollout. A file appears whole or not at all.

    Example: write(3, 2, groups) -> rollouts/part-00002.parquet; counting goes on after the parts that are there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        numbers = [int(part.stem.removeprefix("part-")) for part in directory.glob("part-*.parquet")]
        self._next_part = max(numbers, default=-1) + 1

    def write(self, step: int, policy_version: int, groups: Sequence[Group]) -> Path | None:
        """Write the rollouts of `groups`; None where there are none. Raises OSError, e.g. on a full disk."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [_rollout_row(step, policy_version, group, one) for group in groups for one in group.trajectories]
        if not rows:
            return None
        part = self._directory / f"part-{self._next_part:05d}.parquet"
        unfinished = self._directory / f".{part.name}.tmp"
        pq.write_table(pa.Table.from_pylist(rows, schema=_rollout_schema()), unfinished, compression="zstd")
        unfinished.replace(part)
        self._next_part += 1
        return part


def read_rollouts(path: Path) -> pyarrow.Table:
    """All rollouts of a run, in the order they were written; `path` is its folder, its rollouts/, or one part.

    Example: read_rollouts(run.path).column("reward").to_pylist() -> [1.0, 0.0, None]

    Raises DataError where there are none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [path] if path.is_file() else sorted([*path.glob("part-*.parquet"), *path.glob("rollouts/part-*.parquet")])
    if not parts:
        raise DataError(f"no rollouts at {path}")
    return pa.concat_tables([pq.read_table(part, partitioning=None) for part in parts])


def read_group(path: Path, rollout_id: str) -> Group:
    """The whole group of a rollout, as it was written. Raises DataError where there is no such rollout.

    Example: read_group(run.path, "train-12-3").group_id -> "train-12"
    """
    import pyarrow.compute as pc

    table = read_rollouts(path)
    group_id = rollout_id.rpartition("-")[0]
    rows = table.filter(pc.equal(table.column("group_id"), group_id)).to_pylist()
    # A stopped run that was resumed may have written a group again: the later one counts.
    latest = {row["rollout_id"]: row for row in rows}
    if rollout_id not in latest:
        example = table.column("rollout_id")[0].as_py()
        raise DataError(f"{path} has no rollout {rollout_id}; `agl runs {path}` lists them, the first is {example}")
    ordered = sorted(latest.values(), key=lambda row: RolloutKey.parse(row["rollout_id"], 0))
    task = Task(task_id=ordered[0]["task_id"], payload=json.loads(ordered[0]["task"]))
    return Group(group_id=group_id, task=task, trajectories=tuple(_trajectory(row) for row in ordered))


def read_trajectories(path: Path) -> Iterator[Trajectory]:
    """The rollouts of a run, in the order they were written; `path` as in `read_rollouts`. Raises DataError.

    Example: [one.reward for one in read_trajectories(run.path)] -> [1.0, 0.0, None]
    """
    table = read_rollouts(path)
    # A stopped run that was resumed may have written a group again: the later one counts.
    identities = zip(table.column("rollout_id").to_pylist(), table.column("step").to_pylist(), strict=True)
    latest = {identity: index for index, identity in enumerate(identities)}
    batches = table.take(sorted(latest.values())).to_batches(max_chunksize=256)
    return (_trajectory(row) for batch in batches for row in batch.to_pylist())


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    key = RolloutKey.parse(row["rollout_id"], row["attempt"])
    return Trajectory(
        key=key,
        task_id=row["task_id"],
        calls=tuple(_model_call(key, call) for call in row["calls"]),
        reward=row["reward"],
        outcome=Outcome(row["outcome"]),
        error=row["error"],
        output=row["output"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
    )


def _model_call(key: RolloutKey, row: Mapping[str, Any]) -> ModelCall:
    same = ("call_id", "agent", "policy_version", "finish_reason", "started_at", "ended_at", "request", "reply")
    return ModelCall(
        key=key,
        prompt_T=np.array(row["prompt_ids"], np.int32),
        response_T=np.array(row["response_ids"], np.int32),
        logprob_T=np.array(row["logprobs"], np.float32),
        **{name: row[name] for name in same},
    )


def _rollout_schema() -> pyarrow.Schema:
    import pyarrow as pa

    text, real, whole = pa.string(), pa.float64(), pa.int32()
    call = {"call_id": text, "agent": text, "policy_version": whole, "prompt_ids": pa.list_(whole)}
    call |= {"response_ids": pa.list_(whole), "logprobs": pa.list_(pa.float32()), "finish_reason": text}
    call |= {"started_at": real, "ended_at": real, "request": text, "reply": text}
    row = {"rollout_id": text, "group_id": text, "split": text, "attempt": whole, "task_id": text, "task": text}
    row |= {"step": whole, "policy_version": whole, "reward": real, "outcome": text, "error": text, "output": text}
    row |= {"started_at": real, "ended_at": real, "num_calls": whole, "calls": pa.list_(pa.struct(list(call.items())))}
    return pa.schema(list(row.items()))


def _rollout_row(step: int, policy_version: int, group: Group, one: Trajectory) -> dict[str, Any]:
    row: dict[str, Any] = {"rollout_id": one.key.rollout_id, "group_id": group.group_id, "split": one.key.split}
    row |= {"attempt": one.key.attempt, "task_id": one.task_id, "step": step, "policy_version": policy_version}
    row |= {"task": json.dumps(dict(group.task.payload), default=str), "reward": one.reward}
    row |= {"outcome": one.outcome.value, "error": _storable(one.error), "output": _storable(one.output)}
    row |= {"started_at": one.started_at, "ended_at": one.ended_at, "num_calls": len(one.calls)}
    return row | {"calls": [_call_row(call) for call in one.calls]}


def _call_row(call: ModelCall) -> dict[str, Any]:
    row: dict[str, Any] = {"call_id": call.call_id, "agent": call.agent, "policy_version": call.policy_version}
    row |= {"prompt_ids": call.prompt_T, "response_ids": call.response_T, "logprobs": call.logprob_T}
    row |= {"finish_reason": call.finish_reason, "started_at": call.started_at, "ended_at": call.ended_at}
    return row | {"request": _storable(call.request), "reply": _storable(call.reply)}


def _storable(text: str) -> str:
    """Half of a surrogate pair, which a model can be made to write, is no UTF-8: it becomes "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")
