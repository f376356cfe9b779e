"""The gateway's permissions and limits, and that no file of a run contains a secret."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import openai
import pytest
from test_gateway import HELLO, TOOL, code_of, open_rig, url_of

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Policy, Task
from agent_lightning.rollouts.client import current_rollout, tool
from agent_lightning.run.archive import RolloutWriter, read_rollouts, read_trajectories
from agent_lightning.spans.traces import export
from agent_lightning.testing.world import ToyWorld


def nested(levels: int, inner: Any = 1) -> Any:
    for level in range(levels):
        inner = [inner] if level % 2 else {"a": inner, "b": 0}
    return inner


async def test_a_request_that_is_nested_too_deep_is_refused_and_one_below_is_not() -> None:
    async with open_rig(max_json_depth=10) as rig:
        assert (await rig.post(metadata=nested(9))).status_code == 200
        assert code_of(await rig.post(metadata=nested(10))) == (400, "invalid_request")
        body = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        response = await rig.http.post(f"{url_of(rig.key)}/chat/completions", content=body)
        assert code_of(response) == (400, "invalid_request")
        assert (await rig.buffer.stats()).calls == 1


async def test_the_bytes_that_one_attempt_has_in_flight_are_bounded_and_come_free_again() -> None:
    async with open_rig(max_bytes_in_flight=30_000) as rig:
        rig.engine.delay_s = 0.3
        replies = await asyncio.gather(*(rig.post(metadata={"text": "x" * 10_000}) for _ in range(5)))
        assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429, 429]
        refused = next(reply for reply in replies if reply.status_code == 429)
        assert "x-should-retry" not in refused.headers
        assert (await rig.post(metadata={"text": "x" * 10_000})).status_code == 200


@pytest.mark.parametrize(
    "end", ["pause", "publish", "v1/journal", "v1/load_lora_adapter", "v1/update_weights", "collective_rpc", "metrics"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_nothing_that_controls_a_run_is_behind_the_agents_url(end: str, method: str) -> None:
    async with open_rig() as rig:
        root = url_of(rig.key).removesuffix("/v1")
        for path in (f"{root}/{end}", f"/{end}"):
            assert code_of(await rig.http.request(method, path)) == (404, "not_found")


async def test_a_token_that_no_vocabulary_has_does_not_reach_the_engine() -> None:
    async with open_rig() as rig:
        for prompt in ([-1], [[5, -2]], [2**31]):
            response = await rig.http.post(f"{url_of(rig.key)}/completions", json={"prompt": prompt})
            assert code_of(response) == (400, "invalid_request")


SECRETS: set[str] = set()
"""Those that the agent below was given."""


async def gossips(task: dict[str, Any], policy: Policy) -> float:
    """Tells its URL to everybody who may hear it: the model, a span, a log, its reply and the error that it raises."""
    rollout = current_rollout()
    assert rollout is not None
    SECRETS.add(policy.base_url.split("/")[-3])
    logging.getLogger("agent").warning("I am %s", task["number"])
    with tool("fetch", {"url": policy.base_url}) as span:
        span.result = f"got {rollout.traces_url}"
    async with openai.AsyncOpenAI(base_url=policy.base_url, api_key="any") as client:
        messages: Any = [*HELLO, {"role": "user", "content": policy.base_url}]
        await client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])  # type: ignore[list-item]
    if task["number"]:
        raise ValueError(f"cannot reach {policy.base_url}")
    return 1.0


async def test_nothing_that_a_run_leaves_tells_a_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tasks = [Task(task_id=str(number), payload={"number": number}) for number in range(2)]
    agent = AgentConfig(target=gossips, timeout_s=20.0)
    journal, words = tmp_path / "journal", ("call:1", "no")
    async with ToyWorld(
        agent=agent, tasks=tasks, words=words, algorithm=AlgorithmConfig(rollouts_per_task=2), journal=journal
    ) as world:
        await world.train(steps=1)
        groups = world.observer.groups
    assert len(SECRETS) == 8  # before, in and after one step
    (tmp_path / "rollouts").mkdir()
    RolloutWriter(tmp_path / "rollouts").write(0, 0, groups)
    texts = [str(read_rollouts(tmp_path).to_pylist()), caplog.text]
    texts += [file.read_bytes().decode("latin-1") for file in (tmp_path / "journal").glob("*.agl")]
    for form in ("otlp", "jsonl"):
        path, _ = export.write(read_trajectories(tmp_path), tmp_path / form, form)
        texts.append(path.read_text())
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text]
    assert "*" * 32 in texts[0]
    assert "cannot reach" in texts[0]
    assert "cannot reach" in texts[2]
