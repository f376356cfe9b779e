"""PolicyBoard: the current weights, and the replicas of the policy that have them. Follower: a replica's side of it."""

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

HEARTBEAT_TIMEOUT = 15.0
"""Seconds, for eight heartbeats, so that a busy machine loses no replica."""


class PolicyBoard:
    """Holds the newest weights, and publishes them to the replicas; an actor in a run.

    Replicas pull weights from the board, so that a replica that joins late gets the current weights before it answers a
    call, and nobody keeps a list of replicas to push to. A replica belongs to the policy as long as its heartbeats
    arrive. The board drops it after `heartbeat_timeout` seconds without a heartbeat. The replica counts from before it
    sent the last one, so it has stopped answering by then: the board never waits for a dead replica, and a replica that
    was cut off never answers with old weights.

        await board.join("replica-1")            # -> None: the starting weights are current
        await board.publish(weights, timeout=60) # returns when replica-1 has called `note_installed("replica-1", 1)`
    """

    def __init__(self, *, heartbeat_timeout: float = HEARTBEAT_TIMEOUT) -> None:
        """`heartbeat_timeout`: seconds without a heartbeat after which a replica counts as dead."""
        self._heartbeat_timeout = heartbeat_timeout
        self._weights: Weights | None = None
        self._installed: dict[str, int] = {}
        self._last_heartbeat: dict[str, float] = {}
        self._failures: dict[str, str] = {}
        self._changed = asyncio.Condition()

    async def join(self, replica: str) -> Weights | None:
        """Add a replica that has loaded the weights on disk. Returns newer weights, to install before the first call;
        None if there are none."""
        await self.note_installed(replica, 0)
        return self._weights

    async def heartbeat(self, replica: str) -> bool:
        """Note that the replica lives. False if it does not belong to the policy: it must join before it answers."""
        self._drop_silent_replicas()
        if replica in self._last_heartbeat:
            self._last_heartbeat[replica] = time.monotonic()
        return replica in self._last_heartbeat

    async def heartbeat_timeout(self) -> float:
        return self._heartbeat_timeout

    async def leave(self, replica: str) -> None:
        """Remove a replica; `publish` no longer waits for it."""
        async with self._changed:
            self._remove(replica)
            self._changed.notify_all()

    async def wait_for_newer(self, version: int, timeout: float) -> Weights | None:
        """The current weights as soon as their version is above `version`; None after `timeout` seconds."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while self._weights is None or self._weights.version <= version:
                        await self._changed.wait()
                    return self._weights
        return None

    async def note_installed(self, replica: str, version: int) -> None:
        """Note that the replica answers with this version from now on."""
        async with self._changed:
            self._installed[replica], self._last_heartbeat[replica] = version, time.monotonic()
            self._changed.notify_all()

    async def note_failure(self, replica: str, error: str) -> None:
        """Note that the replica could not install the newest weights."""
        async with self._changed:
            self._failures[replica] = error
            self._changed.notify_all()

    async def publish(self, weights: Weights, timeout: float) -> int:
        """Make these weights current; returns the number of replicas, once all of them have installed the weights. A
        replica that dies meanwhile is not waited for. Raises EngineError if a replica fails to install them, or after
        `timeout` seconds."""
        async with self._changed:
            self._weights = weights
            self._failures.clear()
            self._changed.notify_all()

            end = time.monotonic() + timeout
            while not self._failures:  # ends with the last replica, with a failure, or at `end`
                self._drop_silent_replicas()
                late = sorted(name for name, version in self._installed.items() if version < weights.version)
                if not late:
                    return len(self._installed)
                if time.monotonic() >= end:
                    raise EngineError(f"policy version {weights.version} not installed after {timeout:.0f} s by {late}")
                # Until something changes, the time is up, or the next replica has missed its heartbeats.
                drop_at = min(self._last_heartbeat[replica] for replica in late) + self._heartbeat_timeout
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(end, drop_at) - time.monotonic()):
                        await self._changed.wait()
            raise EngineError(f"policy version {weights.version} could not be installed: {self._failures}")

    async def versions(self) -> dict[str, int]:
        """The version that each replica answers with."""
        return dict(self._installed)

    def _drop_silent_replicas(self) -> None:
        now, timeout = time.monotonic(), self._heartbeat_timeout
        for replica in [name for name, heard_at in self._last_heartbeat.items() if now - heard_at >= timeout]:
            logger.warning("policy replica %s is struck off: not heard of for %.0f s", replica, timeout)
            self._remove(replica)

    def _remove(self, replica: str) -> None:
        for table in (self._installed, self._last_heartbeat, self._failures):
            table.pop(replica, None)


class Follower:
    """A replica's side of the board: installs the current weights before the first call, and newer ones as they come.

    Example:

        follower = Follower(board, install, check_alive)
        await follower.join()
        following = asyncio.create_task(follower.run())
        await follower.wait_until_joined()  # before each call
    """

    def __init__(
        self,
        board: PolicyBoard,
        install: Callable[[Weights], Awaitable[None]],
        check_alive: Callable[[], Awaitable[None]],
    ) -> None:
        """`install` puts weights into the engine, which answers with no others once it returns. `check_alive` raises if
        the engine is dead."""
        self.replica = uuid.uuid4().hex[:8]
        self.version = 0
        self._board, self._install_weights, self._check_alive = board, install, check_alive
        self._heartbeat_timeout = HEARTBEAT_TIMEOUT
        self._joined_until = 0.0
        self._heard = asyncio.Condition()
        self._installing = asyncio.Lock()

    async def join(self) -> None:
        """Join the policy with its current weights. Raises what `install` raises."""
        self._heartbeat_timeout = await self._board.heartbeat_timeout()
        current = await self._board.join(self.replica)
        if current is not None:
            await self._install(current)
        await self._send_heartbeat()

    async def wait_until_joined(self) -> None:
        """Wait until the replica belongs to the policy, in case it was cut off from the board."""
        async with self._heard:
            await self._heard.wait_for(lambda: time.monotonic() < self._joined_until)

    async def run(self) -> None:
        """Follow the board until cancelled. Raises, as a group, what `check_alive` and `install` raise."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send_heartbeats())
            while True:  # ends by cancellation
                weights = await self._board.wait_for_newer(self.version, timeout=60.0)
                if weights is not None:
                    await self._install(weights)

    async def _send_heartbeats(self) -> None:
        while True:  # ends by cancellation
            await self._check_alive()
            await self._send_heartbeat()
            await asyncio.sleep(self._heartbeat_timeout / 8)

    async def _send_heartbeat(self) -> None:
        sent_at = time.monotonic()
        if not await self._board.heartbeat(self.replica):
            await self.join()
            return
        async with self._heard:
            self._joined_until = sent_at + self._heartbeat_timeout
            self._heard.notify_all()

    async def _install(self, weights: Weights) -> None:
        async with self._installing:
            if weights.version > self.version:
                try:
                    await self._install_weights(weights)
                except Exception as error:  # whatever the engine raised, `publish` must raise it
                    await self._check_alive()  # unless the engine is dead: another replica takes its place
                    await self._board.note_failure(self.replica, f"{type(error).__name__}: {error}")
                    raise
                self.version = weights.version
            await self._board.note_installed(self.replica, self.version)
