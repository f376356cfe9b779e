"""A gate between calls and weight updates: many calls at once, or one update alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """`async with gate.call()` for each call; `async with gate.update()` waits for the calls in flight to end, and
    holds new ones until it is done. So no call sees two versions, and no agent sees the pause.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._updating = False
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)
            self._calls += 1
        try:
            yield
        finally:
            async with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    @asynccontextmanager
    async def update(self) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)
            self._updating = True
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._calls == 0)
            yield
        finally:
            async with self._changed:
                self._updating = False
                self._changed.notify_all()
