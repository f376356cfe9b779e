"""A step in which a tenth of all calls fails, compared with the same step without faults.

    python tests/chaos/faults.py   # prints a line of JSON; exit code 1 if a target is missed

10 % of the model calls fail, 10 % of the tool calls hang, and every minute one of two workers is killed. As with any
careful agent, the client repeats failed calls and the tool has a deadline; dead workers are replaced. The toy engine
and the tool take a second each, so that a step takes a minute of waiting, not of computing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import aiohttp
from injector import Faults, Rates

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Outcome, Policy, Task
from agent_lightning.credit.failures import Retries
from agent_lightning.rollouts.client import tool
from agent_lightning.serving.gateway import RETRY_HEADER
from agent_lightning.testing.world import ToyWorld

WORDS = ("red", "green", "blue")


class Search:
    """A tool that takes some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def find(self, query: str) -> str:
        await asyncio.sleep(self._seconds)
        return f"nothing about {query}"


class Agent:
    """An agent with three model calls and two searches; it repeats a failed call or a hanging search three times."""

    def __init__(self, search: Search, deadline_s: float) -> None:
        self.answered: list[tuple[str, str]] = []
        """The base URL of the attempt and the id of the reply, for each reply that the agent has received."""

        async def find(query: str) -> str:
            return await search.find(query)

        self._find = tool("search", timeout_s=deadline_s)(find)

    async def __call__(self, payload: Mapping[str, Any], policy: Policy) -> float:
        answer, messages = "", [{"role": "user", "content": payload["question"]}]
        async with aiohttp.ClientSession() as http:
            for turn in range(3):
                answer = await self._ask(http, policy, messages)
                messages.append({"role": "assistant", "content": answer})
                if turn < 2:
                    messages.append({"role": "user", "content": await self._search(answer)})
        return float(answer == payload["answer"])

    async def _ask(self, http: aiohttp.ClientSession, policy: Policy, messages: list[dict[str, str]]) -> str:
        for retry in range(4):
            body, headers = {"model": policy.model, "messages": messages}, {RETRY_HEADER: str(retry)}
            async with http.post(f"{policy.base_url}/chat/completions", json=body, headers=headers) as reply:
                if reply.status < 500:
                    reply.raise_for_status()
                    completion = await reply.json()
                    self.answered.append((policy.base_url, completion["id"]))
                    return str(completion["choices"][0]["message"]["content"])
        raise ConnectionError("the model failed four times")

    async def _search(self, query: str) -> str:
        for _ in range(4):
            try:
                return await self._find(query)
            except TimeoutError:
                continue
        raise TimeoutError("the search hung four times")


async def run(
    *, rates: Rates, tool_rates: Rates, steps: int, rollouts: int, slow_s: float, kill_s: float
) -> dict[str, Any]:
    """Train for some steps of 8 tasks, and return the counts. A worker dies every `kill_s` seconds (0: none)."""
    faults = Faults(seed=7)
    search = faults.between(Search(slow_s), "search", tool_rates)
    agent = Agent(search, deadline_s=2.5 * slow_s)
    tasks = [Task(task_id=str(n), payload={"question": f"q{n}", "answer": WORDS[n % 3]}) for n in range(8)]
    spec = AgentConfig(target=agent, timeout_s=60 * slow_s)
    async with ToyWorld(
        agent=spec,
        tasks=tasks,
        words=WORDS,
        algorithm=AlgorithmConfig(rollouts_per_task=rollouts),
        num_workers=2,
        retries=Retries(max_attempts=3),
        link=faults.linking({"engine": rates}),
    ) as world:
        world.engine.delay_s = slow_s
        killing = asyncio.create_task(kill_workers(faults, kill_s))
        await world.loop.evaluate()
        started = time.monotonic()
        state = await world.train(steps=steps)
        seconds = time.monotonic() - started
        killing.cancel()
        stats = await world.buffer.stats()
    ended = [t for group in world.observer.groups for t in group.trajectories if t.key.split == "train"]
    usable = sum(trajectory.outcome is Outcome.FINISHED for trajectory in ended)
    sizes = Counter(
        len(group.trajectories) for group in world.observer.groups if group.task.payload and len(group.trajectories) > 1
    )
    calls = Counter(call.call_id for trajectory in ended for call in trajectory.calls)
    final = {f"/{t.key.rollout_id}/attempt/{t.key.attempt}/": {call.call_id for call in t.calls} for t in ended}
    lost = [reply for url, reply in agent.answered for at, ids in final.items() if at in url and reply not in ids]
    return {
        "rollouts": len(ended),
        "usable_share": round(usable / len(ended), 4),
        "step_s": [round(record["time/step"], 1) for record in world.observer.records],
        "seconds": round(seconds, 1),
        "workers_killed": world.workers.replaced,
        "retried": stats.retried,
        "failed": dict(state.failed),
        "faults": dict(faults.counts),
        "books": state.admitted == state.trained + sum(state.dropped.values()) == len(ended),
        "whole_groups": sizes == {rollouts: 8 * steps},
        "lost": len(lost),
        "doubled": sum(times > 1 for times in calls.values()),
    }


async def kill_workers(faults: Faults, every_s: float) -> None:
    """Cut off the workers in turn, one every `every_s` seconds."""
    turn = 0
    while every_s:
        await asyncio.sleep(every_s)
        names = sorted(name for name in faults.links if name.startswith(f"worker-{turn % 2}"))
        faults.links[names[-1]].cut()
        turn += 1


async def compare(steps: int, rollouts: int, slow_s: float, kill_s: float) -> dict[str, Any]:
    settings: dict[str, Any] = {"steps": steps, "rollouts": rollouts, "slow_s": slow_s}
    without = await run(rates=Rates(), tool_rates=Rates(), kill_s=0.0, **settings)
    faulty = await run(rates=Rates(error=0.1), tool_rates=Rates(hang=0.1), kill_s=kill_s, **settings)
    longer = round(sum(faulty["step_s"]) / sum(without["step_s"]), 2)
    return {"benchmark": "a tenth fails", "times_as_long": longer, "with_faults": faulty, "without": without}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=64, help="rollouts of each of 8 tasks")
    parser.add_argument("--slow-s", type=float, default=1.0, help="seconds of a model call and of a tool call")
    parser.add_argument("--kill-s", type=float, default=60.0, help="seconds between two kills of a worker")
    result = asyncio.run(compare(**vars(parser.parse_args())))
    sys.stdout.write(json.dumps(result) + "\n")
    return int(result["with_faults"]["usable_share"] < 0.95 or result["times_as_long"] > 1.5)


if __name__ == "__main__":
    sys.exit(main())
