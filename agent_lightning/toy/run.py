"""The toy model where a run has it: a replica for Ray Serve, and a learner whose weights go through the object store.

`agl train experiment=toy` is the whole system but vLLM and veRL, in seconds. See `toy.py`, conf/model/toy.yaml.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from agent_lightning.core import actors as cluster
from agent_lightning.core.types import OnWeightUpdate
from agent_lightning.learners.base import Weights
from agent_lightning.serving.engine import Completion, Part, Refusal
from agent_lightning.serving.policy import PolicyBoard
from agent_lightning.toy.toy import ToyEngine, ToyLanguage, ToyLearner


class SharedToyLearner(ToyLearner):
    """Its weights are in Ray's object store, as those of a real learner."""

    async def publish(self) -> Weights:
        weights = await super().publish()
        return replace(weights, buckets=tuple(replace(one, data=cluster.put(one.data)) for one in weights.buckets))


class ToyReplica:
    """A replica of the policy: a ToyEngine that follows the board."""

    def __init__(
        self, words: tuple[str, ...], seed: int, max_len: int, on_weight_update: OnWeightUpdate, board: PolicyBoard
    ) -> None:
        self._engine = _FetchingEngine(
            ToyLanguage(words), seed=seed, max_len=max_len, on_weight_update=on_weight_update
        )
        self._board = board
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._engine.join(self._board)
        self._following = asyncio.create_task(self._engine.follow())

    async def check_health(self) -> None:
        if self._following is not None and self._following.done():
            self._following.result()

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        return await self._engine.generate(request)

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        async for part in self._engine.stream(request):
            yield part


class _FetchingEngine(ToyEngine):
    async def install(self, weights: Weights) -> None:
        buckets = [replace(one, data=await cluster.fetch(one.data)) for one in weights.buckets]
        await super().install(replace(weights, buckets=tuple(buckets)))
