"""Whether a gateway answers, as seen from the node of its agents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp

from agent_lightning.core.errors import EngineError

FindGateway = Callable[[float], Coroutine[Any, Any, str]]
"""Waits until a gateway answers, and returns its root URL. Raises EngineError after the given number of seconds."""
_PAUSE = 0.1
_ANSWER_SECONDS = 3.0


async def is_healthy(url: str) -> bool:
    """Whether the gateway with root `url` answers with 200: a proxy whose gateways are all gone answers otherwise."""
    try:
        clock = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        async with aiohttp.ClientSession(timeout=clock) as session, session.get(f"{url}/health") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def wait_until_healthy(url: str, timeout: float) -> str:
    """Poll the gateway until it answers, and return its URL. Raises EngineError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not await is_healthy(url):
        if time.monotonic() > deadline:
            raise EngineError(f"the gateway at {url} did not answer within {timeout:.0f} s")
        await asyncio.sleep(_PAUSE)
    return url
