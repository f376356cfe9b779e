"""AutoGen's assistant."""

from __future__ import annotations

import json
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import StructuredMessage
from autogen_core.models import (
    AssistantMessage,
    FunctionExecutionResult,
    FunctionExecutionResultMessage,
    SystemMessage,
    UserMessage,
)
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from harness import MODEL, PLAIN, QUESTION, SYSTEM, Answer, Rollout, Seen, case

INFO = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True}


def model(rollout: Rollout) -> OpenAIChatCompletionClient:
    info: Any = {**INFO, "family": "unknown"}
    return OpenAIChatCompletionClient(model=MODEL, base_url=rollout.url, api_key="any", model_info=info)


async def run(rollout: Rollout, streamed: bool, question: str, **settings: Any) -> Seen:
    settings |= {"system_message": SYSTEM, "model_client_stream": streamed}
    agent = AssistantAgent("adder", model(rollout), **settings)
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


@case("AutoGen", "autogen-agentchat", "forced tool")
async def forced(rollout: Rollout, streamed: bool) -> Seen:
    client, tool = model(rollout), FunctionTool(rollout.calculator, description="Computes.")
    messages: list[Any] = [SystemMessage(content=SYSTEM), UserMessage(content=QUESTION, source="user")]
    reply: Any = await one_reply(client, streamed, messages, [tool], tool if streamed else "required")
    messages.append(AssistantMessage(content=reply.content, source="adder"))
    results = [
        FunctionExecutionResult(
            content=rollout.calculator(**json.loads(call.arguments)), call_id=call.id, name=call.name, is_error=False
        )
        for call in reply.content
    ]
    messages.append(FunctionExecutionResultMessage(content=results))
    return Seen(2, (await one_reply(client, streamed, messages, [tool], "auto")).content)


async def one_reply(client: Any, streamed: bool, messages: list[Any], tools: list[Any], choice: Any) -> Any:
    if not streamed:
        return await client.create(messages, tools=tools, tool_choice=choice)
    return [piece async for piece in client.create_stream(messages, tools=tools, tool_choice=choice)][-1]


@case("AutoGen", "autogen-agentchat", "structured")
async def structured(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, PLAIN, output_content_type=Answer)
