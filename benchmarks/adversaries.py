"""What adversarial agents cost the others, as JSON lines: with and without them in a tenth of the rollouts.

    python benchmarks/adversaries.py --rounds 5 > adversaries.jsonl

Rounds take turns. In each, 90 % of the rollouts make two calls, as an agent does, and are measured: rollouts per second
until the last of them has ended. The other tenth does the same, or attacks: traces that are deep, large, repeated or
bent, rewards beyond all bounds, packed bodies, random bytes. The attacks are sent by a process of their own; gateway,
buffer (with its journal) and toy engine share another; health checks come from a third. After each round all rollouts
are accounted for and their credit is computed; at the end a buffer is started over the journal and goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from agent_lightning.config.learning import AlgorithmConfig, CreditConfig
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Group, Outcome, Policy, Task
from agent_lightning.credit.assign import CreditRules, assign
from agent_lightning.serving.bodies import prepare_process
from agent_lightning.spans.otlp import encode_json
from agent_lightning.spans.tree import RawSpan
from agent_lightning.testing.world import ToyWorld

WORDS = tuple("0123456789")
JSON: Mapping[str, str] = {"content-type": "application/json"}
PACKED: Mapping[str, str] = {**JSON} | {"content-encoding": "gzip"}


def span(number: int, attributes: Mapping[str, Any], parent: int = 0) -> RawSpan:
    ids = {"span_id": f"{number:016x}", "parent_id": f"{parent:016x}" if parent else ""}
    return RawSpan(name="a", started_at=1e9, ended_at=2e9, attributes=attributes, **ids)


def trace(*spans: RawSpan) -> bytes:
    return encode_json(spans, trace_id="1" * 32, resource={}).encode()


def attacks() -> dict[str, list[tuple[str, Mapping[str, str], bytes]]]:
    """The requests of each attack: an endpoint below the attempt's URL, headers, and a body."""
    noise, index = random.Random(0), f"agentlightning.reward.{'9' * 5000}.value"
    large = trace(span(1, {"text": "x" * 3_900_000}))
    values = gzip.compress(b'{"messages": [' + b"null," * 1_300_000 + b"null]}")
    literal = trace(span(1, {"gen_ai.input.messages": "[" + "(1, 'a')," * 420_000 + "]"}))
    chain = [span(number, {"k": 1}, number - 1) for number in range(1, 10_001)]
    reward = {"agl.reward.name": "mine", "agl.reward.about": "chatcmpl-any"}
    names = [span(i + 1, {"agl.reward.name": f"n{i}", "agl.reward.value": 1.0}) for i in range(9000)]
    odd = [1e39, -1e308, float("nan"), float("inf"), 10**15, True, "1e999", "nan", ["1"], 10**18]
    deep = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    fuzz = [("chat/completions", JSON, noise.randbytes(noise.randrange(1, 50_000))) for _ in range(40)]
    return {
        "a reward's index of 5000 digits": [("traces", JSON, trace(span(1, {index: 1.0})))],
        "rewards beyond all bounds": [
            ("traces", JSON, trace(span(i + 1, {**reward, "agl.reward.value": value}))) for i, value in enumerate(odd)
        ],
        "rewards of 1000 about itself": [("traces", JSON, trace(span(1, {**reward, "agl.reward.value": 1000.0})))] * 10,
        "9000 names": [("traces", PACKED, gzip.compress(trace(*names)))],
        "a packed body of 1.3 million values": [("chat/completions", PACKED, values)] * 8,
        "a chain of 10,000 spans": [("traces", PACKED, gzip.compress(trace(*chain)))],
        "a text in Python's notation": [("traces", PACKED, gzip.compress(literal))],
        "60 spans of 3.9 MB": [
            ("traces", PACKED, gzip.compress(large.replace(b"0000001", b"%07d" % i), 1)) for i in range(1, 61)
        ],
        "the same span again and again": [("traces", PACKED, gzip.compress(large))] * 60,
        "deep nesting": [("chat/completions", JSON, deep)] * 10,
        "random bytes": fuzz,
        "10,000 calls": [("chat/completions", JSON, b'{"messages": [{"role": "user", "content": "a"}]}')] * 300,
    }  # fmt: skip


def run_attacker(pipe: Connection) -> None:
    """Send the attacks that the pipe names, to the URLs that it gives, eight requests at a time."""
    requests = attacks()
    pipe.send(sorted(requests))

    async def attack(url: str, kind: str, client: aiohttp.ClientSession) -> int:
        waiting = asyncio.Semaphore(8)

        async def send(end: str, headers: Mapping[str, str], body: bytes) -> int:
            async with waiting:
                try:
                    async with client.post(f"{url}/{end}", data=body, headers=headers) as reply:
                        await reply.read()
                        return int(reply.status >= 500 and reply.status != 507)
                except (aiohttp.ClientError, TimeoutError):
                    return 0

        return sum(await asyncio.gather(*(send(*request) for request in requests[kind])))

    async def serve() -> None:
        timeout = aiohttp.ClientTimeout(total=60)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as client:
            running: set[asyncio.Task[None]] = set()

            async def answer(number: int, url: str, kind: str) -> None:
                pipe.send((number, await attack(url, kind, client)))

            while (job := await asyncio.to_thread(pipe.recv)) is not None:
                task = asyncio.create_task(answer(*job))
                running.add(task)
                task.add_done_callback(running.discard)

    asyncio.run(serve())


def run_checks(pipe: Connection) -> None:
    """Check the health of the URL that the pipe gives until it gives another message; send the milliseconds."""

    async def check(url: str) -> list[float]:
        times = []
        async with aiohttp.ClientSession() as client:
            while not pipe.poll():
                begun = time.perf_counter()
                async with client.get(url) as reply:
                    assert reply.status == 200
                times.append(1e3 * (time.perf_counter() - begun))
                await asyncio.sleep(0.005)
        return times

    while (url := pipe.recv()) is not None:
        times = asyncio.run(check(url))
        pipe.recv()
        pipe.send(times)


class Agent:
    """An agent whose task says whether it works or attacks."""

    def __init__(self, client: aiohttp.ClientSession, pipe: Connection) -> None:
        self.client, self.pipe = client, pipe
        self.waiting: dict[int, asyncio.Future[int]] = {}
        self.bare_errors = 0
        self.ended: dict[str, float] = {}
        asyncio.get_running_loop().add_reader(pipe.fileno(), self._read)

    def _read(self) -> None:
        number, errors = self.pipe.recv()
        self.bare_errors += errors
        if not (waiting := self.waiting.pop(number)).done():  # the attempt may have run out of time
            waiting.set_result(errors)

    async def __call__(self, task: Mapping[str, Any], policy: Policy) -> float:
        if task["attack"]:
            number = random.getrandbits(60)
            self.waiting[number] = asyncio.get_running_loop().create_future()
            self.pipe.send((number, policy.base_url, task["attack"]))
            await self.waiting[number]
        answer = ""
        for text in (task["question"], "Sure?"):
            body = {"model": policy.model, "messages": [{"role": "user", "content": text}]}
            async with self.client.post(f"{policy.base_url}/chat/completions", json=body) as reply:
                answer = (await reply.json())["choices"][0]["message"]["content"]
        return float(answer == task["answer"])


async def wave(world: ToyWorld, tasks: list[Task], per_task: int) -> tuple[float, list[Group]]:
    """Rollouts per second of the tasks that attack in no round, until the last of them has ended; and all groups."""
    begun = time.time()
    groups = await world.generate(tasks, num_rollouts=per_task)
    honest = [t for g in groups if not g.task.payload["attack"] for t in g.trajectories]
    assert all(t.outcome is Outcome.FINISHED and len(t.calls) == 2 for t in honest), honest[0].error
    measured = [t for g in groups if int(g.task.task_id) % 10 for t in g.trajectories]
    return len(measured) / (max(t.ended_at for t in measured) - begun), groups


async def measure(options: argparse.Namespace, folder: Path, pipe: Connection, checks: Connection) -> None:
    prepare_process()  # as a gateway on Ray Serve does
    kinds = pipe.recv()
    rules = CreditRules(credit=CreditConfig(method="return_to_go"))
    rates: dict[bool, list[float]] = {False: [], True: []}
    health: dict[bool, list[float]] = {False: [], True: []}
    sections = {"algorithm": AlgorithmConfig(rollouts_per_task=options.per_task), "words": WORDS}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        agent = Agent(client, pipe)
        spec = AgentConfig(target=agent, timeout_s=60.0)
        settings: dict[str, Any] = {"agent": spec, "concurrency": options.concurrent, **sections, "journal": folder}
        count = options.rollouts // options.per_task
        first = [Task(task_id="1", payload={"question": "0?", "answer": "0", "attack": ""})]
        async with ToyWorld(tasks=first, **settings) as world:
            world.engine.delay_s = options.delay
            for number in range(2 * options.rounds + 1):
                hostile = number % 2 == 1
                tasks = [
                    Task(
                        task_id=f"{n}",
                        payload={
                            "question": f"{n}?",
                            "answer": str(n % 10),
                            "attack": kinds[(n // 10 + number) % len(kinds)] if hostile and n % 10 == 0 else "",
                        },
                    )
                    for n in range(count)
                ]
                checks.send(f"{world.url}/health")
                rate, groups = await wave(world, tasks, options.per_task)
                checks.send("end")
                times = await asyncio.to_thread(checks.recv)
                credits = [assign(group, rules) for group in groups]
                trained = sum(credit.trained_rollouts for credit in credits)
                dropped = sum(sum(credit.dropped_rollouts.values()) for credit in credits)
                assert trained + dropped == count * options.per_task
                assert all(np.isfinite(s.advantage_T).all() for credit in credits for s in credit.samples)
                await world.buffer.advance(trained=trained, dropped={"credit": dropped})
                stats = await world.buffer.stats()
                assert stats.admitted == stats.trained + sum(stats.dropped.values())
                if number:  # the first round warms up
                    rates[hostile].append(rate)
                    health[hostile] += times
        begun = time.perf_counter()
        async with ToyWorld(tasks=first, **settings) as world:
            replay_s = time.perf_counter() - begun
            stats = await world.buffer.stats()
            assert stats.admitted == stats.trained + sum(stats.dropped.values())
            await wave(world, first, options.per_task)
    without, with_them = (statistics.median(rates[hostile]) for hostile in (False, True))
    row: dict[str, Any] = {
        "rollouts_per_s": without,
        "with_adversaries": with_them,
        "share": with_them / without,
        "health_p99_ms": np.quantile(health[False], 0.99),
        "health_p99_ms_with_adversaries": np.quantile(health[True], 0.99),
        "bare_5xx": agent.bare_errors,
        "replay_s": replay_s,
    }
    sys.stdout.write(json.dumps({name: round(float(value), 3) for name, value in row.items()} | {"all": rates}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rollouts", type=int, default=960, help="of a round")
    parser.add_argument("--per-task", type=int, default=4)
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--delay", type=float, default=1.0, help="seconds of the engine for a call")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    checks, others = spawn.Pipe()
    helpers = [spawn.Process(target=run_attacker, args=(theirs,)), spawn.Process(target=run_checks, args=(others,))]
    for helper in helpers:
        helper.start()
    theirs.close()
    others.close()
    folder = Path(tempfile.mkdtemp())
    try:
        asyncio.run(measure(options, folder / "journal", pipe, checks))
    finally:
        for end in (pipe, checks):
            end.send(None)
        for helper in helpers:
            helper.join(10)
            helper.kill()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
