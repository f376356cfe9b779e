"""Agents that run as commands, in environments of their own: a crew of CrewAI, and a script on Node."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from agents_for_tests import skilled

from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Task, ToolCall, ToolStatus, Trajectory
from agent_lightning.testing.world import ToyWorld

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "calc_x"))
from reward import score

ROOT = Path(__file__).parents[2]
CREWAI = ROOT / ".venv-crewai" / "bin"
CREW = (
    f"{CREWAI}/opentelemetry-instrument --metrics_exporter none --logs_exporter none "
    f"{CREWAI}/python {ROOT}/examples/calc_x/crewai_agent.py"
)
NODE = ROOT / "examples" / "calc_x" / "node_agent"
TASK = Task(task_id="sum", payload={"question": "What is 2 plus 3?", "result": "5"})
WORDS = ("call:2+3", "The answer is 5.")


async def run(command: str, num: int) -> list[Trajectory]:
    spec = AgentConfig(target=command, mode="command", timeout_s=240.0, reward=score)
    async with asyncio.timeout(280), ToyWorld(agent=spec, tasks=[TASK], words=WORDS) as world:
        await world.engine.install(skilled(WORDS))
        await world.buffer.admit(TASK, split="train", num_rollouts=num)
        (group,) = await take_groups(world.buffer, 1, split="train")
    assert [(trajectory.error, trajectory.output, trajectory.reward) for trajectory in group.trajectories] == [
        ("", "The answer is 5.", 1.0)
    ] * num
    return list(group.trajectories)


def the_tool(trajectory: Trajectory) -> ToolCall:
    """The tool call of a rollout, whose first model call requests it and whose second has its result."""
    assert [(call.source, call.finish_reason) for call in trajectory.calls] == [("gateway", "stop")] * 2
    (tool,) = trajectory.tools
    assert (tool.name, tool.arguments, tool.result) == ("calculator", '{"expression": "2+3"}', "5")
    assert (tool.status, tool.call_id) == (ToolStatus.OK, trajectory.calls[0].call_id)
    return tool


@pytest.fixture
def node() -> str:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on the PATH")
    if not (NODE / "node_modules" / "openai").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=NODE, check=True, timeout=200)
    return f"node {NODE}/agent.js"


async def test_the_tools_of_a_node_agent_are_read_from_its_requests(node: str) -> None:
    for trajectory in await run(node, 2):
        tool = the_tool(trajectory)
        assert tool.source == "request"
        assert {call.agent for call in trajectory.calls} == {"agent"}


def test_the_calculator_of_the_node_agent(node: str) -> None:
    results = {"(14+3)*2": "34", "7/2-1": "2.5", "-(2+.5)*2": "-5", "1/0": "", "2+": "", "alert(1)": "", "9" * 999: ""}
    code = """
        const { evaluate } = await import(process.argv[1]);
        const quiet = (text) => { try { return String(evaluate(text)); } catch { return ""; } };
        console.log(JSON.stringify(process.argv.slice(2).map(quiet)));
    """
    command = ["node", "--input-type=module", "-e", code, f"{NODE}/calculator.js", *results]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert dict(zip(results, json.loads(done.stdout), strict=True)) == results, done.stderr


@pytest.mark.skipif(not CREWAI.is_dir(), reason="`make venv-crewai` was not run")
async def test_a_crew_sends_its_own_spans_of_agent_and_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    # CrewAI's own telemetry is another thing, and asks servers of theirs.
    for name, value in {"CREWAI_DISABLE_TELEMETRY": "true", "CREWAI_TRACING_ENABLED": "false"}.items():
        monkeypatch.setenv(name, value)
    (trajectory,) = await run(CREW, 1)
    tool = the_tool(trajectory)
    assert tool.source == "trace"
    assert tool.started_at < tool.ended_at
    assert "calc" in {agent.name for agent in trajectory.agents}
    assert {call.source for call in trajectory.calls} == {"gateway"}
