"""The code of a training process: veRL's `TrainingWorker` with our losses, and with the export of the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed
from peft.tuners.lora import LoraLayer
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.trainer.ppo.core_algos import compute_value_loss, get_policy_loss_fn, kl_penalty
from verl.utils.metric import AggregationType, Metric
from verl.utils.tensordict_utils import get_tensordict
from verl.workers.config import ActorConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker

from agent_lightning.core.hub import model_folder


class ModelWorker(TrainingWorker):
    """One rank of a training group: of the policy, the reference or the critic."""

    def __init__(
        self, config: TrainingWorkerConfig, *, device: str, seed: int, num_threads: int, revision: str | None
    ) -> None:
        """`revision`: commit of a model that is named by its hub id."""
        if device == "cpu":
            torch.set_num_threads(num_threads)
            # veRL would create a group with "cpu:gloo,cpu:gloo", which torch refuses; it keeps a group that exists.
            torch.distributed.init_process_group(
                "gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        import agent_lightning.learners.verl_engines  # noqa: F401

        config.model_config.local_path = model_folder(config.model_config.path, revision)  # on this node
        torch.manual_seed(seed)
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def choose_layout(self, bound: float) -> str:
        """Initialize the model, and choose how rows go through it; returns that in words. Raises EngineError."""
        self.reset()
        return str(self.engine.choose_layout(bound))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Load a checkpoint, but keep learning rate and weight decay, which the config may have changed since."""
        scheduler, groups = self.engine.lr_scheduler, self.engine.optimizer.param_groups
        rates, decays = list(scheduler.base_lrs), [group["weight_decay"] for group in groups]
        self.engine.load_checkpoint(local_path, hdfs_path, del_local_after_load)
        scheduler.base_lrs = rates
        # Loading has replaced the parameter groups.
        groups = self.engine.optimizer.param_groups
        for group, rate, decay, factor in zip(groups, rates, decays, scheduler.lr_lambdas, strict=True):
            group |= {"initial_lr": rate, "lr": rate * factor(scheduler.last_epoch), "weight_decay": decay}

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_batch(self, data: TensorDict) -> TensorDict:
        """veRL's, which drops what the model put out; here its log-probabilities are returned if the batch asks for
        them by `return_model_output`."""
        output = super().train_batch(data)
        log_probs = self.engine.trained_output.get("log_probs")
        if log_probs is None:
            return output
        return get_tensordict({"log_probs": log_probs.cpu()}, {"metrics": output["metrics"]})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_weights(self, bucket_bytes: int, dtype: str) -> list[tuple[list[dict[str, Any]], ray.ObjectRef]]:
        """Put the model into Ray's object store, as buckets of at most `bucket_bytes` bytes (or one larger parameter).

        Floating-point parameters are converted to `dtype`. Every rank takes part in gathering the shards. Returns on
        rank 0 a pair for each bucket: the parameters, each {"name", "dtype", "shape", "offset"}, and a reference to a
        uint8 array; on the other ranks [].
        """
        parameters = self._merged() if self.model_config.lora_rank else self.engine.get_per_tensor_param()[0]
        buckets: list[tuple[list[dict[str, Any]], ray.ObjectRef]] = []
        entries: list[dict[str, Any]] = []
        pieces: list[Tensor] = []
        size, store = 0, _ObjectStore()
        for name, tensor in parameters:
            if self.rank != 0:
                continue
            array = tensor.detach().to(vars(torch)[dtype] if tensor.is_floating_point() else tensor.dtype)
            if size and size + array.nbytes > bucket_bytes:
                buckets.append((entries, store.put(pieces)))
                entries, pieces, size = [], [], 0
            entry = {"name": name, "dtype": str(array.dtype).removeprefix("torch."), "shape": list(array.shape)}
            entries.append(entry | {"offset": size})
            pieces.append(array.contiguous().view(torch.uint8).reshape(-1))
            size += array.nbytes
        if pieces:
            buckets.append((entries, store.put(pieces)))
        return buckets

    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters with the adapters added, by the base model's names. veRL's own merge rounds to bfloat16."""
        module: Any = self.engine.module
        state = module.state_dict()
        scales = {name: part.scaling["default"] for name, part in module.named_modules() if isinstance(part, LoraLayer)}
        for name, tensor in state.items():
            if "lora_" in name:
                continue
            value, layer = _gathered(tensor), name.removesuffix(".base_layer.weight")
            if layer != name:
                low, high = (_gathered(state[f"{layer}.lora_{part}.default.weight"]) for part in "AB")
                value = value + scales[layer] * (high @ low)
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), value


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _ObjectStore:
    """Ray's object store, through host memory that all buckets share (pinned for GPUs): fresh memory costs more."""

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.uint8)

    def put(self, pieces: list[Tensor]) -> ray.ObjectRef:
        """Store the pieces' bytes, one after the other; returns a reference to a uint8 array."""
        sizes = [piece.nbytes for piece in pieces]
        if sum(sizes) > len(self._host):
            self._host = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pieces[0].is_cuda)
        for part, piece in zip(self._host[: sum(sizes)].split(sizes), pieces, strict=True):
            part.copy_(piece)
        array: np.ndarray = self._host[: sum(sizes)].numpy()
        return ray.put(array)


def policy_loss(
    config: ActorConfig, model_output: dict[str, Tensor], data: TensorDict, dp_group: object = None
) -> tuple[Tensor, dict[str, Metric]]:
    """veRL's policy loss (PPO-clip, arXiv 1707.06347 eq. 7; GSPO; CISPO): the sum of weight * loss over trained tokens.

    `data` holds jagged rows with a value for each token: loss_mask, weights, advantages, old_log_probs, with a
    reference ref_log_probs, and is_current if the gap between engine and learner is measured on the tokens where it is
    1. The advantages are multiplied by the weights: all three losses are homogeneous in the
    advantage, so weight * loss(advantage) = loss(weight * advantage) exactly. The factor `dp_size` undoes FSDP's
    averaging over ranks. Returns the loss, a scalar, and metrics by veRL's names.
    """
    log_probs = _padded(model_output["log_probs"])
    mask, weights, advantages, old = _shifted(data, "weights", "advantages", "old_log_probs")
    config.global_batch_info["dp_size"] = data["dp_size"]
    loss, metrics = get_policy_loss_fn(config.policy_loss.loss_mode)(
        old_log_prob=torch.where(mask, old, log_probs.detach()),
        log_prob=log_probs,
        advantages=advantages * weights,
        response_mask=mask,
        loss_agg_mode="token-sum",
        config=config,
    )
    out = Metric.from_dict(metrics, aggregation=AggregationType.MEAN)
    if config.use_kl_loss:
        _, reference = _shifted(data, "ref_log_probs")
        kl = kl_penalty(logprob=log_probs, ref_logprob=reference, kl_penalty=config.kl_loss_type)
        kl_loss = (kl * weights)[mask].sum() * data["dp_size"]
        loss = loss + config.kl_loss_coef * kl_loss
        out["actor/kl_loss"] = Metric(AggregationType.SUM, kl_loss.detach() / data["dp_size"])
    if "entropy" in model_output:
        entropy = (_padded(model_output["entropy"]) * weights)[mask].sum() * data["dp_size"]
        loss = loss - config.entropy_coeff * entropy
        out["actor/entropy"] = Metric(AggregationType.SUM, entropy.detach() / data["dp_size"])
    if "is_current" in data:
        _, current = _shifted(data, "is_current")
        gap = (log_probs.detach() - old)[mask & current.bool()]
        out["gap/sum"] = Metric(AggregationType.SUM, gap.abs().sum())
        out["gap/signed"] = Metric(AggregationType.SUM, gap.sum())
        out["gap/tokens"] = Metric(AggregationType.SUM, float(gap.numel()))
        out["gap/max"] = Metric(AggregationType.MAX, gap.abs().max() if gap.numel() else torch.zeros(()))
    out["actor/nll"] = Metric(AggregationType.SUM, -(log_probs.detach() * weights)[mask].sum())
    return loss, out


def sft_loss(
    model_output: dict[str, Tensor], data: TensorDict, dp_group: object = None
) -> tuple[Tensor, dict[str, Metric]]:
    """Cross-entropy: the sum of -log p * weight over trained tokens. In veRL's own loss all tokens weigh the same."""
    mask, weights = _shifted(data, "weights")
    nll = -(_padded(model_output["log_probs"]) * weights)[mask].sum()
    return nll * data["dp_size"], {"actor/nll": Metric(AggregationType.SUM, nll.detach())}


def value_loss(
    clip_range: float, model_output: dict[str, Tensor], data: TensorDict, dp_group: object = None
) -> tuple[Tensor, dict[str, Metric]]:
    """veRL's clipped value loss: the sum over trained tokens of weight * max(squared error, clipped squared error) / 2.

    `data` holds jagged rows: loss_mask, weights, returns, and values from before the step. The model's values[:, i] is
    of the state in which token i + 1 is sampled. A squared error is homogeneous of degree two, so values, returns and
    clip range are multiplied by the square root of the weight.
    """
    mask, weights, values, returns = _shifted(data, "weights", "values", "returns")
    root = weights.sqrt()
    loss, clipped = compute_value_loss(
        vpreds=_padded(model_output["values"]).float() * root,
        values=values * root,
        returns=returns * root,
        response_mask=mask,
        cliprange_value=clip_range * root,
        loss_agg_mode="token-sum",
        dp_size=data["dp_size"],
    )
    metrics = {
        "critic/loss": Metric(AggregationType.SUM, loss.detach() / data["dp_size"]),
        "critic/clip_fraction": Metric(AggregationType.MEAN, clipped.detach()),
    }
    return loss, metrics


def _shifted(data: TensorDict, *names: str) -> list[Tensor]:
    """The loss mask and these inputs, each [N, T], shifted to the left, since a model's output i is of token i + 1. The
    first token of each row, which is part of the prompt and masked, moves to its end."""
    mask, *inputs = (torch.roll(_padded(data[name]), shifts=-1, dims=1) for name in ("loss_mask", *names))
    return [mask.bool(), *inputs]


def _padded(rows: Tensor) -> Tensor:
    """Jagged rows as [N, T], with zeros after each row's end. (`to_padded_tensor` would trust a cached length.)"""
    return torch.nn.utils.rnn.pad_sequence(list(rows.unbind()), batch_first=True)
