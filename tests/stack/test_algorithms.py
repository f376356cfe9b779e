"""Every algorithm, from its config keys to a policy that earns more: the real loop, buffer, credit and veRL learner.

The policy is a small random Llama that is sampled with plain torch from the published weights. Its agent calls it
twice, with a token of the world's between; the reward is the share of its tokens that are divisible by 4. Steps have
two batches, so that the second is trained by a policy that has left its sampler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import model_call
from models import load, random_batch, random_model, to_arrays

from agent_lightning.buffer.buffer import Buffer, Lease
from agent_lightning.buffer.taken import TakenGroup
from agent_lightning.config.load import load as load_config
from agent_lightning.core import actors as cluster
from agent_lightning.core.errors import GapError, UserError
from agent_lightning.core.metrics import values
from agent_lightning.core.types import Ending, Outcome, Split, Task
from agent_lightning.launch.launch import training
from agent_lightning.learners.base import Weights
from agent_lightning.learners.verl import VerlLearner
from agent_lightning.learners.verl_groups import Groups, start_groups
from agent_lightning.run.loop import Loop
from agent_lightning.run.state import State, make_plan
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.testing.world import QuietObserver

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]
STEPS = 6
TOKENS = 4
"""Tokens of a call."""
RISE = 0.1
"""Gain of the held-out reward, whose standard error is 0.01: 256 rollouts of 8 tokens."""
SETTINGS = [
    "experiment=calc_tiny",
    f"steps={STEPS}",
    "eval_every=0",
    "algorithm.tasks_per_step=8",
    "algorithm.rollouts_per_batch=32",
    "algorithm.lr=1e-2",
    "algorithm.lr_warmup_steps=0",
    "learner.threads=1",
]
PPO = ["algorithm=ppo", "critic.lr=1e-2"]
KL = ["algorithm.kl_coef=0.02"]


class Sampler(Buffer):
    """A buffer that runs rollouts when they are taken, and a board whose policy is the sampler's own."""

    def __init__(self, model: Any, *, noise: float) -> None:
        """`noise`: how far the engine's logits are from the trainer's; it then also loses some log-probabilities."""
        super().__init__(run_secret=b"0123456789abcdef")
        self._model = model
        self._lossy = noise > 0
        self._version = 0
        generator = torch.Generator().manual_seed(0)
        self._noise = noise * torch.randn(model.config.vocab_size, generator=generator)

    async def take(self, num_groups: int, *, split: Split, **settings: Any) -> list[TakenGroup]:
        leases = await self.lease(10**6, 1.0)
        first = [[1, 10 + lease.key.group % 8] for lease in leases]
        sampled = self._sample(first)
        second = [[*prompt, *tokens, 2] for prompt, (tokens, _) in zip(first, sampled, strict=True)]
        for lease, prompts, replies in zip(
            leases, zip(first, second, strict=True), zip(sampled, self._sample(second), strict=True), strict=True
        ):
            await self._finish(lease, prompts, replies)
        return await super().take(num_groups, split=split, **settings)

    async def publish(self, weights: Weights, timeout: float) -> int:
        state = {name: torch.from_numpy(array.copy()) for name, array in to_arrays(weights).items()}
        self._model.load_state_dict(state, strict=True)
        self._version = weights.version
        return 1

    async def _finish(
        self, lease: Lease, prompts: Sequence[list[int]], replies: Sequence[tuple[list[int], list[float]]]
    ) -> None:
        tokens = [token for reply, _ in replies for token in reply]
        for at, (prompt, (reply, logprobs)) in enumerate(zip(prompts, replies, strict=True)):
            lost = self._lossy and lease.key.index == 7 and at == 1
            known = [math.nan] * TOKENS if lost else logprobs
            call = model_call(lease.key, prompt, reply, logprobs=known, started_at=at, version=self._version)
            await self.record(call)
        reward = sum(token % 4 == 0 for token in tokens) / len(tokens)
        await self.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=reward))

    def _sample(self, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
        rows, logprobs = torch.tensor(prompts), []
        with torch.no_grad():
            for _ in range(TOKENS):
                scores = (self._model(rows).logits[:, -1].float() + self._noise).log_softmax(-1)
                token = torch.multinomial(scores.exp(), 1)
                logprobs.append(scores.gather(1, token))
                rows = torch.cat([rows, token], 1)
        return list(zip(rows[:, -TOKENS:].tolist(), torch.cat(logprobs, 1).tolist(), strict=True))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Groups]]:
    """A model, and one set of worker processes for all tests: each learner begins again from the model's weights."""
    folder = str(tmp_path_factory.mktemp("model"))
    random_model(Path(folder), seed=0, tied=False)
    cluster.init_ray(num_cpus=6)
    try:
        every = load_config([*SETTINGS, *PPO, *KL])
        yield folder, start_groups(training(every, folder))
    finally:
        cluster.shutdown_ray()


async def train(started: tuple[str, Groups], overrides: Sequence[str], *, noise: float = 0.0) -> Loop:
    folder, groups = started
    torch.manual_seed(0)
    config = load_config([*SETTINGS, *overrides])
    sampler = Sampler(load(folder), noise=noise)
    loop = Loop(
        plan=make_plan(config),
        state=State(cursor=TaskCursor(seed=0)),
        buffer=sampler,
        board=sampler,
        learner=VerlLearner(training(config, folder), groups),
        observer=QuietObserver(),
        train_tasks=[Task(task_id=str(n), payload={}) for n in range(8)],
        val_tasks=[Task(task_id=str(n), payload={}) for n in range(256)],
    )
    await loop.run()
    return loop


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm=grpo"],
        pytest.param(["algorithm=grpo", *KL], marks=pytest.mark.slow),
        pytest.param(["algorithm=grpo", *KL, "algorithm.kl_in=reward"], marks=pytest.mark.slow),
        pytest.param(["algorithm=dr_grpo"], marks=pytest.mark.slow),
        pytest.param(["algorithm=rloo"], marks=pytest.mark.slow),
        ["algorithm=reinforce_plus_plus", *KL, "algorithm.kl_in=reward"],
        pytest.param(["algorithm=reinforce_plus_plus", "credit.baseline=mean"], marks=pytest.mark.slow),
        pytest.param(["algorithm=dapo", "algorithm.entropy_coef=1e-3"], marks=pytest.mark.slow),
        pytest.param(["algorithm=gspo"], marks=pytest.mark.slow),
        pytest.param(["algorithm=cispo"], marks=pytest.mark.slow),
        PPO,
        pytest.param([*PPO, "credit.gae_level=call", *KL, "algorithm.kl_in=reward"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
async def test_it_learns(started: tuple[str, Groups], overrides: list[str]) -> None:
    loop = await train(started, overrides)
    (_, before), (_, after) = loop.state.val_rewards
    records = loop.observer.records  # type: ignore[attr-defined]
    assert after > before + RISE
    assert all(math.isfinite(value) for record in records for value in record.values())


@pytest.mark.parametrize("level", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
async def test_it_learns_from_an_engine_that_is_not_the_trainer(started: tuple[str, Groups], level: str) -> None:
    overrides = ["algorithm=grpo", f"algorithm.importance_sampling={level}", "algorithm.importance_sampling_cap=1.5"]
    with pytest.raises(GapError, match=r"differ by .*learner\.max_logprob_gap"):
        await train(started, overrides, noise=0.25)
    loop = await train(started, [*overrides, "learner.max_logprob_gap=null"], noise=0.25)
    (_, before), (_, after) = loop.state.val_rewards
    records = loop.observer.records  # type: ignore[attr-defined]
    assert after > before + RISE
    for record in records:
        # Rollout 7 of each of the step's 8 groups lost the log-probabilities of its second call.
        assert record["learner/rows_without_logprobs"] == 8
        assert 0.05 < record["logprob_gap/mean_abs"] < 2
        assert 0.3 < record["learner/importance_weight"] < 1.2
        assert all(math.isfinite(value) for value in record.values())


async def test_a_checkpoint_keeps_the_critic_and_how_far_its_warm_up_is(
    started: tuple[str, Groups], tmp_path: Path
) -> None:
    folder, groups = started
    config = training(
        load_config([*SETTINGS, *PPO, *KL, "critic.warmup_steps=2", "learner.max_logprob_gap=null"]), folder
    )
    batch = random_batch(0, rows=8, vocab=1000, version=10)
    learner = VerlLearner(config, groups)
    with pytest.raises(UserError, match="holds no critic"):
        await learner.restore(tmp_path, version=1)
    at_first = to_arrays(await learner.publish())
    warming = values((await learner.update([batch])).metrics)
    assert "learner/loss" not in warming
    assert warming["logprob_gap/mean_abs"] > 0
    assert warming["critic/explained_variance"] == pytest.approx(0.0, abs=1e-3)  # values begin at zero
    await learner.save(tmp_path)
    records = [values((await learner.update([batch])).metrics) for _ in range(3)]
    assert ["learner/loss" in record for record in records] == [False, True, True]
    after = to_arrays(await learner.publish())
    assert any(np.abs(after[name] - at_first[name]).max() > 1e-3 for name in after)

    resumed = VerlLearner(config, groups)
    await resumed.restore(tmp_path, version=7)
    weights = await resumed.publish()
    assert weights.version == 8
    for name, array in to_arrays(weights).items():
        np.testing.assert_array_equal(array, at_first[name])
    for record in records:
        assert values((await resumed.update([batch])).metrics) == pytest.approx(record, rel=1e-4, abs=1e-6)
    for name, array in to_arrays(await resumed.publish()).items():
        np.testing.assert_allclose(array, after[name], atol=1e-6)
