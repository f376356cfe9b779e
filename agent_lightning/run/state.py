"""What a run is to do, and how far it is: the loop's plan, and the state that a checkpoint keeps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from agent_lightning.core.errors import AccountingError
from agent_lightning.core.types import Split
from agent_lightning.credit.rules import CreditRules
from agent_lightning.run.tasks import TaskCursor


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long, how much, and how credit is given."""

    steps: int
    tasks_per_step: int
    rollouts_per_task: int
    refills: int
    """More rounds of rollouts in a step, for groups that give nothing to train on."""
    rollouts_per_batch: int | None
    """Rollouts of one optimiser step; None: all of the step's."""
    epochs: int
    """Times that the batches of a step are trained on."""
    eval_every: int
    """Steps between evaluations; there is always one before the first step and one after the last."""
    rules: CreditRules
    pad_token: int
    row_multiple: int
    publish_timeout_s: float = 300.0


@dataclass(slots=True, kw_only=True)
class State:
    """What a checkpoint keeps beside the learner's own files. Counts are of the whole run."""

    step: int = 0
    version: int = 0
    cursor: TaskCursor
    next_group: dict[Split, int] = field(default_factory=dict)
    val_rewards: list[tuple[int, float]] = field(default_factory=list)
    """(step, mean held-out reward) of each evaluation."""
    admitted: int = 0
    trained: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    sampled_tokens: int = 0
    trained_tokens: int = 0
    gap_total: float = 0.0
    gap_count: float = 0.0
    gap_max: float = 0.0
    seconds: Counter[str] = field(default_factory=Counter)
    """Of all steps together: total, generate, update, publish, other."""
    wall_s: float = 0.0


def check_conservation(state: State) -> None:
    """Every admitted rollout and every sampled token was trained or dropped. Raises AccountingError."""
    for what, came, trained, dropped in (
        ("rollouts", state.admitted, state.trained, state.dropped),
        ("tokens", state.sampled_tokens, state.trained_tokens, state.dropped_tokens),
    ):
        if came != trained + sum(dropped.values()):
            raise AccountingError(f"{came} {what} came in, but {trained} were trained and {dict(dropped)} dropped")
