"""Rewards that an agent gives itself cannot outweigh the owner's; states recur as the chosen key says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.config.learning import AirConfig, CreditConfig
from agent_lightning.config.load import load
from agent_lightning.core.errors import ConfigError
from agent_lightning.core.metrics import Mean, Sum, keep_most_counted, values
from agent_lightning.core.types import (
    LARGEST_REWARD,
    Group,
    ModelCall,
    Outcome,
    Reward,
    RolloutKey,
    Task,
    ToolCall,
    ToolStatus,
    Trajectory,
    is_reward,
)
from agent_lightning.credit.air import Air
from agent_lightning.credit.assign import Credit, CreditRules, assign
from agent_lightning.credit.states import STATE_KEYS, shared, state_keys
from agent_lightning.spans.assemble import assemble
from agent_lightning.spans.tree import RawSpan

NUMBERS = st.floats(-LARGEST_REWARD, LARGEST_REWARD)


def call(key: RolloutKey, n: int, *messages: dict[str, Any], agent: str = "main") -> ModelCall:
    return ModelCall(
        key=key,
        call_id=f"{key.index}-{n}",
        agent=agent,
        policy_version=0,
        prompt_T=np.array([key.index, n], np.int32),
        response_T=np.array([1], np.int32),
        logprob_T=np.array([-0.5], np.float32),
        finish_reason="stop",
        started_at=float(n),
        ended_at=n + 0.5,
        request=json.dumps(messages),
    )


def rollout(index: int, reward: float, emitted: dict[str, list[float]] | None = None, calls: int = 2) -> Trajectory:
    """A rollout that emits rewards about its last call, by name."""
    key = RolloutKey(split="train", group=0, index=index)
    made = tuple(call(key, n, {"role": "user", "content": "go"}) for n in range(calls))
    rewards = tuple(
        Reward(key=key, span_id=f"{name}-{i}", name=name, value=value, about=made[-1].call_id, at=1.0)
        for name, numbers in (emitted or {}).items()
        for i, value in enumerate(numbers)
    )
    return Trajectory(key=key, task_id="t", calls=made, reward=reward, outcome=Outcome.FINISHED, rewards=rewards)


def credit(*rollouts: Trajectory, air: Air | None = None, **keys: Any) -> Credit:
    rules = CreditRules(credit=CreditConfig(scale="none", **keys), air=air)
    return assign(Group(group_id="train-0", task=Task(task_id="t", payload={}), trajectories=rollouts), rules)


def advantage(result: Credit, index: int) -> float:
    return float(next(s.advantage_T[-1] for s in result.samples if s.key.index == index))


@pytest.mark.parametrize(
    ("emitted", "value", "expected"),
    [
        ("bounded", 0.2, -0.4),  # rewards 1 and 0 + 0.2, minus their mean
        ("bounded", 1000.0, -0.35),
        ("bounded", -1000.0, -0.65),
        ("bounded", LARGEST_REWARD, -0.35),
        ("trusted", 0.2, -0.4),
        ("trusted", 3.0, 1.0),
        ("ignored", 1000.0, -0.5),
    ],
)
def test_what_an_agent_emits_about_its_own_calls_counts_as_the_config_says(
    emitted: str, value: float, expected: float
) -> None:
    result = credit(rollout(0, 1.0), rollout(1, 0.0, {"mine": [value]}), emitted=emitted)
    assert advantage(result, 1) == pytest.approx(expected, abs=1e-6)
    assert values(result.metrics)["emitted/mine"] == value
    if emitted == "bounded":
        assert values(result.metrics)["credit/emitted_cut"] == pytest.approx(max(0.0, abs(value) - 0.3) / 2)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(NUMBERS, max_size=6),
    st.lists(NUMBERS, max_size=6),
    st.floats(0.01, 0.49),
    st.booleans(),
    st.sampled_from(["identical", "return_to_go"]),
)
def test_no_failed_rollout_overtakes_one_that_succeeded_whatever_either_emits(
    good: list[float], bad: list[float], bound: float, with_air: bool, method: str
) -> None:
    air = Air(AirConfig(enabled=True, bound=bound)) if with_air else None
    rules = CreditRules(credit=CreditConfig(scale="none", method=method), air=air, bound=bound)  # type: ignore[arg-type]
    rollouts = rollout(0, 1.0, {"a": good}, 1), rollout(1, 0.0, {"b": bad}, 1)
    result = assign(Group(group_id="train-0", task=Task(task_id="t", payload={}), trajectories=rollouts), rules)
    assert advantage(result, 0) > 0 > advantage(result, 1)


@settings(max_examples=300, deadline=None)
@given(st.lists(NUMBERS, max_size=30), st.sampled_from(["bounded", "trusted"]), st.sampled_from(["std", "none"]))
def test_no_emitted_reward_makes_a_number_that_float32_does_not_have(
    emitted: list[float], mode: str, scale: str
) -> None:
    keys: Any = {"emitted": mode, "scale": scale, "reward_weights": {"a": 1e30}}
    rollouts = rollout(0, 1.0, {"a": emitted, "b": emitted}), rollout(1, 0.0)
    group = Group(group_id="train-0", task=Task(task_id="t", payload={}), trajectories=rollouts)
    for sample in assign(group, CreditRules(credit=CreditConfig(**keys))).samples:
        assert np.isfinite(sample.advantage_T).all()
        assert np.isfinite(np.square(sample.advantage_T)).all()


ODD: list[Any] = [
    *(1e39, -1e39, 3.5e38, 1.1e15, math.nan, math.inf, -math.inf, 10**400, 10**18, True, "1e39", "nan", "9" * 5000, ""),
    *(None, [1.0], [[1.0]], {"a": 1.0}, b"1e39", 1 + 1j),
]
"""What no reward may become."""


@pytest.mark.parametrize(
    "value", ODD, ids=lambda value: f"{type(value).__name__} {str(value)[:8] if value != 10**400 else ''}"
)
def test_no_odd_value_becomes_a_reward_whichever_way_it_comes(value: Any) -> None:
    """As a span's value, its name, its index in the attribute's name; and a reward that is refused is counted."""
    key, times = RolloutKey(split="train", group=0, index=0), {"started_at": 1.0, "ended_at": 2.0}
    attributes = [
        {"agl.reward.value": value},
        {"agl.reward.value": 0.5, "agl.reward.name": value, "agl.reward.about": value},
        {"agentlightning.reward.0.name": "a", "agentlightning.reward.0.value": value},
        {f"agentlightning.reward.{'9' * 5000}.value": value},
        {f"agentlightning.reward.{value if value != 10**400 else 0}.value": 1e39},
    ]
    for number, spelled in enumerate(attributes):
        span = RawSpan(span_id="1" * 16, name="reward", attributes=spelled, **times)
        account = assemble(key, (), (span,))
        assert all(is_reward(reward.value) and isinstance(reward.name, str) for reward in account.rewards)
        if number in (0, 2) and value not in ("", None):
            assert account.refused


def test_an_agent_that_is_not_trusted_does_not_score_itself() -> None:
    with pytest.raises(ConfigError, match=r"credit\.emitted=ignored: .* agent\.reward must score"):
        load(["experiment=toy", "credit.emitted=ignored", "agent.reward=null"])


def test_names_that_agents_choose_fill_no_metrics() -> None:
    many = {f"name-{i}": [1.0] for i in range(9000)}
    metrics = credit(rollout(0, 1.0, many | {"shared": [0.5]}), rollout(1, 0.0, {"shared": [0.25]})).metrics
    kept = keep_most_counted({**metrics, "emitted/sum": Sum(1.0), "emitted_by": Mean.of([1.0])}, "emitted/", 64)
    assert sum(name.startswith("emitted/name-") for name in kept) == 63
    assert {"emitted/shared", "emitted/sum", "emitted_by", "reward"} <= set(kept)


def asked(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(identity: str) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": identity, "function": {"name": "look"}}]}


def got(identity: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identity, "content": content}


def conversation(index: int, *results: str, agent: str = "main") -> Trajectory:
    """A rollout that uses a tool after each call but the last; the ids of tool calls differ between rollouts."""
    key = RolloutKey(split="train", group=0, index=index)
    history, calls, tools = [asked("go")], [call(key, 0, asked("go"), agent=agent)], []
    for n, result in enumerate(results):
        identity = f"{index}/{n}"
        history += [said(identity), got(identity, result)]
        times = {"started_at": float(n), "ended_at": float(n)}
        use = {"tool_call_id": identity, "name": "look", "arguments": '{"at": 1}', "result": result}
        of_call = {"span_id": identity, "parent_id": "", "call_id": calls[-1].call_id, "source": "trace"}
        tools.append(ToolCall(key=key, status=ToolStatus.OK, **of_call, **use, **times))  # type: ignore[arg-type]
        calls.append(call(key, n + 1, *history, agent=agent))
    spans: dict[str, Any] = {"calls": tuple(calls), "tools": tuple(tools)}
    return Trajectory(key=key, task_id="t", reward=float(index), outcome=Outcome.FINISHED, **spans)


FIRST, SECOND = conversation(0, "a door", "a key"), conversation(1, "a wall", "a door")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("prompt", [False] * 6),
        ("shown", [True, True, False, True, False, True]),  # both begin alike, and each has seen a door
        ("tools", [True, False, False, True, False, False]),  # the histories part at the first tool
    ],
)
def test_a_state_recurs_as_its_key_says(key: str, expected: list[bool]) -> None:
    states_R = [state_keys(trajectory, STATE_KEYS[key]) for trajectory in (FIRST, SECOND)]
    assert shared(states_R) == expected
    metrics = credit(FIRST, SECOND, method="same_state", state_key=key).metrics
    assert values(metrics)["credit/shared_states"] == pytest.approx(sum(expected) / 6)


def test_another_agent_is_in_another_state() -> None:
    other = conversation(1, "a door", agent="other")
    for key in STATE_KEYS.values():
        assert not any(shared([state_keys(FIRST, key), state_keys(other, key)]))


def test_later_calls_in_the_same_state_are_compared() -> None:
    """The first call of both, and their calls at the door: those of the better rollout have 5 more."""
    result = credit(FIRST, SECOND, method="same_state", state_weight=10.0)
    rows = [[float(s.advantage_T[-1]) for s in result.samples if s.key.index == index] for index in (0, 1)]
    assert sorted(rows[0]) == pytest.approx([-5.5, -5.5, -0.5])
    assert sorted(rows[1]) == pytest.approx([0.5, 5.5, 5.5])


@pytest.mark.parametrize("request_text", ["", "no JSON", "[]", "7", '["text", null]', '[{"role": 1, "content": {}}]'])
@pytest.mark.parametrize("key", STATE_KEYS)
def test_a_request_in_any_form_has_a_state(key: str, request_text: str) -> None:
    calls = tuple(replace(call, request=request_text) for call in FIRST.calls)
    assert len(state_keys(replace(FIRST, calls=calls), STATE_KEYS[key])) == 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda trajectory: [1], "must return 3 keys"),
        (lambda trajectory: [[], [], []], "raised TypeError: unhashable"),
        (lambda trajectory: 1 / 0, "raised ZeroDivisionError"),
        (lambda trajectory: None, "raised TypeError"),
    ],
)
def test_a_function_of_the_user_that_fails_is_one_line(function: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"credit\.state_key: <lambda> {message}"):
        state_keys(FIRST, function)
    with pytest.raises(ConfigError, match=r"credit\.state_key=mine: use shown, tools, prompt"):
        CreditConfig(method="same_state", state_key="mine")
    assert not math.isnan(CreditConfig(method="same_state", state_key="a.py:f").state_weight)
