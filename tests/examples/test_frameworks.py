"""Agents of frameworks, as their users write them, with the stock instrumentors: what arrives is one account."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from agents_for_tests import skilled
from openai import AsyncOpenAI

from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Policy, Task, ToolStatus, Trajectory
from agent_lightning.spans.assemble import assemble
from agent_lightning.testing.world import ToyWorld

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
    question = {"messages": [{"role": "user", "content": payload["question"]}]}
    state = await agent.ainvoke(question, {"recursion_limit": 12})
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
    spec = AgentConfig(target=framework, timeout_s=60.0, instrument=(instrumentor,))
    async with (
        asyncio.timeout(120),
        ToyWorld(agent=spec, tasks=TASKS, words=WORDS, algorithm=AlgorithmConfig(rollouts_per_task=16)) as world,
    ):
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


# Many.

SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}


async def with_openai(payload: dict[str, Any], policy: Policy) -> float:
    tool: Any = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
    messages: list[Any] = [{"role": "user", "content": payload["question"]}]
    async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key) as client:
        while True:
            reply = await client.chat.completions.create(model=policy.model, messages=messages, tools=[tool])
            message: Any = reply.choices[0].message
            if not message.tool_calls:
                return float(message.content == "5")
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                content = add(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": content})


async def with_anthropic(payload: dict[str, Any], policy: Policy) -> float:
    from anthropic import AsyncAnthropic

    tool: Any = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
    messages: list[Any] = [{"role": "user", "content": payload["question"]}]
    async with AsyncAnthropic(base_url=policy.anthropic_base_url, api_key=policy.api_key) as client:
        while True:
            reply = await client.messages.create(model=policy.model, max_tokens=64, messages=messages, tools=[tool])
            used: list[Any] = [block for block in reply.content if block.type == "tool_use"]
            if not used:
                return float("".join(block.text for block in reply.content if block.type == "text") == "5")
            results = [{"type": "tool_result", "tool_use_id": u.id, "content": add(**u.input)} for u in used]
            blocks = [block.model_dump(exclude_none=True) for block in reply.content]
            messages += [{"role": "assistant", "content": blocks}, {"role": "user", "content": results}]


MIXED = (with_langchain, with_openai_agents, with_autogen, with_openai, with_anthropic)


async def with_any(payload: dict[str, Any], policy: Policy) -> float:
    return await MIXED[payload["number"] % len(MIXED)](payload, policy)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
async def test_500_agents_of_mixed_frameworks_at_once_lose_no_span_and_double_none() -> None:
    for name in ("langchain_openai", "agents", "autogen_ext.models.openai"):
        pytest.importorskip(name)
    tasks = [Task(task_id=str(n), payload={"question": "What is 2 plus 3?", "number": n}) for n in range(500)]
    instrumentors = ("langchain", "openai_agents", "autogen_agentchat")
    spec = AgentConfig(target=with_any, timeout_s=600.0, instrument=instrumentors)
    async with ToyWorld(agent=spec, concurrency=500, tasks=tasks, words=WORDS) as world:
        await world.engine.install(skilled(WORDS))
        world.engine.delay_s = 2.0  # so that all of them are at it at once
        for task in tasks:
            await world.buffer.admit(task, split="train", num_rollouts=1)
        taking = asyncio.create_task(take_groups(world.buffer, 500, split="train"))
        most = 0
        while not taking.done():  # ends with the rollouts, each of which has a deadline
            most = max(most, (await world.buffer.stats()).running)
            await asyncio.sleep(0.1)
        done = [trajectory for group in taking.result() for trajectory in group.trajectories]
        stats = await world.buffer.stats()
    assert most == 500
    assert [
        (trajectory.error, trajectory.reward, len(trajectory.calls), len(trajectory.tools)) for trajectory in done
    ] == [("", 1.0, 2, 1)] * 500
    assert {
        (tool.name, tool.result, tool.call_id == trajectory.calls[0].call_id)
        for trajectory in done
        for tool in trajectory.tools
    } == {("add", "5", True)}
    assert len({call.call_id for trajectory in done for call in trajectory.calls}) == stats.calls == 1000
    assert (stats.refused_spans, stats.refused_finishes) == (0, 0)
    sources = [tool.source for trajectory in done for tool in trajectory.tools]
    assert sources.count("trace") == 300, "three of the five have an instrumentor"
