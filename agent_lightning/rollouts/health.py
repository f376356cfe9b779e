"""Whether a gateway answers, seen from where its agents are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp

from agent_lightning.core.errors import EngineError

Find = Callable[[float], Coroutine[Any, Any, str]]
"""Root of the gateway that is to be asked, once it answers. Raises EngineError after so many seconds."""
_PAUSE = 0.1
_ANSWER_SECONDS = 3.0


async def is_healthy(url: str) -> bool:
    """`url`: root of the gateway. A proxy whose gateways are all gone answers too, but not with 200."""
    try:
        clock = aiohttp.ClientTimeout(total=_ANSWER_SECONDS)
        async with aiohttp.ClientSession(timeout=clock) as session, session.get(f"{url}/health") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def wait_until_healthy(url: str, timeout: float) -> str:
    """Poll the gateway until it answers; the same URL. Raises EngineError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not await is_healthy(url):
        if time.monotonic() > deadline:
            raise EngineError(f"the gateway at {url} did not answer within {timeout:.0f} s")
        await asyncio.sleep(_PAUSE)
    return url
