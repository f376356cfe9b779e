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
from agent_lightning.buffer.journal import JournalConfig
from agent_lightning.core.errors import StepFailed
from agent_lightning.core.types import Policy, Task
from agent_lightning.rollouts.worker import AgentSpec
from agent_lightning.toy.world import ToyWorld

WORDS = ("0", "1", "2", "3")
TASKS = [Task(task_id=f"task-{n}", payload={"question": f"{n}?", "answer": str(n)}) for n in range(3)]


class Agent:
    """Asks twice, and takes a picture of the run's folder, as kill -9 would leave it, after so many rollouts."""

    def __init__(self, client: openai.AsyncOpenAI) -> None:
        self.client = client
        self.ended: list[str] = []
        self.picture_after = -1
        self.picture: tuple[Path, Path] | None = None
        self.taken = asyncio.Event()

    async def __call__(self, task: Mapping[str, Any], policy: Policy) -> float:
        client = self.client.with_options(base_url=policy.base_url)
        said = []
        for text in (task["question"], "again"):
            messages: Any = [{"role": "user", "content": text}]
            reply = await client.chat.completions.create(model=policy.model, messages=messages)
            said.append(reply.choices[0].message.content)
        if len(self.ended) == self.picture_after and self.picture is not None:
            shutil.copytree(*self.picture)
            self.taken.set()
        self.ended.append(policy.base_url.split("/rollout/")[1].split("/")[0])
        return float(said[0] == task["answer"]) - 0.1 * (said[1] == "0")


@pytest.fixture
async def agent() -> AsyncIterator[Agent]:
    async with openai.AsyncOpenAI(base_url="http://unset.invalid", api_key="any", max_retries=0) as client:
        yield Agent(client)


def make_world(agent: Any, folder: Path, *, every: int, resume: bool = False) -> ToyWorld:
    spec = AgentSpec(target=agent, mode="async", timeout_s=20.0, concurrency=5, reward_range=(-1.0, 1.0))
    return ToyWorld(
        agent=spec,
        tasks=TASKS,
        words=WORDS,
        rollouts_per_task=4,
        lr=2.0,
        seeded=True,
        checkpoints=folder / "checkpoints",
        checkpoint_every=every,
        journal=JournalConfig(path=folder / "journal", segment_bytes=20_000),
        resume=resume,
    )


async def never_stopped(agent: Agent, folder: Path, steps: int) -> tuple[dict[int, Any], list[tuple[int, float]]]:
    async with make_world(agent, folder, every=1) as world:
        state = await world.train(steps=steps)
    return dict(enumerate(map(numbers, world.observer.records), start=1)), state.val_rewards


def numbers(record: Mapping[str, float]) -> dict[str, float]:
    """All of a step's record but times, and the attempts that a kill has cost."""
    return {name: value for name, value in record.items() if not name.startswith(("time/", "rollouts/retried"))}


def ended_in(journal: Path) -> Iterator[str]:
    """The rollouts that have ended, as a journal says."""
    for reading in segments.readings(journal):
        for _, payload in reading.records():
            event = decode(payload)
            if isinstance(event, Ended) and not event.again:
                yield event.key.rollout_id


@pytest.mark.parametrize("every", [1, 2])
async def test_a_run_killed_in_every_step_gives_the_numbers_of_one_never_stopped(
    agent: Agent, tmp_path: Path, every: int
) -> None:
    steps, source = 3, random.Random(every)
    expected, rewards = await never_stopped(agent, tmp_path / "whole", steps)
    assert len({record["train/reward"] for record in expected.values()}) > 1
    folder, resume, run = tmp_path / "0", False, set[str]()
    found: dict[int, Any] = {}
    for life in range(1, 50):
        agent.ended, agent.taken = [], asyncio.Event()
        agent.picture_after, agent.picture = source.randrange(3, 14), (folder, tmp_path / f"{life}")
        async with asyncio.timeout(30), make_world(agent, folder, every=every, resume=resume) as world:
            first = world.loop.state.step + 1
            training = asyncio.create_task(world.train(steps=steps))
            taken = asyncio.create_task(agent.taken.wait())
            await asyncio.wait((training, taken), return_when=asyncio.FIRST_COMPLETED)
            done = training.done()
            training.cancel()
            taken.cancel()
            await asyncio.wait((training, taken))
        for step, record in enumerate(world.observer.records, start=first):
            assert numbers(record) == expected[step]
            found[step] = record
        assert not run & set(agent.ended)  # what had ended before the kill is not run again
        if done:
            break
        folder, resume = tmp_path / f"{life}", True
        run = set(ended_in(folder / "journal"))
    assert life > steps
    assert found.keys() == expected.keys()
    assert world.loop.state.val_rewards == rewards
    assert world.loop.state.admitted == steps * 3 * 4


@pytest.mark.parametrize("written", [True, False])
async def test_a_step_that_failed_is_begun_anew_by_the_resumed_run(agent: Agent, tmp_path: Path, written: bool) -> None:
    """There is a checkpoint of the step before it; the failed rollouts are in the journal and must not come back. Also
    where the end comes when the buffer knows that the step is given up, and no file says so yet."""
    half = tmp_path / "checkpoints" / "step-000000" / "state.json.half"

    async def fails(task: Mapping[str, Any], policy: Policy) -> float:
        if not policy.base_url.split("/rollout/")[1].startswith("train"):
            return await agent(task, policy)
        if not written:
            half.mkdir(exist_ok=True)  # it cannot be written any more
        raise ValueError("a tool is down")

    async with make_world(fails, tmp_path, every=1) as world:
        with pytest.raises(StepFailed if written else IsADirectoryError):
            await world.train(steps=2)
    if not written:
        half.rmdir()
        async with make_world(agent, tmp_path, every=1, resume=True) as world:
            with pytest.raises(StepFailed, match="a tool is down"):  # what had ended is not run again
                await world.train(steps=2)
    async with make_world(agent, tmp_path, every=1, resume=True) as world:
        run, stats = await world.train(steps=2), await world.buffer.stats()
    assert (run.step, run.admitted, run.trained, run.dropped) == (2, 36, 24, {"step_failed": 12})
    assert (stats.admitted, stats.trained, stats.dropped) == (36, 24, {"step_failed": 12})


DRIVER = """
import asyncio, json, sys
from pathlib import Path
import openai
from agent_lightning.toy.world import ToyWorld
sys.path.insert(0, sys.argv[1])
import test_resume

async def main(folder, steps):
    async with openai.AsyncOpenAI(base_url="http://unset.invalid", api_key="any", max_retries=0) as client:
        agent = test_resume.Agent(client)
        resume = (folder / "checkpoints").exists() and any(folder.glob("checkpoints/*/state.json"))
        async with test_resume.make_world(agent, folder, every=1, resume=resume) as world:
            first = world.loop.state.step + 1
            training = asyncio.create_task(world.train(steps=steps))
            said = 0
            while not training.done():
                await asyncio.sleep(0.002)
                for record in world.observer.records[said:]:
                    print(json.dumps([first + said, test_resume.numbers(record)]), flush=True)
                    said += 1
                print(json.dumps(len(agent.ended)), flush=True)
            await training
            for record in world.observer.records[said:]:
                print(json.dumps([first + said, test_resume.numbers(record)]), flush=True)
                said += 1
    print(json.dumps("done"), flush=True)

asyncio.run(main(Path(sys.argv[2]), int(sys.argv[3])))
"""


@pytest.mark.slow
async def test_a_driver_killed_in_every_step_goes_on_where_it_was(agent: Agent, tmp_path: Path) -> None:
    expected, _ = await never_stopped(agent, tmp_path / "whole", 3)
    source, found, done, lives = random.Random(0), dict[int, Any](), False, 0
    while not done and lives < 30:
        lives += 1
        command = [sys.executable, "-c", DRIVER, str(Path(__file__).parents[1] / "support"), str(tmp_path / "run"), "3"]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        kill_after = source.randrange(4, 12)
        for line in driver.stdout:
            said = json.loads(line)
            done = done or said == "done"
            if isinstance(said, list):
                found[said[0]] = said[1]
            elif isinstance(said, int) and said >= kill_after:
                driver.send_signal(signal.SIGKILL)
                break
        driver.stdout.close()
        driver.wait()
    assert done
    assert lives > 3
    for step, record in found.items():
        assert record == expected[step]
    assert found.keys() == expected.keys()
