"""litellm, over chat, Responses and Anthropic's messages."""

from __future__ import annotations

import json
from typing import Any

import litellm
from harness import MODEL, NEXT, PARAMETERS, PLAIN, QUESTION, SYSTEM, TOOL, Answer, Rollout, Seen, asking, case


async def reply_of(rollout: Rollout, wire: str, streamed: bool, messages: list[Any], **body: Any) -> Any:
    """The message of one reply; of a stream's pieces litellm makes it."""
    base = {"openai": rollout.url, "anthropic": rollout.root}[wire]
    reply = await litellm.acompletion(
        model=f"{wire}/{MODEL}", api_base=base, api_key="any", messages=messages, stream=streamed, **body
    )
    if streamed:
        reply = litellm.stream_chunk_builder([piece async for piece in reply], messages=messages)
    return reply.choices[0].message


async def loop(rollout: Rollout, wire: str, streamed: bool, **first: Any) -> Seen:
    messages, calls = asking(QUESTION), 0
    while True:
        message = await reply_of(rollout, wire, streamed, messages, tools=[TOOL], **first)
        first, calls = {}, calls + 1
        if not message.tool_calls or calls == 4:
            return Seen(calls, message.content or "")
        messages.append(message.model_dump())
        for call in message.tool_calls:
            result = rollout.calculator(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def register(client: str, wire: str, structured: str) -> None:
    @case(client, "litellm", "plain")
    async def plain(rollout: Rollout, streamed: bool) -> Seen:
        return Seen(1, (await reply_of(rollout, wire, streamed, asking(PLAIN))).content)

    @case(client, "litellm", "tool")
    async def tool(rollout: Rollout, streamed: bool) -> Seen:
        return await loop(rollout, wire, streamed)

    @case(client, "litellm", "forced tool")
    async def forced(rollout: Rollout, streamed: bool) -> Seen:
        named = {"type": "function", "function": {"name": "calculator"}}
        return await loop(rollout, wire, streamed, tool_choice=named if streamed else "required")

    @case(client, "litellm", structured)
    async def an_object(rollout: Rollout, streamed: bool) -> Seen:
        return Seen(1, (await reply_of(rollout, wire, streamed, asking(PLAIN), response_format=Answer)).content)


register("litellm (chat)", "openai", "structured")
register("litellm (messages)", "anthropic", "structured by a tool")


async def response(rollout: Rollout, streamed: bool, **body: Any) -> Any:
    to = {"model": f"openai/{MODEL}", "api_base": rollout.url, "api_key": "any", "instructions": SYSTEM}
    reply = await litellm.aresponses(**to, stream=streamed, **body)
    if streamed:
        reply = [event async for event in reply][-1].response
    return reply


@case("litellm (Responses)", "litellm", "plain")
async def responses_plain(rollout: Rollout, streamed: bool) -> Seen:
    return Seen(1, (await response(rollout, streamed, input=PLAIN)).output_text)


@case("litellm (Responses)", "litellm", "tool")
async def responses_tool(rollout: Rollout, streamed: bool) -> Seen:
    tool = {"type": "function", "name": "calculator", "parameters": PARAMETERS}
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    first = await response(rollout, streamed, input=items, tools=[tool])
    for item in first.output:
        items.append(item.model_dump())
        if item.type == "function_call":
            result = rollout.calculator(**json.loads(item.arguments))
            items.append({"type": "function_call_output", "call_id": item.call_id, "output": result})
    return Seen(2, (await response(rollout, streamed, input=items, tools=[tool])).output_text)


@case("litellm (Responses)", "litellm", "second turn")
async def responses_second(rollout: Rollout, streamed: bool) -> Seen:
    first = await response(rollout, streamed, input=PLAIN)
    return Seen(2, (await response(rollout, streamed, input=NEXT, previous_response_id=first.id)).output_text)
