"""Rollout workers on the nodes of a cluster, each beside a gateway that answers, as nodes come and go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agent_lightning.core import actors as cluster
from agent_lightning.core.errors import EngineError
from agent_lightning.rollouts.health import FindGateway
from agent_lightning.rollouts.supervise import Workers

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0
GATEWAY_SECONDS = 120.0
"""For a gateway to come up on a node."""


async def beside(app: str, timeout: float) -> str:
    """`FindGateway`, where each node has a gateway of this application of Serve."""
    from agent_lightning.serving import app as service  # two seconds; a worker needs it where its gateway is gone

    return await service.gateway_here(app, timeout)


class Nodes:
    """The workers of each node.

    Example:

        nodes = Nodes(partial(beside, service.app), make_workers, service.scale_gateways)
        await nodes.start(4)                # of 3 nodes, this driver's has 2
        asyncio.create_task(nodes.follow())
        ...
        await nodes.stop()
    """

    def __init__(
        self, find: FindGateway, make: Callable[[str, int, str], Workers], scale: Callable[[int], None] | None
    ) -> None:
        """`make`: a number of workers on a node, which ask this gateway. `scale`: to so many gateways, one on each."""
        self._find, self._make, self._scale = find, make, scale
        self._running: dict[str, tuple[Workers, asyncio.Task[None]]] = {}
        self._share = self._gateways = 0

    async def start(self, number: int) -> None:
        """Wait for the gateways on the nodes that there are, and deal out the workers. Raises EngineError."""
        nodes = [node.node_id for node in await asyncio.to_thread(cluster.nodes)]
        here = self._find(GATEWAY_SECONDS)  # this driver's node comes first
        urls = await asyncio.gather(here, *(cluster.call_on(node, _found, self._find) for node in nodes[1:]))
        self._share, self._gateways = max(1, round(number / len(nodes))), len(nodes)
        for turn, (node, url) in enumerate(zip(nodes, urls, strict=True)):
            self._begin(node, number // len(nodes) + (turn < number % len(nodes)), url)

    async def follow(self) -> None:
        """Until cancelled: workers end with their node; one that joins gets a gateway and the others' average."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            alive = [node.node_id for node in await asyncio.to_thread(cluster.nodes)]
            for node in self._running.keys() - set(alive):
                logger.warning("node %s is gone; its rollouts are run again elsewhere", node[:8])
                await self._end(node)
            try:
                if self._scale is not None and self._gateways != len(alive):
                    await asyncio.to_thread(self._scale, len(alive))
                    self._gateways = len(alive)
                for node in [one for one in alive if one not in self._running]:
                    url = await cluster.call_on(node, _found, self._find)
                    logger.warning("node %s joined; rollout workers there: %d", node[:8], self._share)
                    self._begin(node, self._share, url)
            except EngineError as error:
                logger.warning("a node that joined is not used yet: %s", error)

    async def stop(self) -> None:
        """End all workers; each gives back what it runs."""
        await asyncio.gather(*map(self._end, list(self._running)))

    def _begin(self, node: str, number: int, url: str) -> None:
        workers = self._make(node, number, url)
        self._running[node] = workers, asyncio.create_task(workers.run())

    async def _end(self, node: str) -> None:
        workers, running = self._running.pop(node)
        await workers.stop()
        await asyncio.wait((running,))


def _found(find: FindGateway) -> str:
    return asyncio.run(find(GATEWAY_SECONDS))
