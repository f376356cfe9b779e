"""The log-probability and the entropy of each next token, from the last hidden states of a language model.

Logits are as wide as the vocabulary, and with a small model they are most of the work. So they are computed for a part
of the tokens at a time, and only for tokens whose outputs are wanted: a prompt's are not, in training. If the output
head is not trained, as with LoRA, the gradient of the hidden states is computed at once: backward needs no logits.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from verl.models.transformers.dense_common import CausalLMOutputForPPO
from verl.utils.experimental.torch_functional import FusedLinearForPPO

_PART: Final = 512
"""Tokens whose logits are computed at a time."""


def outputs(
    model: Any,
    *,
    input_ids: Tensor,
    temperature: float,
    wanted_N: Tensor | None,
    with_entropy: bool,
    shift_labels: Tensor | None = None,
    **inputs: Any,
) -> CausalLMOutputForPPO:
    """What a model of Transformers gives for tokens [B, T], by veRL's names: log_probs and entropy, float32[B, T].

    At i they are of the token at i + 1, or of `shift_labels` at i. They are computed where `wanted_N`, bool[B * T], is
    true or None, and 0 elsewhere; the entropy counts only `with_entropy`.
    """
    ignored = ("labels", "logits_to_keep", "return_dict")
    inputs = {name: value for name, value in inputs.items() if value is not None and name not in ignored}
    hidden_ND = model.base_model(input_ids=input_ids, **inputs)[0].flatten(0, 1)
    label_N = (input_ids.roll(-1, dims=-1) if shift_labels is None else shift_labels).flatten()
    places = None if wanted_N is None else wanted_N.nonzero().flatten()
    if places is not None:
        hidden_ND, label_N = hidden_ND[places], label_N[places]
    weight_VD: Any = model.get_output_embeddings().weight
    if weight_VD.requires_grad:
        pair = FusedLinearForPPO(chunk_size=_PART).forward(hidden_ND, weight_VD, label_N, temperature)
    else:
        pair = _FrozenHead.apply(hidden_ND, weight_VD, label_N, temperature, with_entropy)
    if places is not None:
        zeros_N = hidden_ND.new_zeros(input_ids.numel(), dtype=torch.float32)
        pair = tuple(zeros_N.index_copy(0, places, values.float()) for values in pair)
    log_probs, entropy = (values.view(input_ids.shape) for values in pair)
    return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy)


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities and entropies of labels [N] from hidden states [N, D] and a head [V, D] without a gradient.

    With p = softmax(logits), H = -sum(p log p) and W the head's rows divided by the temperature: the gradient of a
    label's log-probability is W[label] - p W, and that of the entropy is -(p (log p + H)) W.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        size = len(hidden_ND)
        logprob_N, entropy_N = (torch.zeros(size, dtype=torch.float32, device=hidden_ND.device) for _ in range(2))
        needs_gradient = ctx.needs_input_grad[0]
        gradients = [torch.empty_like(hidden_ND) for _ in range(needs_gradient * (1 + with_entropy))]
        for start in range(0, size, _PART):
            part = slice(start, start + _PART)
            logprob_PV = (hidden_ND[part] @ weight_VD.t()).float().div_(temperature)
            logprob_PV -= logprob_PV.logsumexp(dim=1, keepdim=True)
            logprob_N[part] = logprob_PV.gather(1, label_N[part, None])[:, 0]
            if not (needs_gradient or with_entropy):
                continue
            prob_PV = logprob_PV.exp()
            if needs_gradient:
                gradients[0][part] = (weight_VD[label_N[part]] - prob_PV.to(weight_VD.dtype) @ weight_VD) / temperature
            if with_entropy:
                entropy_N[part] = -torch.linalg.vecdot(prob_PV, logprob_PV)
            if needs_gradient and with_entropy:
                prob_PV *= logprob_PV.add_(entropy_N[part, None])
                gradients[1][part] = -(prob_PV.to(weight_VD.dtype) @ weight_VD) / temperature
        ctx.save_for_backward(*gradients)
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(output_gradients, ctx.saved_tensors, strict=False)
        terms = [output_N[:, None].to(own_ND.dtype) * own_ND for output_N, own_ND in pairs if output_N is not None]
        return (sum(terms[1:], terms[0]) if terms else None, None, None, None, None)
