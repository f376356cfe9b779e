"""Groups as the Buffer returns them, with their spans as recorded; the process that takes them assembles trajectories.

The Buffer is one process that every call of every agent waits for. So it only stores, and reading spans is left to the
process that needs them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from agent_lightning.core.types import Ending, Group, ModelCall, Outcome, RolloutKey, Split, Task, Trajectory
from agent_lightning.spans.assemble import assemble
from agent_lightning.spans.tree import RawSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenRollout:
    """The last attempt of a rollout."""

    key: RolloutKey
    started_at: float  # Unix seconds at which the attempt was leased; 0 if it never was
    ending: Ending
    calls: tuple[ModelCall, ...]  # the calls that the gateway recorded, in the order of their arrival
    spans: tuple[RawSpan, ...]  # the spans that the agent's process sent
    refused_spans: Mapping[str, int]  # reason -> number of spans that were refused when they arrived

    def assemble(self, task: Task) -> Trajectory:
        """The attempt with its spans put together. Never raises: a trace that cannot be assembled is lost and counted
        in `Trajectory.refused_spans`, and the gateway's calls are kept."""
        spans, ending = assemble(self.key, self.calls, self.spans), self.ending
        return Trajectory(
            key=self.key,
            task_id=task.task_id,
            calls=spans.calls,
            reward=ending.reward if ending.outcome is Outcome.FINISHED else None,
            outcome=ending.outcome,
            error=ending.error,
            output=ending.output,
            started_at=self.started_at,
            ended_at=ending.at,
            tools=spans.tools,
            rewards=spans.rewards,
            agents=spans.agents,
            refused_spans=dict(Counter(self.refused_spans) + Counter(spans.refused)),
            reward_parts=ending.reward_parts,
            trace=ending.trace,
            printed=ending.printed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenGroup:
    """All rollouts of one task, each of which has ended."""

    group_id: str
    task: Task
    rollouts: tuple[TakenRollout, ...]  # in the order of `RolloutKey.index`

    def assemble(self) -> Group:
        """The group with the trajectories of its rollouts. Never raises."""
        trajectories = tuple(rollout.assemble(self.task) for rollout in self.rollouts)
        return Group(group_id=self.group_id, task=self.task, trajectories=trajectories)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """Until when each group must be trained, which decides how far younger groups may overtake it (docs/async.md)."""

    slack: Mapping[str, int]
    """Group, the oldest first -> the number of updates that may come before the update that trains it."""
    groups_per_step: int

    def choose(self, complete: Collection[str], num_groups: int) -> tuple[str, ...]:
        """The oldest `num_groups` groups that are complete, if the others can then be trained in time, in their order,
        `groups_per_step` in each further step; else ().

            slack {a: 0, b: 1, c: 1}, steps of 1 group, b and c complete: (), since a must be trained now
            slack {a: 1, b: 1, c: 2}: b goes before a, and a must be next
        """
        chosen = tuple(islice((group for group in self.slack if group in complete), num_groups))
        taken = set(chosen)
        left = (slack for group, slack in self.slack.items() if group not in taken)
        in_time = all(slack > index // self.groups_per_step for index, slack in enumerate(left))
        # A run that was resumed with a smaller bound has groups that are late: the oldest go first.
        oldest = chosen == tuple(islice(self.slack, num_groups))
        return chosen if len(chosen) == num_groups and (in_time or oldest) else ()


class GroupSource(Protocol):
    """The part of the Buffer from which groups are taken."""

    async def take(self, num_groups: int, *, split: Split, deadlines: Deadlines | None = None) -> list[TakenGroup]: ...


async def take_groups(
    buffer: GroupSource, num_groups: int, *, split: Split, deadlines: Deadlines | None = None
) -> list[Group]:
    """Take groups as `Buffer.take` does, and assemble them in a thread of this process: its event loop goes on."""
    taken = await buffer.take(num_groups, split=split, deadlines=deadlines)
    return await asyncio.to_thread(lambda: [group.assemble() for group in taken])
