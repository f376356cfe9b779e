"""Whether a text answers a question of Calc-X: numbers, fractions, mixed numbers, units, percentages, option letters.

A result is as the parts of Calc-X have it: "42", "-3", "0.875", "3/4", "(11/20)", "4(4/7)", "50%", an option letter,
or an unevaluated one of Ape210k such as "660/(1+10%)". An answer is its value in any usual form: "$1,200.00",
"1_200 apples", "0.333333", "1 3/4", "\\frac{7}{4}", "12 percent".

Calc-X (arXiv 2305.15017) compares values with an absolute tolerance of 1e-5. Here a whole result must be met exactly,
up to what six printed decimals leave open; any other within RELATIVE of itself, at most CENTS, so that a result which
is rounded in the answer's last decimals still counts and a number that is off by one never does.

Example:

    same("4(4/7)", "It is 32/7.")         # True
    same("12000", "The answer is 12001")  # False
    same("B", "B) 34")                    # True
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import product

from calculator import evaluate

FOR_INTEGERS = Fraction(1, 10**6)
RELATIVE = Fraction(1, 10**4)
CENTS = Fraction(5, 1000)
LONGEST = 200
"""Characters of a number; a longer one is no answer."""

_UNIFORM = (
    (re.compile(r"\\(?:left|right|[,;!])"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\s?\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}"), r"(\1/\2)"),
    (re.compile(r"\\(?=[%$])"), ""),
    (re.compile(r"(?<=[0-9)])\s?(?:percent|per cent|％)"), "%"),
    (re.compile(r"(?<=[0-9])_(?=[0-9]{3}(?![0-9]))"), ""),
    # An exponent of a unit is no number: "12 cm^2".
    (re.compile(r"(?<=[A-Za-z])\^\{?-?[0-9]+\}?"), ""),
    (re.compile(r"(?<![0-9./(])([0-9]{1,9})(?: and | |又)([0-9]{1,9}/[0-9]{1,9})(?![0-9/])"), r"\1(\2)"),
)
"""Ways to write a number that become one: LaTeX, thousands as Calc-X prints them, "1 3/4" and "1又3/4"."""

_PLAIN = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?<![A-Za-z0-9])(?P<sign>(?:(?<![0-9A-Za-z)])[-−])?)(?:[$¥€£](?P<sign2>[-−]?))?"
    rf"(?:(?P<whole>[0-9]+)\((?P<top>[0-9]+)/(?P<bottom>[0-9]+)\)"
    rf"|\(?(?P<number>{_PLAIN}(?:[eE][-+]?[0-9]{{1,2}}(?![0-9A-Za-z]))?)(?:/(?P<over>[0-9]+(?:\.[0-9]+)?))?)"
    rf"\)?(?P<percent>\s?%)?"
)
_CHOSEN = r"([A-E](?![A-Za-z0-9'])|[a-e](?=\s*(?:[).\]}*]|$)))"
_NAMED_OPTION = re.compile(rf"(?i:answer|option|choice)(?i:\s+is)?\s*[:=]?\s*[*(\[{{<]*{_CHOSEN}")
_LEADING_OPTION = re.compile(r"\W*([A-Ea-e])\s*[).:\]}]")
_OPTION = re.compile(r"(?<![A-Za-z0-9])([A-E])(?![A-Za-z0-9'])(?! [a-z])")


def same(result: str, answer: str) -> bool:
    """Whether `answer` gives `result`; what counts is its last number, or the option it names."""
    result = result.strip()
    if re.fullmatch(r"[A-E]", result):
        return parse_option(answer) == result
    expected = _expected(result)
    if not expected:
        return answer.strip() == result
    # "50%" may stand for 0.5 or for 50; where both say percent, they are compared as such.
    answers = _readings(answer)
    pairs = zip(answers, expected, strict=True) if len(answers) == len(expected) == 2 else product(answers, expected)
    return any(_equal(expected, other) for expected, other in pairs) or _repeats(result, answer)


def parse_answer(text: str) -> float | None:
    """The last number of a text, None where it has none.

    "The answer is 1,234.5." -> 1234.5; "$12" -> 12.0; "3/4" -> 0.75; "12%" -> 0.12; "<result>5</result>" -> 5.0.
    A division that comes out even is not an answer but work left undone: "96/4" reads as its last number, 4.0.
    """
    readings = _readings(text)
    return float(readings[0]) if readings else None


def parse_option(text: str) -> str | None:
    """The option letter that a text chooses: "The answer is B) 12" -> "B"; "(c)" -> "C"; "12" -> None."""
    named = _NAMED_OPTION.findall(text)
    if named:
        return str(named[-1]).upper()
    alone = re.fullmatch(r"\W*([a-e])\W*", text) or _LEADING_OPTION.match(text)
    if alone:
        return alone[1].upper()
    loose = _OPTION.findall(text)
    return str(loose[-1]) if loose else None


def _readings(text: str) -> list[Fraction]:
    """What the last number of a text can mean: one value, or two for a percentage ("12%" -> [0.12, 12])."""
    for pattern, uniform in _UNIFORM:
        text = pattern.sub(uniform, text)
    matches = list(_NUMBER.finditer(text))
    if not matches or len(matches[-1][0]) > LONGEST:
        return []
    last = matches[-1]
    value = _value(last)
    if last["sign"] or last["sign2"]:
        value = -value
    return [value / 100, value] if last["percent"] else [value]


def _value(match: re.Match[str]) -> Fraction:
    """The unsigned number of a match, without its percent sign."""
    if match["whole"]:
        top, bottom = int(match["top"]), int(match["bottom"])
        return int(match["whole"]) + (Fraction(top, bottom) if bottom else Fraction(0))
    number = Fraction(match["number"].replace(",", ""))
    if match["over"] is None:
        return number
    over = Fraction(match["over"])
    if over == 1:
        return number
    if over == 0 or (number / over).denominator == 1:
        return over
    return number / over


def _expected(result: str) -> list[Fraction]:
    """The values of a task's result, which may be an expression: "4(4/7)" -> [4.571…], "36/(1-85%)" -> [240]."""
    text = re.sub(r"([0-9])\(", r"\1+(", result) if re.fullmatch(r"[0-9]+\([0-9]+/[0-9]+\)", result) else result
    text = re.sub(r"([0-9.]+)%", r"(\1/100)", text)
    try:
        value = Fraction(evaluate(text))
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


def _equal(answer: Fraction, expected: Fraction) -> bool:
    # An expression's value may have been worked out in floats.
    is_integer = abs(expected - round(expected)) < 1e-9
    return abs(answer - expected) <= (FOR_INTEGERS if is_integer else min(RELATIVE * abs(expected), CENTS))
