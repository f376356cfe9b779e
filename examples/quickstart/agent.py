"""A first agent: it answers word problems with a calculator, and a function gives it its reward.

The agent is plain `openai` code. The training only tells it where the model is:

    await solve({"question": "Ada has 14 figs and finds 3 more. How many figs has Ada?"}, policy)  # "The answer is 17."
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Mapping
from typing import Any, Protocol

from openai import AsyncOpenAI

SYSTEM = "Solve the problem. Use the calculator."
CALCULATOR: Any = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out an arithmetic expression, such as (14+3)*2.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
MAX_TURNS = 3
"""Model calls of one rollout."""

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class Policy(Protocol):
    """The model that is trained, as an OpenAI-compatible endpoint."""

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str: ...
    @property
    def model(self) -> str: ...


async def solve(task: Mapping[str, Any], policy: Policy) -> str:
    """Run one rollout: talk to the model until it calls no more tools, and return its last reply.

    `task` is a row of train.jsonl or val.jsonl. An exception ends the rollout as a failed one.
    """
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task["question"]}]
    async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key) as client:
        for _ in range(MAX_TURNS):
            answer = await client.chat.completions.create(model=policy.model, messages=messages, tools=[CALCULATOR])
            reply = answer.choices[0].message
            if not reply.tool_calls:
                break
            messages.append(reply.model_dump(include={"role", "content", "tool_calls"}, exclude_none=True))
            for call in reply.tool_calls:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": run(call)})
    return reply.content or ""


def reward(task: Mapping[str, Any], output: str) -> float:
    """Return 1.0 if the last number of the agent's answer is the task's answer, else 0.0.

    Example:

        reward({"answer": 17}, "The answer is 17.")  # 1.0
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", output)
    return float(bool(numbers) and float(numbers[-1]) == task["answer"])


def run(call: Any) -> str:
    """Return the result of a tool call; a mistake becomes a text that the model reads, and the rollout goes on."""
    try:
        return f"{calculate(json.loads(call.function.arguments)['expression']):g}"
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        return f"error: {error}"


def calculate(expression: str) -> float:
    """Work out an expression of numbers, + - * / and brackets. Raises ValueError or ZeroDivisionError.

    Example:

        calculate("(14+3)*2")  # 34
    """
    if len(expression) > 100:
        raise ValueError("the expression is too long")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError("this is no expression") from error


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATORS:
            return _OPERATORS[type(operation)](_value(left), _value(right))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand)
    raise ValueError("only numbers, + - * / and brackets are allowed")
