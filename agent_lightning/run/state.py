"""The plan of a run (`Plan`), its progress (`State`), and its checkpoints.

checkpoints/step-000010/   the learner's own files, and
    state.json             the State, written last: a folder without this file is not a complete checkpoint
"""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.load import Config
from agent_lightning.config.running import LoopConfig
from agent_lightning.core import files
from agent_lightning.core.errors import AccountingError, UserError
from agent_lightning.core.text import error_line
from agent_lightning.core.types import Split
from agent_lightning.credit.air import Air, Signal
from agent_lightning.credit.assign import CreditRules
from agent_lightning.credit.states import StateKey
from agent_lightning.rollouts.agents import load as load_target
from agent_lightning.run.tasks import TaskCursor

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The length of a run, the size of its steps, and its rules of credit."""

    steps: int
    algorithm: AlgorithmConfig
    """The size of a step; the learner reads the rest."""
    loop: LoopConfig = LoopConfig()
    eval_every: int = 0
    """Steps between evaluations. The first step is always preceded, and the last followed, by an evaluation."""
    rules: CreditRules
    pad_token: int
    row_multiple: int
    """Batches are padded to a multiple of this many rows: the learner's processes share them equally."""
    publish_timeout_s: float = 300.0

    def evaluates_after(self, step: int) -> bool:
        return step == self.steps or bool(self.eval_every and step % self.eval_every == 0)


def make_plan(config: Config) -> Plan:
    """The plan of the loop, as the config says. Raises ConfigError."""
    return Plan(
        steps=config.steps,
        algorithm=config.algorithm,
        loop=config.loop,
        eval_every=config.eval_every,
        rules=credit_rules(config),
        pad_token=0,
        row_multiple=config.learner.processes,
    )


def credit_rules(config: Config) -> CreditRules:
    """The rules of credit, as the config says. Raises ConfigError, also if a signal of AIR cannot be loaded."""
    signals = tuple(cast(Signal, load_target(target)) for target in config.air.signals)
    own_key = config.credit.state_key if ":" in config.credit.state_key else None
    return CreditRules(
        credit=config.credit,
        failures=config.algorithm.failures,
        air=Air(config.air, signals) if config.air.enabled else None,
        agents=config.agent.trained,
        reward_range=config.agent.reward_range,
        bound=config.air.bound,
        state_key=cast(StateKey, load_target(own_key)) if own_key is not None else None,
        max_tokens=config.model.max_len,
        drop_beyond=config.loop.drop_beyond,
    )


class InFlight(NamedTuple):
    """A training group that is admitted and neither trained nor dropped."""

    group_id: str
    version: int
    """The policy version when it was admitted: none of its tokens is older."""
    num_rollouts: int
    task_id: str


@dataclass(slots=True, kw_only=True)
class State:
    """The progress of a run, as a checkpoint keeps it beside the learner's files. Counts go over the complete run."""

    step: int = 0
    version: int = 0
    """The policy version that the engines serve."""
    cursor: TaskCursor
    in_flight: list[InFlight] = field(default_factory=list)
    """The oldest first. A checkpoint has none of them if loop.max_lag is 0."""
    redo: list[str] = field(default_factory=list)
    """Ids of tasks that were drawn and whose groups were abandoned: they are drawn again, before those of `cursor`."""
    next_group: dict[Split, int] = field(default_factory=dict)
    """The number of the next group that the buffer will name, for each split."""
    val_rewards: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean held-out reward) for each evaluation."""
    val_ci95: list[tuple[int, float]] = field(default_factory=list)
    """(step, half the width of that mean's 95 % interval); none of what an earlier version evaluated."""
    supervised: bool = False
    """Whether the run is of `agl sft`: then what is admitted and trained are chats."""
    val_losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss of the held-out chats in nats a token) for each evaluation of supervised training."""
    admitted: int = 0
    """Training rollouts that entered the buffer: each is in flight, trained or dropped (`check_conservation`)."""
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rollouts that were not trained, by reason."""
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    """Rollouts that did not finish, by outcome; they may have been trained all the same."""
    sampled_tokens: int = 0
    trained_tokens: int = 0
    gap_total: float = 0.0
    """Sum of |log-probability of the engine - of the trainer|, in nats, over `gap_count` tokens."""
    gap_count: float = 0.0
    gap_max: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    """Time that all steps took: total, generate, update, publish, other."""
    wall_s: float = 0.0


def check_conservation(state: State) -> None:
    """Check that every admitted rollout is in flight, trained or dropped, and that every sampled token of those that
    are not in flight was trained or dropped. Raises AccountingError."""
    ended = state.admitted - sum(group.num_rollouts for group in state.in_flight)
    for name, entered, trained, dropped in (
        ("rollouts", ended, state.trained, state.dropped),
        ("tokens", state.sampled_tokens, state.trained_tokens, state.dropped_tokens),
    ):
        if entered != trained + sum(dropped.values()):
            raise AccountingError(f"{entered} {name} came in, but {trained} were trained and {dict(dropped)} dropped")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint that is saved after `step` steps."""
    return checkpoints / f"step-{step:06d}"


def write_state(folder: Path, state: State) -> None:
    """Write `state.json`, which makes the checkpoint complete, with the size of each of its files."""
    # Not asdict(): on Python 3.11 it turns a Counter into one of its items.
    values = {item.name: getattr(state, item.name) for item in fields(state)} | {"cursor": asdict(state.cursor)}
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE]
    values["files"] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(paths)}
    files.write_text(folder / STATE_FILE, json.dumps(values, indent=1) + "\n")


def read_state(folder: Path) -> State:
    """The state that `write_state` wrote into a checkpoint's folder."""
    values: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    values.pop("files", None)
    values["cursor"] = TaskCursor(**values["cursor"])
    values["in_flight"] = [InFlight(*group) for group in values.get("in_flight", ())]
    for name in {"val_rewards", "val_ci95", "val_losses"} & values.keys():
        values[name] = [(int(step), float(value)) for step, value in values[name]]
    for name in ("dropped", "dropped_tokens", "failed", "seconds"):
        values[name] = Counter(values[name])
    return State(**values)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The folders of a run's complete checkpoints, the newest last."""
    return sorted(folder for folder in checkpoints.glob("step-*") if (folder / STATE_FILE).exists())


def newest_checkpoint(checkpoints: Path) -> Path:
    """The folder of a run's newest complete checkpoint that is not damaged; warns of each that is. Raises UserError if
    there is none. Every byte is read: torch would load weights with flipped bits."""
    damages = []
    for folder in reversed(complete_checkpoints(checkpoints)):
        if not (damage := find_damage(folder)):
            return folder
        damages.append(damage)
        logger.warning("a checkpoint is damaged: %s", damage)
    what = f"holds only damaged checkpoints ({'; '.join(damages)})" if damages else "holds no complete checkpoint"
    raise UserError(f"{checkpoints} {what}: nothing to resume from")


def find_damage(folder: Path) -> str:
    """What is wrong with a complete checkpoint, as one line that names the file; "" if nothing is. Archives, such as
    the files that torch writes, are compared with the checksums in them, and every file with its size."""
    path = folder / STATE_FILE
    try:
        read_state(folder)
        for name, written in json.loads(path.read_text()).get("files", {}).items():
            path = folder / name
            if (size := path.stat().st_size) != written:
                return f"{path} has {size} bytes, and was written with {written}"
        for path in folder.rglob("*.json"):
            json.loads(path.read_text())
        for path in folder.rglob("*.pt"):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{path} does not match its checksums"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    except (ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        return f"{path} is broken ({error_line(error)})"
    return ""


def prune_checkpoints(checkpoints: Path, keep: int) -> None:
    """Remove all complete checkpoints but the newest `keep`; 0 keeps all. `state.json` goes first, so that an
    interrupted removal leaves no folder that looks complete."""
    for folder in complete_checkpoints(checkpoints)[:-keep] if keep else ():
        (folder / STATE_FILE).unlink()
        shutil.rmtree(folder)
