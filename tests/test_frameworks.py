"""Agents of frameworks, as their users write them, with the stock instrumentors: what arrives is one account."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI

from agent_lightning.rollout import AgentSpec
from agent_lightning.telemetry.spans import assemble
from agent_lightning.testing import ToyWorld
from agent_lightning.types import Policy, Task, ToolStatus, Trajectory

TASKS = [Task(task_id="sum", payload={"question": "What is 2 plus 3?"})]
WORDS = ("call:2+3", "5")
"""What the toy policy can say: a call of the first tool, or an answer."""


def add(expression: str) -> str:
    """Work out a sum such as 2+3."""
    return str(sum(int(part) for part in expression.split("+")))


async def with_langchain(payload: dict[str, Any], policy: Policy) -> float:
    agents = pytest.importorskip("langchain.agents")
    openai = pytest.importorskip("langchain_openai")
    model = openai.ChatOpenAI(model=policy.model, base_url=policy.base_url, api_key=policy.api_key)
    agent = agents.create_agent(model, tools=[add], name="adder")
    asked = {"messages": [{"role": "user", "content": payload["question"]}]}
    state = await agent.ainvoke(asked, {"recursion_limit": 12})
    return float(state["messages"][-1].content == "5")


async def with_openai_agents(payload: dict[str, Any], policy: Policy) -> float:
    sdk = pytest.importorskip("agents")
    client = AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key)
    model = sdk.OpenAIResponsesModel(policy.model, client)
    agent = sdk.Agent(name="adder", model=model, tools=[sdk.function_tool(add)])
    result = await sdk.Runner.run(agent, payload["question"], max_turns=6)
    return float(result.final_output == "5")


async def with_autogen(payload: dict[str, Any], policy: Policy) -> float:
    agents = pytest.importorskip("autogen_agentchat.agents")
    models = pytest.importorskip("autogen_ext.models.openai")
    info = {"vision": False, "function_calling": True, "json_output": False, "structured_output": False}
    client = models.OpenAIChatCompletionClient(
        model=policy.model, base_url=policy.base_url, api_key=policy.api_key, model_info={**info, "family": "unknown"}
    )
    agent = agents.AssistantAgent("adder", client, tools=[add], max_tool_iterations=4)
    result = await agent.run(task=payload["question"])
    return float(str(getattr(result.messages[-1], "content", "")) == "5")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("framework", "instrumentor"),
    [(with_langchain, "langchain"), (with_openai_agents, "openai_agents"), (with_autogen, "autogen_agentchat")],
)
async def test_tools_agents_and_calls_of_a_framework_are_one_account(framework: Any, instrumentor: str) -> None:
    pytest.importorskip(f"openinference.instrumentation.{instrumentor}")
    spec = AgentSpec(target=framework, mode="async", timeout_s=60.0, instrumentors=(instrumentor,))
    async with asyncio.timeout(120), ToyWorld(agent=spec, tasks=TASKS, words=WORDS, rollouts_per_task=16) as world:
        await world.train(steps=1)
        seen = [t for group in world.observer.groups for t in group.trajectories if len(t.calls) > 1]
    assert len(seen) >= 3
    for trajectory in seen:
        check(trajectory)


def check(trajectory: Trajectory) -> None:
    calls = trajectory.calls
    assert all(call.source == "gateway" for call in calls), "a model call is there twice"
    assert {call.agent for call in calls} == {"adder"}
    from_requests = assemble(trajectory.key, calls, []).tools
    assert len(trajectory.tools) == len(from_requests)
    assert [tool.call_id for tool in trajectory.tools] == [tool.call_id for tool in from_requests]
    ran = [tool for tool in trajectory.tools if tool.source == "trace"]
    assert len(ran) >= len(calls) - 1
    for tool in ran:
        assert (tool.name, tool.result, tool.status) == ("add", "5", ToolStatus.OK)
        assert tool.started_at <= tool.ended_at
