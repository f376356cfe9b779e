"""A safe calculator, the tool of the example: its schema, and a way to run one call of it.

Arithmetic is exact (fractions) wherever it can be, so that 0.1+0.2 is 0.3. Nothing is handed to `eval`: the
expression is parsed and its tree is walked, and length, depth, digits and exponents are bounded.
"""

from __future__ import annotations

import ast
import json
import re
from fractions import Fraction
from typing import Any

SYSTEM = "Solve the problem. Use the calculator."
"""The system message of an agent that has this tool; short, because a tiny policy reads it."""

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out one arithmetic expression, such as (14+3)*2.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "Numbers, + - * / // % ** and ( )."}},
            "required": ["expression"],
        },
    },
}
"""The tool in the format of OpenAI's `tools=`."""

MAX_LENGTH = 200
MAX_DEPTH = 100
"""A sum of 100 numbers is a tree of depth 99."""
MAX_DIGITS = 30
MAX_EXPONENT = 64
MAX_BITS = 1000
"""The largest numerators and denominators; any such fraction is still a finite float."""

_CHARACTERS = re.compile(r"[0-9.+\-*/%() ]+")
_TYPED = str.maketrans({"×": "*", "÷": "/", "−": "-", "\n": " ", "\t": " "})


def evaluate(expression: str) -> float | int:
    """Work out an expression.

    "(14+3)*2" -> 34; "0.1+0.2" -> 0.3; "1,200/5" -> 240; "7//2" -> 3.
    Raises ValueError with a short message: "division by zero", "not a calculation", "expression too long", …
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError("expression too long")
    text = expression.translate(_TYPED).strip()
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    # Python refuses "007"; a calculator does not.
    text = re.sub(r"(?<![0-9.])0+(?=[0-9])", "", text)
    if not _CHARACTERS.fullmatch(text):
        raise ValueError("not a calculation")
    if any(len(number) > MAX_DIGITS for number in re.findall(r"[0-9.]+", text)):
        raise ValueError("number too long")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("not a calculation") from None
    value = _walk(tree.body, 1)
    return value.numerator if value.denominator == 1 else float(value)


def render(value: float | int) -> str:
    """A number as the tool says it: 34.0 -> "34", 1/3 -> "0.333333", 0.00012345678 -> "0.000123457".

    Integers have no ".0"; others have at most 6 decimals (6 digits after the leading zeros where smaller than 0.1).
    """
    if value == int(value):
        return str(int(value))
    exponent = int(f"{abs(value):e}".split("e")[1])
    decimals = min(max(6, 5 - exponent), 18)
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def call(arguments: str) -> str:
    """Run one tool call, as the model wrote its arguments: '{"expression": "2*3"}' -> "6".

    Whatever is wrong is told to the model: '{"expression": "1/0"}' -> "error: division by zero".
    """
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        return "error: arguments are not JSON"
    expression = given.get("expression") if isinstance(given, dict) else None
    if not isinstance(expression, str):
        return "error: expression is missing"
    try:
        return render(evaluate(expression))
    except ValueError as error:
        return f"error: {error}"


def _walk(node: ast.expr, depth: int) -> Fraction:
    """The exact value of a tree. `depth` counts from 1 at the root."""
    if depth > MAX_DEPTH:
        raise ValueError("expression too deep")
    match node:
        case ast.Constant(value=int() | float() as value):
            # repr gives the shortest decimal that reads back as this float: 0.1 -> 1/10.
            return Fraction(repr(value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_walk(operand, depth + 1)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _walk(operand, depth + 1)
        case ast.BinOp(left=left, op=operator, right=right):
            return _bounded(_apply(operator, _walk(left, depth + 1), _walk(right, depth + 1)))
        case _:
            raise ValueError("not a calculation")


def _apply(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(operator, ast.Div | ast.FloorDiv | ast.Mod) and right == 0:
        raise ValueError("division by zero")
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return Fraction(left // right)
        case ast.Mod():
            return left % right
        case ast.Pow():
            return _power(left, right)
        case _:
            raise ValueError("not a calculation")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError("exponent too large")
    if base == 0 and exponent < 0:
        raise ValueError("division by zero")
    if exponent.denominator == 1:
        # Checked before it is worked out: the size of a power is known from its base.
        if max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent) > 2 * MAX_BITS:
            raise ValueError("number too large")
        return Fraction(base**exponent.numerator)
    if base < 0:
        raise ValueError("not a real number")
    try:
        return Fraction(float(base) ** float(exponent))
    except OverflowError:
        raise ValueError("number too large") from None


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ValueError("number too large")
    return value
