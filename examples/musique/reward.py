"""The reward of the example: 0.9 x F1 of the answer + 0.1 x format, as in Agent Lightning's paper (arXiv 2508.03680).

The format is kept where every turn thinks and then does one thing, and the last one answers:

    <think>I need the band's singer.</think><query>singer of The Doors</query>
    <think>It says so.</think><answer>Jim Morrison</answer>
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from answers import f1

_QUERY = re.compile(r"\s*<think>(.*?)</think>\s*<query>(.*?)</query>\s*", re.DOTALL)
_ANSWER = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|query|answer)>")
_GIVEN = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def score(task: Mapping[str, Any], output: Sequence[str]) -> float:
    """The reward, from 0 to 1, of what the agent said turn by turn; without an answer F1 is 0."""
    answer = given_answer(output[-1]) if output else None
    right = 0.0 if answer is None else f1(answer, [task["answer"], *task.get("answer_aliases", ())])
    return 0.9 * right + 0.1 * well_formed(output)


def given_answer(turn: str) -> str | None:
    """The last answer in a turn: "<answer>Oslo</answer>" -> "Oslo"; None where there is none."""
    answers = _GIVEN.findall(turn)
    return answers[-1].strip() if answers else None


def well_formed(turns: Sequence[str]) -> bool:
    """Whether all turns but the last think and query, and the last thinks and answers."""
    if not turns:
        return False
    matches = [_QUERY.fullmatch(turn) for turn in turns[:-1]] + [_ANSWER.fullmatch(turns[-1])]
    return all(match and match[2].strip() and not _TAG.search(match[1] + match[2]) for match in matches)
