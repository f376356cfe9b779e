"""Agents reach the gateway whatever proxy variables are set, in all four modes: the proxy of these tests is dead."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import install_opener

import agents_for_tests as agents
import httpx
import pytest
from test_rollout import FILE, make_spec, run_task

from agent_lightning.config.running import AgentMode
from agent_lightning.core.types import Outcome
from agent_lightning.rollouts.agents import bypass_proxies

URL = "http://10.0.0.5:8000/rollout/v1"
DEAD = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, None),
        ({"NO_PROXY": "a"}, None),
        ({"HTTP_PROXY": ""}, None),
        ({"HTTP_PROXY": DEAD}, "10.0.0.5"),
        ({"https_proxy": DEAD, "no_proxy": "intranet, .corp"}, "intranet,.corp,10.0.0.5"),
        ({"ALL_PROXY": DEAD, "NO_PROXY": "a,b", "no_proxy": "b,c"}, "a,b,c,10.0.0.5"),
        ({"http_proxy": DEAD, "NO_PROXY": "*"}, "*"),
        ({"http_proxy": DEAD, "NO_PROXY": "10.0.0.5"}, "10.0.0.5"),
        ({"http_proxy": "proxy.corp:3128"}, "10.0.0.5"),
        ({"all_proxy": "socks5://127.0.0.1:9"}, "10.0.0.5,*"),
        ({"HTTP_PROXY": "ftp://127.0.0.1:9", "NO_PROXY": "a"}, "a,10.0.0.5,*"),
    ],
)
def test_the_gateways_host_is_added(env: dict[str, str], expected: str | None) -> None:
    expected_variables = {} if expected is None else {"NO_PROXY": expected, "no_proxy": expected}
    variables = bypass_proxies(env, URL)
    assert variables == expected_variables
    assert bypass_proxies(env | variables, URL) == expected_variables


@pytest.fixture(params=["http", "socks", "lower case"])
def dead_proxy(request: pytest.FixtureRequest) -> Iterator[None]:
    before = dict(os.environ)
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    if request.param == "http":
        os.environ.update(dict.fromkeys(names, DEAD))
    elif request.param == "socks":
        os.environ["ALL_PROXY"] = "socks5://127.0.0.1:9"
    else:
        os.environ.update(dict.fromkeys(map(str.lower, names), DEAD), no_proxy="intranet")
    install_opener(None)  # urllib reads the variables once in a process
    yield
    install_opener(None)
    os.environ.clear()
    os.environ.update(before)


SCRIPT = """import json, os, httpx
url, body = os.environ["OPENAI_BASE_URL"], {"number": json.loads(os.environ["AGL_TASK"])["number"]}
print(httpx.post(url + "/chat/completions", json=body).json()["answer"])
"""


@pytest.mark.parametrize("mode", ["async", "thread", "process", "command"])
async def test_an_agent_reaches_the_gateway_past_a_dead_proxy(
    mode: AgentMode, dead_proxy: None, tmp_path: Path
) -> None:
    (tmp_path / "agent.py").write_text(SCRIPT)
    targets = {"async": agents.doubles, "thread": agents.doubles_blocking, "process": f"{FILE}:doubles"}
    target = targets.get(mode, f"{sys.executable} {tmp_path}/agent.py")
    spec = make_spec(target, mode, reward=None if mode == "command" else f"{FILE}:score", reward_max=10.0)
    trajectory = await run_task(spec)
    assert (trajectory.outcome, trajectory.error) == (Outcome.FINISHED, "")
    if mode in ("async", "thread"):
        httpx.Client().close()  # also a client that the agent makes later can be made
