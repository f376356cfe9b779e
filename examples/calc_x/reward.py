"""The reward of the example: 1.0 if the last number (or the option letter) of the answer is right, else 0.0.

Reads results of all parts of Calc-X: "42", "-3", "0.875", "3/4", "(11/20)", "4(4/7)", "50%", option letters, and
Ape210k's unevaluated results such as "660/(1+10%)".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from calculator import evaluate

ABSOLUTE = 1e-6
RELATIVE = 1e-4
"""Two numbers are equal when |a - b| <= ABSOLUTE + RELATIVE * |b|."""

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?<![A-Za-z])(?P<sign>(?:(?<![0-9A-Za-z)])[-−])?)(?:[$¥€£](?P<sign2>[-−]?))?"
    rf"(?:(?P<whole>[0-9]+)\((?P<top>[0-9]+)/(?P<bottom>[0-9]+)\)|(?P<number>{_PLAIN})(?:/(?P<over>[0-9]+(?:\.[0-9]+)?))?)"
    rf"\)?(?P<percent>\s?%)?"
)
_NAMED_OPTION = re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*[:=]?\s*[*(\[{<]*([A-E])(?![A-Za-z0-9'])")
_OPTION = re.compile(r"(?<![A-Za-z0-9])([A-E])(?![A-Za-z0-9'])(?! [a-z])")


def score(task: Mapping[str, Any], output: str) -> float:
    """1.0 if `output` answers the task, else 0.0.

    {"result": "34"}, "The answer is 34." -> 1.0; {"result": "B"}, "Option B" -> 1.0; {"result": "50%"}, "0.5" -> 1.0.
    """
    result = str(task["result"]).strip()
    if re.fullmatch(r"[A-E]", result):
        return float(parse_option(output) == result)
    expected = _expected(result)
    answers = _readings(output)
    right = any(_equal(answer, value) for answer in answers for value in expected)
    return float(right or _repeats(result, output))


def score_sheet(task: Mapping[str, Any], output: Sequence[str]) -> float:
    """1.0 if every question of a sheet is answered right, else 0.0."""
    return float(all(score(row, answer) for row, answer in zip(task["rows"], output, strict=True)))


def parse_answer(text: str) -> float | None:
    """The last number of a text, None where it has none.

    "The answer is 1,234.5." -> 1234.5; "$12" -> 12.0; "3/4" -> 0.75; "12%" -> 0.12; "<result>5</result>" -> 5.0.
    A division that comes out even is not an answer but work left undone: "96/4" reads as its last number, 4.0.
    """
    readings = _readings(text)
    return readings[0] if readings else None


def parse_option(text: str) -> str | None:
    """The option letter that a text chooses: "The answer is B) 12" -> "B"; "(c)" -> "C"; "12" -> None."""
    named = _NAMED_OPTION.findall(text)
    if named:
        return str(named[-1])
    if re.fullmatch(r"\W*[a-e]\W*", text):
        return text.strip(" \n\t").strip("().*").upper()
    loose = _OPTION.findall(text)
    return str(loose[-1]) if loose else None


def _readings(text: str) -> list[float]:
    """What the last number of a text can mean: one value, or two for a percentage ("12%" -> [0.12, 12.0])."""
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return []
    found = matches[-1]
    value = _value(found)
    if found["sign"] or found["sign2"]:
        value = -value
    return [float(value / 100), float(value)] if found["percent"] else [float(value)]


def _value(found: re.Match[str]) -> Fraction:
    """The unsigned number of a match, without its percent sign."""
    if found["whole"]:
        bottom = int(found["bottom"])
        return int(found["whole"]) + (Fraction(int(found["top"]), bottom) if bottom else Fraction(0))
    number = Fraction(found["number"].replace(",", ""))
    if found["over"] is None:
        return number
    over = Fraction(found["over"])
    if over == 0 or (number / over).denominator == 1:
        return over
    return number / over


def _expected(result: str) -> list[float]:
    """The values of a task's result, which may be an expression: "4(4/7)" -> [4.571…], "36/(1-85%)" -> [240.0]."""
    text = re.sub(r"([0-9])\(", r"\1+(", result) if re.fullmatch(r"[0-9]+\([0-9]+/[0-9]+\)", result) else result
    text = re.sub(r"([0-9.]+)%", r"(\1/100)", text)
    try:
        value = float(evaluate(text))
    except ValueError:
        return _readings(result)
    return [value, value * 100] if re.fullmatch(r"-?[0-9.]+%", result) else [value]


def _repeats(result: str, output: str) -> bool:
    """Whether the answer ends with the very text of a result that is an unevaluated expression."""
    result, output = re.sub(r"\s", "", result), re.sub(r"\s", "", output).rstrip(".。")
    if not re.search(r"[0-9)][-+*/(]", result) or not output.endswith(result):
        return False
    before = output[: -len(result)][-1:]
    return not re.match(r"[0-9.+\-*/(]", before)


def _equal(answer: float, expected: float) -> bool:
    return abs(answer - expected) <= ABSOLUTE + RELATIVE * abs(expected)
