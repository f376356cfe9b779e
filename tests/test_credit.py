"""Group statistics and the account of a group: rollouts and tokens in = trained + dropped, always."""

import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from agent_lightning.credit import Credit, FailurePolicy, Scale, assign, group_normalised, identical
from agent_lightning.errors import ConfigError
from agent_lightning.metrics import values
from agent_lightning.types import Group, ModelCall, Outcome, RolloutKey, Task, Trajectory


def trajectory(
    index: int,
    lengths: Sequence[int],
    *,
    reward: float | None = None,
    outcome: Outcome = Outcome.FINISHED,
    agents: Sequence[str] = (),
) -> Trajectory:
    """A rollout with one call for each response length; prompts of 2 tokens that do not extend each other."""
    key = RolloutKey(split="train", group=0, index=index)
    calls = tuple(
        ModelCall(
            key=key,
            call_id=f"{index}-{n}",
            agent=agents[n] if agents else "main",
            policy_version=0,
            prompt_T=np.array([index, 100 + n], np.int32),
            response_T=np.arange(length, dtype=np.int32),
            logprob_T=np.zeros(length, np.float32),
            finish_reason="stop",
            started_at=0.0,
            ended_at=0.0,
        )
        for n, length in enumerate(lengths)
    )
    return Trajectory(key=key, task_id="t", calls=calls, reward=reward, outcome=outcome)


def credit(
    *trajectories: Trajectory,
    agents: str = "*",
    failures: FailurePolicy | None = None,
    scale: Scale = "std",
    max_tokens: int = 10**6,
) -> Credit:
    group = Group(group_id="train-0", task=Task(task_id="t", payload={}), trajectories=trajectories)
    return assign(group, agents=agents, failures=failures or FailurePolicy(), scale=scale, max_tokens=max_tokens)


# identical, group_normalised ------------------------------------------------------------------------------------------


def test_every_call_gets_the_final_reward() -> None:
    assert identical(0.5, 3).tolist() == [0.5, 0.5, 0.5]
    assert identical(0.5, 0).shape == (0,)
    assert identical(0.5, 3).dtype == np.float32


# fmt: off
NORMALISED: list[tuple[Scale, list[float], list[int], list[float]]] = [
    ("none", [1, 0, 0, 7], [1, 1, 1, 0], [2 / 3, -1 / 3, -1 / 3, 0]),
    ("std",  [1, 0, 0, 7], [1, 1, 1, 0], [1.1547, -.57735, -.57735, 0]),  # sample std of 1 0 0 is 0.57735
    ("std",  [1, 0],       [1, 1],       [.7071, -.7071]),
    ("std",  [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]),                   # no spread among the valid
    ("std",  [1, 0],       [1, 0],       [0, 0]),                         # one valid rollout
    ("std",  [1, 0],       [0, 0],       [0, 0]),
    ("std",  [],           [],           []),
    ("std",  [math.nan, 1, 0], [0, 1, 1], [0, .7071, -.7071]),            # a masked reward may be anything
]
# fmt: on


@pytest.mark.parametrize(("scale", "rewards", "valid", "expected"), NORMALISED)
def test_group_normalised(scale: Scale, rewards: list[float], valid: list[int], expected: list[float]) -> None:
    found = group_normalised(np.array(rewards, np.float64), np.array(valid, np.bool_), scale=scale)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_group_normalised_refuses_what_is_not_a_reward() -> None:
    with pytest.raises(ValueError, match="not all finite"):
        group_normalised(np.array([math.inf, 0.0]), np.ones(2, np.bool_))
    with pytest.raises(ValueError, match="validity of shape"):
        group_normalised(np.zeros(2), np.ones(3, np.bool_))


rewards_and_valid = st.lists(
    st.tuples(st.integers(-50, 50).map(lambda n: n / 10), st.booleans()), min_size=1, max_size=8
).map(lambda rows: (np.array([r for r, _ in rows], np.float64), np.array([v for _, v in rows], np.bool_)))
Rollouts = tuple[NDArray[np.float64], NDArray[np.bool_]]


@settings(deadline=None, max_examples=50)
@given(rewards_and_valid, st.floats(-10, 10), st.floats(0.1, 10))
def test_advantages_do_not_depend_on_the_reward_s_unit(case: Rollouts, shift: float, factor: float) -> None:
    rewards, valid = case
    moved = group_normalised(rewards * factor + shift, valid)
    np.testing.assert_allclose(moved, group_normalised(rewards, valid), atol=1e-3)
    unscaled = group_normalised(rewards * factor + shift, valid, scale="none")
    np.testing.assert_allclose(unscaled, factor * group_normalised(rewards, valid, scale="none"), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(rewards_and_valid, st.integers(0, 999), st.sampled_from(["std", "none"]))
def test_order_of_rollouts_does_not_matter(case: Rollouts, seed: int, scale: Scale) -> None:
    rewards, valid = case
    order = np.random.default_rng(seed).permutation(len(rewards))
    shuffled = group_normalised(rewards[order], valid[order], scale=scale)
    np.testing.assert_allclose(shuffled, group_normalised(rewards, valid, scale=scale)[order], atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(rewards_and_valid, st.sampled_from(["std", "none"]))
def test_advantages_balance_and_masked_rollouts_leave_no_trace(case: Rollouts, scale: Scale) -> None:
    rewards, valid = case
    found = group_normalised(rewards, valid, scale=scale)
    assert abs(float(found.sum())) < 1e-4
    assert not found[~valid].any()
    np.testing.assert_array_equal(found[valid], group_normalised(rewards[valid], valid[valid], scale=scale))


@pytest.mark.parametrize("scale", ["std", "none"])
@settings(deadline=None, max_examples=50)
@given(reward=st.floats(-1e3, 1e3), size=st.integers(1, 12))
def test_equal_rewards_give_exactly_zero(scale: Scale, reward: float, size: int) -> None:
    assert group_normalised(np.full(size, reward), np.ones(size, np.bool_), scale=scale).tolist() == [0.0] * size


@pytest.mark.stack
@pytest.mark.parametrize("scale", ["std", "none"])
def test_group_normalised_agrees_with_verl(scale: Scale) -> None:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for size in (2, 3, 8, 64):
        rewards = rng.integers(0, 5, size).astype(np.float32)
        rewards[0] += 1  # some spread, whatever was drawn
        token_rewards = torch.zeros(size, 4)
        token_rewards[:, -1] = torch.from_numpy(rewards)
        theirs, _ = core_algos.compute_grpo_outcome_advantage(
            token_rewards,
            response_mask=torch.ones(size, 4),
            index=np.zeros(size, np.int64),
            norm_adv_by_std_in_grpo=scale == "std",
        )
        ours = group_normalised(rewards, np.ones(size, np.bool_), scale=scale)
        np.testing.assert_allclose(ours, theirs[:, 0].numpy(), rtol=1e-4, atol=1e-5)


# FailurePolicy --------------------------------------------------------------------------------------------------------


def test_failures_have_defaults_that_can_be_changed_one_by_one() -> None:
    policy = FailurePolicy.of({"timeout": None, "engine_error": -1.0})
    assert policy.reward_of(trajectory(0, [1], outcome=Outcome.TIMEOUT)) is None
    assert policy.reward_of(trajectory(0, [1], outcome=Outcome.ENGINE_ERROR)) == -1.0
    assert policy.reward_of(trajectory(0, [1], outcome=Outcome.AGENT_ERROR)) == 0.0
    assert policy.reward_of(trajectory(0, [1], outcome=Outcome.CANCELLED)) is None
    assert policy.reward_of(trajectory(0, [1], reward=0.7)) == 0.7
    assert FailurePolicy().reward_of(trajectory(0, [1], outcome=Outcome.TIMEOUT)) == 0.0


def test_every_outcome_has_an_answer() -> None:
    assert set(FailurePolicy().rewards) == set(Outcome) - {Outcome.FINISHED}
    assert pickle.loads(pickle.dumps(FailurePolicy())) == FailurePolicy()


@pytest.mark.parametrize("overrides", [{"finished": 1.0}, {"tiemout": 0.0}, {"timeout": math.nan}])
def test_failures_refuse_what_is_not_one(overrides: dict[str, float | None]) -> None:
    with pytest.raises(ConfigError, match=r"^failures\."):
        FailurePolicy.of(overrides)


def test_failures_refuse_to_leave_an_outcome_out() -> None:
    with pytest.raises(ConfigError, match="needs exactly the outcomes"):
        FailurePolicy({Outcome.TIMEOUT: 0.0})


def test_a_finished_rollout_has_a_reward() -> None:
    with pytest.raises(ValueError, match="train-0-2 finished without a reward"):
        FailurePolicy().reward_of(trajectory(2, [1]))


# assign ---------------------------------------------------------------------------------------------------------------


def test_a_group_is_credited_and_accounted_for() -> None:
    found = credit(
        trajectory(0, [2, 3], reward=1.0),
        trajectory(1, [4], reward=0.0),
        trajectory(2, [5], outcome=Outcome.TIMEOUT),  # counts as 0.0
        trajectory(3, [6], outcome=Outcome.ENGINE_ERROR),  # masked
        trajectory(4, [], outcome=Outcome.NO_MODEL_CALL),  # counts as 0.0, has nothing to train
        scale="none",
    )
    rows = [(s.key.index, int(s.mask_T.sum()), float(s.advantage_T[-1])) for s in found.samples]
    assert rows == [(0, 2, 0.75), (0, 3, 0.75), (1, 4, -0.25), (2, 5, -0.25)]
    assert found.trained_rollouts == 3
    assert found.dropped_rollouts == {"masked_engine_error": 1, "no_selected_call": 1}
    assert found.dropped_tokens == {"masked_engine_error": 6}
    assert found.sampled_tokens == 2 + 3 + 4 + 5 + 6
    np.testing.assert_array_equal(found.reward_R, [1, 0, 0, np.nan, 0])
    assert values(found.metrics) == pytest.approx(
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
    found = credit(trajectory(0, [2], reward=1.0), trajectory(1, [3], reward=1.0), trajectory(2, [], reward=1.0))
    assert found.samples == ()
    assert found.trained_rollouts == 0
    assert found.dropped_rollouts == {"no_spread": 2, "no_selected_call": 1}
    assert found.dropped_tokens == {"no_spread": 5}
    assert found.metrics["group/no_spread"].value == 1.0


def test_statistics_are_taken_before_anything_is_dropped() -> None:
    # Rollout 1's only row is too long to train; its reward still counts in the mean.
    found = credit(trajectory(0, [2], reward=1.0), trajectory(1, [50], reward=0.0), scale="none", max_tokens=10)
    assert [float(s.advantage_T[-1]) for s in found.samples] == [0.5]
    assert found.dropped_rollouts == {"overlong_sample": 1}
    assert found.dropped_tokens == {"overlong_sample": 50}


def test_a_rollout_that_loses_one_row_is_still_trained() -> None:
    found = credit(trajectory(0, [2, 50], reward=1.0), trajectory(1, [3], reward=0.0), max_tokens=10)
    assert found.trained_rollouts == 2
    assert found.dropped_rollouts == {}
    assert found.dropped_tokens == {"overlong_sample": 50}


def test_only_selected_agents_are_trained_and_counted() -> None:
    found = credit(
        trajectory(0, [2, 9], reward=1.0, agents=["writer", "judge"]),
        trajectory(1, [9], reward=0.0, agents=["judge"]),
        agents="writer",
        scale="none",
    )
    assert [(s.key.index, int(s.mask_T.sum()), float(s.advantage_T[-1])) for s in found.samples] == [(0, 2, 0.5)]
    assert found.sampled_tokens == 2
    assert found.dropped_rollouts == {"no_selected_call": 1}


def test_a_rollout_that_sampled_no_token_has_no_call_to_train() -> None:
    found = credit(trajectory(0, [0], reward=1.0), trajectory(1, [1], reward=0.0))
    assert found.dropped_rollouts == {"no_selected_call": 1}
    assert found.dropped_tokens == {}


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
        trajectories.append(trajectory(index, lengths, reward=reward, outcome=outcome, agents=agents))
    return trajectories


@settings(deadline=None, max_examples=100)
@given(groups(), st.sampled_from(["*", "writer", "nobody"]), st.integers(3, 8), st.sampled_from(["std", "none"]))
def test_rollouts_and_tokens_are_conserved(
    trajectories: list[Trajectory], agents: str, max_tokens: int, scale: Scale
) -> None:
    found = credit(*trajectories, agents=agents, max_tokens=max_tokens, scale=scale)
    selected = [c for t in trajectories for c in t.calls if agents == "*" or c.agent == agents]
    assert found.sampled_tokens == sum(c.response_T.size for c in selected)
    trained_tokens = sum(int(s.mask_T.sum()) for s in found.samples)
    assert found.sampled_tokens == trained_tokens + sum(found.dropped_tokens.values())
    assert len(trajectories) == found.trained_rollouts + sum(found.dropped_rollouts.values())
    assert found.trained_rollouts == len({s.key.rollout_id for s in found.samples})
    assert found.reward_R.shape == (len(trajectories),)
    reasons = {"no_spread", "no_selected_call", "overlong_sample", "masked_engine_error", "masked_cancelled"}
    assert {*found.dropped_rollouts, *found.dropped_tokens} <= reasons
    assert all(count > 0 for count in (*found.dropped_rollouts.values(), *found.dropped_tokens.values()))
