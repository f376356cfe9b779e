"""What a checkpoint keeps beside the learner's files: one JSON file, written last, so that half a save is no save."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from agent_lightning.core.errors import UserError
from agent_lightning.run.state import State
from agent_lightning.run.tasks import TaskCursor

STATE = "state.json"
_COUNTERS = ("dropped", "dropped_tokens", "failed", "seconds")


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def write_state(folder: Path, state: State) -> None:
    """Atomic: a checkpoint is whole when this file is there."""
    half = folder / f"{STATE}.half"
    # Not asdict(): on Python 3.11 it turns a Counter into one of its items.
    values = {item.name: getattr(state, item.name) for item in fields(state)} | {"cursor": asdict(state.cursor)}
    half.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(half, folder / STATE)


def read_state(folder: Path) -> State:
    values: dict[str, Any] = json.loads((folder / STATE).read_text())
    values["cursor"] = TaskCursor(**values["cursor"])
    values["val_rewards"] = [(int(step), float(reward)) for step, reward in values["val_rewards"]]
    for name in _COUNTERS:
        values[name] = Counter(values[name])
    return State(**values)


def whole(checkpoints: Path) -> list[Path]:
    """The whole checkpoints of a run, the newest last."""
    return sorted(folder for folder in checkpoints.glob("step-*") if (folder / STATE).exists())


def newest(checkpoints: Path) -> Path:
    """The newest whole checkpoint of a run. Raises UserError where there is none."""
    found = whole(checkpoints)
    if not found:
        raise UserError(f"{checkpoints} holds no whole checkpoint: nothing to resume from")
    return found[-1]


def prune(checkpoints: Path, kept: int) -> None:
    """Remove all but the newest `kept` whole ones; 0 keeps all. What makes one whole is removed first."""
    for folder in whole(checkpoints)[:-kept] if kept else ():
        (folder / STATE).unlink()
        shutil.rmtree(folder)
