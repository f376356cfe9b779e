"""instructor, with its default mode (a forced tool) and with JSON schemas."""

from __future__ import annotations

from typing import Any

import instructor
from harness import MODEL, PLAIN, SYSTEM, Answer, Rollout, Seen, case
from openai import AsyncOpenAI

MESSAGES: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PLAIN}]


async def run(rollout: Rollout, streamed: bool, **mode: Any) -> Seen:
    async with AsyncOpenAI(**rollout.openai) as openai:
        client = instructor.from_openai(openai, **mode)
        if streamed:
            async for piece in client.create_partial(model=MODEL, messages=MESSAGES, response_model=Answer):
                answer: Any = piece
        else:
            answer = await client.create(model=MODEL, messages=MESSAGES, response_model=Answer)
    return Seen(1, answer.model_dump_json())


@case("instructor", "instructor", "structured by a tool")
async def by_tool(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed)


@case("instructor", "instructor", "structured")
async def by_schema(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, mode=instructor.Mode.JSON_SCHEMA)


@case("instructor (Responses)", "instructor", "structured by a tool")
async def responses(rollout: Rollout, streamed: bool) -> Seen:
    return await run(rollout, streamed, mode=instructor.Mode.RESPONSES_TOOLS)
