"""Our engines in veRL's registry. Imported in training processes only, since veRL's engines warn on import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from types import MethodType
from typing import Any, Final

import torch
import torch.distributed
from peft.tuners.lora import LoraLayer
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from verl.utils import tensordict_utils
from verl.utils.device import get_device_name
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from agent_lightning.core.errors import EngineError
from agent_lightning.core.text import error_line
from agent_lightning.learners import head
from agent_lightning.learners.attention import share_prefixes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the rows of a micro-batch go through a model."""

    attention: str
    """The attention, by its name in Transformers."""
    packed: bool = False
    """Whether the rows lie end to end, [1, N], so that they cost only their tokens; else they are padded, [N, T]."""
    fused: bool = False
    """Whether log-probabilities are computed for some tokens at a time, as logits are as wide as the vocabulary."""
    shared: bool = False
    """Whether what packed rows have in common at their beginning, such as a group's prompt, is computed once."""

    def __str__(self) -> str:
        options = [name for name in ("fused", "shared") if getattr(self, name)]
        return ", ".join(["packed" if self.packed else "padded", self.attention, *options])


_ALONE: Final = Layout(attention="eager")
"""The layout of a single row that all others are compared with: Transformers' own formulas, and nothing to pad."""
_PROBE: Final = (20, 31, 9, 14)
"""Lengths of the rows that are compared, in tokens. Half of each row's tokens are those of the row before it."""


class _CausalModel(FSDPEngineWithLMHead):
    """An engine that builds its model as a language model, and finds out by trying how rows may go through it.

    Rows end to end and veRL's fused log-probabilities are fast, but not right for every model: rows leak into each
    other through a convolution or a recurrent state, and fused log-probabilities leave out what a model does to logits.
    """

    fuses = False
    """Whether the outputs are log-probabilities, which can be computed for some tokens at a time."""
    layout = _ALONE
    trained_output: Mapping[str, Tensor] = {}
    """What the model put out for the last batch that it was trained on, if the batch asked for it."""
    _gap_is_small = True
    _wanted_N: Tensor | None = None
    """Whether the loss reads the outputs at each token of the micro-batch that is computed; None: all are read."""
    _with_entropy = False

    def _build_module(self) -> Any:
        self.model_config.model_type = "language_model"
        config = self.model_config.hf_config
        # veRL reads the numbers of heads of every model, also of those that have none, such as Mamba.
        absent = [name for name in ("num_attention_heads", "num_key_value_heads") if not hasattr(config, name)]
        vars(config).update(dict.fromkeys(absent, 1))
        module = super()._build_module()
        for name in absent:
            delattr(config, name)
        return module

    def _build_lora_module(self, module: Any) -> Any:
        """veRL's adapters, with the dropout that it does not know."""
        module = super()._build_lora_module(module)
        if rate := self.model_config.lora["dropout"]:
            for part in module.modules():
                if isinstance(part, LoraLayer):
                    part.lora_dropout["default"] = torch.nn.Dropout(rate)
        return module

    def choose_layout(self, bound: float) -> str:
        """Use the fastest layout in which rows of a batch have the outputs of rows alone, up to a mean difference of
        `bound`. Every rank takes part. Returns the layout in words. Raises EngineError if there is none."""
        on_gpu = get_device_name() != "cpu"
        fast = "flash_attention_2" if on_gpu and find_spec("flash_attn") is not None else "rows_sdpa"
        attentions = [(fast, True), *((name, False) for name in (fast, "sdpa", "eager") if name != "rows_sdpa")]
        # An adapter of the output head does nothing yet, so a trial would not show that it is left out.
        fuses = self.fuses and not isinstance(self.module.get_output_embeddings(), LoraLayer)
        layouts = [
            Layout(attention=attention, packed=packed, fused=fused, shared=shared)
            for attention, packed in attentions
            for shared in (True, False)[attention != "rows_sdpa" :]
            for fused in (True, False)[not fuses :]
        ]
        size = self.module.get_input_embeddings().num_embeddings
        rows = [torch.randint(size, (length,), generator=torch.Generator().manual_seed(length)) for length in _PROBE]
        for before, row in pairwise(rows):
            row[: len(row) // 2] = before[: len(row) // 2]
        alone, reasons = torch.cat([self._outputs([row], _ALONE) for row in rows]), []
        for layout in layouts:
            try:
                difference = (self._outputs(rows, layout) - alone).abs().mean()
                reason = f"differs by {difference:.1e}"
            except Exception as error:  # a model may refuse a layout in any way
                difference, reason = torch.tensor(torch.inf, device=alone.device), error_line(error)
            torch.distributed.all_reduce(difference, op=torch.distributed.ReduceOp.MAX)
            if difference <= bound:
                self._use(layout)
                return str(layout)
            reasons.append(f"{layout}: {reason}")
        raise EngineError(f"rows of a batch differ from rows alone: {'; '.join(reasons)}")

    def _outputs(self, rows: Sequence[Tensor], layout: Layout) -> Tensor:
        """The model's output at each token of the rows but their last ones, one row after the other: float32."""
        self._use(layout)
        tensors = {"input_ids": rows, "position_ids": [torch.arange(len(row)) for row in rows]}
        batch = tensordict_utils.get_tensordict(
            {
                name: torch.nested.as_nested_tensor(list(tensor), layout=torch.jagged)
                for name, tensor in tensors.items()
            },
            {"temperature": 1.0, "calculate_entropy": False},
        )
        with self.eval_mode(), torch.no_grad():
            _, output = self.forward_step(batch, loss_function=None, forward_only=True)
        (values,) = output["model_output"].values()
        return torch.cat([row.float().flatten()[:-1] for row in values.unbind()])

    def _use(self, layout: Layout) -> None:
        self.layout = layout
        self.module.config._attn_implementation = layout.attention
        # With LoRA peft's model is around it.
        model = self.module.get_base_model() if self._is_lora else self.module
        model.forward = partial(self._fused, model) if layout.fused else MethodType(type(model).forward, model)

    def _fused(self, model: Any, **inputs: Any) -> Any:
        return head.outputs(model, wanted_N=self._wanted_N, with_entropy=self._with_entropy, **inputs)

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> Any:
        """veRL's, with micro-batches that are small enough even if their rows are padded; and with the verdict on the
        log-probability gap, if the batch has a bound for it."""
        if not self.layout.packed:
            rows, longest = data.shape[0], max(tensordict_utils.get(data, "global_token_num"))
            most = max(1, int(data["max_token_len_per_gpu"]) // longest)
            size = max(size for size in range(1, rows + 1) if rows % size == 0 and size <= most)
            tensordict_utils.assign_non_tensor(data, use_dynamic_bsz=False, micro_batch_size_per_gpu=size)
        output = super().forward_backward_batch(data, loss_function, forward_only)
        self.trained_output = {} if forward_only else dict(output["model_output"])
        bound, metrics = tensordict_utils.get(data, "gap_bound", default=None), output["metrics"]
        if bound is not None and not forward_only and "gap/sum" in metrics:  # a critic has none
            sums = torch.tensor(
                [sum(metrics[name].values) for name in ("gap/sum", "gap/tokens")], device=get_device_name()
            )
            torch.distributed.all_reduce(sums, group=self.get_data_parallel_group())
            self._gap_is_small = bool(sums[0] <= bound * sums[1])
        return output

    def optimizer_step(self) -> float:
        """veRL's; no step is taken if the gap is beyond its bound: the run ends, with the policy as it is."""
        return float(super().optimizer_step()) if self._gap_is_small else 0.0

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        layout = {"use_remove_padding": self.layout.packed, "use_fused_kernels": self.layout.fused}
        tensordict_utils.assign_non_tensor(micro_batch, **layout)
        self._with_entropy = tensordict_utils.get(micro_batch, "calculate_entropy", default=False)
        wanted_N = None  # in training, the outputs at tokens whose next one is trained
        if self.layout.packed and loss_function is not None and not forward_only:
            wanted_N = micro_batch["loss_mask"].values().roll(-1).bool()
        if not self.layout.shared:
            self._wanted_N = wanted_N
            return super().forward_step(micro_batch, loss_function, forward_only)
        rows = micro_batch["input_ids"]
        kept, index = share_prefixes(rows.unbind())
        self._wanted_N = None
        if wanted_N is not None:
            self._wanted_N = torch.zeros(sum(len(tokens) for tokens, _ in kept), dtype=torch.bool, device=rows.device)
            self._wanted_N[index.to(rows.device)[wanted_N]] = True
        positions = [torch.arange(start, start + len(tokens), device=tokens.device) for tokens, start in kept]
        smaller = micro_batch.copy()
        smaller["input_ids"] = torch.nested.as_nested_tensor([tokens for tokens, _ in kept], layout=torch.jagged)
        smaller["position_ids"] = torch.nested.as_nested_tensor(positions, layout=torch.jagged)

        def expand(output: Mapping[str, Tensor]) -> dict[str, Tensor]:
            offsets, places = rows.offsets(), index.to(rows.device)
            return {
                name: torch.nested.nested_tensor_from_jagged(values.values()[places].to(rows.device), offsets)
                for name, values in output.items()
            }

        def loss(model_output: dict[str, Tensor], data: TensorDict, dp_group: object) -> Any:
            return loss_function(model_output=expand(model_output), data=micro_batch, dp_group=dp_group)

        value, output = super().forward_step(smaller, loss if loss_function is not None else None, forward_only)
        return value, output | {"model_output": expand(output["model_output"])}


@EngineRegistry.register(model_type="policy", backend="fsdp2", device="cuda")
class PolicyEngine(_CausalModel):
    """veRL's engine, which also gathers the output head's weight, for fused log-probabilities. They read the
    weight without calling the head, but FSDP2 gathers a module's shards only when it is called; a head that is not tied
    to the embedding would stay sharded. After the backward pass FSDP2 shards it again."""

    fuses = True

    def forward_step(self, micro_batch: TensorDict, loss_function: Any, forward_only: bool) -> Any:
        head = self.module.get_output_embeddings()
        if not (self.layout.fused and isinstance(head, FSDPModule)):
            return super().forward_step(micro_batch, loss_function, forward_only)
        head.unshard()
        result = super().forward_step(micro_batch, loss_function, forward_only)
        if forward_only:
            head.reshard()
        return result


@EngineRegistry.register(model_type="critic", backend="fsdp2", device="cuda")
class CriticEngine(_CausalModel, FSDPEngineWithValueHead):
    """veRL's engine with a value head, as the config's architecture says; veRL's own critic engine needs flash-attn."""
