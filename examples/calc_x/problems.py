"""Word problems for the calculator: a seeded generator, ideal chats to learn from, and re-drawn MAWPS rows.

    generate(seed=0, num=1, split="train")
    # [{"id": "calc-train-0-0", "question": "Ravi has 14 keys and …", "result": "34", "equation": "(14+3)*2",
    #   "kind": "sum_times", "steps": 2}]

The sentences are our own. In many of them the numbers stand in another order than in the equation, and some have
a number that is not needed, so that a question has to be read.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, Literal

from calculator import SYSTEM, call, evaluate, render
from sentences import CONTAINERS, KINDS, NAMES, OBJECTS, Kind

LARGEST = 999
"""No result is larger."""
SHEET = 4
"""Problems of a sheet."""
MAX_TRIES = 400
"""Draws for one row to re-draw, before it is given up."""
_FRACTIONS = ("0.01", "0.05", "0.1", "0.25", "0.5")
CONSTANTS = frozenset([*map(Fraction, _FRACTIONS), *map(Fraction, [*range(1, 11), 12, 24, 60, 100])])
"""Numbers that an equation may have without the question: conversions, or said in words ("half", "a week")."""

_QUESTION_NUMBER = re.compile(r"(?<![\w.])(?<![0-9],)(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:\.[0-9]+)?)(?!\w|[.,][0-9])")
_EQUATION_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")


def generate(seed: int, num: int, split: Literal["train", "val"]) -> list[dict[str, Any]]:
    """`num` different problems; the same for the same seed everywhere. Train and val never share a question.

    A question belongs to val where its SHA-256 hash says so (one in ten), whatever the seed.
    """
    rng = random.Random(seed)
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < num:
        kind = rng.choice(KINDS)
        equation, numbers = _draw(kind, rng)
        question = _tell(rng.choice(kind.frames), numbers, rng)
        if _split_of(question) != split or question in rows:
            continue
        rows[question] = {
            "id": f"calc-{split}-{seed}-{len(rows)}",
            "question": question,
            "result": render(evaluate(equation)),
            "equation": equation,
            "kind": kind.name,
            "steps": operations(equation),
        }
    return list(rows.values())


def generate_sheets(seed: int, num: int, split: Literal["train", "val"]) -> list[dict[str, Any]]:
    """`num` sheets of SHEET different problems each: {"id": "sheet-train-0-0", "rows": [problem, …]}."""
    rows = generate(seed, SHEET * num, split)
    return [
        {"id": f"sheet-{split}-{seed}-{index}", "rows": rows[SHEET * index : SHEET * (index + 1)]}
        for index in range(num)
    ]


def solution(row: Mapping[str, Any], *, in_the_head: bool = False) -> list[dict[str, Any]]:
    """A right chat for a row with question, equation and result: OpenAI messages.

    system, user, assistant with the tool call calculator(expression=row["equation"]), tool, and at last the
    assistant's "The answer is 42.", which is the row's result. `in_the_head`: that answer at once, without the tool.
    Raises ValueError where the equation does not lead to the result (within 1 %: some results are rounded).
    """
    equation, result = str(row["equation"]), evaluate(str(row["result"]))
    if abs(evaluate(equation) - result) > 0.01 * abs(result):
        raise ValueError(f"{equation} does not lead to {row['result']}")
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
    answer = {"role": "assistant", "content": f"The answer is {render(result)}."}
    if in_the_head:
        return [*messages, answer]
    arguments = json.dumps({"expression": equation})
    tool_call = {"id": "call_0", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
    result_turn = {"role": "tool", "tool_call_id": "call_0", "content": call(arguments)}
    return [*messages, {"role": "assistant", "tool_calls": [tool_call]}, result_turn, answer]


def operations(equation: str) -> int:
    """How many operations an equation has: "(14+3)*2" -> 2."""
    return len(re.findall(r"[-+*/]", equation))


def normalise_equation(text: str) -> str:
    """An equation as the expression to type: "X=((22.0-14.0)/4.0)" -> "(22-14)/4"; "7 + 2 = x" -> "7+2"."""
    text = re.sub(r"\s", "", text)
    text = re.sub(r"^[A-Za-z_]+=|=[A-Za-z_]+$", "", text)
    text = re.sub(r"([0-9]+)\.([0-9]*?)0*(?![0-9])", lambda m: f"{m[1]}.{m[2]}" if m[2] else m[1], text)
    while text.startswith("(") and _closing(text) == len(text) - 1:
        text = text[1:-1]
    return text


def redraw(row: Mapping[str, Any], rng: random.Random) -> dict[str, Any] | None:
    """The same problem with other numbers, in the question and the equation together.

    "Sam has 22 pens and loses 14. …", "X=22.0-14.0" -> "Sam has 31 pens and loses 9. …", "31-9", result "22".
    Equal numbers stay equal and different ones different; integers stay integers; sizes stay within a third and
    three times; no difference and no result becomes negative, and an integer result stays an integer. Numbers that
    only the question has, and constants that only the equation has, stay. The id gets a suffix.
    None where that cannot be done: the equation cannot be evaluated or does not lead to the result, it has a number
    that is neither in the question nor a constant, or no draw fits.
    """
    question, equation = str(row["question"]), normalise_equation(str(row["equation"]))
    try:
        value = evaluate(equation)
        if abs(value - evaluate(str(row["result"]))) > 0.01 * abs(value) or value < 0:
            return None
    except ValueError:
        return None
    spelled = _spelled(question)
    wanted = {Fraction(token) for token in _EQUATION_NUMBER.findall(equation)}
    drawn = sorted((wanted & spelled.keys()) - {Fraction(0), Fraction(1)})
    if not drawn or not wanted - set(drawn) <= CONSTANTS | spelled.keys():
        return None
    kept = (wanted | spelled.keys()) - set(drawn)
    for _ in range(MAX_TRIES):
        new = {old: _near(old, spelled[old], rng) for old in drawn}
        if len({*new.values(), *kept}) < len(new) + len(kept):
            continue
        candidate = _rewrite(_EQUATION_NUMBER, equation, new, plain=True)
        if _fits(candidate, integer=isinstance(value, int)):
            rewritten = _rewrite(_QUESTION_NUMBER, question, new, plain=False)
            digest = hashlib.sha256(rewritten.encode()).hexdigest()[:8]
            return {
                "id": f"{row['id']}-{digest}",
                "question": rewritten,
                "equation": candidate,
                "result": render(evaluate(candidate)),
            }
    return None


def _draw(kind: Kind, rng: random.Random) -> tuple[str, dict[str, int]]:
    """Numbers for a kind of problem: the equation with them, and the numbers by letter."""
    while True:
        numbers = {letter: rng.randint(low, high) for letter, (low, high) in kind.ranges.items()}
        parts = [evaluate(part.format(**numbers)) for part in kind.parts]
        equation = kind.equation.format(**numbers)
        value = evaluate(equation)
        short = isinstance(value, int) or (kind.decimal and (10 * value).is_integer())
        if 0 <= value <= LARGEST and short and all(isinstance(part, int) and part > 0 for part in parts):
            return equation, numbers


def _tell(frame: str, numbers: Mapping[str, int], rng: random.Random) -> str:
    """Fill a sentence frame: {A} {B} names, {x} {y} objects, {j} {js} a container, {k} a number of no use."""
    first, second = rng.sample(NAMES, 2)
    thing, other = rng.sample(OBJECTS, 2)
    container, containers = rng.choice(CONTAINERS)
    useless = rng.choice([number for number in range(2, 100) if number not in numbers.values()])
    return frame.format(A=first, B=second, x=thing, y=other, j=container, js=containers, k=useless, **numbers)


def _split_of(question: str) -> Literal["train", "val"]:
    return "val" if hashlib.sha256(question.encode()).digest()[0] % 10 == 0 else "train"


def _closing(text: str) -> int:
    """Index of the bracket that closes the first one; -1 where none does."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index
    return -1


def _spelled(question: str) -> dict[Fraction, str]:
    """The numbers of a question as they stand there: "costs 33.60 or 7" -> {168/5: "33.60", 7: "7"}.

    A number before "twice" is left out: MAWPS writes "2 twice a number", where another number makes no sense.
    """
    matches = list(_QUESTION_NUMBER.finditer(question))
    fixed = {Fraction(m[0].replace(",", "")) for m in matches if question[m.end() :].lstrip().startswith("twice")}
    spelled = {Fraction(m[0].replace(",", "")): m[0] for m in matches}
    return {value: token for value, token in spelled.items() if value not in fixed}


def _near(old: Fraction, token: str, rng: random.Random) -> Fraction:
    """A number between a third and three times as large, with as many decimals as are written (two at most)."""
    is_integer = old.denominator == 1
    scale = 1 if is_integer else 10 ** min(2, len(token.partition(".")[2]))
    low, high = max(1, round(old * scale / 3)), max(9 if is_integer else 2, int(old * scale * 3))
    return Fraction(rng.randint(low, high), scale)


def _rewrite(pattern: re.Pattern[str], text: str, new: Mapping[Fraction, Fraction], *, plain: bool) -> str:
    """A text with its numbers replaced; where not `plain`, money keeps its decimals: "33.60" -> "41.20"."""

    def swap(match: re.Match[str]) -> str:
        old = Fraction(match[0].replace(",", ""))
        if old not in new:
            return match[0]
        places = len(match[0].partition(".")[2])
        return render(float(new[old])) if plain or places not in (1, 2) else f"{float(new[old]):.{places}f}"

    return pattern.sub(swap, text)


def _fits(equation: str, *, integer: bool) -> bool:
    try:
        value = evaluate(equation)
        return (
            value >= 0
            and (isinstance(value, int) or not integer)
            and all(evaluate(part) >= 0 for part in _differences(equation))
        )
    except ValueError:
        return False


def _differences(equation: str) -> Iterator[str]:
    """The parts of an expression that subtract, as text."""
    for node in ast.walk(ast.parse(equation, mode="eval")):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
            yield ast.unparse(node)
