"""The learner as the training loop calls it, and the weights that it publishes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent_lightning.core.metrics import Metrics
from agent_lightning.core.types import Batch, Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Some of the model's parameters, one after the other as bytes in the object store."""

    parameters: tuple[dict[str, Any], ...]
    """{"name", "dtype", "shape", "offset"} of each parameter; names as in the checkpoint, offsets in bytes."""
    data: Any
    """A uint8 array, or a reference to one in Ray's object store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All weights of one version of the policy."""

    version: int
    buckets: tuple[WeightBucket, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What an update gave."""

    metrics: Metrics
    logprobs: tuple[Floats | None, ...] = ()
    """For each batch, float32[N, T]: log-probabilities of the tokens under the policy before the update, from the same
    computation as the loss; None, or no entry, for a batch for which none were computed before an optimiser step."""


class Learner(Protocol):
    """Trains the policy on batches."""

    async def update(self, batches: Sequence[Batch], *, epochs: int = 1) -> Update:
        """Train on all batches of a step: one optimiser step for each batch, in order, `epochs` times over."""

    async def publish(self) -> Weights:
        """The current weights, under the next version number."""

    async def save(self, path: Path) -> None:
        """Save weights, optimiser, schedule and random state to a folder."""

    async def restore(self, path: Path, version: int) -> None:
        """Load what `save` has written; the next `publish` returns version `version + 1`."""
