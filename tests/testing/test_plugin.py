"""The fixture `run_agent`: users' agents run against scripted replies, through the real gateway."""

from __future__ import annotations

import ast
import json
import operator
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from agent_lightning.core.types import Outcome
from agent_lightning.testing.plugin import RunAgent

ROOT = Path(__file__).parents[2]
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TASK = {"question": "2 + 3?", "answer": "5"}
CALL = {"add": {"expression": "2+3"}}


def add(expression: str) -> str:
    left, right = ast.literal_eval(expression.replace("+", ",").join("()"))
    return str(operator.add(left, right))


async def solve(task: dict[str, Any], policy: Any) -> str:
    messages: list[Any] = [{"role": "user", "content": task["question"]}]
    async with openai.AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, max_retries=0) as client:
        while True:
            reply = await client.chat.completions.create(model=policy.model, messages=messages, tools=[TOOL])
            message = reply.choices[0].message
            if not message.tool_calls:
                return message.content or ""
            messages.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls:
                result = add(**json.loads(call.function.arguments))
                messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def solve_streamed(task: dict[str, Any], policy: Any) -> str:
    client = openai.OpenAI(base_url=policy.base_url, api_key=policy.api_key)
    body: Any = {"model": policy.model, "messages": [{"role": "user", "content": "?"}], "tools": [TOOL]}
    with client.chat.completions.create(**body, stream=True) as chunks:
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    called = [call.function.name or "" for delta in deltas for call in delta.tool_calls or ()]
    return "".join(delta.content or "" for delta in deltas) + "".join(called)


def complete(task: dict[str, Any], policy: Any) -> str:
    client = openai.OpenAI(base_url=policy.base_url, api_key=policy.api_key)
    return client.completions.create(model=policy.model, prompt="2 + 3 =").choices[0].text


def score(task: dict[str, Any], output: str) -> float:
    return float(task["answer"] in output)


def test_a_rollout_has_reward_calls_and_tools(run_agent: RunAgent) -> None:
    rollout = run_agent(solve, TASK, reward=score, replies=[CALL, "It is 5."])
    assert (rollout.outcome, rollout.reward, rollout.output) == (Outcome.FINISHED, 1.0, "It is 5."), rollout.error
    assert [(tool.name, tool.arguments, tool.result) for tool in rollout.tools] == [
        ("add", '{"expression": "2+3"}', "5")
    ]
    assert [len(json.loads(call.request)) for call in rollout.calls] == [1, 3]


async def test_a_coroutine_test_may_use_it(run_agent: RunAgent) -> None:
    assert run_agent(solve, TASK, reward=score, replies=["4"]).reward == 0.0


@pytest.mark.parametrize(
    ("agent", "reply", "output"),
    [(solve_streamed, "five", "five"), (solve_streamed, CALL, "add"), (complete, " 5", " 5")],
)
def test_streams_and_completions_are_answered(run_agent: RunAgent, agent: Any, reply: Any, output: str) -> None:
    rollout = run_agent(agent, TASK, mode="thread", reward=score, replies=[reply])
    assert rollout.output == output, rollout.error


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        ([CALL], "the test gives 1 replies, and this is call 2"),
        ([{"divide": {}}], "reply 1 calls divide, and the agent offers ['add']"),
        ([{"add": {"expression": "2-"}}, ""], "test_plugin.py"),
    ],
)
def test_what_the_script_or_the_agent_lacks_is_told(run_agent: RunAgent, replies: Any, error: str) -> None:
    rollout = run_agent(solve, TASK, reward=score, replies=replies)
    assert rollout.outcome is Outcome.AGENT_ERROR
    assert error in rollout.error


def test_the_plug_in_is_cheap_until_a_test_uses_it() -> None:
    code = "import sys, agent_lightning.testing.plugin; print({'aiohttp', 'numpy', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout.strip() == b"set()"


def test_the_package_is_the_command() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "agent_lightning", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert shown.stdout.startswith("usage: agl ")
