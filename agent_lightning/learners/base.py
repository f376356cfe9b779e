"""What a learner is: four methods, documented by their call site in `loop.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent_lightning.core.metrics import Metrics
from agent_lightning.core.types import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """A part of the weights, as bytes in the object store."""

    parameters: tuple[dict[str, Any], ...]
    """{"name", "dtype", "shape", "offset"} of each parameter in `data`; names as in the checkpoint."""
    data: Any
    """A uint8 array, or a reference to one in Ray's object store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One version of the policy's weights, whole."""

    version: int
    buckets: tuple[WeightBucket, ...]


class Learner(Protocol):
    """Turns batches into new versions of the policy."""

    async def update(self, batches: Sequence[Batch], *, epochs: int = 1) -> Metrics:
        """One optimiser step per batch, in order, `epochs` times over. `batches` are a whole step's."""
        ...

    async def publish(self) -> Weights:
        """The weights as they are now, with the next version's number."""
        ...

    async def save(self, path: Path) -> None:
        """Weights, optimiser, schedule and random state into a folder."""
        ...

    async def restore(self, path: Path, version: int) -> None:
        """Back to what `save` kept; the next `publish` has `version + 1`."""
        ...
