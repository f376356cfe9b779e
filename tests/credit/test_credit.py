"""Group statistics and the account of a group: rollouts and tokens in = trained + dropped, always."""

import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agent_lightning.config.learning import AirConfig, CreditConfig, FailuresConfig, Method, RuleConfig
from agent_lightning.config.load import from_mapping
from agent_lightning.core.errors import ConfigError
from agent_lightning.core.metrics import values
from agent_lightning.core.types import Group, ModelCall, Outcome, RolloutKey, Task, Trajectory
from agent_lightning.credit.air import Air
from agent_lightning.credit.assign import Credit, CreditRules, assign, explain_credit
from agent_lightning.credit.estimators import Baseline, Scale
from agent_lightning.credit.failures import TRUNCATED, learned_reward


def trajectory(
    index: int,
    lengths: Sequence[int],
    *,
    reward: float | None = None,
    outcome: Outcome = Outcome.FINISHED,
    agents: Sequence[str] = (),
    cut: Sequence[int] = (),
    states: Sequence[int] = (),
) -> Trajectory:
    """A rollout with one call for each response length; prompts of 2 tokens that do not extend each other.

    `cut`: calls that ended at the length limit. `states`: calls with the same number have the same prompt.
    """
    key = RolloutKey(split="train", group=0, index=index)
    calls = tuple(
        ModelCall(
            key=key,
            call_id=f"{index}-{n}",
            agent=agents[n] if agents else "main",
            policy_version=0,
            prompt_T=np.array([99, states[n]] if states else [index, 100 + n], np.int32),
            response_T=np.arange(length, dtype=np.int32),
            logprob_T=np.zeros(length, np.float32),
            finish_reason="length" if n in cut else "stop",
            started_at=0.0,
            ended_at=0.0,
        )
        for n, length in enumerate(lengths)
    )
    return Trajectory(key=key, task_id="t", calls=calls, reward=reward, outcome=outcome)


def credit(
    *trajectories: Trajectory,
    agents: str = "*",
    failures: FailuresConfig = FailuresConfig(),
    scale: Scale = "std",
    config: CreditConfig | None = None,
    air: Air | None = None,
    max_tokens: int = 10**6,
) -> Credit:
    return assign(
        Group(group_id="train-0", task=Task(task_id="t", payload={}), trajectories=trajectories),
        CreditRules(
            agents=agents, failures=failures, credit=config or CreditConfig(scale=scale), air=air, max_tokens=max_tokens
        ),
    )


def advantages(result: Credit, index: int) -> list[float]:
    """The advantage of each trained row of a rollout; its calls make a row each here."""
    return [float(s.advantage_T[-1]) for s in result.samples if s.key.index == index]


# algorithm.failures ---------------------------------------------------------------------------------------------------


def test_failures_have_defaults_that_can_be_changed_one_by_one() -> None:
    failures = FailuresConfig(timeout=None, engine_error=-1.0)
    assert learned_reward(trajectory(0, [1], outcome=Outcome.TIMEOUT), failures) is None
    assert learned_reward(trajectory(0, [1], outcome=Outcome.ENGINE_ERROR), failures) == -1.0
    assert learned_reward(trajectory(0, [1], outcome=Outcome.AGENT_ERROR), failures) == 0.0
    assert learned_reward(trajectory(0, [1], outcome=Outcome.CANCELLED), failures) is None
    assert learned_reward(trajectory(0, [1], reward=0.7), failures) == 0.7
    assert learned_reward(trajectory(0, [1], outcome=Outcome.TIMEOUT), FailuresConfig()) == 0.0


def test_every_outcome_has_a_treatment() -> None:
    assert set(FailuresConfig.model_fields) == {*Outcome} - {Outcome.FINISHED} | {TRUNCATED}
    assert pickle.loads(pickle.dumps(FailuresConfig())) == FailuresConfig()


@pytest.mark.parametrize(
    "wrong",
    [
        {"finished": 1.0},
        {"tiemout": 0.0},
        {"timeout": math.nan},
        {"timeout": True},
        {"timeout": "keep"},
        {"truncated": "drop"},
        {"cancelled": "resample"},
    ],
)
def test_a_treatment_that_does_not_exist_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, ValidationError)):
        FailuresConfig(**wrong)
    values = {"experiment": "x", "model": {"path": "x"}, "agent": {"target": "x"}, "algorithm": {"failures": wrong}}
    with pytest.raises(ConfigError, match=r"^algorithm\.failures\."):
        from_mapping(values)


def test_a_resampled_failure_is_masked_if_its_last_attempt_fails() -> None:
    failures = FailuresConfig(timeout="resample", engine_error=0.5, truncated="resample")
    assert failures.resampled == {"timeout", "truncated", "tool_error", "worker_lost"}
    assert learned_reward(trajectory(0, [1], outcome=Outcome.TIMEOUT), failures) is None
    assert learned_reward(trajectory(0, [1], outcome=Outcome.ENGINE_ERROR), failures) == 0.5


@pytest.mark.parametrize(
    ("truncated", "reward"), [("keep", 1.0), (0.0, 0.0), (-1, -1.0), (None, None), ("resample", None)]
)
def test_a_finished_rollout_with_a_cut_reply_is_treated_as_the_config_says(
    truncated: Any, reward: float | None
) -> None:
    uncut, cut = trajectory(0, [1], reward=1.0), trajectory(1, [1], reward=1.0)
    cut = replace(cut, calls=tuple(replace(call, finish_reason="length") for call in cut.calls))
    failures = FailuresConfig(truncated=truncated)
    assert (learned_reward(uncut, failures), learned_reward(cut, failures)) == (1.0, reward)
    result = credit(uncut, cut, trajectory(2, [1], reward=0.0), failures=failures)
    assert result.dropped_rollouts == ({"masked_truncated": 1} if reward is None else {})


def test_a_finished_rollout_has_a_reward() -> None:
    with pytest.raises(ValueError, match="train-0-2 finished without a reward"):
        learned_reward(trajectory(2, [1]), FailuresConfig())


# assign ---------------------------------------------------------------------------------------------------------------


def test_a_group_is_credited_and_accounted_for() -> None:
    result = credit(
        trajectory(0, [2, 3], reward=1.0),
        trajectory(1, [4], reward=0.0),
        trajectory(2, [5], outcome=Outcome.TIMEOUT),  # counts as 0.0
        trajectory(3, [6], outcome=Outcome.ENGINE_ERROR),  # masked
        trajectory(4, [], outcome=Outcome.NO_MODEL_CALL),  # counts as 0.0, has nothing to train
        scale="none",
    )
    rows = [(s.key.index, int(s.mask_T.sum()), float(s.advantage_T[-1])) for s in result.samples]
    assert rows == [(0, 2, 0.75), (0, 3, 0.75), (1, 4, -0.25), (2, 5, -0.25)]
    assert result.trained_rollouts == 3
    assert result.dropped_rollouts == {"masked_engine_error": 1, "no_selected_call": 1}
    assert result.dropped_tokens == {"masked_engine_error": 6}
    assert result.sampled_tokens == 2 + 3 + 4 + 5 + 6
    np.testing.assert_array_equal(result.reward_R, [1, 0, 0, np.nan, 0])
    assert values(result.metrics) == pytest.approx(
        {
            "reward": 1 / 4,
            "group/no_spread": 0.0,
            "rollout/finished": 2 / 5,
            "rollout/calls": 5 / 5,
            "rollout/response_tokens": 20 / 5,
            "call/prompt_tokens": 2.0,
            "call/response_tokens": 20 / 5,
            "sample/tokens": (4 + 5 + 6 + 7) / 4,
        }
    )


def test_a_group_without_spread_trains_nothing() -> None:
    result = credit(trajectory(0, [2], reward=1.0), trajectory(1, [3], reward=1.0), trajectory(2, [], reward=1.0))
    assert result.samples == ()
    assert result.trained_rollouts == 0
    assert result.dropped_rollouts == {"no_spread": 2, "no_selected_call": 1}
    assert result.dropped_tokens == {"no_spread": 5}
    assert result.metrics["group/no_spread"].value == 1.0


def test_statistics_are_taken_before_anything_is_dropped() -> None:
    # Rollout 1's only row is too long to train; its reward still counts in the mean.
    result = credit(trajectory(0, [2], reward=1.0), trajectory(1, [50], reward=0.0), scale="none", max_tokens=10)
    assert [float(s.advantage_T[-1]) for s in result.samples] == [0.5]
    assert result.dropped_rollouts == {"overlong_sample": 1}
    assert result.dropped_tokens == {"overlong_sample": 50}


def test_a_rollout_that_loses_one_row_is_still_trained() -> None:
    result = credit(trajectory(0, [2, 50], reward=1.0), trajectory(1, [3], reward=0.0), max_tokens=10)
    assert result.trained_rollouts == 2
    assert result.dropped_rollouts == {}
    assert result.dropped_tokens == {"overlong_sample": 50}


def test_only_selected_agents_are_trained_and_counted() -> None:
    result = credit(
        trajectory(0, [2, 9], reward=1.0, agents=["writer", "judge"]),
        trajectory(1, [9], reward=0.0, agents=["judge"]),
        agents="writer",
        scale="none",
    )
    assert [(s.key.index, int(s.mask_T.sum()), float(s.advantage_T[-1])) for s in result.samples] == [(0, 2, 0.5)]
    assert result.sampled_tokens == 2
    assert result.dropped_rollouts == {"no_selected_call": 1}


def test_a_rollout_that_sampled_no_token_has_no_call_to_train() -> None:
    result = credit(trajectory(0, [0], reward=1.0), trajectory(1, [1], reward=0.0))
    assert result.dropped_rollouts == {"no_selected_call": 1}
    assert result.dropped_tokens == {}


def test_the_number_of_calls_does_not_change_the_advantages() -> None:
    few = credit(trajectory(0, [1], reward=1.0), trajectory(1, [1], reward=0.0), trajectory(2, [1], reward=0.0))
    many = credit(trajectory(0, [1] * 9, reward=1.0), trajectory(1, [1], reward=0.0), trajectory(2, [1], reward=0.0))
    assert [float(s.advantage_T[-1]) for s in few.samples[:1]] * 9 == [
        float(s.advantage_T[-1]) for s in many.samples[:9]
    ]
    assert [float(s.advantage_T[-1]) for s in few.samples[1:]] == [float(s.advantage_T[-1]) for s in many.samples[9:]]


@st.composite
def groups(draw: st.DrawFn) -> list[Trajectory]:
    trajectories = []
    for index in range(draw(st.integers(0, 6))):
        outcome = draw(st.sampled_from(Outcome))
        lengths = draw(st.lists(st.integers(0, 4), max_size=4))
        agents = draw(st.lists(st.sampled_from(["writer", "judge"]), min_size=len(lengths), max_size=len(lengths)))
        reward = float(draw(st.integers(0, 1))) if outcome is Outcome.FINISHED else None
        cut = draw(st.lists(st.integers(0, 3), max_size=2))
        trajectories.append(trajectory(index, lengths, reward=reward, outcome=outcome, agents=agents, cut=cut))
    return trajectories


# Calls that differ ----------------------------------------------------------------------------------------------------

CUT = Air(AirConfig(enabled=True, rules=(RuleConfig(on="cut", value=-0.2, cap=0.2),)))
"""Takes 0.2 from the calls that were cut at the length limit; `trajectory(..., cut=[1])` has such a call."""


def test_with_air_a_call_gets_what_it_earned_and_what_followed() -> None:
    cut, uncut = trajectory(0, [1, 1, 1], reward=1.0, cut=[1]), trajectory(1, [1], reward=0.0)
    to_go = CreditConfig(method="return_to_go", scale="none")
    result = credit(cut, uncut, config=to_go, air=CUT)
    # Returns 0.8 0.8 1.0 and 0.0; mean over rollouts (0.8667 + 0) / 2.
    assert advantages(result, 0) == pytest.approx([0.3667, 0.3667, 0.5667], abs=1e-4)
    assert advantages(result, 1) == pytest.approx([-0.4333], abs=1e-4)
    # The final reward alone is what is shown as the reward.
    assert values(result.metrics)["reward"] == 0.5
    assert values(result.metrics)["air/reward"] == pytest.approx(-0.1)


def test_with_air_identical_credit_shares_the_total() -> None:
    cut, uncut = trajectory(0, [1, 1, 1], reward=1.0, cut=[1]), trajectory(1, [1], reward=0.0)
    result = credit(cut, uncut, scale="none", air=CUT)
    assert advantages(result, 0) == pytest.approx([0.4] * 3)
    assert advantages(result, 1) == pytest.approx([-0.4])


def test_air_makes_spread_where_final_rewards_have_none() -> None:
    cut, uncut = trajectory(0, [1], reward=0.0, cut=[0]), trajectory(1, [1], reward=0.0)
    assert credit(cut, uncut).dropped_rollouts == {"no_spread": 2}
    result = credit(cut, uncut, air=CUT)
    assert result.trained_rollouts == 2
    assert advantages(result, 0)[0] < 0 < advantages(result, 1)[0]


def test_what_an_unselected_agent_earned_later_counts_for_the_calls_before() -> None:
    mixed = trajectory(0, [1, 1], reward=0.0, agents=["writer", "judge"], cut=[1])
    other = trajectory(1, [1], reward=0.0, agents=["writer"])
    result = credit(mixed, other, agents="writer", config=CreditConfig(method="return_to_go", scale="none"), air=CUT)
    assert advantages(result, 0) == pytest.approx([-0.1])


def test_same_state_compares_calls_with_the_same_prompt() -> None:
    first = trajectory(0, [1, 1], reward=1.0, states=[7, 8])
    second = trajectory(1, [1, 1], reward=0.0, states=[7, 9])
    result = credit(first, second, config=CreditConfig(method="same_state", scale="none", state_weight=2.0))
    assert advantages(result, 0) == pytest.approx([0.5 + 2 * 0.5, 0.5])
    assert advantages(result, 1) == pytest.approx([-0.5 - 2 * 0.5, -0.5])


def test_a_masked_rollout_changes_nothing_whatever_the_method() -> None:
    good, bad = trajectory(0, [1, 1], reward=1.0), trajectory(1, [1], reward=0.0)
    lost = trajectory(2, [1], outcome=Outcome.CANCELLED)
    for method in get_args(Method):
        config = CreditConfig(method=method, scale="none" if method == "gae" else "std")
        with_it, without = (credit(*rows, config=config) for rows in ((good, bad, lost), (good, bad)))
        assert [s.advantage_T.tolist() for s in with_it.samples] == [s.advantage_T.tolist() for s in without.samples]


def test_a_row_holds_what_each_call_earned_for_a_critic_to_go_by() -> None:
    # Three calls, the second cut at its length limit; the judge's, which is not trained, is the last.
    judged = trajectory(0, [1, 2, 1], reward=1.0, agents=["writer", "writer", "judge"], cut=[1])
    result = credit(judged, agents="writer", config=CreditConfig(method="gae", scale="batch"), air=CUT)
    assert [s.reward_T.tolist() for s in result.samples] == [[0, 0, 0], [0, 0, 0, pytest.approx(0.8)]]
    assert [s.call_T.tolist() for s in result.samples] == [[0, 0, 0], [0, 0, 1, 1]]
    assert not any(s.advantage_T.any() for s in result.samples)
    lost = credit(judged, agents="writer", config=CreditConfig(method="gae", scale="batch"), air=CUT, max_tokens=3)
    assert [s.reward_T.tolist() for s in lost.samples] == [[0, 0, pytest.approx(0.8)]]


def test_where_the_step_decides_a_group_without_spread_is_trained() -> None:
    rows = [trajectory(index, [1], reward=1.0) for index in range(3)]
    for config, advantage in (
        (CreditConfig(scale="batch", baseline="none"), 1.0),
        (CreditConfig(scale="batch"), 0.0),
        (CreditConfig(method="gae", scale="batch"), 0.0),
    ):
        result = credit(*rows, config=config)
        assert result.trained_rollouts == 3
        assert [s.advantage_T.tolist() for s in result.samples] == [[0, 0, advantage]] * 3
        assert values(result.metrics)["group/no_spread"] == 1
    assert credit(*rows, config=CreditConfig(scale="none", baseline="none")).trained_rollouts == 3
    assert credit(*rows).dropped_rollouts == {"no_spread": 3}


def test_a_critic_s_advantage_is_not_known_to_explain() -> None:
    two_agents = trajectory(0, [1, 1], reward=1.0, agents=["writer", "judge"])
    rules = CreditRules(agents="writer", credit=CreditConfig(method="gae", scale="none"))
    group = Group(group_id="train-0", task=Task(task_id="t", payload={}), trajectories=(two_agents,))
    ((first, second),) = explain_credit(group, rules)
    assert (first.status, second.status, second.advantage) == ("trained", "not selected", 0.0)
    assert math.isnan(first.advantage)
    assert first.return_to_go == 1.0


@pytest.mark.parametrize(
    "wrong", [{"method": "gae"}, {"method": "gae", "scale": "none", "baseline": "none"}, {"baseline": "none"}]
)
def test_an_estimator_refuses_what_it_would_not_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^credit\.(method=gae|baseline=none): needs credit\.scale="):
        CreditConfig(**wrong)


ESTIMATORS = [CreditConfig(method="gae", scale=scale) for scale in ("none", "batch")] + [
    CreditConfig(method=method, scale=scale, baseline=baseline)
    for method, scale, baseline in product(get_args(Method), get_args(Scale), get_args(Baseline))
    if method != "gae" and (scale, baseline) != ("std", "none")
]


@settings(deadline=None, max_examples=1000)
@given(
    groups(),
    st.sampled_from(["*", "writer", "nobody"]),
    st.integers(3, 8),
    st.sampled_from(ESTIMATORS),
    st.sampled_from([None, CUT]),
)
def test_rollouts_and_tokens_are_conserved(
    trajectories: list[Trajectory], agents: str, max_tokens: int, config: CreditConfig, air: Air | None
) -> None:
    result = credit(*trajectories, agents=agents, max_tokens=max_tokens, config=config, air=air)
    selected = [c for t in trajectories for c in t.calls if agents == "*" or c.agent == agents]
    assert result.sampled_tokens == sum(c.response_T.size for c in selected)
    trained_tokens = sum(int(s.mask_T.sum()) for s in result.samples)
    assert result.sampled_tokens == trained_tokens + sum(result.dropped_tokens.values())
    assert len(trajectories) == result.trained_rollouts + sum(result.dropped_rollouts.values())
    assert result.trained_rollouts == len({s.key.rollout_id for s in result.samples})
    assert result.reward_R.shape == (len(trajectories),)
    unscored = ("scorer_error", "unscored")
    masked = {f"masked_{name}" for name in ("engine_error", "tool_error", "worker_lost", "cancelled", *unscored)}
    reasons = {"no_spread", "no_selected_call", "overlong_sample"} | masked
    assert {*result.dropped_rollouts, *result.dropped_tokens} <= reasons
    assert all(count > 0 for count in (*result.dropped_rollouts.values(), *result.dropped_tokens.values()))
