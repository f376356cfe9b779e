"""OpenAI's client in chat and in Responses, and Anthropic's in messages."""

from __future__ import annotations

import json
from typing import Any

from anthropic import AsyncAnthropic, beta_async_tool
from harness import (
    FUNCTION,
    MODEL,
    NEXT,
    PARAMETERS,
    PLAIN,
    QUESTION,
    SYSTEM,
    TOOL,
    Answer,
    Rollout,
    Seen,
    asking,
    case,
)
from openai import AsyncOpenAI

STRICT: Any = {"type": "function", "function": {**FUNCTION, "strict": True}}


async def chat_reply(client: AsyncOpenAI, streamed: bool, **body: Any) -> Any:
    """The message of one reply."""
    if not streamed:
        return (await client.chat.completions.create(model=MODEL, **body)).choices[0].message
    async with client.chat.completions.stream(model=MODEL, **body) as stream:
        return (await stream.get_final_completion()).choices[0].message


async def chat_loop(rollout: Rollout, streamed: bool, tool: Any = TOOL, **first: Any) -> Seen:
    """An agent of a dozen lines; `first` is of its first request only."""
    messages, calls = asking(QUESTION), 0
    async with AsyncOpenAI(**rollout.openai) as client:
        while True:
            message = await chat_reply(client, streamed, messages=messages, tools=[tool], **first)
            first, calls = {}, calls + 1
            if not message.tool_calls or calls == 4:
                return Seen(calls, message.content or "")
            messages.append(message.model_dump(exclude_none=True) if streamed else message)
            for call in message.tool_calls:
                result = rollout.calculator(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


@case("openai (chat)", "openai", "plain")
async def chat_plain(rollout: Rollout, streamed: bool) -> Seen:
    async with AsyncOpenAI(**rollout.openai) as client:
        return Seen(1, (await chat_reply(client, streamed, messages=asking(PLAIN))).content or "")


@case("openai (chat)", "openai", "tool")
async def chat_tool(rollout: Rollout, streamed: bool) -> Seen:
    return await chat_loop(rollout, streamed, STRICT if streamed else TOOL)


@case("openai (chat)", "openai", "forced tool")
async def chat_forced(rollout: Rollout, streamed: bool) -> Seen:
    named = {"type": "function", "function": {"name": "calculator"}}
    return await chat_loop(rollout, streamed, STRICT, tool_choice=named if streamed else "required")


@case("openai (chat)", "openai", "structured")
async def chat_structured(rollout: Rollout, streamed: bool) -> Seen:
    async with AsyncOpenAI(**rollout.openai) as client:
        body: Any = {"messages": asking(PLAIN), "response_format": Answer}
        if streamed:
            message = await chat_reply(client, True, **body)
        else:
            message = (await client.chat.completions.parse(model=MODEL, **body)).choices[0].message
        return Seen(1, message.parsed.model_dump_json())


async def response(client: AsyncOpenAI, streamed: bool, **body: Any) -> Any:
    if not streamed:
        return await client.responses.create(model=MODEL, **body)
    async with client.responses.stream(model=MODEL, **body) as stream:
        return await stream.get_final_response()


async def responses_loop(rollout: Rollout, streamed: bool, **first: Any) -> Seen:
    items, calls = [{"role": "user", "content": QUESTION}], 0
    tools: Any = [{"type": "function", **FUNCTION, "strict": True}]
    async with AsyncOpenAI(**rollout.openai) as client:
        while True:
            reply = await response(client, streamed, input=items, instructions=SYSTEM, tools=tools, **first)
            first, calls = {}, calls + 1
            called = [item for item in reply.output if item.type == "function_call"]
            if not called or calls == 4:
                return Seen(calls, reply.output_text)
            items += reply.output
            for call in called:
                result = rollout.calculator(**json.loads(call.arguments))
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": result})


@case("openai (Responses)", "openai", "plain")
async def responses_plain(rollout: Rollout, streamed: bool) -> Seen:
    async with AsyncOpenAI(**rollout.openai) as client:
        return Seen(1, (await response(client, streamed, input=PLAIN, instructions=SYSTEM)).output_text)


@case("openai (Responses)", "openai", "tool")
async def responses_tool(rollout: Rollout, streamed: bool) -> Seen:
    return await responses_loop(rollout, streamed)


@case("openai (Responses)", "openai", "forced tool")
async def responses_forced(rollout: Rollout, streamed: bool) -> Seen:
    named = {"type": "function", "name": "calculator"}
    return await responses_loop(rollout, streamed, tool_choice=named if streamed else "required")


@case("openai (Responses)", "openai", "structured")
async def responses_structured(rollout: Rollout, streamed: bool) -> Seen:
    async with AsyncOpenAI(**rollout.openai) as client:
        body: Any = {"input": PLAIN, "instructions": SYSTEM, "text_format": Answer}
        if streamed:
            reply = await response(client, True, **body)
        else:
            reply = await client.responses.parse(model=MODEL, **body)
        return Seen(1, reply.output_parsed.model_dump_json())


@case("openai (Responses)", "openai", "second turn")
async def responses_second(rollout: Rollout, streamed: bool) -> Seen:
    async with AsyncOpenAI(**rollout.openai) as client:
        first = await response(client, streamed, input=PLAIN, instructions=SYSTEM)
        reply = await response(client, streamed, input=NEXT, instructions=SYSTEM, previous_response_id=first.id)
        return Seen(2, reply.output_text)


async def message_of(client: AsyncAnthropic, streamed: bool, **body: Any) -> Any:
    body = {"model": MODEL, "max_tokens": 256, "system": SYSTEM, **body}
    if not streamed:
        return await client.messages.create(**body)
    async with client.messages.stream(**body) as stream:
        return await stream.get_final_message()


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


async def messages_loop(rollout: Rollout, streamed: bool, **first: Any) -> Seen:
    messages, calls = [{"role": "user", "content": QUESTION}], 0
    tools: Any = [{"name": "calculator", "description": "Computes.", "input_schema": PARAMETERS}]
    async with AsyncAnthropic(base_url=rollout.root, api_key="any") as client:
        while True:
            reply = await message_of(client, streamed, messages=messages, tools=tools, **first)
            first, calls = {}, calls + 1
            used = [block for block in reply.content if block.type == "tool_use"]
            if (reply.stop_reason == "tool_use") != bool(used):
                raise AssertionError(f"stop_reason is {reply.stop_reason} with {len(used)} tool_use blocks")
            if not used or calls == 4:
                return Seen(calls, text_of(reply))
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": rollout.calculator(**block.input)}
                for block in used
            ]
            messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]


@case("anthropic", "anthropic", "plain")
async def messages_plain(rollout: Rollout, streamed: bool) -> Seen:
    async with AsyncAnthropic(base_url=rollout.root, api_key="any") as client:
        return Seen(1, text_of(await message_of(client, streamed, messages=asking(PLAIN)[1:])))


@case("anthropic", "anthropic", "tool")
async def messages_tool(rollout: Rollout, streamed: bool) -> Seen:
    return await messages_loop(rollout, streamed)


@case("anthropic", "anthropic", "forced tool")
async def messages_forced(rollout: Rollout, streamed: bool) -> Seen:
    named = {"type": "tool", "name": "calculator"}
    return await messages_loop(rollout, streamed, tool_choice=named if streamed else {"type": "any"})


@case("anthropic", "anthropic", "structured")
async def messages_structured(rollout: Rollout, streamed: bool) -> Seen:
    async with AsyncAnthropic(base_url=rollout.root, api_key="any") as client:
        body: Any = {"messages": asking(PLAIN)[1:], "output_format": Answer}
        if streamed:
            reply = await message_of(client, True, **body)
        else:
            reply = await client.messages.parse(model=MODEL, max_tokens=256, system=SYSTEM, **body)
        return Seen(1, reply.parsed_output.model_dump_json())


@case("anthropic (tool runner)", "anthropic", "tool")
async def messages_runner(rollout: Rollout, streamed: bool) -> Seen:
    async with AsyncAnthropic(base_url=rollout.root, api_key="any") as client:

        @beta_async_tool
        async def calculator(expression: str) -> str:
            """Computes."""
            return rollout.calculator(expression)

        body: Any = {"model": MODEL, "max_tokens": 256, "system": SYSTEM, "messages": asking(QUESTION)[1:]}
        if streamed:
            streams = client.beta.messages.tool_runner(**body, tools=[calculator], stream=True)
            replies: list[Any] = [await stream.get_final_message() async for stream in streams]
        else:
            replies = [reply async for reply in client.beta.messages.tool_runner(**body, tools=[calculator])]
    return Seen(len(replies), text_of(replies[-1]))
