"""What runs in each training process: veRL's `TrainingWorker` with our loss and our way out for the weights."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo.core_algos import compute_value_loss, get_policy_loss_fn, kl_penalty
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig, TrainingWorkerConfig
from verl.workers.engine_workers import TrainingWorker


class ModelWorker(TrainingWorker):
    """One rank of a training group: the policy's, its reference's or its critic's."""

    def __init__(self, config: TrainingWorkerConfig, *, device: str, seed: int, num_threads: int) -> None:
        if device == "cpu":
            torch.set_num_threads(num_threads)
            # veRL would ask for "cpu:gloo,cpu:gloo", which torch refuses; an existing group is kept.
            torch.distributed.init_process_group(
                "gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        import agent_lightning.learners.verl_engines  # noqa: F401

        torch.manual_seed(seed)
        super().__init__(config)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(
        self, local_path: str, hdfs_path: str | None = None, del_local_after_load: bool = False
    ) -> None:
        """Learning rate and weight decay are the config's: who goes on from a checkpoint may have been given others."""
        scheduler, groups = self.engine.lr_scheduler, self.engine.optimizer.param_groups
        rates, decays = list(scheduler.base_lrs), [group["weight_decay"] for group in groups]
        self.engine.load_checkpoint(local_path, hdfs_path, del_local_after_load)
        scheduler.base_lrs = rates
        # Loading has replaced the groups.
        groups = self.engine.optimizer.param_groups
        for group, rate, decay, factor in zip(groups, rates, decays, scheduler.lr_lambdas, strict=True):
            group |= {"initial_lr": rate, "lr": rate * factor(scheduler.last_epoch), "weight_decay": decay}

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_weights(self, bucket_bytes: int, dtype: str) -> list[tuple[list[dict[str, Any]], ray.ObjectRef]]:
        """Put the whole model into Ray's object store, as flat buckets of bytes, its numbers in the engine's `dtype`.

        Every rank takes part in gathering the shards; rank 0 keeps them. Returns, on rank 0, one
        (parameters, reference) per bucket, where a parameter is {"name", "dtype", "shape", "offset"} and the
        reference is to a uint8 array; on the other ranks [].
        """
        parameters, _ = self.engine.get_per_tensor_param()
        buckets: list[tuple[list[dict[str, Any]], ray.ObjectRef]] = []
        entries: list[dict[str, Any]] = []
        pieces: list[Tensor] = []
        size, store = 0, _ObjectStore()
        for name, tensor in parameters:
            if self.rank != 0:
                continue
            kept = tensor.detach().to(vars(torch)[dtype] if tensor.is_floating_point() else tensor.dtype)
            if size and size + kept.nbytes > bucket_bytes:
                buckets.append((entries, store.put(pieces)))
                entries, pieces, size = [], [], 0
            entry = {"name": name, "dtype": str(kept.dtype).removeprefix("torch."), "shape": list(kept.shape)}
            entries.append(entry | {"offset": size})
            pieces.append(kept.contiguous().view(torch.uint8).reshape(-1))
            size += kept.nbytes
        if pieces:
            buckets.append((entries, store.put(pieces)))
        return buckets


class _ObjectStore:
    """Ray's, by way of host memory that is kept from bucket to bucket, for GPUs pinned: fresh memory costs more."""

    def __init__(self) -> None:
        self._host = torch.empty(0, dtype=torch.uint8)

    def put(self, pieces: list[Tensor]) -> ray.ObjectRef:
        """A reference to the pieces' bytes, one after the other."""
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
    """veRL's policy loss (PPO-clip, arXiv 1707.06347 eq. 7; GSPO; CISPO), each token counted with its own weight.

    `data` holds jagged rows aligned with the tokens: loss_mask, weights, advantages, old_log_probs and, with a
    reference, ref_log_probs. The loss of the whole batch is the sum over trained tokens of weight times token loss.
    The weights are folded into the advantages: the three losses are homogeneous in the advantage, so
    weight x loss(advantage) = loss(weight x advantage) exactly. `dp_size` undoes FSDP's averaging over ranks.
    """
    log_probs = _padded(model_output["log_probs"])
    # log_probs[:, i] is of token i+1: shift the row data left to stand beside it. The last place of a row then holds
    # its first token, which is of the prompt and masked.
    mask, weights, advantages, old = (
        torch.roll(_padded(data[name]), shifts=-1, dims=1)
        for name in ("loss_mask", "weights", "advantages", "old_log_probs")
    )
    mask = mask.bool()
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
        reference = torch.roll(_padded(data["ref_log_probs"]), shifts=-1, dims=1)
        kl = kl_penalty(logprob=log_probs, ref_logprob=reference, kl_penalty=config.kl_loss_type)
        kl_loss = (kl * weights)[mask].sum() * data["dp_size"]
        loss = loss + config.kl_loss_coef * kl_loss
        out["actor/kl_loss"] = Metric(AggregationType.SUM, kl_loss.detach() / data["dp_size"])
    if "entropy" in model_output:
        entropy = (_padded(model_output["entropy"]) * weights)[mask].sum() * data["dp_size"]
        loss = loss - config.entropy_coeff * entropy
        out["actor/entropy"] = Metric(AggregationType.SUM, entropy.detach() / data["dp_size"])
    gap = (log_probs.detach() - old)[mask].abs()
    out["gap/sum"] = Metric(AggregationType.SUM, gap.sum())
    out["gap/tokens"] = Metric(AggregationType.SUM, mask.sum())
    out["gap/max"] = Metric(AggregationType.MAX, gap.max() if gap.numel() else torch.zeros(()))
    out["actor/nll"] = Metric(AggregationType.SUM, -(log_probs.detach() * weights)[mask].sum())
    return loss, out


def sft_loss(
    model_output: dict[str, Tensor], data: TensorDict, dp_group: object = None
) -> tuple[Tensor, dict[str, Metric]]:
    """Cross-entropy: the sum of -log p times the token's weight. veRL's own gives all learnt tokens one weight."""
    mask, weights = (torch.roll(_padded(data[name]), shifts=-1, dims=1) for name in ("loss_mask", "weights"))
    nll = -(_padded(model_output["log_probs"]) * weights)[mask.bool()].sum()
    return nll * data["dp_size"], {"actor/nll": Metric(AggregationType.SUM, nll.detach())}


def value_loss(
    clip_range: float, model_output: dict[str, Tensor], data: TensorDict, dp_group: object = None
) -> tuple[Tensor, dict[str, Metric]]:
    """veRL's clipped value loss, each token counted with its own weight: sum of weight * max of the squared errors / 2.

    A squared error is homogeneous of degree two, so the root of the weight is folded into all that is compared.
    `data` holds, beside loss_mask and weights, the values from before the step and the returns. values[:, i] of the
    model is of the state in which token i + 1 is sampled.
    """
    mask, weights, values, returns = (
        torch.roll(_padded(data[name]), shifts=-1, dims=1) for name in ("loss_mask", "weights", "values", "returns")
    )
    root = weights.sqrt()
    loss, clipped = compute_value_loss(
        vpreds=_padded(model_output["values"]).float() * root,
        values=values * root,
        returns=returns * root,
        response_mask=mask.bool(),
        cliprange_value=clip_range * root,
        loss_agg_mode="token-sum",
        dp_size=data["dp_size"],
    )
    metrics = {
        "critic/loss": Metric(AggregationType.SUM, loss.detach() / data["dp_size"]),
        "critic/clip_fraction": Metric(AggregationType.MEAN, clipped.detach()),
    }
    return loss, metrics


def _padded(rows: Tensor) -> Tensor:
    """Jagged rows as [N, T], zeros after the end of each. Not by `to_padded_tensor`: it trusts a cached length."""
    return torch.nn.utils.rnn.pad_sequence(list(rows.unbind()), batch_first=True)
