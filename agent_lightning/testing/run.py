"""The toy model on Ray: a replica for Ray Serve, and a learner that publishes through the object store.

`agl train experiment=toy` runs the complete system without vLLM and veRL, in seconds; see conf/model/toy.yaml.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from agent_lightning.config.running import ServingConfig
from agent_lightning.core import actors
from agent_lightning.learners.base import Weights
from agent_lightning.serving.gate import Gate
from agent_lightning.serving.policy import PolicyBoard
from agent_lightning.testing.model import ToyEngine, ToyLanguage, ToyLearner


class SharedToyLearner(ToyLearner):
    """A ToyLearner that puts its weights into Ray's object store, as the learner on veRL does."""

    async def publish(self) -> Weights:
        weights = await super().publish()
        buckets = [replace(bucket, data=actors.put(bucket.data)) for bucket in weights.buckets]
        return replace(weights, buckets=tuple(buckets))


class ToyReplica(ToyEngine):
    """A `PolicyReplica`: a ToyEngine that follows the board."""

    def __init__(
        self, words: tuple[str, ...], seed: int, max_len: int, serving: ServingConfig, board: PolicyBoard
    ) -> None:
        super().__init__(ToyLanguage(words), seed=seed, max_len=max_len, gate=Gate(serving.on_weight_update or "wait"))
        self._board = board
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.join(self._board)
        self._following = asyncio.create_task(self.follow())

    async def check_health(self) -> None:
        if self._following is not None and self._following.done():
            self._following.result()

    async def install(self, weights: Weights) -> None:
        buckets = [replace(bucket, data=await actors.fetch(bucket.data)) for bucket in weights.buckets]
        await super().install(replace(weights, buckets=tuple(buckets)))
