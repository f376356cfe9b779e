"""What agent code says about itself, from coroutines, threads and processes, through the real gateway and buffer."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from openai import AsyncOpenAI

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.errors import ConfigError, RewardError, StepFailed
from agent_lightning.core.types import Outcome, Policy, Task, ToolStatus, Trajectory
from agent_lightning.rollouts.client import Rollout, close, current_rollout, emit_reward, inside, install, tool
from agent_lightning.testing.world import ToyWorld

TASKS = [Task(task_id="sky", payload={"question": "The sky is"})]
Payload = dict[str, str]


async def ask(policy: Policy, payload: Payload) -> str:
    """The id of the reply."""
    messages = [{"role": "user", "content": payload["question"]}]
    async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key) as client:
        return (await client.chat.completions.create(model=policy.model, messages=messages)).id  # type: ignore[arg-type]


async def trajectory_of(agent: AgentConfig | Callable[..., object]) -> Trajectory:
    """A trajectory of one step with the agent."""
    # The limits have room for a busy machine, on which a process takes long to start.
    spec = agent if isinstance(agent, AgentConfig) else AgentConfig(target=agent, mode="async", timeout_s=60.0)
    async with (
        asyncio.timeout(90),
        ToyWorld(agent=spec, tasks=TASKS, words=("blue",), algorithm=AlgorithmConfig(rollouts_per_task=2)) as world,
    ):
        await world.train(steps=1)
        return next(t for group in world.observer.groups for t in group.trajectories if t.key.split == "train")


@tool
def search(query: str, limit: int = 3) -> list[str]:
    return [query] * limit


@tool("fetch")
async def get(url: str) -> str:
    await asyncio.sleep(0)
    raise TimeoutError(f"{url} timed out")


async def shows_its_tools(payload: Payload, policy: Policy) -> None:
    reply = await ask(policy, payload)
    with tool("outer", {"a": 1}, call_id="t-1") as outer:
        assert search("x", limit=1) == ["x"]
        outer.result = {"found": True}
    with pytest.raises(TimeoutError):
        await get("http://nowhere")
    emit_reward(0.25, name="found", about=outer)
    emit_reward({"format": 0.5, "style": 0.25}, about=reply)
    emit_reward({"answer": 1.0, "length": -0.5})


@tool("slow", timeout_s=0.1)
async def slow() -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        STOPPED.append("slow")
        raise


@tool("blocks", timeout_s=0.1)
def blocks(seconds: float) -> str:
    time.sleep(seconds)
    return f"{current_rollout() is not None}"


STOPPED: list[str] = []


async def has_tools_that_hang(payload: Payload, policy: Policy) -> float:
    await ask(policy, payload)
    for call in (slow, functools.partial(asyncio.to_thread, blocks, 2.0)):
        with pytest.raises(TimeoutError, match=r"tool (slow|blocks): not done after 0.1 s"):
            await call()
    assert blocks(0.0) == "True"
    return 1.0


async def test_a_tool_has_a_deadline_of_its_own() -> None:
    STOPPED.clear()
    seen = await trajectory_of(has_tools_that_hang)
    assert (seen.outcome, seen.error) == (Outcome.FINISHED, "")
    assert [(item.name, item.status) for item in seen.tools] == [
        ("slow", ToolStatus.TIMEOUT),
        ("blocks", ToolStatus.TIMEOUT),
        ("blocks", ToolStatus.OK),
    ]
    assert set(STOPPED) == {"slow"}
    with pytest.raises(TypeError, match="decorator"), tool("block", timeout_s=1.0):
        pass


async def test_tools_and_rewards_reach_the_trajectory() -> None:
    seen = await trajectory_of(shows_its_tools)
    assert (seen.outcome, seen.reward) == (Outcome.FINISHED, 0.5)  # what it emitted about the whole
    outer, inner, failed = seen.tools
    assert (outer.name, outer.arguments, outer.result, outer.status) == (
        "outer",
        '{"a": 1}',
        '{"found": true}',
        ToolStatus.OK,
    )
    assert outer.tool_call_id == "t-1"
    assert (inner.name, inner.arguments, inner.parent_id) == ("search", '{"query": "x", "limit": 1}', outer.span_id)
    assert outer.started_at <= inner.started_at <= inner.ended_at <= outer.ended_at
    assert (failed.name, failed.status) == ("fetch", ToolStatus.TIMEOUT)
    (call,) = seen.calls
    assert {tool.call_id for tool in seen.tools} == {call.call_id}
    about = {item.name: (item.value, item.about) for item in seen.rewards}
    assert about["found"] == (0.25, outer.span_id)
    assert about["format"] == (0.5, call.call_id)
    assert about["answer"] == (1.0, "")


async def test_a_rollout_is_known_in_threads_and_processes() -> None:
    async def agent(payload: Payload, policy: Policy) -> float:
        await ask(policy, payload)
        rollouts = []

        def work(name: str) -> None:
            rollouts.append(current_rollout())
            with tool(name):
                pass

        work("here")
        await asyncio.to_thread(work, "pool")
        thread = threading.Thread(target=work, args=["thread"])
        thread.start()
        thread.join()
        rollout = current_rollout()
        assert rollout is not None
        assert rollouts == [rollout] * 3
        code = (
            "from agent_lightning.rollouts.client import tool, emit_reward\n"
            "with tool('process'): emit_reward(1, name='p')"
        )
        with tool("parent"):
            env = {**os.environ, **rollout.environment()}
            child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=env)
            assert await child.wait() == 0
        return 1.0

    seen = await trajectory_of(agent)
    assert seen.error == ""
    assert {item.name for item in seen.tools} == {"here", "pool", "thread", "parent", "process"}
    by_name = {item.name: item for item in seen.tools}
    assert by_name["process"].parent_id == by_name["parent"].span_id
    assert [item.name for item in seen.rewards] == ["p"]


async def test_an_agent_in_a_process_says_it_too() -> None:
    spec = AgentConfig(target="tests/rollouts/test_client.py:in_a_process", mode="process", timeout_s=60.0)
    seen = await trajectory_of(spec)
    assert (seen.outcome, seen.reward, seen.error) == (Outcome.FINISHED, 0.75, "")
    assert [item.name for item in seen.tools] == ["search"]


async def in_a_process(payload: Payload, policy: Policy) -> None:
    await ask(policy, payload)
    search("y")
    emit_reward(0.75)


async def test_an_agent_that_returns_and_emits_nothing_has_no_reward() -> None:
    async def silent(payload: Payload, policy: Policy) -> None:
        await ask(policy, payload)

    with pytest.raises(StepFailed, match="RewardError: the agent returned nothing and emitted no reward"):
        await trajectory_of(silent)


def test_outside_a_run_agent_code_runs_as_before() -> None:
    assert current_rollout() is None
    assert search("x") == ["x"] * 3
    with tool("anything", {"a": object()}) as span:
        span.result = 1
    assert span.span_id == ""
    emit_reward(1.0)
    code = (
        "from agent_lightning.rollouts.client import tool\nwith tool('x'): pass\n"
        "import sys\nassert 'requests' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow  # as long as it is tried
async def test_what_cannot_be_sent_is_given_up_without_showing_the_secret(caplog: pytest.LogCaptureFixture) -> None:
    secret = "0123456789abcdef" * 2
    rollout = Rollout(rollout_id="train-0-0", attempt=0, base_url=f"http://127.0.0.1:9/attempt/0/{secret}/agent/v1")
    with inside(rollout):
        late = tool("late")
        with tool("lost"):
            late.__enter__()
    await close(rollout)
    late.__exit__(None, None, None)  # after the rollout's end: a part of nothing
    await close(rollout)
    assert "/attempt/0/***/agent/v1/traces" in caplog.text
    assert secret not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("delay", [None, 5.0], ids=["a gateway that is gone", "a gateway that is slow"])
def test_a_process_that_ends_is_held_up_by_a_slow_gateway_only(delay: float | None) -> None:
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(delay or 0)
            received.append(self.path)
            self.send_response(200)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if delay is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    code = "from agent_lightning import emit_reward\nemit_reward(1.0)\nimport time\nprint(time.time())"
    variables = os.environ | {"AGL_ROLLOUT_ID": "train-0-0", "OPENAI_BASE_URL": url}
    ended = subprocess.run([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.time() - float(ended.stdout)
    if delay is None:
        assert seconds < 8
    else:
        server.shutdown()
        assert seconds > delay
        assert received == ["/v1/traces"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e16, -1e300, 10**400, "1", None, {"a": "b"}])
def test_a_reward_that_is_no_number_or_too_large_is_refused(value: object) -> None:
    with pytest.raises(RewardError, match="not a finite number"):
        emit_reward(value)  # type: ignore[arg-type]


def test_an_instrumentor_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ConfigError, match="no instrumentor 'nothing' is installed"):
        install(["nothing"])
