"""PolicyBoard: which weights are current, and which replicas of the policy have them.

A plain async class; in a run it is one actor. Replicas follow it, so a replica that joins late takes the current
weights before it serves, and nobody needs a list of replicas to push to.
"""

from __future__ import annotations

import asyncio

from agent_lightning.errors import EngineError
from agent_lightning.learners.base import Weights


class PolicyBoard:
    """Holds the newest weights until every replica has them.

    Example:

        await board.join("replica-1")            # -> None: the starting weights are current
        await board.publish(weights, timeout=60) # returns when replica-1 has called `installed("replica-1", 1)`
    """

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._installed: dict[str, int] = {}
        self._failed: dict[str, str] = {}
        self._changed = asyncio.Condition()

    async def join(self, replica: str) -> Weights | None:
        """A replica has started with the weights on disk. Returns newer ones, which it installs before it serves."""
        async with self._changed:
            self._installed[replica] = 0
            self._changed.notify_all()
            return self._weights

    async def leave(self, replica: str) -> None:
        """The replica is gone: nobody waits for it any more."""
        async with self._changed:
            self._installed.pop(replica, None)
            self._failed.pop(replica, None)
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
            self._installed[replica] = version
            self._changed.notify_all()

    async def failed(self, replica: str, error: str) -> None:
        """The replica could not install the newest weights."""
        async with self._changed:
            self._failed[replica] = error
            self._changed.notify_all()

    async def publish(self, weights: Weights, timeout: float) -> int:
        """Make these weights current; returns the number of replicas once every one of them has them.

        Raises EngineError when a replica fails to install them, or after `timeout` seconds.
        """
        async with self._changed:
            self._weights = weights
            self._failed.clear()
            self._changed.notify_all()

            def settled() -> bool:
                return bool(self._failed) or all(v >= weights.version for v in self._installed.values())

            try:
                async with asyncio.timeout(timeout):  # ends with installed, failed or leave of the last one
                    await self._changed.wait_for(settled)
            except TimeoutError:
                late = sorted(name for name, v in self._installed.items() if v < weights.version)
                raise EngineError(
                    f"policy version {weights.version} not installed after {timeout:.0f} s by {late}"
                ) from None
            if self._failed:
                raise EngineError(f"policy version {weights.version} could not be installed: {self._failed}")
            return len(self._installed)

    async def versions(self) -> dict[str, int]:
        """The version that each replica answers with."""
        return dict(self._installed)
