"""CrewAI, and its own LLM class."""

from __future__ import annotations

import asyncio
from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool as crewai_tool
from harness import MODEL, PLAIN, QUESTION, SYSTEM, Answer, Rollout, Seen, case


def llm(rollout: Rollout, streamed: bool, **settings: Any) -> LLM:
    return LLM(MODEL, custom_openai=True, base_url=rollout.url, api_key="any", stream=streamed, **settings)


def a_tool(rollout: Rollout) -> Any:
    @crewai_tool("calculator")
    def calculator(expression: str) -> str:
        """Work out one arithmetic expression, such as 14+3*2."""
        return rollout.calculator(expression)

    return calculator


async def run(rollout: Rollout, streamed: bool, question: str, tools: list[Any], **of_task: Any) -> Seen:
    adder = Agent(role="calc", goal=SYSTEM, backstory="", llm=llm(rollout, streamed), tools=tools)
    task = Task(description=question, expected_output="a number", agent=adder, **of_task)
    result: Any = await asyncio.to_thread(Crew(agents=[adder], tasks=[task]).kickoff)
    if streamed and not hasattr(result, "token_usage"):
        for _ in result:
            pass
        result = result.result
    text = result.pydantic.model_dump_json() if result.pydantic else result.raw
    return Seen(result.token_usage.successful_requests, text)


@case("CrewAI", "crewai", "plain")
async def plain(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, PLAIN, [])


@case("CrewAI", "crewai", "tool")
async def tool(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, QUESTION, [a_tool(rollout)])


@case("CrewAI", "crewai", "structured")
async def structured(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, PLAIN, [], output_pydantic=Answer)
