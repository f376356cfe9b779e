"""The loop of supervised training: what a step learns, the held-out loss, and that a resumed run is the run itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.core.metrics import Mean
from agent_lightning.core.types import Batch, Floats, RolloutKey, Sample
from agent_lightning.credit.assign import CreditRules
from agent_lightning.learners.base import Update, Weights
from agent_lightning.learners.chats import Chat
from agent_lightning.run.sampler import Evaluation
from agent_lightning.run.state import Plan, State, newest_checkpoint, read_state, write_state
from agent_lightning.run.supervised import SupervisedLoop
from agent_lightning.run.tasks import TaskCursor


def chat(number: int, prompt: int, reply: int) -> Chat:
    """A chat of tokens that are all its number, with `reply` learnt tokens after `prompt`."""
    size = prompt + reply
    zeros = np.zeros(size, np.float32)
    sample = Sample(
        key=RolloutKey(split="train", group=number, index=0),
        token_T=np.full(size, number, np.int32),
        mask_T=np.arange(size) >= prompt,
        logprob_T=zeros,
        advantage_T=zeros,
        reward_T=zeros,
        call_T=np.zeros(size, np.int32),
        version_T=np.zeros(size, np.int32),
    )
    return Chat((sample,))


CHATS = [chat(number, prompt=2, reply=1 + number % 3) for number in range(10)]


class CountingLearner:
    """Notes what it learns. Each update halves its loss, 1 at the start on a token of chat 0, 2 of chat 1, …"""

    def __init__(self) -> None:
        self.learnt: list[tuple[list[int], float]] = []
        self.factor = 1.0

    async def update(self, batches: Sequence[Batch], *, epochs: int = 1) -> Update:
        (batch,) = batches
        self.factor /= 2
        self.learnt.append((sorted(batch.token_NT[:, 0].tolist()), float(batch.weight_NT.sum())))
        assert len(set(batch.weight_NT[batch.mask_NT].tolist())) == 1  # each token weighs the same
        return Update(metrics={"learner/nll": Mean.of([self.factor])})

    async def log_probs(self, batch: Batch) -> list[Floats]:
        rows = zip(batch.token_NT, batch.length_N, strict=True)
        return [-(1.0 + row[1:length]).astype(np.float32) * self.factor for row, length in rows]

    async def publish(self) -> Weights:
        raise AssertionError("nothing serves these weights")

    async def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "learner.json").write_text(json.dumps([self.learnt, self.factor]))

    async def restore(self, path: Path, version: int) -> None:
        learnt, self.factor = json.loads((path / "learner.json").read_text())
        self.learnt = [(numbers, weight) for numbers, weight in learnt]


class FolderObserver:
    """Writes a checkpoint after every second step, and stops the run after the step `stop_after`."""

    def __init__(self, folder: Path, stop: asyncio.Event, stop_after: int) -> None:
        self.folder, self.stop, self.stop_after = folder, stop, stop_after
        self.records: list[Mapping[str, float]] = []

    def waiting_for(self, text: str) -> None: ...
    def record_rollouts(self, step: int, version: int, groups: object, logprobs: object = None) -> None: ...
    def record_evaluation(self, step: int, evaluation: Evaluation) -> None: ...
    def record_loss(self, step: int, nats: float, chats: int) -> None: ...

    def record_step(self, step: int, record: Mapping[str, float]) -> None:
        self.records.append(record)
        if step == self.stop_after:
            self.stop.set()

    def checkpoint_folder(self, state: State, *, force: bool) -> Path | None:
        return self.folder / f"step-{state.step:06d}" if force or state.step % 2 == 0 else None

    def complete_checkpoint(self, folder: Path, state: State) -> None:
        write_state(folder, state)


async def run(folder: Path, *, stop_after: int = 99, resumed: bool = False) -> tuple[SupervisedLoop, CountingLearner]:
    stop, learner = asyncio.Event(), CountingLearner()
    state = State(cursor=TaskCursor(seed=0), supervised=True)
    if resumed:
        state = read_state(newest_checkpoint(folder))
    loop = SupervisedLoop(
        plan=Plan(
            steps=5,
            algorithm=AlgorithmConfig(tasks_per_step=4),
            eval_every=2,
            rules=CreditRules(),
            pad_token=0,
            row_multiple=2,
        ),
        state=state,
        learner=learner,
        observer=FolderObserver(folder, stop, stop_after),
        train_chats=CHATS[:9],
        val_chats=[CHATS[0], CHATS[1]],
        stop=stop,
    )
    if resumed:
        await loop.restore(newest_checkpoint(folder))
    await loop.run()
    return loop, learner


async def test_a_step_learns_the_next_chats_and_an_epoch_has_each_once(tmp_path: Path) -> None:
    loop, learner = await run(tmp_path)
    assert [len(numbers) for numbers, _ in learner.learnt] == [4] * 5
    assert all(weight == pytest.approx(1) for _, weight in learner.learnt)
    drawn = [number for numbers, _ in learner.learnt[:2] for number in numbers]
    assert len(set(drawn)) == 8
    assert loop.state.trained == loop.state.admitted == 20
    assert loop.state.trained_tokens == sum(1 + number % 3 for numbers, _ in learner.learnt for number in numbers)


async def test_the_held_out_loss_is_the_mean_over_tokens(tmp_path: Path) -> None:
    loop, _ = await run(tmp_path)
    start = (1 * 1.0 + 2 * 2.0) / 3  # one token of chat 0, and two of chat 1
    assert loop.state.val_losses == [(step, pytest.approx(start / 2**step)) for step in (0, 2, 4, 5)]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
async def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path, stop_after: int) -> None:
    first, _ = await run(tmp_path / "stopped", stop_after=stop_after)
    assert first.state.step == stop_after
    resumed, learner = await run(tmp_path / "stopped", resumed=True)
    through, expected = await run(tmp_path / "through")
    assert learner.learnt == expected.learnt
    assert resumed.state.val_losses == through.state.val_losses
    assert resumed.state.cursor == through.state.cursor
