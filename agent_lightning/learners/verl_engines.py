"""Our engines in veRL's own registry; imported where a model is trained or asked, not before: veRL's warn on import."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch.distributed.fsdp import FSDPModule
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

import agent_lightning.learners.attention  # noqa: F401


class _CausalModel(FSDPEngineWithLMHead):
    """A model that is built as a language model, with the attention that its config names."""

    def _build_module(self) -> Any:
        self.model_config.model_type = "language_model"
        return super()._build_module()


@EngineRegistry.register(model_type="policy", backend="fsdp2", device="cuda")
class PolicyEngine(_CausalModel):
    """veRL's engine, with the head's weight whole where veRL's fused log-probabilities read it.

    They do not call the head, and FSDP2 makes a module whole when it is called: one that is not tied to the embedding
    would stay in shards. After the backward pass FSDP2 shards it again with the rest.
    """

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
    """veRL's engine with a value head, which the config's architecture names; veRL's own type asks for flash-attn."""
