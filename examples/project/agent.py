"""Your agent: it gets a task, a row of train.jsonl, and a policy, the model that is trained, and returns its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI


async def solve(task: Mapping[str, Any], policy: Any) -> str:
    """Ask the model once. Any framework will do: it needs the policy's base URL, and nothing else."""
    async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key) as client:
        messages: list[Any] = [{"role": "user", "content": task["question"]}]
        answer = await client.chat.completions.create(model=policy.model, messages=messages)
    return answer.choices[0].message.content or ""
