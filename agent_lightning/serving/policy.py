"""PolicyBoard: which weights are current, and which replicas of the policy have them. Follower: a replica's side of it.

Plain async classes; in a run the board is one actor. Replicas follow it, so a replica that joins late takes the current
weights before it serves, and nobody needs a list of replicas to push to.

A replica is a part of the policy for as long as it is heard of: the board strikes one off after `silence` seconds, and
the replica, which counts from before it spoke, has stopped answering by then. So nobody waits for the dead, and one
that was only out of reach answers with no old weights.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable

from agent_lightning.core.errors import EngineError
from agent_lightning.learners.base import Weights

logger = logging.getLogger(__name__)

SILENCE = 15.0
"""Seconds: many beats, so that a busy machine loses no replica."""


class PolicyBoard:
    """Holds the newest weights until every replica has them.

    Example:

        await board.join("replica-1")            # -> None: the starting weights are current
        await board.publish(weights, timeout=60) # returns when replica-1 has called `installed("replica-1", 1)`
    """

    def __init__(self, *, silence: float = SILENCE) -> None:
        """`silence`: seconds after which a replica that is not heard of is dead."""
        self._silence = silence
        self._weights: Weights | None = None
        self._installed: dict[str, int] = {}
        self._heard: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        self._changed = asyncio.Condition()

    async def join(self, replica: str) -> Weights | None:
        """A replica has started with the weights on disk. Returns newer ones, which it installs before it serves."""
        async with self._changed:
            self._installed[replica], self._heard[replica] = 0, time.monotonic()
            self._changed.notify_all()
            return self._weights

    async def beat(self, replica: str) -> bool:
        """The replica lives; False: it is no part of the policy (any more), and must join before it answers."""
        self._strike_off()
        if replica in self._heard:
            self._heard[replica] = time.monotonic()
        return replica in self._heard

    async def silence(self) -> float:
        """Seconds for which a beat holds."""
        return self._silence

    async def leave(self, replica: str) -> None:
        """The replica is gone: nobody waits for it any more."""
        async with self._changed:
            self._forget(replica)
            self._changed.notify_all()

    async def newer_than(self, version: int, timeout: float) -> Weights | None:
        """Wait for weights with a higher version; None when `timeout` seconds have passed without."""

        def ready() -> bool:
            return self._weights is not None and self._weights.version > version

        async with self._changed:
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait_for(ready)
            except TimeoutError:
                return None
            return self._weights

    async def installed(self, replica: str, version: int) -> None:
        """The replica answers with this version from now on."""
        async with self._changed:
            self._installed[replica], self._heard[replica] = version, time.monotonic()
            self._changed.notify_all()

    async def failed(self, replica: str, error: str) -> None:
        """The replica could not install the newest weights."""
        async with self._changed:
            self._failed[replica] = error
            self._changed.notify_all()

    async def publish(self, weights: Weights, timeout: float) -> int:
        """Make these weights current; returns the number of replicas once every one of them has them.

        One that dies meanwhile is not waited for. Raises EngineError when a replica fails to install them, or after
        `timeout` seconds.
        """
        async with self._changed:
            self._weights = weights
            self._failed.clear()
            self._changed.notify_all()

            end = time.monotonic() + timeout
            while not self._failed and (late := self._late(weights.version)):  # ends with the last of them, or at `end`
                if time.monotonic() >= end:
                    raise EngineError(f"policy version {weights.version} not installed after {timeout:.0f} s by {late}")
                # Whichever comes first: news, the end, or that one of them has been silent for too long.
                silent = min(self._heard[replica] for replica in late) + self._silence
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(end, silent) - time.monotonic()):
                        await self._changed.wait()
            if self._failed:
                raise EngineError(f"policy version {weights.version} could not be installed: {self._failed}")
            return len(self._installed)

    async def versions(self) -> dict[str, int]:
        """The version that each replica answers with."""
        return dict(self._installed)

    def _late(self, version: int) -> list[str]:
        """The replicas that live and have not installed this version."""
        self._strike_off()
        return sorted(name for name, installed in self._installed.items() if installed < version)

    def _strike_off(self) -> None:
        now = time.monotonic()
        for replica in [name for name, heard in self._heard.items() if now - heard >= self._silence]:
            logger.warning("policy replica %s is struck off: not heard of for %.0f s", replica, self._silence)
            self._forget(replica)

    def _forget(self, replica: str) -> None:
        for known in (self._installed, self._heard, self._failed):
            known.pop(replica, None)


class Follower:
    """A replica's side of the board: the current weights before the first call, newer ones as they are published.

    Example:

        follower = Follower(board, install, alive)
        await follower.join()
        following = asyncio.create_task(follower.run())
        await follower.attached()  # before each call
    """

    def __init__(
        self, board: PolicyBoard, install: Callable[[Weights], Awaitable[None]], alive: Callable[[], Awaitable[None]]
    ) -> None:
        """`install` puts weights into the engine: once it returns, nothing is answered with others. `alive` raises
        where the engine is dead."""
        self.replica = uuid.uuid4().hex[:8]
        self.version = 0
        self._board, self._install, self._alive = board, install, alive
        self._silence = SILENCE
        self._holds_until = 0.0
        self._beaten = asyncio.Condition()
        self._installing = asyncio.Lock()

    async def join(self) -> None:
        """Become a part of the policy, with its current weights. Raises what `install` raises."""
        self._silence = await self._board.silence()
        current = await self._board.join(self.replica)
        if current is not None:
            await self._take(current)
        await self._beat()

    async def attached(self) -> None:
        """Wait until the replica is a part of the policy: it may have been cut off from the board."""
        async with self._beaten:
            await self._beaten.wait_for(lambda: time.monotonic() < self._holds_until)

    async def run(self) -> None:
        """Follow the board until cancelled. Raises, as a group, what `alive` and `install` raise."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._live())

    async def _follow(self) -> None:
        while True:  # ends by cancellation
            weights = await self._board.newer_than(self.version, timeout=60.0)
            if weights is not None:
                await self._take(weights)

    async def _live(self) -> None:
        while True:  # ends by cancellation
            await self._alive()
            await self._beat()
            await asyncio.sleep(self._silence / 8)

    async def _beat(self) -> None:
        asked = time.monotonic()
        if not await self._board.beat(self.replica):
            await self.join()
            return
        async with self._beaten:
            self._holds_until = asked + self._silence
            self._beaten.notify_all()

    async def _take(self, weights: Weights) -> None:
        async with self._installing:
            if weights.version > self.version:
                try:
                    await self._install(weights)
                except Exception as error:  # whatever the engine raised, the publisher must hear of it
                    await self._alive()  # but not of an engine that is dead: another replica takes its place
                    await self._board.failed(self.replica, f"{type(error).__name__}: {error}")
                    raise
                self.version = weights.version
            await self._board.installed(self.replica, self.version)
