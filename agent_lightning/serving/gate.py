"""A gate between calls and weight updates, with a rule for the calls that run when an update comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from agent_lightning.core.types import OnWeightUpdate

T = TypeVar("T")


class _Interrupted(Exception):
    """An update has cancelled the call, which is to be repeated."""


class Gate:
    """Lets calls through one by one, and updates between them.

        rule     the update                     a running call
        wait     waits until they have ended    is answered by one version
        restart  cancels and repeats them with  is answered by one version; if its client has seen a part of the answer,
                 the new weights                the update waits for its end instead
        keep     does not wait                  goes on with the new weights, so several versions may answer it

    With every rule, no call starts during an update: it waits at the gate, and its agent sees a slow call.

        reply = await gate.complete(work)         # work() starts the call; it is called again if the call is repeated
        async for part in gate.stream(work): ...
        async with gate.update(): ...             # install new weights
    """

    def __init__(self, rule: OnWeightUpdate = "wait") -> None:
        self._rule = rule
        self._calls = 0
        self._updating = False
        self._changed = asyncio.Condition()
        self._restartable: set[asyncio.Timeout] = set()
        """The cancel scopes of calls of which no client has seen a part."""

    async def complete(self, work: Callable[[], Awaitable[T]]) -> T:
        """The result of a call that is answered in one piece."""
        while True:  # ends: each turn but the last is interrupted by an update
            async with self.call():
                try:
                    return await self._interruptible(work())
                except _Interrupted:
                    continue

    async def stream(self, work: Callable[[], AsyncGenerator[T, None]]) -> AsyncIterator[T]:
        """The parts of a call; once the first is out, the call is not repeated."""
        nothing = object()
        while True:  # as above
            async with self.call(), aclosing(work()) as parts:
                try:
                    first = await self._interruptible(anext(parts, nothing))
                except _Interrupted:
                    continue
                if first is not nothing:
                    yield first  # type: ignore[misc]  # it is a T
                    async for part in parts:
                        yield part
                return

    @asynccontextmanager
    async def update(self) -> AsyncIterator[None]:
        """A block in which no call starts, and none runs unless the rule is "keep"."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._updating)
            self._updating = True
        try:
            if self._rule == "restart":
                for scope in self._restartable:
                    scope.reschedule(asyncio.get_running_loop().time())
                self._restartable.clear()
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
        """A block that starts outside of updates, and that updates wait for unless the rule is "keep"."""
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
        """The result of the work. Raises _Interrupted if an update has cancelled it, even if the work then returned:
        vLLM answers a cancelled call with an error."""
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._restartable.add(scope)
                result = await work
                if not scope.expired():
                    return result
        except TimeoutError:
            if not scope.expired():
                raise  # a timeout of the work itself
        finally:
            self._restartable.discard(scope)
        raise _Interrupted
