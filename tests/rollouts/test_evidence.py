"""A user's failing code is seen: the file and line, the frames, and what each attempt printed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from agents_for_tests import make_task
from test_rollout import make_spec, run_tasks

from agent_lightning.config.running import AgentMode
from agent_lightning.core.types import Outcome, Trajectory

AGENT = """
import asyncio, logging, sys
from concurrent.futures import ThreadPoolExecutor
from agent_lightning.rollouts.client import tool

@tool
def lookup(key):
    return {}[key]

def work(payload):
    print("begins", payload["number"])
    sys.stderr.write(f"warns {payload['number']}\\n")
    with ThreadPoolExecutor() as pool:
        pool.submit(print, "in a pool", payload["number"]).result()
    logging.getLogger("mine").warning("logs %d", payload["number"])
    print("x" * 10_000)
    print("ends", payload["number"])
    try:
        lookup("caught")
    except KeyError:
        pass
    if payload["number"] % 2:
        raise KeyError(f"missing {payload['number']}")
    return payload["number"]

def solve(payload):
    return work(payload)

async def solve_async(payload, policy):
    await asyncio.sleep(0.01 * payload["number"])
    return work(payload)

def score(task, output):
    print("scores", output)
    return task["anwser"]
"""


@pytest.fixture
def agent_file(tmp_path: Path) -> Path:
    file = tmp_path / "my_agent.py"
    file.write_text(AGENT)
    return file


async def ended(agent_file: Path, mode: AgentMode, function: str, **settings: object) -> list[Trajectory]:
    target = f"{agent_file}:{function}"
    if mode == "command":
        code = f"import json, sys; sys.path.insert(0, '{agent_file.parent}'); import my_agent"
        (agent_file.parent / "run.py").write_text(f"{code}\nprint(my_agent.work(json.load(sys.stdin)))\n")
        target = f"{sys.executable} {agent_file.parent}/run.py"
    return await run_tasks(make_spec(target, mode, reward_max=10.0, **settings), [make_task(n) for n in range(4)])


@pytest.mark.parametrize("mode", ["async", "thread", "process", "command"])
async def test_what_failed_and_what_was_printed_are_in_the_trajectory(agent_file: Path, mode: AgentMode) -> None:
    for number, rollout in enumerate(await ended(agent_file, mode, "solve_async" if mode == "async" else "solve")):
        printed = rollout.printed
        assert len(printed.encode()) <= 4096
        assert f"ends {number}" in printed
        assert "xxxx" in printed
        assert not any(f"ends {other}" in printed for other in range(4) if other != number)
        assert "AGL_RESULT" not in printed
        if number % 2 == 0:
            assert (rollout.outcome, rollout.trace) == (Outcome.NO_MODEL_CALL, "")
            continue
        assert rollout.outcome is Outcome.AGENT_ERROR
        if mode == "command":  # of any language: its stderr is what there is
            assert f"KeyError: 'missing {number}'" in printed
            assert "my_agent.py" in printed
            continue
        assert f"KeyError: 'missing {number}' ({agent_file}:23 in work)" in rollout.error
        first, *rest = rollout.trace.splitlines()
        assert first == f"{agent_file}:23 in work"
        assert rest[0] == "Traceback (most recent call last):"
        assert str(agent_file) in rest[1]  # no frame of this package above it
        assert rest[-1] == f"KeyError: 'missing {number}'"
        assert f"tool lookup failed: {agent_file}:8 in lookup" in printed


async def test_output_from_the_beginning_is_there_if_it_is_short(agent_file: Path) -> None:
    agent_file.write_text(AGENT.replace("10_000", "10"))
    for number, rollout in enumerate(await ended(agent_file, "thread", "solve")):
        for line in (f"begins {number}", f"warns {number}", f"in a pool {number}", f"ends {number}"):
            assert line in rollout.printed


async def test_a_failing_reward_function_is_named_with_file_and_line(agent_file: Path) -> None:
    agent_file.write_text(AGENT.replace("% 2", "< 0").replace("10_000", "10"))
    for rollout in await ended(agent_file, "thread", "solve", reward=f"{agent_file}:score"):
        assert rollout.outcome is Outcome.SCORER_ERROR
        assert rollout.error == f"KeyError: 'anwser' ({agent_file}:35 in score)"
        assert rollout.trace.startswith(f"{agent_file}:35 in score\nTraceback")
        assert rollout.printed.endswith(f"scores {rollout.output}\n")


async def test_an_error_that_cannot_describe_itself_is_an_error_like_another() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError("no words")

    async def solve(payload: dict[str, object]) -> None:
        await asyncio.sleep(0)
        raise Unprintable

    (rollout,) = await run_tasks(make_spec(solve), [make_task(1)])
    assert rollout.outcome is Outcome.AGENT_ERROR
    assert rollout.error.startswith("Unprintable: <exception str() failed> (tests/rollouts/test_evidence.py:")
