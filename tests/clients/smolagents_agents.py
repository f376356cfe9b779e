"""smolagents: an agent that calls tools, which its default `tool_choice` forces, and one that writes code."""

from __future__ import annotations

import asyncio
from typing import Any

import smolagents
from harness import MODEL, PLAIN, QUESTION, Answer, Rollout, Seen, case, saying

CALL = 'final_answer(calculator("28+25-27"))'
CODE = f"Thought: I add.\n<code>\n{CALL}\n</code>"
"""What a policy that knows smolagents' prompt would say."""


MESSAGES = [smolagents.ChatMessage(role=smolagents.MessageRole.USER, content=PLAIN)]
FORMAT = {"type": "json_schema", "json_schema": {"name": "Answer", "schema": Answer.model_json_schema()}}


def reply(rollout: Rollout, streamed: bool, **options: Any) -> Seen:
    model = smolagents.OpenAIModel(MODEL, api_base=rollout.url, api_key="any")
    if streamed:
        return Seen(1, "".join(piece.content or "" for piece in model.generate_stream(MESSAGES, **options)))
    return Seen(1, str(model.generate(MESSAGES, **options).content))


@case("smolagents", "smolagents", "plain")
async def plain(rollout: Rollout, streamed: bool) -> Seen:
    return await asyncio.to_thread(reply, rollout, streamed)


@case("smolagents", "smolagents", "structured")
async def structured(rollout: Rollout, streamed: bool) -> Seen:
    return await asyncio.to_thread(reply, rollout, streamed, response_format=FORMAT)


def run_step(agent: Any) -> Seen:
    """One step of the agent, and what smolagents asks for when there may be no further one."""
    return Seen(2, str(agent.run(QUESTION)))


def a_tool(rollout: Rollout) -> Any:
    @smolagents.tool
    def calculator(expression: str) -> str:
        """Work out one arithmetic expression.

        Args:
            expression: Numbers and + - * /, such as 14+3*2.
        """
        return rollout.calculator(expression)

    return calculator


@case("smolagents", "smolagents", "forced tool answered in text")
async def tool(rollout: Rollout, streamed: bool) -> Seen:
    model = smolagents.OpenAIModel(MODEL, api_base=rollout.url, api_key="any")
    agent = smolagents.ToolCallingAgent(
        [a_tool(rollout)], model, stream_outputs=streamed, max_steps=1, verbosity_level=0
    )
    return await asyncio.to_thread(run_step, agent)


@case("smolagents (code)", "smolagents", "tool in text")
async def code(rollout: Rollout, streamed: bool) -> Seen:
    model = smolagents.OpenAIModel(MODEL, api_base=rollout.url, api_key="any", **saying(CODE))
    agent = smolagents.CodeAgent([a_tool(rollout)], model, stream_outputs=streamed, max_steps=1, verbosity_level=0)
    assert await asyncio.to_thread(agent.run, QUESTION) == "26"
    return Seen(1, CALL)


@case("smolagents (litellm)", "smolagents", "forced tool answered in text")
async def through_litellm(rollout: Rollout, streamed: bool) -> Seen:
    model = smolagents.LiteLLMModel(f"openai/{MODEL}", api_base=rollout.url, api_key="any")
    agent = smolagents.ToolCallingAgent(
        [a_tool(rollout)], model, stream_outputs=streamed, max_steps=1, verbosity_level=0
    )
    return await asyncio.to_thread(run_step, agent)
