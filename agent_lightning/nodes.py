"""The nodes of a cluster that rollout workers can be on: those whose gateway answers, as nodes come and go."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any

from agent_lightning import cluster
from agent_lightning.errors import EngineError
from agent_lightning.serving.app import Service, wait_until_healthy

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0
GATEWAY_SECONDS = 120.0
"""For a gateway to come up on a node."""


class Nodes:
    """Where workers are started, in turn.

    Example:

        nodes = Nodes(service, scale=True)
        await nodes.start()
        worker = spawn(RolloutWorker, options=nodes.next(), ...)
        asyncio.create_task(nodes.follow(4, lambda node, number: start_workers(number)))
    """

    def __init__(self, service: Service, *, scale: bool) -> None:
        """`scale`: a gateway on each node, also on one that joins."""
        self._service = service
        self._scale = scale
        self._ready: list[str] = []
        self._turn = itertools.count()

    async def start(self) -> None:
        """Wait for the gateways on the nodes that there are. Raises EngineError."""
        self._ready = [node.node_id for node in await asyncio.to_thread(cluster.nodes)]
        # This driver's node comes first, and its gateway is known to answer.
        await asyncio.gather(*(cluster.call_on(node, _answers, self._service.url) for node in self._ready[1:]))

    def next(self) -> dict[str, Any]:
        """Options of `spawn` that put an actor onto the next node."""
        # Soft: of a node that has just gone, it is not known yet.
        return cluster.on_node(self._ready[next(self._turn) % len(self._ready)], soft=True)

    def on(self, node: str) -> dict[str, Any]:
        """The same for a node that has joined, or for another once it is gone."""
        return cluster.on_node(node, soft=True) if node in self._ready else self.next()

    async def follow(self, workers: int, start: Callable[[str, int], None]) -> None:
        """Until cancelled, call `start` with each node that joins and its number of workers: the others' average.

        `on` places them, and `next` has the node's turns too from then on.
        """
        share = max(1, round(workers / len(self._ready)))
        while True:
            await asyncio.sleep(POLL_SECONDS)
            alive = [node.node_id for node in await asyncio.to_thread(cluster.nodes)]
            joined = [node for node in alive if node not in self._ready]
            left = [node for node in self._ready if node not in alive]
            if not joined and not left:
                continue
            self._ready = [node for node in self._ready if node in alive]
            if self._scale:
                await asyncio.to_thread(self._service.scale_gateways, len(alive))
            for node in left:
                logger.warning("node %s is gone; its rollouts are run again elsewhere", node[:8])
            for node in joined:
                try:
                    await cluster.call_on(node, _answers, self._service.url)
                except EngineError as error:
                    logger.warning("node %s joined, and is not used: %s", node[:8], error)
                    continue
                logger.warning("node %s joined; rollout workers there: %d", node[:8], share)
                self._ready.append(node)
                start(node, share)


def _answers(url: str) -> None:
    asyncio.run(wait_until_healthy(url, GATEWAY_SECONDS))
