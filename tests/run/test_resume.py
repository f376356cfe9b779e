"""A run that is killed anywhere and resumed is the run that was never stopped: the same numbers, no rollout twice."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from agent_lightning.buffer import segments
from agent_lightning.buffer.codec import decode
from agent_lightning.buffer.events import Ended
from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import AgentConfig, BufferConfig
from agent_lightning.core.errors import StepFailed
from agent_lightning.core.types import Policy, Task
from agent_lightning.testing.world import ToyWorld

WORDS = ("0", "1", "2", "3")
TASKS = [Task(task_id=f"task-{n}", payload={"question": f"{n}?", "answer": str(n)}) for n in range(3)]


class Agent:
    """Calls the policy twice; after `snapshot_after` rollouts it copies the run's folder, as kill -9 would leave it."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client
        self.ended: list[str] = []
        self.snapshot_after = -1
        self.snapshot: tuple[Path, Path] | None = None
        self.snapshot_taken = asyncio.Event()

    async def __call__(self, task: Mapping[str, Any], policy: Policy) -> float:
        client = self.client.with_options(base_url=policy.base_url)
        replies = []
        for text in (task["question"], "again"):
            messages: Any = [{"role": "user", "content": text}]
            reply = await client.chat.completions.create(model=policy.model, messages=messages)
            replies.append(reply.choices[0].message.content)
        if len(self.ended) == self.snapshot_after and self.snapshot is not None:
            shutil.copytree(*self.snapshot)
            self.snapshot_taken.set()
        self.ended.append(policy.base_url.split("/rollout/")[1].split("/")[0])
        return float(replies[0] == task["answer"]) - 0.1 * (replies[1] == "0")


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with openai.AsyncOpenAI(base_url="http://unset.invalid", api_key="any", max_retries=0) as client:
        yield Agent(client)


def make_world(agent: Any, folder: Path, *, every: int, resume: bool = False) -> ToyWorld:
    spec = AgentConfig(target=agent, timeout_s=20.0, reward_min=-1.0, reward_max=1.0)
    return ToyWorld(
        agent=spec,
        concurrency=5,
        tasks=TASKS,
        words=WORDS,
        algorithm=AlgorithmConfig(rollouts_per_task=4),
        lr=2.0,
        seeded=True,
        checkpoints=folder / "checkpoints",
        checkpoint_every=every,
        journal=folder / "journal",
        buffer_config=BufferConfig(segment_mib=20_000 / 2**20),
        resume=resume,
    )


async def uninterrupted_run(agent: Agent, folder: Path, steps: int) -> tuple[dict[int, Any], list[tuple[int, float]]]:
    async with make_world(agent, folder, every=1) as world:
        state = await world.train(steps=steps)
    return dict(enumerate(map(numbers, world.observer.records), start=1)), state.val_rewards


def numbers(record: Mapping[str, float]) -> dict[str, float]:
    """A step's record without times and without the attempts that a kill costs."""
    return {name: value for name, value in record.items() if not name.startswith(("time/", "rollouts/retried"))}


def ended_in(journal: Path) -> Iterator[str]:
    """The rollouts that have ended, according to a journal."""
    for reader in segments.segment_readers(journal):
        for _, payload in reader.records():
            event = decode(payload)
            if isinstance(event, Ended) and not event.again:
                yield event.key.rollout_id


@pytest.mark.parametrize("every", [1, 2])
async def test_a_run_killed_in_every_step_gives_the_numbers_of_an_uninterrupted_run(
    agent: Agent, tmp_path: Path, every: int
) -> None:
    steps, source = 3, random.Random(every)
    expected, rewards = await uninterrupted_run(agent, tmp_path / "uninterrupted", steps)
    assert len({record["train/reward"] for record in expected.values()}) > 1
    folder, resume, run = tmp_path / "0", False, set[str]()
    records: dict[int, Any] = {}
    for life in range(1, 50):
        agent.ended, agent.snapshot_taken = [], asyncio.Event()
        agent.snapshot_after, agent.snapshot = source.randrange(3, 14), (folder, tmp_path / f"{life}")
        async with asyncio.timeout(30), make_world(agent, folder, every=every, resume=resume) as world:
            first = world.loop.state.step + 1
            training = asyncio.create_task(world.train(steps=steps))
            taken = asyncio.create_task(agent.snapshot_taken.wait())
            await asyncio.wait((training, taken), return_when=asyncio.FIRST_COMPLETED)
            done = training.done()
            training.cancel()
            taken.cancel()
            await asyncio.wait((training, taken))
        for step, record in enumerate(world.observer.records, start=first):
            assert numbers(record) == expected[step]
            records[step] = record
        assert not run & set(agent.ended)  # rollouts that ended before the kill are not run again
        if done:
            break
        folder, resume = tmp_path / f"{life}", True
        run = set(ended_in(folder / "journal"))
    assert life > steps
    assert records.keys() == expected.keys()
    assert world.loop.state.val_rewards == rewards
    assert world.loop.state.admitted == steps * 3 * 4


@pytest.mark.parametrize("written", [True, False])
async def test_a_resumed_run_starts_a_failed_step_again(agent: Agent, tmp_path: Path, written: bool) -> None:
    """The failed rollouts are in the journal and must not return: the resumed run starts from the checkpoint before the
    step. Not `written`: the run ends after the buffer has dropped the step and before the state could be written."""
    unfinished = tmp_path / "checkpoints" / "step-000000" / ".state.json.tmp"

    async def fails(task: Mapping[str, Any], policy: Policy) -> float:
        if not policy.base_url.split("/rollout/")[1].startswith("train"):
            return await agent(task, policy)
        if not written:
            unfinished.mkdir(exist_ok=True)  # state.json cannot be written any more
        raise ValueError("a tool is down")

    async with make_world(fails, tmp_path, every=1) as world:
        with pytest.raises(StepFailed if written else IsADirectoryError):
            await world.train(steps=2)
    if not written:
        unfinished.rmdir()
        async with make_world(agent, tmp_path, every=1, resume=True) as world:
            with pytest.raises(StepFailed, match="a tool is down"):  # finished rollouts are not run again
                await world.train(steps=2)
    async with make_world(agent, tmp_path, every=1, resume=True) as world:
        run, stats = await world.train(steps=2), await world.buffer.stats()
    assert (run.step, run.admitted, run.trained, run.dropped) == (2, 36, 24, {"step_failed": 12})
    assert (stats.admitted, stats.trained, stats.dropped) == (36, 24, {"step_failed": 12})


DRIVER = """
import asyncio, json, sys
from pathlib import Path
import openai
from agent_lightning.testing.world import ToyWorld
sys.path.insert(0, sys.argv[1])
import test_resume

async def main(folder, steps):
    async with openai.AsyncOpenAI(base_url="http://unset.invalid", api_key="any", max_retries=0) as client:
        agent = test_resume.Agent(client)
        resume = (folder / "checkpoints").exists() and any(folder.glob("checkpoints/*/state.json"))
        async with test_resume.make_world(agent, folder, every=1, resume=resume) as world:
            first = world.loop.state.step + 1
            training = asyncio.create_task(world.train(steps=steps))
            printed = 0
            while not training.done():
                await asyncio.sleep(0.002)
                for record in world.observer.records[printed:]:
                    print(json.dumps([first + printed, test_resume.numbers(record)]), flush=True)
                    printed += 1
                print(json.dumps(len(agent.ended)), flush=True)
            await training
            for record in world.observer.records[printed:]:
                print(json.dumps([first + printed, test_resume.numbers(record)]), flush=True)
                printed += 1
    print(json.dumps("done"), flush=True)

asyncio.run(main(Path(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.mark.slow
async def test_a_run_whose_driver_is_killed_in_every_step_resumes_where_it_was(agent: Agent, tmp_path: Path) -> None:
    expected, _ = await uninterrupted_run(agent, tmp_path / "uninterrupted", 3)
    source, records, done, lives = random.Random(0), dict[int, Any](), False, 0
    while not done and lives < 30:
        lives += 1
        command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), str(tmp_path / "run"), "3"]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        kill_after = source.randrange(4, 12)
        for line in driver.stdout:
            message = json.loads(line)
            done = done or message == "done"
            if isinstance(message, list):
                records[message[0]] = message[1]
            elif isinstance(message, int) and message >= kill_after:
                driver.send_signal(signal.SIGKILL)
                break
        driver.stdout.close()
        driver.wait()
    assert done
    assert lives > 3
    for step, record in records.items():
        assert record == expected[step]
    assert records.keys() == expected.keys()
