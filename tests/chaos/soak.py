"""A run that goes on and on: memory and open files, in this process, with a journal and with faults.

python tests/chaos/soak.py --minutes 10   # prints a line of JSON; exit code 1 if either grows

Growth in the second half: the median of the last quarter over that of the third.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from faults import WORDS, Agent, Search
from injector import Faults, Rates

from agent_lightning.config.running import AgentConfig, BufferConfig
from agent_lightning.core.types import Task
from agent_lightning.credit.failures import Retries
from agent_lightning.testing.world import ToyWorld


async def soak(minutes: float) -> dict[str, Any]:
    tasks = [Task(task_id=str(n), payload={"question": f"q{n}", "answer": WORDS[n % 3]}) for n in range(8)]
    agent, faults = Agent(Search(0.0), deadline_s=5.0), Faults(seed=3)
    samples: list[tuple[float, float, int, int]] = []
    process, started = psutil.Process(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        async with ToyWorld(
            agent=AgentConfig(target=agent, timeout_s=60.0),
            concurrency=16,
            tasks=tasks,
            words=WORDS,
            num_workers=2,
            checkpoints=Path(folder) / "checkpoints",
            checkpoint_every=5,
            journal=Path(folder) / "journal",
            buffer_config=BufferConfig(segment_mib=1),
            retries=Retries(max_attempts=3),
            link=faults.linking(
                {"engine": Rates(error=0.05), "recorder": Rates(duplicate=0.05), "finish": Rates(slow=0.1)}
            ),
        ) as world:
            while time.monotonic() - started < 60 * minutes:
                state = await world.train(steps=world.loop.state.step + 5)
                for records in (world.observer.groups, world.observer.records, agent.answered):
                    records.clear()  # the records of this script itself
                gc.collect()
                disk = sum(file.stat().st_size for file in (Path(folder) / "journal").iterdir())
                rss = process.memory_info().rss / 2**20
                samples.append((time.monotonic() - started, rss, process.num_fds(), disk))
    late = [rss for _, rss, _, _ in samples[len(samples) // 2 :]]
    # Medians, because single samples jump by 20 MiB and fall again.
    third, last = (statistics.median(part) for part in (late[: len(late) // 2], late[len(late) // 2 :]))
    return {
        "benchmark": "soak",
        "minutes": round((time.monotonic() - started) / 60, 1),
        "steps": state.step,
        "rollouts": state.admitted,
        "rss_mib": [round(rss, 1) for _, rss, _, _ in samples[:: max(1, len(samples) // 12)]],
        "growth_mib_in_the_second_half": round(last - third, 1),
        "open_files": [samples[0][2], samples[-1][2]],
        "journal_mib": [round(samples[0][3] / 2**20, 2), round(samples[-1][3] / 2**20, 2)],
        "faults": faults.counts.total(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    logging.disable(logging.ERROR)  # the faults that are injected
    result = asyncio.run(soak(parser.parse_args().minutes))
    sys.stdout.write(json.dumps(result) + "\n")
    grown = result["growth_mib_in_the_second_half"] > 5.0 or result["open_files"][1] > result["open_files"][0] + 20
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
