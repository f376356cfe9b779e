"""The age of each token of a step."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from agent_lightning.core.types import Group, ModelCall, Outcome, RolloutKey, Task, Trajectory
from agent_lightning.credit.assign import STALE, CreditRules, assign, explain_credit
from agent_lightning.credit.samples import to_samples
from agent_lightning.credit.staleness import overlap_metrics

KEY = RolloutKey(split="train", group=0, index=0)


def rollout(*versions: Sequence[int]) -> Trajectory:
    """A rollout whose calls have a token of each of the versions."""
    calls = [
        ModelCall(
            key=KEY,
            call_id=f"c{number}",
            agent="agent",
            policy_version=of_call[0],
            prompt_T=np.array([number], np.int32),
            response_T=np.zeros(len(of_call), np.int32),
            logprob_T=np.zeros(len(of_call), np.float32),
            finish_reason="stop",
            started_at=0.0,
            ended_at=1.0,
            new_versions=tuple((i, v) for i, v in enumerate(of_call) if i and v != of_call[i - 1]),
        )
        for number, of_call in enumerate(versions)
    ]
    return Trajectory(key=KEY, task_id="t", calls=tuple(calls), reward=1.0, outcome=Outcome.FINISHED)


@pytest.mark.parametrize(
    ("versions", "metrics"),
    [
        ([[3, 3]], {"lag/mean": 0.0, "lag/max": 0.0, "lag/tokens/0": 2.0, "lag/mixed_rollouts": 0.0}),
        ([[2, 2]], {"lag/mean": 1.0, "lag/max": 1.0, "lag/tokens/1": 2.0, "lag/mixed_rollouts": 0.0}),
        (
            [[1, 2, 3, 3]],
            {"lag/mean": 0.75, "lag/max": 2.0, "lag/tokens/0": 2.0, "lag/tokens/1": 1.0, "lag/tokens/2": 1.0}
            | {"lag/mixed_rollouts": 1.0},
        ),
        (
            [[2, 2, 2], [3]],
            {"lag/mean": 0.75, "lag/max": 1.0, "lag/tokens/0": 1.0, "lag/tokens/1": 3.0, "lag/mixed_rollouts": 1.0},
        ),
    ],
)
def test_lag_is_counted_in_tokens(versions: Sequence[Sequence[int]], metrics: dict[str, float]) -> None:
    ended = rollout(*versions)
    zeros = np.zeros(len(versions), np.float32)
    samples, _ = to_samples(ended, ended.calls, zeros, zeros, max_tokens=9)
    assert overlap_metrics([ended], samples, version=3) == metrics


@pytest.mark.parametrize(("beyond", "kept"), [(None, True), (2, True), (1, False), (0, False)])
def test_the_oldest_token_decides_whether_a_group_is_dropped(beyond: int | None, kept: bool) -> None:
    other = replace(rollout([3]), key=replace(KEY, index=1), reward=0.0)
    group = Group(group_id="train-0", task=Task(task_id="t", payload={}), trajectories=(rollout([1, 3, 3]), other))
    credit = assign(group, CreditRules())
    after, explained = (of(group, CreditRules(drop_beyond=beyond), 3) for of in (assign, explain_credit))
    assert (after.dropped_rollouts == credit.dropped_rollouts) is kept
    assert kept or (after.samples, after.dropped_rollouts, after.dropped_tokens) == ((), {STALE: 2}, {STALE: 4})
    assert {call.status for calls in explained for call in calls} == {"trained" if kept else STALE}


def test_a_call_that_an_update_kept_from_beginning_is_of_the_new_version() -> None:
    (call,) = rollout([1, 1]).calls
    ended = replace(rollout([1, 1]), calls=(replace(call, new_versions=((0, 3),)),))
    assert overlap_metrics([ended], (), version=3) == {"lag/mixed_rollouts": 0.0}
