"""Rollouts per second with `loop.max_lag` 0, 1, 2, 4, as JSON, where agents wait for tools: five calls, and before each
a tool that takes log-normal seconds.

    python benchmarks/async.py                                # the toy's engine and learner, 1,000 rollouts at once
    python benchmarks/async.py --rollouts 10000 --median 15   # ten times as many, at the same pace
    python benchmarks/async.py --vllm rollout.concurrency=1280   # vLLM and veRL: experiment=calc_tiny, waiting tools

Of the toy, everything but HTTP is real: agents ask the engine without the gateway, which one process could not serve
as fast. Its learner takes `--update` seconds on another machine. `gain` is relative to max_lag 0; `engine_busy` the
share of the time in which rollouts waited or ran; `cpu_ms` the processor time of the process per rollout. The time
until the first step is trained counts for every lag.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import AgentConfig, LoopConfig
from agent_lightning.core.types import Batch, ModelCall, Policy, RolloutKey, Task
from agent_lightning.learners.base import Update
from agent_lightning.testing.world import ToyWorld

CALLS, PER_TASK, SIGMA = 5, 8, 0.8
MEDIAN_S = 1.5  # of a tool's seconds
WORDS = ("red", "green", "blue")


async def wait_for_tool(median: float) -> None:
    await asyncio.sleep(random.lognormvariate(0.0, SIGMA) * median)


async def solve(task: Mapping[str, Any], policy: Policy) -> str:
    """The agent of experiment=calc_tiny, whose tools are slow."""
    from examples.calc_x import agent

    for _ in range(CALLS):
        await wait_for_tool(MEDIAN_S)
    return await agent.solve(task, policy)


class Agent:
    """Asks the engine of a world, and records as the gateway does."""

    world: ToyWorld

    def __init__(self, median: float) -> None:
        self.median = median

    async def __call__(self, task: Mapping[str, Any], policy: Policy) -> float:
        rollout_id, _, attempt = policy.base_url.split("/rollout/")[1].split("/")[:3]
        key, answer = RolloutKey.parse(rollout_id, int(attempt)), ""
        for number in range(CALLS):
            await wait_for_tool(self.median)
            request = {"messages": [{"role": "user", "content": f"{task['question']} {number}"}]}
            started, reply = time.time(), await self.world.engine.generate(request)
            choice, answer = reply.choices[0], reply.reply["choices"][0]["message"]["content"]  # type: ignore[union-attr]
            call = ModelCall(
                key=key,
                call_id=f"{key.rollout_id}.{key.attempt}.{number}",
                agent="agent",
                policy_version=reply.policy_version,  # type: ignore[union-attr]
                prompt_T=choice.prompt_T,
                response_T=choice.response_T,
                logprob_T=choice.logprob_T,
                finish_reason=choice.finish_reason,
                started_at=started,
                ended_at=time.time(),
            )
            await self.world.buffer.record(call)
        return float(answer == task["answer"])


class SlowLearner:
    """The toy's learner, as if it computed on another machine."""

    def __init__(self, learner: Any, seconds: float) -> None:
        self._learner, self._seconds = learner, seconds
        self.publish = learner.publish

    async def update(self, batches: Sequence[Batch], *, epochs: int = 1) -> Update:
        await asyncio.sleep(self._seconds)
        update: Update = await self._learner.update(batches, epochs=epochs)
        return update


async def toy(max_lag: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run of the toy world."""
    random.seed(0)
    rollouts = options.rollouts
    tasks = [Task(task_id=f"t{n}", payload={"question": f"q{n}", "answer": WORDS[n % 3]}) for n in range(64)]
    agent = Agent(options.median)
    world = ToyWorld(
        agent=AgentConfig(target=agent, timeout_s=3600.0),
        concurrency=rollouts,
        tasks=tasks,
        words=WORDS,
        overlap=LoopConfig(max_lag=max_lag),
    )
    async with world:
        agent.world, world.loop.val_tasks = world, ()
        size = AlgorithmConfig(tasks_per_step=rollouts // PER_TASK, rollouts_per_task=PER_TASK)
        world.loop.plan = replace(world.loop.plan, algorithm=size)
        world.loop.learner = SlowLearner(world.learner, options.update)  # type: ignore[assignment]
        started, cpu = time.monotonic(), time.process_time()
        state = await world.train(steps=options.steps)
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        assert not set(state.dropped) - {"no_spread"}, state.dropped
        return measure(max_lag, world.observer.records, state.admitted, seconds) | {
            "cpu_ms": round(1000 * cpu / state.admitted, 2)
        }


def real(max_lag: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run of experiment=calc_tiny on vLLM and veRL, without its evaluations."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "agent_lightning", "train", "experiment=calc_tiny", f"runs_dir={folder}"]
        command += [f"steps={options.steps}", "name=run", "eval_every=0", "data.val.num=8", f"loop.max_lag={max_lag}"]
        command += [f"agent.target={Path(__file__).resolve()}:solve", *options.overrides]
        subprocess.run(command, check=True, stdout=sys.stderr)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    records = [record for record in map(json.loads, lines) if "time/step" in record]
    seconds = sum(record["time/step"] for record in records)
    return measure(max_lag, records, summary["rollouts"]["admitted"], seconds)


def measure(max_lag: int, records: Sequence[Mapping[str, float]], rollouts: int, seconds: float) -> dict[str, Any]:
    idle = sum(record["time/engine_idle"] for record in records[1:])  # before the first step nothing has ended
    return {
        "max_lag": max_lag,
        "rollouts_per_s": round(rollouts / seconds, 2),
        "seconds": round(seconds, 1),
        "engine_busy": round(1 - idle / seconds, 3),
        "learner_idle_s": round(sum(record["time/learner_idle"] for record in records), 1),
        "lag_max": max(record.get("lag/max", 0.0) for record in records),
        "lag_mean": round(sum(record.get("lag/mean", 0.0) for record in records) / len(records), 2),
        "rollout_p50_s": round(records[-1]["time/rollout_p50"], 1),
        "rollout_p99_s": round(records[-1]["time/rollout_p99"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", action="store_true", help="vLLM and veRL instead of the toy")
    parser.add_argument("--rollouts", type=int, default=1000, help="rollouts at once, and of a step")
    parser.add_argument("--median", type=float, default=MEDIAN_S, help="median seconds of a tool")
    parser.add_argument("--update", type=float, default=3.0, help="seconds of an update of the toy's learner")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lags", type=_numbers, default=[0, 1, 2, 4], metavar="0,1,2,4")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for --vllm")
    options = parser.parse_args()
    results = []
    for lag in options.lags:
        results.append(real(lag, options) if options.vllm else asyncio.run(toy(lag, options)))
        print(results[-1], file=sys.stderr)
    first = results[0]["rollouts_per_s"]
    for result in results:
        result["gain"] = round(result["rollouts_per_s"] / first, 2)
    engine = {"engine": "vllm"} if options.vllm else {"engine": "toy", "at_once": options.rollouts}
    print(json.dumps({"benchmark": "async", **engine, "lags": results}))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
