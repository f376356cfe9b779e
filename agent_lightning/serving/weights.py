"""Weights from Ray's object store into vLLM, in place, through vLLM's weight-transfer API.

Registered as the backend `ray_object_store` in every vLLM process by the entry-point group `vllm.general_plugins`.

A replica of the policy reads the weights from the object store of its node (shared memory: no copy), and lays them
in a file in memory that the engine's worker processes map. Those processes are vLLM's own children, not Ray workers,
so a file is the one thing all of them can see.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "ray_object_store"


def register() -> None:
    """Make the backend known to vLLM. Safe to call twice: vLLM loads its plug-ins in every process."""
    with suppress(ValueError):  # vLLM's word for: registered already
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreEngine)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket of weights."""

    path: str
    """File that holds the bytes."""
    parameters: list[dict[str, Any]]
    """{"name", "dtype", "shape", "offset"} of each parameter in the file."""


class ObjectStoreEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The receiving side, in each vLLM worker."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        return None

    def start_weight_update(self) -> None:
        # Layers whose weights were repacked after loading need vLLM's own reload bracket: without it the packed
        # copies keep the old values.
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
        # A copy: the mapping ends with the block, and a layer may keep what it is given until it is complete.
        yield entry["name"], view.to(device, copy=True)


def _repack_tied_heads(model: torch.nn.Module) -> None:
    """Pack the output head again where it shares the embedding's weight.

    The reload bracket sees the weight arrive at the embedding; on a CPU the head keeps a packed copy of its own,
    which would silently answer with the old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    modules = list(model.modules())
    embeddings = [m for m in modules if isinstance(m, VocabParallelEmbedding) and not isinstance(m, ParallelLMHead)]
    for head in (m for m in modules if isinstance(m, ParallelLMHead)):
        for embedding in embeddings:
            if head.weight.data_ptr() == embedding.weight.data_ptr() or head.weight is embedding.weight:
                head.quant_method.process_weights_after_loading(head)
