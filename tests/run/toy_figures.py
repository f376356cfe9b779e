"""The figures of short toy runs, without their seconds. Run as a program, it prints them as JSON: that is how
tests/run/toy_figures.json was written, by the loop as it was before rollouts and training could overlap."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import aiohttp

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.core.types import Policy, Task
from agent_lightning.testing.world import ToyWorld

WORDS = ("0", "1", "2", "3", "4")
TASKS = tuple(Task(task_id=f"t{n}", payload={"q": f"{n} plus 1?", "answer": str(n + 1)}) for n in range(4))
CASES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "part of the tasks": {"tasks_per_step": 3},
    "more tasks than there are": {"tasks_per_step": 6, "rollouts_per_task": 4},
    "batches and epochs": {"rollouts_per_batch": 8, "epochs": 2},
    "dynamic sampling": {"dynamic_sampling_rounds": 2, "rollouts_per_task": 4},
}
STEPS = 6


async def figures(case: str) -> dict[str, Any]:
    """The metrics of each step of a run, its held-out rewards, and its counts."""

    async def solve(task: Mapping[str, Any], policy: Policy) -> float:
        body = {"model": policy.model, "messages": [{"role": "user", "content": task["q"]}]}
        async with http.post(f"{policy.base_url}/chat/completions", json=body) as reply:
            answer = (await reply.json())["choices"][0]["message"]["content"]
        if answer == "4":
            raise ValueError("an agent that cannot stand this answer")
        return float(answer == task["answer"]) + 0.25 * (answer == "0")

    algorithm = AlgorithmConfig(**{"tasks_per_step": len(TASKS), **CASES[case]})
    async with aiohttp.ClientSession() as http, ToyWorld(agent=solve, tasks=TASKS, words=WORDS, seeded=True) as world:
        world.loop.plan = replace(world.loop.plan, algorithm=algorithm, eval_every=2)
        state = await world.train(steps=STEPS)
        return {
            "records": [steady(record) for record in world.observer.records],
            "val_rewards": [list(pair) for pair in state.val_rewards],
            "cursor": [state.cursor.epoch, state.cursor.position],
            "next_group": state.next_group or dict((await world.buffer.stats()).next_group),
            "counts": [state.admitted, state.trained, dict(state.dropped), state.version],
            "tokens": [state.sampled_tokens, state.trained_tokens, dict(state.dropped_tokens)],
            "gap": [state.gap_total, state.gap_max],
            "failed": dict(state.failed),
            "table": {str(row): values.tolist() for row, values in enumerate(world.learner.table) if values.any()},
        }


def steady(record: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics without those that tell the time."""
    return {name: value for name, value in record.items() if not name.startswith("time/")}


if __name__ == "__main__":
    print(json.dumps({case: asyncio.run(figures(case)) for case in CASES}, sort_keys=True))
