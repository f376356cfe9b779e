"""The loop of supervised training: a step takes chats, makes an optimiser step, and some steps measure
the loss on held-out chats. Plan, state, learner, checkpoints and metrics are those of `Loop`; there is no engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from agent_lightning.core.metrics import values
from agent_lightning.core.types import Batch, Floats
from agent_lightning.credit import batching
from agent_lightning.learners.base import Learner
from agent_lightning.learners.chats import Chat
from agent_lightning.run.loop import Clock
from agent_lightning.run.sampler import Observer
from agent_lightning.run.state import Plan, State


class SupervisedLearner(Learner, Protocol):
    async def log_probs(self, batch: Batch) -> list[Floats]: ...


class LossObserver(Observer, Protocol):
    def record_loss(self, step: int, nats: float, chats: int) -> None: ...


@dataclass(slots=True, kw_only=True)
class SupervisedLoop:
    """If `stop` is set, `run` returns after the step and a checkpoint."""

    plan: Plan
    state: State
    learner: SupervisedLearner
    observer: LossObserver
    train_chats: Sequence[Chat]
    val_chats: Sequence[Chat]
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Run to the last step, or until `stop` is set."""
        started = time.monotonic() - self.state.wall_s
        if not self.state.step:
            await self.save()
            await self.evaluate()
        while self.state.step < self.plan.steps and not self.stop.is_set():
            await self.step()
            if self.plan.evaluates_after(self.state.step):
                await self.evaluate()
            self.state.wall_s = time.monotonic() - started
            await self.save(force=self.stop.is_set() or self.state.step == self.plan.steps)

    async def step(self) -> None:
        """Train on the next `chats_per_step` chats: an optimiser step in each epoch."""
        clock, state, algorithm = Clock(), self.state, self.plan.algorithm
        chats = state.cursor.next(self.train_chats, algorithm.chats_per_step)
        self.observer.waiting_for(f"update: {len(chats)} chats")
        clock.lap("other")
        record = values((await self.learner.update([self._pack(chats)], epochs=algorithm.epochs)).metrics)
        clock.lap("update")
        tokens = sum(chat.tokens for chat in chats)
        state.step += 1
        state.admitted += len(chats)
        state.trained += len(chats)
        state.trained_tokens += tokens
        state.seconds.update(clock.seconds)
        record |= {"train/loss": record["learner/nll"], "tokens/trained": tokens}
        record |= {f"time/{'step' if name == 'total' else name}": spent for name, spent in clock.seconds.items()}
        self.observer.record_step(state.step, record)

    async def evaluate(self) -> None:
        """Measure the loss of the held-out chats: the mean of -log p over their tokens, in nats."""
        if not self.val_chats:
            return
        losses: list[Floats] = []
        self.observer.waiting_for(f"evaluate: {len(self.val_chats)} chats")
        for start in range(0, len(self.val_chats), size := self.plan.algorithm.chats_per_step):
            batch = self._pack(self.val_chats[start : start + size])
            rows = zip(await self.learner.log_probs(batch), batch.mask_NT, strict=True)
            losses += [-row[mask_T[1 : row.size + 1]] for row, mask_T in rows]
        nats = float(np.concatenate(losses).mean())
        self.state.val_losses.append((self.state.step, nats))
        self.observer.record_loss(self.state.step, nats, len(self.val_chats))

    async def save(self, *, force: bool = False) -> None:
        """Save a checkpoint if it is due."""
        if (folder := self.observer.checkpoint_folder(self.state, force=force)) is not None:
            self.observer.waiting_for("checkpoint")
            await self.learner.save(folder)
            self.observer.complete_checkpoint(folder, self.state)

    async def restore(self, folder: Path) -> None:
        """Restore the learner from a checkpoint."""
        await self.learner.restore(folder, 0)

    def _pack(self, chats: Sequence[Chat]) -> Batch:
        """A batch in which each token weighs the same."""
        samples, multiple = [sample for chat in chats for sample in chat.samples], self.plan.row_multiple
        (batch,) = batching.pack(samples, pad_token=self.plan.pad_token, row_multiple=multiple)
        return replace(batch, weight_NT=np.where(batch.mask_NT, 1 / batch.mask_NT.sum(), 0).astype(np.float32))
