"""Weights from Ray's object store into vLLM, in place, through vLLM's weight-transfer API.

Registered as the backend `ray_object_store` in every vLLM process by the entry-point group `vllm.general_plugins`.

A replica of the policy reads the weights from the object store of its node (shared memory: no copy) and writes them to
a file in memory that the engine's worker processes map: they are vLLM's own children, not Ray workers, and cannot reach
the object store.
"""

from __future__ import annotations

import asyncio
import math
import mmap
from collections.abc import AsyncGenerator, Awaitable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "ray_object_store"


async def in_shared_memory(arrays: Iterable[Awaitable[Any]]) -> AsyncGenerator[str, None]:
    """Yield, for each uint8 array, the path of a file in memory that begins with the array's bytes. The file holds them
    until the next path is requested; meanwhile the next array is written to another file. Two files are used in turns,
    because fresh memory from the kernel costs more than the copy. Raises what an array raises."""
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else None
    create = partial(NamedTemporaryFile, prefix="agl-weights-", dir=folder)
    with create() as file, create() as other:
        tasks: list[asyncio.Task[str]] = []
        try:
            for array in arrays:
                tasks.append(asyncio.create_task(_write(array, file)))
                if len(tasks) > 1:
                    yield await tasks[-2]
                file, other = other, file
            if tasks:
                yield await tasks[-1]
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)


async def _write(array: Awaitable[Any], file: Any) -> str:
    data = memoryview(await array)

    def write() -> str:
        file.seek(0)
        file.write(data)
        file.flush()
        return str(file.name)

    return await asyncio.to_thread(write)


def register() -> None:
    """Make the backend known to vLLM. May be called twice: vLLM loads its plug-ins in every process."""
    with suppress(ValueError):  # raised if it is registered already
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreEngine)


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A bucket of weights: some parameters, one after the other in a file."""

    path: str
    """The file with the bytes."""
    parameters: list[dict[str, Any]]
    """{"name", "dtype", "shape", "offset"} of each parameter in the file."""


class ObjectStoreEngine(WeightTransferEngine[WeightTransferInitInfo, UpdateInfo]):
    """The receiving side, in each of vLLM's worker processes."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        return None

    def start_weight_update(self) -> None:
        # vLLM repacks the weights of some layers after loading. Outside of its reload bracket, the packed copies would
        # keep the old values.
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with open(update_info.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as raw:
            # Copies: the mapping ends with the block, and a layer may keep tensors until all its parameters are loaded.
            self.model.load_weights(
                [(p["name"], _view(raw, p).to(self.device, copy=True)) for p in update_info.parameters]
            )

    def finish_weight_update(self) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        # The bracket repacks only the embedding, at which a tied weight arrives. On a CPU the output head has a packed
        # copy of its own, which would answer with the old weights.
        modules = list(self.model.modules())
        embeddings = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
        for head in (m for m in modules if isinstance(m, ParallelLMHead)):
            for embedding in embeddings:
                if head.weight.data_ptr() == embedding.weight.data_ptr() or head.weight is embedding.weight:
                    head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        return None


def _view(raw: mmap.mmap, parameter: Mapping[str, Any]) -> torch.Tensor:
    shape, dtype = parameter["shape"], vars(torch)[parameter["dtype"]]
    return torch.frombuffer(raw, dtype=dtype, count=math.prod(shape), offset=parameter["offset"]).reshape(shape)
