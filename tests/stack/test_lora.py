"""LoRA on the learner: what is published and exported is the base with the adapter added, by Hugging Face's
log-probabilities; the reference is the base; checkpoints hold the adapter alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import load, random_batch, random_model, to_arrays

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import LearnerConfig, LoraConfig
from agent_lightning.core import actors
from agent_lightning.core.types import Batch
from agent_lightning.learners.export import export_model
from agent_lightning.learners.verl import VerlLearner
from agent_lightning.learners.verl_groups import Training

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]
ROOT = Path(__file__).parents[2]
LORA = LoraConfig(rank=4, alpha=8)


def log_probs(model: Any, batch: Batch) -> list[np.ndarray]:
    rows = [torch.tensor(batch.token_NT[i, :length].astype(np.int64)) for i, length in enumerate(batch.length_N)]
    with torch.no_grad():
        return [model(row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0].numpy() for row in rows]


async def check(learner: VerlLearner, model: Any, batch: Batch) -> None:
    """The model has the log-probabilities of the learner."""
    for expected, logprob_T in zip(log_probs(model, batch), await learner.log_probs(batch), strict=True):
        np.testing.assert_allclose(expected, logprob_T[: len(expected)], atol=2e-5)


async def check_all(folder: Path, ranks: int, batch: Batch) -> dict[str, np.ndarray]:
    """Five updates of a policy with adapters; returns what it publishes."""
    from peft import PeftModel

    config = Training(
        model_path=str(folder),
        algorithm=AlgorithmConfig(lr=1e-2, kl_coef=0.1),
        learner=LearnerConfig(processes=ranks, threads=1, max_logprob_gap=None),
        lora=LORA,
    )
    learner = VerlLearner(config)
    try:
        base = load(str(folder))
        await check(learner, base, batch)
        published = to_arrays(await learner.publish())
        for name, parameter in base.named_parameters():
            np.testing.assert_array_equal(published[name], parameter.detach().numpy())
        records = [(await learner.update([batch])).metrics for _ in range(5)]
        kl = [record["learner/kl_to_reference"].value for record in records]
        assert kl[0] == pytest.approx(0.0, abs=1e-6)
        assert kl[-1] > 1e-4
        published = to_arrays(await learner.publish())
        assert np.abs(published["lm_head.weight" if "lm_head.weight" in published else next(iter(published))]).max() > 0
        merged = load(str(folder))
        assert set(published) >= {name for name, _ in merged.named_parameters()}
        merged.load_state_dict({name: torch.tensor(value) for name, value in published.items()}, strict=False)
        await check(learner, merged, batch)
        moved = np.abs(np.concatenate(log_probs(merged, batch)) - np.concatenate(log_probs(base, batch))).mean()
        assert moved > 1e-2, "the update must be seen, or this test could not fail"

        checkpoint = folder / f"checkpoint-{ranks}"
        await learner.save(checkpoint)
        sizes = {file.name: file.stat().st_size for file in checkpoint.glob("*.pt")}
        assert sum(sizes.values()) < 0.7 * sum(4 * p.numel() for p in base.parameters()), sizes
        for is_merged in (False, True):
            target = folder / f"exported-{ranks}-{is_merged}"
            export_model(checkpoint, folder, target, dtype="float32", shard_size="5GB", merged=is_merged)
            plain = load(str(target if is_merged else folder))
            await check(learner, plain if is_merged else PeftModel.from_pretrained(plain, str(target)).eval(), batch)

        sixth = (await learner.update([batch])).metrics
        await learner.restore(checkpoint, version=7)
        await check(learner, merged, batch)
        again = (await learner.update([batch])).metrics
        assert again["learner/loss"].value == pytest.approx(sixth["learner/loss"].value, rel=1e-5)
        return published
    finally:
        learner.shutdown()


@pytest.mark.parametrize(
    ("tied", "ranks"),
    [
        (True, (1,)),
        pytest.param(True, (1, 2), marks=pytest.mark.slow),
        pytest.param(False, (1, 2), marks=pytest.mark.slow),
    ],
)
async def test_the_published_policy_is_base_and_adapter(tmp_path: Path, tied: bool, ranks: tuple[int, ...]) -> None:
    model = random_model(tmp_path, seed=0, tied=tied)
    batch = random_batch(0, rows=8, vocab=model.config.vocab_size)
    actors.init_ray(num_cpus=6)
    try:
        first, *others = [await check_all(tmp_path, number, batch) for number in ranks]
    finally:
        actors.shutdown_ray()
    for other in others:
        for name, value in first.items():
            assert np.quantile(np.abs(other[name] - value), 0.99) < 1e-3, name


@pytest.mark.slow
async def test_training_begins_from_an_adapter(tmp_path: Path) -> None:
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model

    model = random_model(tmp_path / "model", seed=0, tied=True)
    batch = random_batch(0, rows=4, vocab=model.config.vocab_size)
    config = PeftConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    actors.init_ray(num_cpus=4)
    try:
        learner = VerlLearner(
            Training(
                model_path=str(tmp_path / "model"),
                learner=LearnerConfig(threads=1),
                lora=LoraConfig(rank=4, path=str(tmp_path / "adapter")),
            )
        )
        adapted = PeftModel.from_pretrained(load(str(tmp_path / "model")), str(tmp_path / "adapter")).eval()
        await check(learner, adapted, batch)
        published = to_arrays(await learner.publish())
        merged = adapted.merge_and_unload()
        for name, parameter in merged.named_parameters():
            np.testing.assert_allclose(published[name], parameter.detach().numpy(), atol=1e-6)
    finally:
        actors.shutdown_ray()


def agl(*arguments: str) -> None:
    command = [sys.executable, "-m", "agent_lightning", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_adapters_learn_on_the_real_stack_and_training_goes_on_from_one(tmp_path: Path) -> None:
    """Engine and learner agree at every step (else the run would end), also from an adapter that is not zero."""
    shared = ["experiment=calc_tiny", "model.lora.rank=8", "algorithm.lr=2e-3", f"runs_dir={tmp_path}"]
    agl("train", *shared, "steps=4", "eval_every=4", "name=first", "tracking.wandb=disabled")
    first = json.loads((tmp_path / "first" / "summary.json").read_text())
    assert first["val_reward_last"] > first["val_reward_first"] + 0.1, first
    agl("export", str(tmp_path / "first"), "--model", str(tmp_path / "adapter"))
    again = [f"model.lora.path={tmp_path / 'adapter'}", "steps=1", "eval_every=1", "name=second"]
    agl("train", *shared, *again, "tracking.wandb=disabled")
    second = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert second["val_reward_first"] == pytest.approx(first["val_reward_last"], abs=1e-6)
