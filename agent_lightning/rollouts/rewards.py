"""What a reward function may return, and the reward that becomes of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Final, SupportsFloat

import numpy as np

from agent_lightning.config.running import AgentConfig
from agent_lightning.core import types
from agent_lightning.core.errors import RewardConfigError, RewardError

_ROUNDING: Final = 1e-5
"""How far a reward may lie outside its range and count as the bound, relative to the larger bound: four weights may sum
to 1.0000000000000002, and a sum in float32 is less exact."""
_TOTALS: Final = ("reward", "score")  # names of a part that is the reward itself; veRL says score
_MOST_PARTS: Final = 64


def to_reward(value: object, agent: AgentConfig) -> tuple[float | None, dict[str, float]]:
    """The reward that a value stands for, and its named parts; None if the value is None: there is no opinion.

    A number is a Python, NumPy or torch scalar, or a bool. The parts of a mapping are added with the weights of
    `agent.part_weights`, or with weight 1 if there are none; a part that is None is left out. A part "reward" or
    "score" that has no weight is the reward itself, and the others are only shown. Raises RewardError for a value that
    is no finite number, and RewardConfigError for a reward outside the range and for a part without a weight.

        to_reward(True, agent)                          # (1.0, {})
        to_reward({"format": 1, "answer": 0.5}, agent)  # (1.5, {"format": 1.0, "answer": 0.5}), if that is in the range
        to_reward("1", agent)                           # RewardError: the reward is a str, not a number
    """
    if value is None:
        return None, {}
    if not isinstance(value, Mapping):
        return _within(_number(value, "the reward"), agent), {}
    parts = {
        str(name): _number(part, f"the reward's part {name!r}") for name, part in value.items() if part is not None
    }
    if len(parts) > _MOST_PARTS:
        raise RewardError(f"the reward has {len(parts)} parts; it may have {_MOST_PARTS}")
    weights = agent.part_weights
    total = next((parts[name] for name in _TOTALS if name in parts and name not in weights), None)
    if total is None and weights and (missing := sorted(parts.keys() - weights.keys())):
        raise RewardConfigError(f"agent.part_weights has no weight for {missing[0]!r}, a part of the reward: add it")
    if total is None and parts:
        total = math.fsum(weights.get(name, 1.0) * part for name, part in parts.items())
    return (None if total is None else _within(total, agent)), parts if parts.keys() != {"reward"} else {}


def read_printed(text: str) -> object:
    """The reward that a command prints: JSON, or a number in Python's notation. Other text stays text."""
    for read in (float, json.loads):
        with suppress(ValueError, RecursionError):
            return read(text)
    return text


def _number(value: object, name: str) -> float:
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()  # NumPy converts an array with dimensions no longer
    if not isinstance(value, SupportsFloat):
        raise RewardError(f"{name} is a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # a tensor with several elements, a huge int
        raise RewardError(f"{name} is a {type(value).__name__} and no single number: {error}") from error
    if not math.isfinite(number):
        raise RewardError(f"{name} is {number}")
    if not types.is_reward(number):
        raise RewardError(f"{name} {number:g} is beyond {types.LARGEST_REWARD:g}")
    return number


def _within(reward: float, agent: AgentConfig) -> float:
    """The reward, or the bound if it is one within rounding. Raises RewardConfigError if it is outside the range."""
    low, high = agent.reward_min, agent.reward_max
    within = min(max(reward, low), high)
    if abs(reward - within) > _ROUNDING * max(abs(low), abs(high)):
        raise RewardConfigError(
            f"the reward {reward:g} is outside [{low:g}, {high:g}]: set agent.reward_min and agent.reward_max to the "
            "range of your rewards, or agent.part_weights if it is a sum of parts"
        )
    return within
