"""Several nodes: network namespaces with a Ray node in each (hosts.py), and a run of the toy model over them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hosts import Host, Hosts, can_be_made

from agent_lightning.buffer.codec import decode
from agent_lightning.buffer.events import Leased
from agent_lightning.buffer.segments import segment_readers
from agent_lightning.run.archive import read_rollouts

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
TOY = ("experiment=toy", "steps=5000", "eval_every=0", "checkpoint_every=5")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not can_be_made():
        pytest.skip("network namespaces need root and `ip`")
    with Hosts() as made:
        yield made


def wait_for(what: Callable[[], object], seconds: float, process: subprocess.Popen[str], log: Path) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, f"not within {seconds} s: {log.read_text()}"
        time.sleep(0.5)


@contextmanager
def training(hosts: Hosts, folder: Path, *settings: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """`agl train` on the head; the process and its log."""
    words = ("train", *TOY, f"hardware.address={hosts.address}", f"runs_dir={folder}", "name=run", *settings)
    command = hosts.head.command(sys.executable, "-m", "agent_lightning", *words)
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=hosts.environment, text=True, stdout=out, stderr=out)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"train/reward"') if path.exists() else 0


def number_on(host: Host, title: str) -> int:
    return len(host.processes(title))


def leases(run: Path) -> set[str]:
    """Names of the workers that have been given rollouts, as far as the journal goes back."""
    workers = set[str]()
    with suppress(FileNotFoundError):  # a segment that is not needed any more has gone meanwhile
        for reading in segment_readers(run / "journal"):
            workers |= {
                event.worker for _, payload in reading.records() if isinstance(event := decode(payload), Leased)
            }
    return workers


SLOW = """
import asyncio
from agent_lightning.rollouts.agents import load

ask = load("examples/toy/agent.py:solve")

async def solve(task, policy):
    await asyncio.sleep(2)
    return await ask(task, policy)
"""
"""An agent that takes its time: whenever a node ends, there are rollouts on it."""


def test_workers_and_gateways_come_and_go_with_their_nodes(hosts: Hosts, tmp_path: Path) -> None:
    run, second = tmp_path / "run", hosts.join()
    third = hosts.join()
    (tmp_path / "slow.py").write_text(SLOW)
    settings = ("rollout.workers=6", "serving.replicas=3", f"agent.target={tmp_path}/slow.py:solve")
    with training(hosts, tmp_path, *settings) as (process, log):
        wait_for(lambda: steps_of(run) >= 3, 240, process, log)
        for host in (hosts.head, second, third):
            assert number_on(host, "ray::RolloutWorker") == 2
            assert number_on(host, "-gateway") == 1
            assert number_on(host, "ray::HAProxyManager") == (host is hosts.head)

        fourth = hosts.join()
        wait_for(lambda: " joined; rollout workers there: 2" in log.read_text(), 240, process, log)
        wait_for(lambda: number_on(fourth, "ray::RolloutWorker") == 2, 120, process, log)
        joined = re.search(r"node (\w+) joined", log.read_text())
        assert joined is not None
        wait_for(lambda: any(name.startswith(f"worker-{joined[1]}") for name in leases(run)), 120, process, log)
        assert number_on(fourth, "-gateway") == 1

        hosts.kill(second)
        wait_for(lambda: " is gone; its rollouts are run again elsewhere" in log.read_text(), 240, process, log)
        reached = steps_of(run)
        wait_for(lambda: steps_of(run) >= reached + 5, 240, process, log)
        assert [number_on(host, "ray::RolloutWorker") for host in (hosts.head, third, fourth)] == [2, 2, 2]
        os.kill(hosts.head.processes("-m agent_lightning train")[-1].pid, signal.SIGINT)
        assert process.wait(timeout=240) == 130, log.read_text()
    rollouts = json.loads((run / "summary.json").read_text())["rollouts"]
    assert rollouts["admitted"] == rollouts["trained"] + sum(rollouts["dropped"].values())
    assert rollouts["failed"] == {}
    rows = read_rollouts(run).to_pylist()
    assert any(row["attempt"] > 0 and row["outcome"] == "finished" for row in rows)  # what the dead node had
    finished = [row["rollout_id"] for row in rows if row["outcome"] == "finished"]
    assert len(set(finished)) == len(finished)
    assert not any(number_on(host, "ray::RolloutWorker") for host in (hosts.head, third, fourth))


@pytest.mark.parametrize("settings", [(), ("serving.host=0.0.0.0", "serving.gateways=1")])
def test_a_driver_on_another_node_than_the_head(settings: tuple[str, ...], hosts: Hosts, tmp_path: Path) -> None:
    """A job that asks for what another node has; the proxy is on the head."""
    second, run = hosts.join(apart=True), tmp_path / "run"
    submit = ("ray", "job", "submit", "--address=http://127.0.0.1:8265", "--entrypoint-resources")
    place = json.dumps({f"node:{second.address}": 0.001})
    words = ("train", *TOY, "steps=5", "rollout.workers=2", f"runs_dir={tmp_path}", "name=run", *settings)
    command = hosts.head.command(*submit, place, "--", "env", "-C", str(ROOT), "agl", *words)
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=hosts.environment, text=True, stdout=out, stderr=out)
    both = (hosts.head, second)
    wait_for(lambda: [number_on(host, "ray::RolloutWorker") for host in both] == [1, 1], 240, process, log)
    assert [number_on(host, "ray::Buffer") for host in both] == [0, 1]  # beside the driver
    assert process.wait(timeout=240) == 0, log.read_text()
    assert steps_of(run) == 5


WEIGHTS = """
import asyncio, sys
import numpy as np
from agent_lightning.core import actors as cluster

class Replica:
    async def install(self, reference):
        return float((await cluster.fetch(reference[0]))[-1])

async def main():
    cluster.init_ray(sys.argv[1])
    nodes = [node.node_id for node in cluster.nodes()]
    replicas = [cluster.spawn(Replica, options=cluster.on_node(node)) for node in nodes for _ in range(3)]
    small = [cluster.put(np.ones(1))]
    await asyncio.gather(*(one.install(small) for one in replicas))  # they run
    sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
    weights = [cluster.put(np.full(8 * 2**20, 7.0))]
    assert set(await asyncio.gather(*(one.install(weights) for one in replicas))) == {7.0}
    sys.stdout.write("done\\n"); sys.stdout.flush(); sys.stdin.readline()

asyncio.run(main())
"""


def test_weights_reach_every_node_once(hosts: Hosts) -> None:
    others = [hosts.join(), hosts.join()]
    command = hosts.head.command(sys.executable, "-c", WEIGHTS, hosts.address)
    with subprocess.Popen(
        command, cwd=ROOT, env=hosts.environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = [host.received() for host in others]
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        size = 64 * 2**20
        for host, start in zip(others, before, strict=True):
            assert size < host.received() - start < 1.5 * size  # three replicas on each
        process.stdin.write("\n")
        process.stdin.close()
        process.wait(60)
