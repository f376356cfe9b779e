"""What may be a reward: scalars of several libraries, mappings of parts, None; and what happens to everything else."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from agent_lightning.config.running import AgentConfig
from agent_lightning.core.errors import RewardConfigError, RewardError
from agent_lightning.rollouts.rewards import read_printed, to_reward

AGENT = AgentConfig(target="m:f")


@pytest.mark.parametrize(
    "value",
    [
        *(1, 0.0, True, False, np.float32(0.5), np.float16(0.25), np.int64(1), np.bool_(True), Fraction(1, 2)),
        *(np.array(0.5), np.array([1.0]), Decimal("0.5"), torch.tensor(0.5), torch.tensor([1]), torch.tensor(True)),
        *(torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.25, requires_grad=True)),
    ],
    ids=repr,
)
def test_scalars_are_rewards(value: object) -> None:
    expected = value.item() if isinstance(value, np.ndarray) else float(value)  # type: ignore[arg-type]
    assert to_reward(value, AGENT) == (expected, {})


@pytest.mark.parametrize(
    "value",
    [
        *("1", "", [1.0], (1.0,), 1j, object(), np.array([0.5, 0.5]), np.array([]), torch.zeros(2), b"1", float),
        *(float("nan"), float("inf"), -math.inf, 10**400, 1e39, np.float32("nan"), torch.tensor(float("nan"))),
        *({"format": "1"}, {"format": math.nan}, {"format": [1.0]}, {str(n): 0.0 for n in range(65)}),
    ],
    ids=lambda value: repr(value).split(" at 0x")[0][:30],
)
def test_what_is_no_reward_is_refused(value: object) -> None:
    with pytest.raises(RewardError) as refused:
        to_reward(value, AGENT)
    assert not isinstance(refused.value, RewardConfigError)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (math.fsum([0.4, 0.3, 0.2, 0.1]), 0.0, 1.0, 1.0),
        (1.0000000000000002, 0.0, 1.0, 1.0),
        (-1e-17, 0.0, 1.0, 0.0),
        (float(np.float32(0.1) * np.float32(10.000001)), 0.0, 1.0, 1.0),
        (float(np.float32(0.3)), 0.0, 0.3, 0.3),
        (-1.0000001, -1.0, 1.0, -1.0),
        (100.00001, 0.0, 100.0, 100.0),
        (1e-3 + 1e-10, 0.0, 1e-3, 1e-3),
    ],
)
def test_a_reward_beyond_the_bound_within_rounding_is_the_bound(
    value: float, low: float, high: float, expected: float
) -> None:
    agent = AgentConfig(target="m:f", reward_min=low, reward_max=high)
    assert to_reward(value, agent) == (pytest.approx(expected, rel=1e-12), {})


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [(1.01, 0, 1), (-0.01, 0, 1), (2, 0, 1), (1.001e-3, 0, 1e-3), ({"format": 1.0, "answer": 1.0}, 0, 1)],
)
def test_a_reward_outside_the_range_is_a_mistake_of_the_config(value: object, low: float, high: float) -> None:
    agent = AgentConfig(target="m:f", reward_min=low, reward_max=high)
    with pytest.raises(RewardConfigError, match=r"set agent\.reward_min and agent\.reward_max .* agent\.part_weights"):
        to_reward(value, agent)


@pytest.mark.parametrize(
    ("value", "weights", "expected"),
    [
        ({"format": 1, "answer": 1.0}, {"format": 0.2, "answer": 0.8}, (1.0, {"format": 1.0, "answer": 1.0})),
        ({"format": True, "answer": np.float32(0)}, {"format": 0.2, "answer": 0.8}, (0.2, {"format": 1, "answer": 0})),
        ({"format": 0.25, "answer": torch.tensor(0.5)}, {}, (0.75, {"format": 0.25, "answer": 0.5})),
        ({"format": 1.0, "style": None}, {"format": 1.0, "style": 1.0}, (1.0, {"format": 1.0})),
        ({"length": 500, "answer": 1}, {"length": 0, "answer": 1}, (1.0, {"length": 500.0, "answer": 1.0})),
        ({"score": 0.5, "acc": 1.0, "pred_len": 17}, {}, (0.5, {"score": 0.5, "acc": 1.0, "pred_len": 17.0})),
        ({"reward": 0.25, "format": 1.0}, {}, (0.25, {"reward": 0.25, "format": 1.0})),
        ({"reward": 0.25}, {}, (0.25, {})),
        ({"score": 1.0, "style": 1.0}, {"score": 0.5, "style": 0.5}, (1.0, {"score": 1.0, "style": 1.0})),
        ({"style": None}, {}, (None, {})),
        ({}, {}, (None, {})),
        (None, {}, (None, {})),
    ],
)
def test_parts_are_weighed_and_none_is_no_opinion(
    value: object, weights: dict[str, float], expected: tuple[float | None, dict[str, float]]
) -> None:
    assert to_reward(value, AgentConfig(target="m:f", part_weights=weights)) == (
        expected[0] if expected[0] is None else pytest.approx(expected[0]),
        expected[1],
    )


def test_a_part_without_a_weight_is_a_mistake_of_the_config() -> None:
    agent = AgentConfig(target="m:f", part_weights={"fromat": 0.2, "answer": 0.8})
    with pytest.raises(RewardConfigError, match=r"agent\.part_weights has no weight for 'format'"):
        to_reward({"format": 1.0, "answer": 1.0}, agent)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("0.5", 0.5), ("1", 1.0), ("+1", 1.0), (".5", 0.5), ("true", True), ("null", None)),
        *(('{"format": 1}', {"format": 1}), ("hello", "hello"), ("[" * 100_000, "[" * 100_000)),
    ],
)
def test_a_command_prints_its_reward(text: str, expected: object) -> None:
    assert read_printed(text) == expected
