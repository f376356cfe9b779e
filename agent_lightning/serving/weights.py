"""Weights from Ray's object store into vLLM, in place, through vLLM's weight-transfer API.

Registered as the backend `ray_object_store` in every vLLM process by the entry-point group `vllm.general_plugins`.

A replica of the policy reads the weights from the object store of its node (shared memory: no copy) and writes them to
a file in memory that the engine's worker processes map: they are vLLM's own children, not Ray workers, and cannot reach
the object store.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncGenerator, Awaitable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "ray_object_store"
_SHARED_MEMORY = Path("/dev/shm")


async def in_shared_memory(arrays: Iterable[Awaitable[Any]]) -> AsyncGenerator[str, None]:
    """Yield, for each uint8 array, the path of a file in memory that begins with the array's bytes.

    The file holds them until the next path is requested; meanwhile the next array is written to another file. Two files
    are used in turns, because fresh memory from the kernel costs more than the copy. Raises what an array raises.
    """
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with (
        NamedTemporaryFile(prefix="agl-weights-", dir=folder) as file,
        NamedTemporaryFile(prefix="agl-weights-", dir=folder) as other,
    ):
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
class InitInfo(WeightTransferInitInfo):
    """What both sides agree on beforehand: nothing."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A bucket of weights: some parameters, one after the other in a file."""

    path: str
    """The file with the bytes."""
    parameters: list[dict[str, Any]]
    """{"name", "dtype", "shape", "offset"} of each parameter in the file."""


class ObjectStoreEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The receiving side, in each of vLLM's worker processes."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        return None

    def start_weight_update(self) -> None:
        # vLLM repacks the weights of some layers after loading. Outside of its reload bracket, the packed copies would
        # keep the old values.
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        with open(update_info.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as raw:
            self.model.load_weights(list(_tensors(raw, update_info.parameters, self.device)))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        return None


def _tensors(
    raw: mmap.mmap, parameters: list[dict[str, Any]], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    for entry in parameters:
        dtype = vars(torch)[entry["dtype"]]
        count = 1
        for size in entry["shape"]:
            count *= size
        view = torch.frombuffer(raw, dtype=dtype, count=count, offset=entry["offset"]).reshape(entry["shape"])
        # A copy: the mapping ends with the block, and a layer may keep a tensor until all its parameters are loaded.
        yield entry["name"], view.to(device, copy=True)


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Repack the output head if it shares the embedding's weight.

    The reload bracket repacks only the embedding, at which the weight arrives. On a CPU the head has a packed copy of
    its own, which would answer with the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(model.modules())
    embeddings = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
    for head in (m for m in modules if isinstance(m, ParallelLMHead)):
        for embedding in embeddings:
            if head.weight.data_ptr() == embedding.weight.data_ptr() or head.weight is embedding.weight:
                head.quant_method.process_weights_after_loading(head)
