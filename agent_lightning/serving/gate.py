"""A gate between calls and weight updates, with the rule for the calls that an update finds in flight.

    rule     the update                           a call
    wait     waits for their ends                 has one version
    restart  has them made again by the new       has one version, unless its client has seen a part of it: then it is
             version                              waited for
    keep     waits for none                       goes on with the new version, and may have several

Whatever the rule, no call begins during an update; it waits at the gate, so an agent sees a slow call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from agent_lightning.core.types import InFlight

T = TypeVar("T")


class _Interrupted(Exception):
    """The call is to be made again."""


class Gate:
    """`await gate.whole(work)` or `async for part in gate.parts(work)` for each call, `async with gate.update()` for
    an update. `work` starts a call, and is asked again where the call is to be made again."""

    def __init__(self, rule: InFlight = "wait") -> None:
        self._rule = rule
        self._calls = 0
        self._updating = False
        self._changed = asyncio.Condition()
        self._unseen: set[asyncio.Timeout] = set()
        """Of the calls that can be made again."""

    async def whole(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of one call."""
        while True:  # ends: each turn but the last is interrupted by an update
            async with self.call():
                try:
                    return await self._interruptible(work())
                except _Interrupted:
                    continue

    async def parts(self, work: Callable[[], AsyncGenerator[T, None]]) -> AsyncIterator[T]:
        """The parts of one call; after the first, it cannot be made again."""
        nothing = object()
        while True:  # as above
            async with self.call(), aclosing(work()) as coming:
                try:
                    first = await self._interruptible(anext(coming, nothing))
                except _Interrupted:
                    continue
                if first is not nothing:
                    yield first  # type: ignore[misc]  # it is a T
                    async for part in coming:
                        yield part
                return

    @asynccontextmanager
    async def update(self) -> AsyncIterator[None]:
        """No call begins in the block; and none goes on, unless the rule is "keep"."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)
            self._updating = True
        try:
            if self._rule == "restart":
                for scope in self._unseen:
                    scope.reschedule(asyncio.get_running_loop().time())
                self._unseen.clear()
            if self._rule != "keep":
                async with self._changed:
                    await self._changed.wait_for(lambda: self._calls == 0)
            yield
        finally:
            async with self._changed:
                self._updating = False
                self._changed.notify_all()

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

    async def _interruptible(self, work: Awaitable[T]) -> T:
        """Raises _Interrupted where an update cancels it, whatever it makes of that: vLLM answers a call that is
        cancelled with an error."""
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._unseen.add(scope)
                result = await work
                if not scope.expired():
                    return result
        except TimeoutError:
            if not scope.expired():
                raise  # the work's own
        finally:
            self._unseen.discard(scope)
        raise _Interrupted
