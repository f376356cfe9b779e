"""The journal's price, as JSON lines: rollouts/s of the toy workload with and without it, and the time of a replay.

    python benchmarks/journal.py > journal.jsonl

rollouts: --concurrent rollouts at a time, each two calls through the gateway over HTTP, in one process with the toy
engine; every configuration in turn, another one first each time, --rounds times over, and the medians. The agent is a
bare HTTP client, so that the system is measured and not the agent. appends: calls of --tokens tokens that --concurrent
clients wait for. replay: a journal of --replay-mib MiB of such calls, read by a new buffer.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import aiohttp
import numpy as np

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.config.running import AgentConfig, BufferConfig, Fsync
from agent_lightning.core.types import Ending, ModelCall, Outcome, Policy, RolloutKey, Task
from agent_lightning.testing.world import ToyWorld

WORDS = tuple("0123456789")


class TwoCalls:
    """Two calls, and a reward for the second answer."""

    def __init__(self, client: aiohttp.ClientSession) -> None:
        self.client = client

    async def __call__(self, task: Mapping[str, Any], policy: Policy) -> float:
        answer = ""
        for text in (task["question"], "Sure?"):
            body = {"model": policy.model, "messages": [{"role": "user", "content": text}]}
            async with self.client.post(f"{policy.base_url}/chat/completions", json=body) as reply:
                answer = (await reply.json())["choices"][0]["message"]["content"]
        return float(answer == task["answer"])


async def rollouts(concurrent: int, journal: Path | None, config: BufferConfig) -> tuple[float, float]:
    """Rollouts/s of one wave of 1.5 times as many rollouts as may run at a time, and rollouts per second of CPU."""
    tasks = [Task(task_id=f"{n}", payload={"question": f"{n}?", "answer": str(n % 10)}) for n in range(concurrent // 8)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as client:
        spec = AgentConfig(target=TwoCalls(client), timeout_s=300.0)
        options: dict[str, Any] = {"agent": spec, "concurrency": concurrent, "tasks": tasks, "words": WORDS}
        async with ToyWorld(**options, journal=journal, buffer_config=config) as world:
            started, working = time.perf_counter(), time.process_time()
            groups = await world.generate(tasks, num_rollouts=12)
            seconds, worked = time.perf_counter() - started, time.process_time() - working
            ended = [trajectory for group in groups for trajectory in group.trajectories]
            assert all(trajectory.outcome is Outcome.FINISHED and len(trajectory.calls) == 2 for trajectory in ended), (
                ended[0].error
            )
            return len(ended) / seconds, len(ended) / worked


def make_call(key: RolloutKey, number: int, tokens: int) -> ModelCall:
    ids = np.arange(tokens, dtype=np.int32)
    response_T = ids[: tokens // 4]
    return ModelCall(
        key=key,
        call_id=f"chatcmpl-{key.rollout_id}-{number}",
        agent="agent",
        policy_version=3,
        prompt_T=ids.copy(),
        response_T=response_T.copy(),
        logprob_T=np.full(response_T.shape, -0.5, np.float32),
        finish_reason="stop",
        started_at=float(number),
        ended_at=float(number) + 1.0,
        request=json.dumps([{"role": "user", "content": "word " * (tokens // 2)}]),
        reply=json.dumps({"role": "assistant", "content": "word " * (tokens // 8)}),
    )


async def appends(folder: Path, fsync: Fsync, concurrent: int, tokens: int) -> dict[str, float]:
    """Calls that many clients record at once, each waiting for its acknowledgement."""
    buffer = Buffer(run_secret=b"x", journal=folder, config=BufferConfig(fsync=fsync))
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=concurrent)
    leases = await buffer.lease(concurrent, 1.0)
    waited: list[float] = []

    async def client(key: RolloutKey) -> None:
        for number in range(5):
            call = make_call(key, number, tokens)
            started = time.perf_counter()
            await buffer.record(call)
            waited.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(client(lease.key) for lease in leases))
    seconds = time.perf_counter() - started
    await buffer.close()
    return {"calls_per_s": len(waited) / seconds, "p50_ms": statistics.median(waited) * 1e3}


async def replay(folder: Path, size: int, tokens: int) -> dict[str, Any]:
    config = BufferConfig(fsync="never", max_disk_gib=4 * size / 2**30, memory_gib=0.25)
    buffer, calls, groups = Buffer(run_secret=b"x", journal=folder, config=config), 0, 0
    while sum(segment.stat().st_size for segment in folder.glob("segment-*")) < size:
        await buffer.admit(Task(task_id="t", payload={"question": "x" * 100}), split="train", num_rollouts=8)
        for lease in await buffer.lease(8, 1.0):
            for number in range(5):
                await buffer.record(make_call(lease.key, number, tokens))
                calls += 1
            await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
        groups += 1
    await buffer.close()
    started = time.perf_counter()
    buffer = Buffer(run_secret=b"x", journal=folder, config=config)
    seconds = time.perf_counter() - started
    stats = await buffer.stats()
    assert (stats.calls, stats.complete) == (calls, groups * 8)
    await buffer.close()
    return {"bytes": size, "calls": calls, "rollouts": groups * 8, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--replay-mib", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where the journals are written; default: a temporary folder")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder))

    def say(**row: Any) -> None:
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()

    try:
        kinds: list[str] = ["none", *get_args(Fsync)]
        measured: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for number in range(options.rounds):
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                gc.collect()  # garbage of the round before is not part of this round's time
                kept = kind != "none"
                config = BufferConfig(fsync=kind) if kept else BufferConfig()  # type: ignore[arg-type]
                folder = root / f"{number}-{kind}" if kept else None
                measured[kind].append(asyncio.run(rollouts(options.concurrent, folder, config)))
        without, without_cpu = (statistics.median(rates) for rates in zip(*measured["none"], strict=True))
        for kind in kinds:
            rate, rate_cpu = (statistics.median(rates) for rates in zip(*measured[kind], strict=True))
            say(
                figure="rollouts",
                journal=kind,
                concurrent=options.concurrent,
                rollouts_per_s=rate,
                share=rate / without,
                rollouts_per_cpu_s=rate_cpu,
                share_of_cpu=rate_cpu / without_cpu,
                all=measured[kind],
            )
        for kind in get_args(Fsync):
            rate = asyncio.run(appends(root / f"appends-{kind}", kind, options.concurrent, options.tokens))
            say(figure="appends", fsync=kind, concurrent=options.concurrent, tokens=options.tokens, **rate)
        folder = root / "replay"
        say(
            figure="replay",
            tokens=options.tokens,
            **asyncio.run(replay(folder, options.replay_mib * 2**20, options.tokens)),
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
