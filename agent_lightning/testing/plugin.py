"""The pytest plug-in for a user's own agent: the fixture `run_agent`. Pytest finds it by its entry point."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:  # pytest imports this module in every project: it must cost nothing until a test uses it
    from agent_lightning.core.types import Trajectory

Reply = str | Mapping[str, Mapping[str, object]]
"""What the policy answers to a call: a text, or the tools that it calls, each with its arguments."""


class RunAgent(Protocol):
    """The type of the fixture `run_agent`."""

    def __call__(
        self, agent: Any, task: Mapping[str, object], *, replies: Sequence[Reply], **section: Any
    ) -> Trajectory: ...


@pytest.fixture
def run_agent() -> RunAgent:
    """Run an agent once on a task, through the real gateway, worker and buffer, against a policy that gives the test's
    replies in their order. The result is the Trajectory: `outcome`, `reward`, `error`, `trace`, `output`, `printed`,
    `calls` with each request and reply, `tools`. `section` holds keys of the config's section `agent`, such as
    `reward`, `mode` and `timeout_s`; an agent that needs more replies than given is refused with status 400.

        def test_it_uses_the_calculator(run_agent):
            task = {"question": "2 + 3?", "answer": "5"}
            rollout = run_agent(solve, task, reward=score, replies=[{"calculator": {"expression": "2+3"}}, "It is 5."])
            assert rollout.reward == 1.0, rollout.trace or rollout.error
            assert [tool.result for tool in rollout.tools] == ["5"]
    """

    def run(agent: Any, task: Mapping[str, object], *, replies: Sequence[Reply], **section: Any) -> Trajectory:
        from agent_lightning.testing.script import run_script

        with ThreadPoolExecutor(1) as pool:  # a thread of its own: the test may be a coroutine
            return pool.submit(lambda: asyncio.run(run_script(agent, task, replies, section))).result()

    return run
