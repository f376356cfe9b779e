"""Model calls, trajectories and groups for tests, from the few values that a test is about."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from agent_lightning.core.types import Group, ModelCall, Outcome, RolloutKey, Task, Trajectory
from agent_lightning.credit.tools import tool_calls


def model_call(
    key: RolloutKey,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    agent: str = "agent",
    version: int = 0,
    started_at: float = 0.0,
    logprobs: Sequence[float] | None = None,
    call_id: str | None = None,
) -> ModelCall:
    """A model call with these tokens: model_call(key, [1, 5], [6]). Without `logprobs`, each log-probability is -1."""
    return ModelCall(
        key=key,
        call_id=call_id or f"{key.rollout_id}-{key.attempt}-{agent}-{started_at:g}-{list(prompt)}",
        agent=agent,
        policy_version=version,
        prompt_T=np.array(prompt, np.int32),
        response_T=np.array(response, np.int32),
        logprob_T=np.array([-1.0] * len(response) if logprobs is None else logprobs, np.float32),
        finish_reason="stop",
        started_at=started_at,
        ended_at=started_at,
    )


def trajectory(
    key: RolloutKey, *calls: ModelCall, reward: float | None = 1.0, outcome: Outcome = Outcome.FINISHED
) -> Trajectory:
    """A finished attempt with these calls and their tools; with an `outcome` other than FINISHED it has no reward."""
    earned = reward if outcome is Outcome.FINISHED else None
    return Trajectory(
        key=key, task_id=key.group_id, calls=calls, reward=earned, outcome=outcome, tools=tool_calls(calls)
    )


def group(*trajectories: Trajectory) -> Group:
    """The group of these trajectories, which must have the same split and group number, with a made-up task."""
    group_id = trajectories[0].key.group_id
    task = Task(task_id=group_id, payload={})
    return Group(group_id=group_id, task=task, trajectories=trajectories)
