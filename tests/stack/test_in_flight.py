"""Calls that run in vLLM during a publish: the version of each token, by log-probabilities against Hugging Face."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import ray
from models import as_weights, random_model, reference_logprobs, serving

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.taken import take_groups
from agent_lightning.core.types import Ending, ModelCall, OnWeightUpdate, Outcome, Task

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(420)]
SECRET = b"0123456789abcdef"
CALLS, TOKENS = 6, 360
BLOCK = 32
"""Tokens of a block of vLLM's prefix cache."""
SYSTEM = {"role": "system", "content": "Add the two numbers: 1 + 2 = 3, 2 + 3 = 5, 3 + 4 = 7. " * 2}


@pytest.mark.parametrize("rule", ["wait", "keep", "restart"])
async def test_calls_in_flight_during_a_publish(rule: OnWeightUpdate, tmp_path: Path) -> None:
    models = [random_model(tmp_path / str(seed), seed=seed, tied=True) for seed in range(3)]
    newest = 2 if rule == "keep" else 1
    engine = {"block_size": BLOCK, "enable_prefix_caching": True}
    settings = {"max_len": 512, "on_weight_update": rule, "engine": engine}
    async with serving(tmp_path / "0", secret=SECRET, max_tokens=TOKENS, **settings) as (buffer, board, service):

        async def publish() -> None:
            for version in range(1, newest + 1):
                await board.publish(as_weights(models[version], version, ray.put), 300.0)

        streamed, unstreamed, late = await calls_around(buffer, service.url, publish)
    assert (len(streamed), len(unstreamed), len(late)) == (2, 4 + CALLS, 1)
    versions = {(call.policy_version, call.new_versions) for call in unstreamed}
    match rule:
        case "wait":
            assert versions == {(0, ())}
        case "restart":
            assert versions == {(1, ())}
            assert {(c.policy_version, c.new_versions) for c in streamed} == {(0, ())}  # seen, so it was waited for
        case "keep":
            for call in (*streamed, *unstreamed):
                assert (call.policy_version, [version for _, version in call.new_versions]) == (0, [1, 2])
                assert call.last_version == 2
            assert all(call.new_versions[0][0] > 0 for call in streamed)
    # The same prompt, of which the engine had blocks in its cache that older versions had computed.
    assert (late[0].policy_version, late[0].new_versions) == (newest, ())
    assert late[0].prompt_T.size > 2 * BLOCK
    assert late[0].prompt_T.tolist() == unstreamed[-1].prompt_T.tolist()
    for call in (*streamed, *unstreamed, *late):
        assert call.response_T.size == TOKENS
        by_version = np.stack([reference_logprobs(model, call) for model in models])
        assert np.abs(np.diff(by_version, axis=0)).mean() > 0.1, "the models must differ, or this test could not fail"
        assert np.abs(call.logprob_T - by_version[call.version_T, np.arange(TOKENS)]).max() < 2e-2


async def calls_around(
    buffer: Buffer, url: str, publish: Callable[[], Coroutine[Any, Any, None]]
) -> tuple[list[ModelCall], list[ModelCall], list[ModelCall]]:
    """A streamed request of two choices and unstreamed ones, the first for two choices of each of two prompts; weights
    that are published once the first token is out; and the last request again, after that."""
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=3 + CALLS)
    leases = await buffer.lease(3 + CALLS, 10.0)
    async with aiohttp.ClientSession() as session:
        started = asyncio.Event()

        async def ask(index: int, number: int, path: str = "chat/completions", **fields: Any) -> None:
            key = leases[index].key
            address = f"{url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{leases[index].secret}/writer/v1"
            messages = [SYSTEM, {"role": "user", "content": f"What is {number} + 4?"}]
            body = {"model": "policy", "ignore_eos": True} | (fields if "prompt" in fields else {"messages": messages})
            async with session.post(f"{address}/{path}", json=body | fields) as response:
                assert response.status == 200, await response.text()
                async for _ in response.content.iter_any():
                    started.set()

        async with asyncio.TaskGroup() as group:
            for index in range(2, 2 + CALLS):
                group.create_task(ask(index, index))
            group.create_task(ask(1, 1, "completions", prompt=["What is 1 + 4?", "3"], n=2))
            await asyncio.sleep(0.02)
            group.create_task(ask(0, 0, stream=True, n=2))
            await started.wait()
            await publish()
        await ask(2 + CALLS, 1 + CALLS)
    for lease in leases:
        await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=0.0))
    (ended,) = await take_groups(buffer, 1, split="train")
    calls = [list(t.calls) for t in sorted(ended.trajectories, key=lambda trajectory: trajectory.key.index)]
    return calls[0], [call for of_one in calls[1:-1] for call in of_one], calls[-1]
