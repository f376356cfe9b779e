"""AutoGen's assistant."""

from __future__ import annotations

from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import StructuredMessage
from autogen_ext.models.openai import OpenAIChatCompletionClient
from harness import MODEL, PLAIN, QUESTION, SYSTEM, Answer, Rollout, Seen, case

INFO = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True}


async def run(rollout: Rollout, streamed: bool, question: str, **settings: Any) -> Seen:
    info: Any = {**INFO, "family": "unknown"}
    client = OpenAIChatCompletionClient(model=MODEL, base_url=rollout.url, api_key="any", model_info=info)
    settings |= {"system_message": SYSTEM, "model_client_stream": streamed}
    agent = AssistantAgent("adder", client, **settings)
    if streamed:
        async for event in agent.run_stream(task=question):
            result: Any = event
    else:
        result = await agent.run(task=question)
    last = result.messages[-1]
    used = [message for message in result.messages if message.models_usage]
    text = last.content.model_dump_json() if isinstance(last, StructuredMessage) else last.content
    return Seen(len(used), text)


@case("AutoGen", "autogen-agentchat", "plain")
async def plain(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, PLAIN)


@case("AutoGen", "autogen-agentchat", "tool")
async def tool(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, QUESTION, tools=[rollout.calculator], max_tool_iterations=4)


@case("AutoGen", "autogen-agentchat", "structured")
async def structured(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, PLAIN, output_content_type=Answer)
