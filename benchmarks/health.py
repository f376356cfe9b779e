"""Health checks of a gateway while one attempt does its worst, as JSON lines: milliseconds at the median and 99 %.

    python benchmarks/health.py > health.jsonl

The gateway is a process of its own, with the toy engine; a client keeps --concurrent requests of one kind in flight for
--seconds, each packed to some kilobytes; the checks come from this process.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import multiprocessing
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import aiohttp
import numpy as np

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.core.types import Task
from agent_lightning.serving.bodies import prepare_process
from agent_lightning.serving.gateway import Gateway, GatewayConfig
from agent_lightning.testing.model import ToyEngine, ToyLanguage
from agent_lightning.testing.world import SAMPLING, serve_locally

WORST: Mapping[str, bytes] = {
    "none": b"",
    "values": b'{"messages": [' + b"null," * 1_300_000 + b"null]}",
    "numbers": b'{"messages": [' + b"1.5," * 190_000 + b"1]}",
    "objects": b'{"messages": [' + b"{}," * 19_000 + b"{}]}",
    "messages": b'{"messages": [' + b'{"role":"user","content":"a"},' * 19_900 + b'{"role":"user"}]}',
    "tools": b'{"messages": [], "tools": [' + b'{"function":{"name":"a"}},' * 9_900 + b"{}]}",
    "quotes": b'{"messages": ["' + b'\\"' * 1_900_000 + b'"]}',
    "text": b'{"messages": [{"role": "user", "content": "' + b"a, " * 1_300_000 + b'"}, {"role": "user"}]}',
}


async def serve(pipe: Connection) -> None:
    """Serve a gateway, and send the URL of an attempt."""
    buffer = Buffer(run_secret=b"benchmark")
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=1)
    (lease,) = await buffer.lease(1, 1.0)
    config = GatewayConfig(model="policy", run_secret=b"benchmark", sampling=SAMPLING)
    gateway = Gateway(engine=ToyEngine(ToyLanguage(("yes", "no"))), recorder=buffer, config=config)
    async with serve_locally(gateway) as root:
        pipe.send((root, f"{root}/rollout/{lease.key.rollout_id}/attempt/0/{lease.secret}/agent/v1/chat/completions"))
        await asyncio.to_thread(pipe.recv)


def run_server(pipe: Connection) -> None:
    prepare_process()  # as a gateway on Ray Serve does
    asyncio.run(serve(pipe))


async def attack(url: str, content: bytes, concurrent: int, until: float) -> int:
    """Keep requests in flight until the time `until`; the number of answers."""
    answers = 0

    async def send() -> None:
        nonlocal answers
        while time.monotonic() < until:
            async with client.post(url, data=content, headers={"content-encoding": "gzip"}) as reply:
                await reply.read()
                answers += 1

    async with aiohttp.ClientSession() as client:
        await asyncio.gather(*(send() for _ in range(concurrent)))
    return answers


def run_attack(url: str, content: bytes, concurrent: int, seconds: float) -> None:
    asyncio.run(attack(url, content, concurrent, time.monotonic() + seconds))


async def check(root: str, until: float) -> list[float]:
    """Seconds of each health check until the time `until`."""
    times = []
    async with aiohttp.ClientSession() as client:
        while time.monotonic() < until:
            begun = time.perf_counter()
            async with client.get(f"{root}/health") as reply:
                assert reply.status == 200
            times.append(time.perf_counter() - begun)
            await asyncio.sleep(0.005)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=run_server, args=(there,))
    server.start()
    root, url = here.recv()
    for kind, body in WORST.items():
        arguments = (url, gzip.compress(body), options.concurrent if body else 0, options.seconds)
        attacker = spawn.Process(target=run_attack, args=arguments)
        attacker.start()
        time.sleep(1.5)  # its imports
        times = np.array(asyncio.run(check(root, time.monotonic() + options.seconds - 1.5))) * 1e3
        attacker.join()
        figures: dict[str, Any] = {"p50_ms": np.median(times), "p99_ms": np.quantile(times, 0.99), "checks": times.size}
        print(
            json.dumps({"kind": kind, **{name: round(float(value), 1) for name, value in figures.items()}}), flush=True
        )
    here.send("end")
    server.join()


if __name__ == "__main__":
    main()
