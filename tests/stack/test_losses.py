"""The policy losses token by token, against the papers' formulas in plain torch; no Ray, no model."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.stack
LENGTHS = (7, 4, 6)
LOW, HIGH = 0.2, 0.3


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    """The module under test. It imports veRL, which takes seconds: here, and not when the tests are collected."""
    return importlib.import_module("agent_lightning.learners.verl_worker")


def tensors(**columns: list[torch.Tensor]) -> Any:
    """The batch of one process, as veRL hands it to a loss: each column holds rows of unequal length."""
    from tensordict import TensorDict

    data = TensorDict({}, batch_size=[])
    for name, rows in columns.items():
        data[name] = nested(rows)
    data["dp_size"] = 1
    return data


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def config(loss: str, entropy_coef: float = 0.0) -> Any:
    from verl.workers.config import FSDPActorConfig, PolicyLossConfig

    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=LOW,
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        policy_loss=PolicyLossConfig(loss_mode=loss),
        entropy_coeff=entropy_coef,
    )


def formula(loss: str, new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """The loss of each trained token of one row."""
    ratio = (new - old).exp()
    if loss == "cispo":  # arXiv 2506.13585 eq. 4
        return -ratio.clamp(1 - LOW, 1 + HIGH).detach() * advantage * new
    if loss == "gspo":  # arXiv 2507.18071 eq. 15: the row's ratio, its gradient through each token
        ratio = (new - old).mean().exp().detach() * (new - new.detach()).exp()
    token = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - LOW, 1 + HIGH))
    if loss == "vanilla":  # dual clip, arXiv 1912.09729 eq. 5
        token = torch.where(advantage < 0, torch.minimum(token, -3.0 * advantage), token)
    return token


@pytest.mark.parametrize("loss", ["vanilla", "gspo", "cispo"])
def test_loss_and_gradient_are_the_paper_s(loss: str, worker: ModuleType) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(length) for length in LENGTHS]  # position i is of token i + 1
    masks = [torch.arange(length) >= 2 for length in LENGTHS]  # position i is of token i
    old, advantages, weights = ([torch.rand(length) - shift for length in LENGTHS] for shift in (0.5, 0.5, 0.0))
    data = tensors(advantages=advantages, weights=weights, old_log_probs=old, loss_mask=[mask.long() for mask in masks])
    data["is_current"] = nested([torch.ones(LENGTHS[0]), *(torch.zeros(length) for length in LENGTHS[1:])])

    ours = [row.clone().requires_grad_() for row in rows]
    loss_value, metrics = worker.policy_loss(config(loss), {"log_probs": nested(ours)}, data)
    loss_value.backward()

    references = [row.clone().requires_grad_() for row in rows]
    expected = torch.zeros(())
    for new, mask, before, advantage, weight in zip(references, masks, old, advantages, weights, strict=True):
        token = formula(loss, new[:-1][mask[1:]], before[1:][mask[1:]], advantage[1:][mask[1:]])
        expected = expected + (weight[1:][mask[1:]] * token).sum()
    expected.backward()

    torch.testing.assert_close(loss_value.detach(), expected.detach())
    for row, reference in zip(ours, references, strict=True):
        torch.testing.assert_close(row.grad, reference.grad)
    assert float(metrics["gap/tokens"].values[0]) == LENGTHS[0] - 2  # the other rows are of older versions


def test_the_entropy_bonus_is_weighted_like_the_loss(worker: ModuleType) -> None:
    data = tensors(
        advantages=[torch.zeros(3)],
        old_log_probs=[torch.zeros(3)],
        weights=[torch.full((3,), 0.5)],
        loss_mask=[torch.tensor([0, 1, 1])],
    )
    output = {"log_probs": nested([torch.zeros(3)]), "entropy": nested([torch.tensor([1.0, 2.0, 9.0])])}
    loss, metrics = worker.policy_loss(config("vanilla", entropy_coef=0.1), output, data)
    assert float(loss) == pytest.approx(-0.1 * 0.5 * (1 + 2))
    assert float(metrics["actor/entropy"].values[0]) == pytest.approx(1.5)


def test_supervised_tokens_count_with_their_weights(worker: ModuleType) -> None:
    data = tensors(
        weights=[torch.tensor([0.0, 0.5, 0.1]), torch.tensor([0.4, 0.3])],
        loss_mask=[torch.tensor([0, 1, 1]), torch.tensor([0, 1])],
    )
    log_probs = [torch.tensor([-1.0, -2.0, -9.0]), torch.tensor([-3.0, -9.0])]  # position i is of token i + 1
    loss, metrics = worker.sft_loss({"log_probs": nested(log_probs)}, data)
    assert float(loss) == pytest.approx(0.5 * 1 + 0.1 * 2 + 0.3 * 3)
    assert float(metrics["actor/nll"].values[0]) == pytest.approx(float(loss))
