"""What only a GPU can show: veRL's update on CUDA, vLLM following it on the same GPU, and the whole loop."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import load, random_batch, random_model, reference_logprobs, serving, to_arrays
from test_learner import LR, own_gradient_step
from test_weights import SECRET, one_group

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import LearnerConfig
from agent_lightning.core import actors as cluster
from agent_lightning.core.types import Group
from agent_lightning.learners.verl import VerlLearner
from agent_lightning.learners.verl_groups import Training

pytestmark = [
    pytest.mark.stack,
    pytest.mark.gpu,
    pytest.mark.timeout(420),
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU here"),
]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
async def test_an_update_on_cuda_is_that_of_plain_torch(tmp_path: Path, tied: bool) -> None:
    model = random_model(tmp_path, seed=0, tied=tied)
    batch = random_batch(0, rows=8, vocab=model.config.vocab_size)
    cluster.init_ray(num_cpus=4)
    try:
        any_gap = LearnerConfig(max_logprob_gap=None)
        algorithm = AlgorithmConfig(lr=LR)
        learner = VerlLearner(Training(model_path=str(tmp_path), device="cuda", algorithm=algorithm, learner=any_gap))
        metrics = (await learner.update([batch])).metrics
        updated = to_arrays(await learner.publish())
    finally:
        cluster.shutdown_ray()
    expected = own_gradient_step(str(tmp_path), batch)
    for name, value in expected.items():
        assert np.quantile(np.abs(updated[name] - value), 0.99) < 1e-3, name
    assert metrics["learner/grad_norm"].value > 0


async def test_an_engine_follows_a_learner_on_the_same_gpu(tmp_path: Path) -> None:
    old = random_model(tmp_path / "old", seed=0, tied=True)
    half = ({"CPU": 1.0, "GPU": 0.5},)
    settings: dict[str, Any] = {"max_len": 256, "device": "cuda", "dtype": "bfloat16", "bundles": half}
    async with serving(tmp_path / "old", secret=SECRET, max_tokens=16, gpu_memory_utilization=0.1, **settings) as (
        buffer,
        board,
        service,
    ):
        agrees(await one_group(buffer, service.url), old, version=0)

        config = Training(
            model_path=str(tmp_path / "old"),
            device="cuda",
            dtype="bfloat16",
            gpu_share=0.5,
            algorithm=AlgorithmConfig(lr=LR),
            learner=LearnerConfig(max_logprob_gap=None),
        )
        learner = VerlLearner(config)
        for seed in range(5):
            await learner.update([random_batch(seed, rows=8, vocab=old.config.vocab_size)])
        weights = await learner.publish()
        assert await board.publish(weights, timeout=60.0) == 1
        new = load(str(tmp_path / "old"))
        new.load_state_dict({name: torch.tensor(value) for name, value in to_arrays(weights).items()}, strict=False)
        new.tie_weights()
        group = await one_group(buffer, service.url)
        agrees(group, new, version=1)
        assert gap(group, old) > 0.3, "the update must move the policy, or this test could not fail"
        learner.shutdown()


def gap(group: Group, model: Any) -> float:
    """Between the engine's log-probabilities and Hugging Face's in float32, mean."""
    calls = [call for trajectory in group.trajectories for call in trajectory.calls]
    return float(np.concatenate([np.abs(call.logprob_T - reference_logprobs(model, call)) for call in calls]).mean())


def agrees(group: Group, model: Any, *, version: int) -> None:
    assert {call.policy_version for trajectory in group.trajectories for call in trajectory.calls} == {version}
    assert gap(group, model) < 0.05  # bfloat16 against float32, with logits of tens


def test_the_whole_loop_runs_on_one_gpu(tmp_path: Path) -> None:
    words = ["experiment=calc_tiny", "hardware=gpu1", "model.dtype=bfloat16", "steps=3", "eval_every=3"]
    words += ["tracking.wandb=disabled"]
    small = ["data.train.num=400", "data.val.num=24", "algorithm.tasks_per_step=8"]
    command = [sys.executable, "-m", "agent_lightning", "train", *words, *small, f"runs_dir={tmp_path}", "name=run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [record["logprob_gap/mean_abs"] for record in records if "logprob_gap/mean_abs" in record]
    assert len(gaps) == 3
    assert max(gaps) < 0.05, "engine and learner must agree on the tokens that the engine sampled"
