"""Your reward: how good an answer is. `agent.part_weights` in the experiment weighs its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def score(task: Mapping[str, Any], output: str) -> dict[str, float]:
    """Score the last number of the answer, and whether it stands alone. None would mean that there is no opinion."""
    numbers = re.findall(r"-?\d+", output)
    return {
        "answer": float(bool(numbers) and int(numbers[-1]) == task["answer"]),
        "format": float(bool(re.fullmatch(r"-?\d+", output.strip()))),
    }
