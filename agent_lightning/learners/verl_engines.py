"""Our engines in veRL's registry. Imported in training processes only, since veRL's engines warn on import."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

import agent_lightning.learners.attention  # noqa: F401


class _CausalModel(FSDPEngineWithLMHead):
    """An engine that builds its model as a language model, with the attention that its config names."""

    def _build_module(self) -> Any:
        self.model_config.model_type = "language_model"
        return super()._build_module()


@EngineRegistry.register(model_type="policy", backend="fsdp2", device="cuda")
class PolicyEngine(_CausalModel):
    """veRL's engine, which also gathers the output head's weight, for veRL's fused log-probabilities. They read the
    weight without calling the head, but FSDP2 gathers a module's shards only when it is called; a head that is not tied
    to the embedding would stay sharded. After the backward pass FSDP2 shards it again."""

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        head = self.module.get_output_embeddings()
        if not isinstance(head, FSDPModule):
            return super().forward_step(micro_batch, loss_function, forward_only)
        head.unshard()
        result = super().forward_step(micro_batch, loss_function, forward_only)
        if forward_only:
            head.reshard()
        return result


@EngineRegistry.register(model_type="critic", backend="fsdp2", device="cuda")
class CriticEngine(_CausalModel, FSDPEngineWithValueHead):
    """veRL's engine with a value head, as the config's architecture says; veRL's own critic engine needs flash-attn."""
