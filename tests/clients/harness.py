"""Runs client programs against a gateway, each case with a rollout of its own, and prints one JSON line a case.

    python harness.py openai_sdks agents_sdk < roots.txt

The first line that is printed is {"cases": their number}. Standard input then has a gateway root for each, a line each:
http://HOST/…/rollout/…/agent. Every further line is the result of a case: {"client", "version", "feature", "streamed",
"root", "calls", "text", "tools", "error"}. A client program registers its cases with `case`; it has the client's
defaults everywhere but in base URL, key and model name. CLIENTS_ONLY=TEXT runs the cases whose name holds a text, and
-v prints tracebacks.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel

SYSTEM = "Solve the problem. Use the calculator."
QUESTION = "Hana has 28 apples, gets 25 and loses 27. How many apples are left?"
"""A question at which the tiny policy calls the calculator, and then gives the answer."""
PLAIN = "Gita takes 76 figs out of a tray that held 85 figs. How many stay?"
"""A question that it answers at once."""
NEXT = "Mina needs 55 candles and has 45. How many candles are missing?"
"""What is said in a second turn."""
MODEL = "policy"
PARAMETERS = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
    "additionalProperties": False,
}
FUNCTION = {"name": "calculator", "description": "Computes.", "parameters": PARAMETERS}
TOOL: Any = {"type": "function", "function": FUNCTION}


def asking(question: str) -> list[Any]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


class Answer(BaseModel):
    """An answer whose every value is one of a few, so that a tiny policy ends it."""

    sure: bool
    unit: Literal["figs", "trays"]


def saying(text: str) -> dict[str, Any]:
    """A field of vLLM's, beside the client's own, that holds the policy to a text that it was never taught."""
    return {"extra_body": {"structured_outputs": {"regex": re.escape(text)}}}


@dataclass
class Rollout:
    """What a case talks to, and what it has seen."""

    root: str
    """Anthropic's base URL; OpenAI's is `root` + "/v1"."""
    tools: list[tuple[str, str]] = field(default_factory=list)
    """(expression, result) of each run of the calculator."""

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    @property
    def openai(self) -> dict[str, str]:
        """What OpenAI's clients and those of the same shape take."""
        return {"base_url": self.url, "api_key": "any"}

    def calculator(self, expression: str) -> str:
        """Work out one arithmetic expression.

        Args:
            expression: Numbers and + - * /, such as 14+3*2.
        """
        try:
            result = f"{eval(expression, {'__builtins__': {}}):g}"  # what the policy of a test says
        except Exception as error:
            result = f"error: {type(error).__name__}"
        self.tools.append((expression, result))
        return result


@dataclass(frozen=True)
class Seen:
    """What the client made of the replies."""

    calls: int
    """Number of model calls that it made."""
    text: str
    """The last reply: its text, or the JSON of its object."""


Program = Callable[[Rollout, bool], Awaitable[Seen]]


@dataclass(frozen=True)
class Case:
    client: str
    package: str
    feature: str
    streamed: bool
    program: Program


_CASES: list[Case] = []


def case(
    client: str, package: str, feature: str, *, streamed: tuple[bool, ...] = (False, True)
) -> Callable[[Program], Program]:
    """Register a program, unstreamed and streamed: an async function of a rollout and of whether its client streams,
    which returns what it saw. `package`: whose version is printed."""

    def register(program: Program) -> Program:
        _CASES.extend(Case(client, package, feature, stream, program) for stream in streamed)
        return program

    return register


async def _run(one: Case, root: str, limit: asyncio.Semaphore) -> None:
    rollout = Rollout(root)
    line: dict[str, Any] = {"client": one.client, "version": version(one.package), "feature": one.feature}
    line |= {"streamed": one.streamed, "root": root, "calls": 0, "text": "", "error": ""}
    async with limit:
        try:
            async with asyncio.timeout(90):
                seen = await one.program(rollout, one.streamed)
            line |= {"calls": seen.calls, "text": seen.text}
        except BaseException as error:  # a client may raise anything, groups too; the test tells
            line["error"] = f"{type(error).__name__}: {error}"[:2000]
            if "-v" in sys.argv:
                traceback.print_exc()
    print(json.dumps(line | {"tools": rollout.tools}), file=_OUT, flush=True)


async def main(wanted: str = "") -> None:
    """Run all cases of the programs, at most four at once."""
    limit = asyncio.Semaphore(4)
    cases = [one for one in _CASES if wanted in f"{one.client} {one.feature}"]
    print(json.dumps({"cases": len(cases)}), file=_OUT, flush=True)
    roots = [sys.stdin.readline().strip() for _ in cases]
    await asyncio.gather(*(_run(one, root, limit) for one, root in zip(cases, roots, strict=True)))


if __name__ == "__main__":
    sys.modules["harness"] = sys.modules["__main__"]  # the programs import `case` from here
    _OUT, sys.stdout = sys.stdout, sys.stderr  # frameworks print
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    for name in [word for word in sys.argv[1:] if not word.startswith("-")]:
        importlib.import_module(name)
    asyncio.run(main(os.environ.get("CLIENTS_ONLY", "")))
    _OUT.flush()
    os._exit(0)  # clients leave threads behind that would be waited for
