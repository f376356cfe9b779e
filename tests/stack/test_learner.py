"""veRL on the CPU: one rank and two ranks give the same update, and the loss is that of the formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import load, random_batch, random_model, to_arrays

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import LearnerConfig
from agent_lightning.core import actors as cluster
from agent_lightning.core.errors import UserError
from agent_lightning.core.metrics import Metrics
from agent_lightning.core.types import Batch
from agent_lightning.learners.export import export_model
from agent_lightning.learners.verl import VerlLearner
from agent_lightning.learners.verl_groups import Training

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]
LR = 1e-2
CLIP = 0.2


def own_gradient_step(folder: str, batch: Batch) -> dict[str, np.ndarray]:
    """The same update in ten lines of torch: sum over tokens of weight x clipped loss, then one step of AdamW."""
    model = load(folder)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    loss = torch.zeros(())
    for i, length in enumerate(batch.length_N):
        tokens = torch.tensor(batch.token_NT[i, :length].astype(np.int64))
        logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        mask = torch.tensor(batch.mask_NT[i, 1:length])
        old, advantage, weight = (
            torch.tensor(array[i, 1:length]) for array in (batch.logprob_NT, batch.advantage_NT, batch.weight_NT)
        )
        ratio = (logprobs - old).clamp(-20, 20).exp()
        clipped = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
        token_loss = torch.where(advantage < 0, torch.minimum(clipped, -3.0 * advantage), clipped)  # dual clip
        loss = loss + (token_loss * weight)[mask].sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


async def run(
    folder: Path, world_size: int, batches: list[Batch], **changes: Any
) -> tuple[Metrics, dict[str, np.ndarray]]:
    processes = LearnerConfig(processes=world_size, threads=1, max_logprob_gap=None, **changes)
    config = Training(model_path=str(folder), algorithm=AlgorithmConfig(lr=LR), learner=processes)
    learner = VerlLearner(config)
    try:
        before = await learner.log_probs(batches[0])
        update = await learner.update(batches)
        metrics, (logprob_NT, *_) = update.metrics, update.logprobs
        assert logprob_NT is not None
        for row, mask_T, logprob_T in zip(before, batches[0].mask_NT, logprob_NT, strict=True):
            trained_T = mask_T[1 : row.size + 1]
            np.testing.assert_allclose(logprob_T[1 : row.size + 1][trained_T], row[trained_T], atol=1e-5)
        await check_export(learner, folder, folder / f"checkpoint-{world_size}", batches[0])
        return metrics, to_arrays(await learner.publish())
    finally:
        learner.shutdown()


async def check_export(learner: VerlLearner, original: Path, checkpoint: Path, batch: Batch) -> None:
    """Save a checkpoint and export it in several files: Transformers loads it, and the log-probabilities of every row
    are the learner's."""
    await learner.save(checkpoint)
    assert "rows_sdpa" not in (checkpoint / "huggingface" / "config.json").read_text()
    target = checkpoint.with_name(f"{checkpoint.name}-exported")
    export_model(checkpoint, original, target, dtype="float32", shard_size="100KB")
    assert len(list(target.glob("model-*.safetensors"))) > 2
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_text() == (original / name).read_text()
    exported = load(str(target))
    for i, logprob_T in enumerate(await learner.log_probs(batch)):
        tokens = torch.tensor(batch.token_NT[i, : batch.length_N[i]].astype(np.int64))
        logprobs = exported(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        np.testing.assert_allclose(logprobs.detach().numpy(), logprob_T[: len(logprobs)], atol=2e-5)
    with pytest.raises(UserError, match="exists: give a folder that is new"):
        export_model(checkpoint, original, target, dtype="float32", shard_size="5GB")
    with pytest.raises(UserError, match="cannot be exported"):
        export_model(checkpoint, original, target.with_name("other"), dtype="float32", shard_size="much")
    for broken in checkpoint.glob("model_world_size_*_rank_0.pt"):
        broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be exported"):
        export_model(checkpoint, original, target.with_name("other"), dtype="float32", shard_size="5GB")
    assert not [path for path in checkpoint.parent.iterdir() if "other" in path.name]


@pytest.mark.slow
async def test_a_tied_output_head_is_exported_too(tmp_path: Path) -> None:
    model = random_model(tmp_path, seed=0, tied=True)
    cluster.init_ray(num_cpus=6)
    try:
        await run(tmp_path, 2, [random_batch(0, rows=8, vocab=model.config.vocab_size)])
    finally:
        cluster.shutdown_ray()


async def test_one_and_two_ranks_and_plain_torch_give_the_same_update(tmp_path: Path) -> None:
    """Also: what each of them exports is the model that it has trained."""
    model = random_model(tmp_path, seed=0, tied=False)
    batch = random_batch(0, rows=8, vocab=model.config.vocab_size)
    cluster.init_ray(num_cpus=6)
    try:
        single_metrics, single = await run(tmp_path, 1, [batch])
        double_metrics, double = await run(tmp_path, 2, [batch], max_tokens_per_micro_batch=64)  # several micro-batches
    finally:
        cluster.shutdown_ray()
    expected = own_gradient_step(str(tmp_path), batch)
    before = {name: p.detach().numpy() for name, p in load(str(tmp_path)).named_parameters()}
    moved = max(float(np.abs(expected[name] - before[name]).max()) for name in expected)
    assert moved > LR / 2
    for name, value in expected.items():
        # Adam's first step is lr x sign(gradient) where the gradient is tiny, so a few entries may differ by rounding.
        for other in (single[name], double[name]):
            assert np.quantile(np.abs(other - value), 0.99) < 1e-4, name
    assert single_metrics["learner/grad_norm"].value == pytest.approx(
        double_metrics["learner/grad_norm"].value, rel=1e-3
    )
    assert single_metrics["learner/loss"].value == pytest.approx(
        double_metrics["learner/loss"].value, rel=1e-3, abs=1e-5
    )
    assert single_metrics["logprob_gap/max_abs"].value == pytest.approx(
        double_metrics["logprob_gap/max_abs"].value, rel=1e-3
    )


@pytest.mark.slow
async def test_kl_to_the_start_is_zero_at_first_then_grows_and_a_checkpoint_restores(tmp_path: Path) -> None:
    model = random_model(tmp_path / "model", seed=0, tied=False)
    batch = random_batch(1, rows=8, vocab=model.config.vocab_size)
    cluster.init_ray(num_cpus=12)
    config = Training(
        model_path=str(tmp_path / "model"),
        algorithm=AlgorithmConfig(lr=LR, kl_coef=0.1),
        learner=LearnerConfig(threads=1, max_logprob_gap=None),
    )
    try:
        learner = VerlLearner(config)
        first = (await learner.update([batch])).metrics
        second = (await learner.update([batch])).metrics
        assert first["learner/kl_to_reference"].value == pytest.approx(0.0, abs=1e-5)
        assert second["learner/kl_to_reference"].value > 1e-4

        await learner.save(tmp_path / "checkpoint")
        third = (await learner.update([batch])).metrics
        after = to_arrays(await learner.publish())
        await learner.restore(tmp_path / "checkpoint", version=7)
        again = (await learner.update([batch])).metrics
        weights = await learner.publish()
        assert weights.version == 8
        assert again["learner/loss"].value == pytest.approx(third["learner/loss"].value, rel=1e-5)
        for name, value in to_arrays(weights).items():
            np.testing.assert_allclose(value, after[name], atol=1e-6)

        learner.shutdown()
        slower = VerlLearner(replace(config, algorithm=AlgorithmConfig(lr=LR / 100)))
        await slower.restore(tmp_path / "checkpoint", version=7)
        before = to_arrays(await slower.publish())
        await slower.update([batch])
        moved = {name: np.abs(value - before[name]).max() for name, value in to_arrays(await slower.publish()).items()}
        assert 0 < max(moved.values()) < LR / 10  # by its own learning rate, and not by the checkpoint's
    finally:
        cluster.shutdown_ray()
