"""New weights in vLLM, proven by log-probabilities against Hugging Face: tied embeddings, two replicas."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import numpy as np
import pytest
import ray
from models import as_weights, random_model, reference_logprobs, serving

from agent_lightning.buffer.buffer import Buffer, Lease
from agent_lightning.core.types import Group, Outcome, Task

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]
SECRET = b"0123456789abcdef"
CALLS = 24


async def ask(session: aiohttp.ClientSession, url: str, lease: Lease, question: str) -> None:
    key = lease.key
    address = f"{url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{lease.secret}/writer/v1/chat/completions"
    body = {"model": "policy", "messages": [{"role": "user", "content": question}]}
    async with session.post(address, json=body) as response:
        assert response.status == 200, await response.text()


async def one_group(buffer: Buffer, url: str) -> Group:
    """CALLS rollouts of one call each, all at once, so that both replicas get some."""
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=CALLS)
    leases = await buffer.lease(CALLS, 10.0)
    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(ask(session, url, lease, f"What is {i} + 4?") for i, lease in enumerate(leases)))
    for lease in leases:
        await buffer.finish(lease.key, outcome=Outcome.FINISHED, reward=0.0)
    (group,) = await buffer.take(1, split="train")
    return group


async def test_an_update_reaches_every_replica_exactly_also_with_tied_embeddings(tmp_path: Path) -> None:
    old = random_model(tmp_path / "old", seed=0, tied=True)
    new = random_model(tmp_path / "new", seed=1, tied=True)
    settings = {"max_model_len": 256, "replicas": 2}
    async with serving(tmp_path / "old", secret=SECRET, max_tokens=16, **settings) as (buffer, board, service):
        assert sorted((await board.versions()).values()) == [0, 0]
        await check(await one_group(buffer, service.url), old, version=0, unlike=new)

        assert await board.publish(as_weights(new, 1, ray.put), timeout=60.0) == 2
        await check(await one_group(buffer, service.url), new, version=1, unlike=old)

        # Back again: nothing of the first update may stay behind.
        await board.publish(as_weights(old, 2, ray.put), timeout=60.0)
        await check(await one_group(buffer, service.url), old, version=2, unlike=new)


async def check(group: Group, model: object, *, version: int, unlike: object) -> None:
    gaps, others = [], []
    for trajectory in group.trajectories:
        (call,) = trajectory.calls
        assert call.policy_version == version
        assert call.agent == "writer"
        gaps.append(np.abs(call.logprob_T - reference_logprobs(model, call)))
        others.append(np.abs(call.logprob_T - reference_logprobs(unlike, call)))
    gap, other = np.concatenate(gaps), np.concatenate(others)
    assert gap.mean() < 1e-3
    assert gap.max() < 2e-2
    assert other.mean() > 0.1, "the two models must differ, or this test could not fail"
