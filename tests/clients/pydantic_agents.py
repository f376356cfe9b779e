"""pydantic-ai, over every format."""

from __future__ import annotations

from typing import Any

from harness import MODEL, NEXT, PLAIN, QUESTION, SYSTEM, Answer, Rollout, Seen, case
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.google import GoogleModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.google import GoogleProvider
from pydantic_ai.providers.openai import OpenAIProvider

WIRES: dict[str, Any] = {
    "chat": lambda rollout: OpenAIChatModel(MODEL, provider=OpenAIProvider(**rollout.openai)),
    "Responses": lambda rollout: OpenAIResponsesModel(MODEL, provider=OpenAIProvider(**rollout.openai)),
    "Google": lambda rollout: GoogleModel(MODEL, provider=GoogleProvider(base_url=rollout.root, api_key="any")),
    "messages": lambda rollout: AnthropicModel(MODEL, provider=AnthropicProvider(base_url=rollout.root, api_key="any")),
}


async def run(rollout: Rollout, wire: str, streamed: bool, question: str, **settings: Any) -> Seen:
    agent: Any = Agent(WIRES[wire](rollout), instructions=SYSTEM, **settings)
    if streamed:
        async with agent.run_stream(question) as result:
            output = await result.get_output()
    else:
        result = await agent.run(question)
        output = result.output
    calls = sum(message.kind == "response" for message in result.all_messages())
    return Seen(calls, output if isinstance(output, str) else output.model_dump_json())


def register(wire: str) -> None:
    client = f"pydantic-ai ({wire})"

    @case(client, "pydantic-ai-slim", "plain")
    async def plain(rollout: Rollout, streamed: bool) -> Seen:
        return await run(rollout, wire, streamed, PLAIN)

    @case(client, "pydantic-ai-slim", "tool")
    async def tool(rollout: Rollout, streamed: bool) -> Seen:
        return await run(rollout, wire, streamed, QUESTION, tools=[rollout.calculator])

    @case(client, "pydantic-ai-slim", "structured by a tool")
    async def structured(rollout: Rollout, streamed: bool) -> Seen:
        return await run(rollout, wire, streamed, PLAIN, output_type=Answer)

    if wire == "messages":  # its Anthropic model refuses that by itself for all models that it does not know
        return

    @case(client, "pydantic-ai-slim", "structured")
    async def native(rollout: Rollout, streamed: bool) -> Seen:
        return await run(rollout, wire, streamed, PLAIN, output_type=NativeOutput(Answer))


for wire in WIRES:
    register(wire)


@case("pydantic-ai (Responses)", "pydantic-ai-slim", "second turn")
async def second_turn(rollout: Rollout, streamed: bool) -> Seen:
    agent: Any = Agent(WIRES["Responses"](rollout), instructions=SYSTEM)
    history = (await agent.run(PLAIN)).all_messages()
    then = {"message_history": history, "model_settings": {"openai_previous_response_id": "auto"}}
    if not streamed:
        return Seen(2, (await agent.run(NEXT, **then)).output)
    async with agent.run_stream(NEXT, **then) as result:
        return Seen(2, await result.get_output())
