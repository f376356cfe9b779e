"""The OpenAI Agents SDK, over chat and over Responses."""

from __future__ import annotations

from typing import Any

import agents
from harness import MODEL, NEXT, PLAIN, QUESTION, SYSTEM, Answer, Rollout, Seen, case
from openai import AsyncOpenAI

WIRES: dict[str, Any] = {"chat": agents.OpenAIChatCompletionsModel, "Responses": agents.OpenAIResponsesModel}


async def run(rollout: Rollout, wire: str, streamed: bool, question: str, then: str = "", **settings: Any) -> Seen:
    async with AsyncOpenAI(**rollout.openai) as client:
        agent = agents.Agent(name="adder", instructions=SYSTEM, model=WIRES[wire](MODEL, client), **settings)
        result = await one_run(agent, question, streamed)
        calls, output = len(result.raw_responses), result.final_output
        if then:
            result = await one_run(agent, then, streamed, previous_response_id=result.last_response_id)
            calls, output = calls + len(result.raw_responses), result.final_output
    return Seen(calls, output if isinstance(output, str) else output.model_dump_json())


async def one_run(agent: Any, question: str, streamed: bool, **options: Any) -> Any:
    if not streamed:
        return await agents.Runner.run(agent, question, **options)
    result = agents.Runner.run_streamed(agent, question, **options)
    async for _ in result.stream_events():
        pass
    return result


def register(wire: str) -> None:
    client = f"OpenAI Agents SDK ({wire})"

    @case(client, "openai-agents", "plain")
    async def plain(rollout: Rollout, streamed: bool) -> Seen:
        return await run(rollout, wire, streamed, PLAIN)

    @case(client, "openai-agents", "tool")
    async def tool(rollout: Rollout, streamed: bool) -> Seen:
        return await run(rollout, wire, streamed, QUESTION, tools=[agents.function_tool(rollout.calculator)])

    @case(client, "openai-agents", "forced tool")
    async def forced(rollout: Rollout, streamed: bool) -> Seen:
        settings = agents.ModelSettings(tool_choice="calculator" if streamed else "required")
        tools = [agents.function_tool(rollout.calculator)]
        return await run(rollout, wire, streamed, QUESTION, tools=tools, model_settings=settings)

    @case(client, "openai-agents", "structured")
    async def structured(rollout: Rollout, streamed: bool) -> Seen:
        return await run(rollout, wire, streamed, PLAIN, output_type=Answer)

    if wire == "chat":
        return

    @case(client, "openai-agents", "second turn")
    async def second_turn(rollout: Rollout, streamed: bool) -> Seen:
        return await run(rollout, wire, streamed, PLAIN, NEXT)


agents.set_tracing_disabled(True)  # else it sends its traces to OpenAI
for wire in WIRES:
    register(wire)
