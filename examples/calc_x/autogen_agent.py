"""The agent with a calculator on AutoGen: an AssistantAgent with one tool, as any user of AutoGen would write it.

await solve({"question": "What is 14 plus 3?"}, policy)  # "The answer is 17."
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Mapping
from typing import Any

import httpx
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import TextMessage
from autogen_core.models import ModelFamily, ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient
from calculator import SYSTEM, evaluate, render

from agent_lightning.core.types import Policy

MAX_TURNS = 4
TIMEOUT = 600.0
"""Seconds for one reply: the engine may be busy with a thousand others."""

MODEL = ModelInfo(
    vision=False, function_calling=True, json_output=False, structured_output=False, family=ModelFamily.UNKNOWN
)
"""AutoGen wants to know what a model that is not OpenAI's can do."""


async def solve(task: Mapping[str, Any], policy: Policy) -> str:
    """Answer the question of a task; "" where the last turn was a tool call. Raises openai.APIError."""
    async with httpx.AsyncClient(verify=_certificates(), timeout=TIMEOUT) as http:
        client = OpenAIChatCompletionClient(
            model=policy.model,
            base_url=policy.base_url,
            api_key=policy.api_key,
            model_info=MODEL,
            http_client=http,
            max_retries=2,
        )
        agent = AssistantAgent("calc", client, tools=[calculator], system_message=SYSTEM, max_tool_iterations=MAX_TURNS)
        last = (await agent.run(task=task["question"])).messages[-1]
    return last.content if isinstance(last, TextMessage) else ""


def calculator(expression: str) -> str:
    """Work out one arithmetic expression, such as (14+3)*2."""
    try:
        return render(evaluate(expression))
    except ValueError as error:
        return f"error: {error}"


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Loading them takes longer than all else that a client does, so all rollouts share them."""
    return ssl.create_default_context()
