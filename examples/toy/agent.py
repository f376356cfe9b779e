"""The toy world's agent and its tasks: sums of small numbers, asked of a model that can only say a number.

No sum is held out: `agl train experiment=toy` tries the system, not what a model learns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

from openai import AsyncOpenAI, DefaultAioHttpClient

_clients: dict[asyncio.AbstractEventLoop, AsyncOpenAI] = {}
"""One for each event loop: rollouts share its connections."""


async def solve(task: Mapping[str, Any], policy: Any) -> str:
    """One call, and its answer."""
    loop = asyncio.get_running_loop()
    if loop not in _clients:
        _clients[loop] = AsyncOpenAI(base_url="http://unset.invalid", api_key="any", http_client=DefaultAioHttpClient())
    client = _clients[loop].with_options(base_url=policy.base_url, api_key=policy.api_key)
    reply = await client.chat.completions.create(
        model=policy.model, messages=[{"role": "user", "content": task["question"]}]
    )
    return reply.choices[0].message.content or ""


def score(task: Mapping[str, Any], output: str) -> float:
    """1 for the sum, half for its neighbours."""
    return {0: 1.0, 1: 0.5}.get(abs(int(output or -9) - int(task["answer"])), 0.0)


def questions(seed: int, num: int, split: str) -> Iterator[dict[str, Any]]:
    """Sums of numbers from 0 to 3, the same ones in both splits."""
    for index in range(min(num, 16)):
        a, b = divmod(index, 4)
        yield {"id": f"{split}-{a}-{b}", "question": f"What is {a} plus {b}?", "answer": str(a + b)}
