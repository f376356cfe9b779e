"""The critic's engine, in veRL's own registry; imported only where a critic runs: veRL's engines warn on import."""

from __future__ import annotations

from typing import Any

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead


@EngineRegistry.register(model_type="critic", backend="fsdp2", device="cuda")
class CriticEngine(FSDPEngineWithValueHead):
    """veRL's engine with a value head, with the attention that its config names: veRL's own always asks flash-attn."""

    def _build_module(self) -> Any:
        # The architecture in the config says that the head is a value's; this type, that the rest is as for a policy.
        self.model_config.model_type = "language_model"
        return super()._build_module()
