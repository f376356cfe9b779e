"""The quick start: its agent, its reward, its rows, and a config that takes no agent and no tasks of the project."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agents_for_tests import skilled

from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.reference import sources
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Task, Trajectory
from agent_lightning.rollouts.agents import load
from agent_lightning.testing.world import ToyWorld

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
AGENT = f"{FOLDER}/agent.py"
calculate: Callable[[str], float] = load(f"{AGENT}:calculate")
reward: Callable[[Any, str], float] = load(f"{AGENT}:reward")


async def roll_out(*words: str) -> Trajectory:
    """Run the agent once, on a policy that answers with `words`, one word a call."""
    task = Task(task_id="sum", payload={"question": "What is 2 plus 3?", "answer": 5})
    spec = AgentConfig(target=f"{AGENT}:solve", timeout_s=60.0, reward=reward)
    async with asyncio.timeout(60), ToyWorld(agent=spec, tasks=[task], words=words) as world:
        await world.engine.install(skilled(words))
        await world.buffer.admit(task, split="train", num_rollouts=1)
        (group,) = await take_groups(world.buffer, 1, split="train")
    (trajectory,) = group.trajectories
    return trajectory


async def test_the_agent_calls_its_tool_and_answers() -> None:
    trajectory = await roll_out("call:2+3", "The answer is 5.")
    assert (trajectory.error, trajectory.output, trajectory.reward) == ("", "The answer is 5.", 1.0)
    (tool,) = trajectory.tools
    assert (tool.name, tool.result) == ("calculator", "5")


async def test_a_wrong_tool_call_gets_an_error_as_its_result_and_the_rollout_goes_on() -> None:
    trajectory = await roll_out("call:2+", "The answer is 5.")
    assert (trajectory.error, trajectory.output, trajectory.reward) == ("", "", 0.0)
    assert len(trajectory.calls) == 3
    # The last call's tool is not run any more: the agent has used up its turns.
    assert [tool.result for tool in trajectory.tools][:2] == ["error: this is no expression"] * 2


@pytest.mark.parametrize(
    ("expression", "value"), [("(14+3)*2", 34), ("7/2-1", 2.5), ("-(2+.5)*2", -5), (" 12 * 3", 36)]
)
def test_the_calculator_calculates(expression: str, value: float) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["2+", "", "1/0", "2**9", "alert(1)", "'a'*9", "9" * 101])
def test_the_calculator_refuses_what_is_no_arithmetic(expression: str) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        calculate(expression)


@pytest.mark.parametrize(
    ("output", "value"), [("The answer is 17.", 1.0), ("14 + 3 = 17.0", 1.0), ("17 or 18", 0.0), ("", 0.0), ("-17", 0)]
)
def test_the_reward_looks_at_the_last_number(output: str, value: float) -> None:
    assert reward({"answer": 17}, output) == value


def test_no_row_is_both_trained_on_and_held_out() -> None:
    train, val = (
        [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "val")
    )
    assert (len(train), len(val)) == (96, 48)
    for field in ("id", "question"):
        assert len({row[field] for row in [*train, *val]}) == 96 + 48


def test_the_config_takes_its_agent_and_tasks_from_no_other_example() -> None:
    file = FOLDER / "experiment" / "quickstart.yaml"
    config, origins = sources([f"experiment={file}"])
    assert config.experiment == "quickstart"
    of_the_project = {
        key: origin
        for key, (_, origin) in origins.items()
        if key.startswith(("agent.", "data.")) and origin not in (str(file), "default", "conf/data/jsonl.yaml")
    }
    assert of_the_project == {}
    assert config.agent.target == "examples/quickstart/agent.py:solve"
