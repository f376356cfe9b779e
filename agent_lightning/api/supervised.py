"""`agl sft`, below the command line: supervised training on chats, a run like any other."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from rich.console import Console

from agent_lightning.api.attempt import Attempt
from agent_lightning.config.load import Config
from agent_lightning.core.errors import DataError, UserError
from agent_lightning.core.types import Split, Task
from agent_lightning.launch import checks, hub, launch
from agent_lightning.learners.chats import Chat, ChatEncoder
from agent_lightning.run.observer import RunObserver
from agent_lightning.run.state import checkpoint_folder, make_plan
from agent_lightning.run.supervised import SupervisedLearner, SupervisedLoop

HELD_OUT: Final = 20
"""Without chats in data.val, one in so many is held out."""


def prepare(config: Config) -> partial[SupervisedAttempt]:
    """Make all checks, read and render the chats, and print how many are learnt, and which are left out and why.
    Returns what makes an attempt. Raises UserError."""
    if config.model.words:
        raise UserError(f"model.path={config.model.path}: a toy model has no chat template; choose another model=")
    inspection = checks.require_supervised(config)
    facts = inspection.model
    assert facts is not None
    encoder = ChatEncoder(hub.find_model(config.model.path, facts.revision), facts.end_tokens, config.model.max_len)
    tasks: dict[Split, list[Task]] = {
        "train": inspection.tasks["train"],
        "val": [t for t in inspection.tasks["val"] if "messages" in t.payload],
    }
    given = bool(tasks["val"])
    if not given:
        sides: tuple[list[Task], list[Task]] = ([], [])
        for task in tasks["train"]:
            sides[_is_held_out(task, config.seed)].append(task)
        tasks = {"train": sides[0], "val": sides[1]} if sides[0] else tasks
    chats = {split: _encode(encoder, split, rows, needed=given or split == "train") for split, rows in tasks.items()}
    return partial(SupervisedAttempt, chats=chats, tasks=tasks)


def _encode(encoder: ChatEncoder, split: str, tasks: Sequence[Task], *, needed: bool) -> list[Chat]:
    """The chats of a split; prints their number, and the others by reason. Raises DataError if none can be learnt and
    some are needed."""
    chats, refused = encoder.encode_all(tasks)
    reasons = [
        f"{len(ids):,} {reason} ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
        for reason, ids in refused.items()
    ]
    if needed and not chats:
        raise DataError(f"data.{split}: none of {len(tasks):,} chats can be learnt: {'; '.join(reasons)}")
    line = f"{split}: {len(chats):,} chats, {sum(chat.tokens for chat in chats):,} tokens of the assistant"
    line += f"; left out: {'; '.join(reasons)}" if reasons else ""
    Console().print(line, soft_wrap=True, highlight=False)
    return chats


def _is_held_out(task: Task, seed: int) -> bool:
    """Whether a chat is held out, by what comes before its first reply: chats that answer the same stay together."""
    opening = []
    for message in task.payload.get("messages") or ():
        if not isinstance(message, Mapping) or message.get("role") == "assistant":
            break
        opening.append(message)
    digest = hashlib.sha256(json.dumps([seed, opening], sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:4]) % HELD_OUT == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedAttempt(Attempt):
    """An attempt to run the supervised loop to its end."""

    chats: Mapping[Split, Sequence[Chat]]

    def start(self, places: Mapping[str, Any]) -> AbstractAsyncContextManager[SupervisedLearner]:
        return launch.supervised(self.config, logs=places["logs"], joined=places["joined"])

    async def loop(self, learner: Any, observer: RunObserver, stop: asyncio.Event) -> None:
        loop = SupervisedLoop(
            plan=make_plan(self.config),
            state=self.state,
            learner=learner,
            observer=observer,
            train_chats=self.chats["train"],
            val_chats=self.chats["val"],
            stop=stop,
        )
        if self.resumed:
            await loop.restore(checkpoint_folder(self.run.checkpoints, self.state.step))
        await loop.run()
