"""Rollout workers on every node of a cluster, while nodes join and leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from agent_lightning.core import actors
from agent_lightning.core.errors import EngineError
from agent_lightning.rollouts.supervise import FindGateway, Workers

logger = logging.getLogger(__name__)
POLL_SECONDS: Final = 2.0  # seconds between two looks at the nodes of the cluster
GATEWAY_SECONDS: Final = 120.0  # seconds that a gateway may take to start on a node


async def find_local_gateway(app: str, timeout: float) -> str:
    """The URL of the gateway on this node that belongs to an application of Serve. Raises EngineError after `timeout`
    seconds."""
    from agent_lightning.serving import app as service  # takes two seconds, and few workers ever call this

    return await service.find_local_gateway(app, timeout)


class Nodes:
    """The rollout workers of each node, which call the gateway of their node.

    nodes = Nodes(partial(find_local_gateway, service.app), make_workers, service.scale_gateways)
    await nodes.start(4)                # on 3 nodes: 2 workers on this driver's node, 1 on each other node
    asyncio.create_task(nodes.follow())
    ...
    await nodes.stop()
    """

    def __init__(
        self, find: FindGateway, make: Callable[[str, int, str], Workers], scale: Callable[[int], None] | None
    ) -> None:
        """
        Args:
            find: finds a gateway from the node on which it runs.
            make: makes a number of workers on a node, from the node's id, the number and the URL of their gateway.
            scale: changes the number of gateways to the number of nodes; None: there is a fixed number of gateways.
        """
        self._find, self._make, self._scale = find, make, scale
        self._running: dict[str, tuple[Workers, asyncio.Task[None]]] = {}
        self._share = self._gateways = 0

    async def start(self, number: int) -> None:
        """Wait for the gateways of the present nodes, and spread the workers over them. Raises EngineError."""
        nodes = [node.node_id for node in await asyncio.to_thread(actors.nodes)]
        here = self._find(GATEWAY_SECONDS)  # this driver's node comes first
        urls = await asyncio.gather(here, *(actors.call_on(node, _run, self._find) for node in nodes[1:]))
        self._share, self._gateways = max(1, round(number / len(nodes))), len(nodes)
        for turn, (node, url) in enumerate(zip(nodes, urls, strict=True)):
            self._add(node, number // len(nodes) + (turn < number % len(nodes)), url)

    async def follow(self) -> None:
        """Until cancelled, end the workers of lost nodes, and start workers on new ones, as many as the others have."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            alive = [node.node_id for node in await asyncio.to_thread(actors.nodes)]
            for node in self._running.keys() - set(alive):
                logger.warning("node %s is gone; its rollouts are run again elsewhere", node[:8])
                await self._remove(node)
            try:
                if self._scale is not None and self._gateways != len(alive):
                    await asyncio.to_thread(self._scale, len(alive))
                    self._gateways = len(alive)
                for node in [node for node in alive if node not in self._running]:
                    url = await actors.call_on(node, _run, self._find)
                    logger.warning("node %s joined; rollout workers there: %d", node[:8], self._share)
                    self._add(node, self._share, url)
            except EngineError as error:
                logger.warning("a node that joined is not used yet: %s", error)

    async def stop(self) -> None:
        """End all workers; each gives its unfinished rollouts back to the buffer."""
        await asyncio.gather(*map(self._remove, list(self._running)))

    def _add(self, node: str, number: int, url: str) -> None:
        workers = self._make(node, number, url)
        self._running[node] = workers, asyncio.create_task(workers.run())

    async def _remove(self, node: str) -> None:
        workers, running = self._running.pop(node)
        await workers.stop()
        await asyncio.wait((running,))


def _run(find: FindGateway) -> str:
    return asyncio.run(find(GATEWAY_SECONDS))
