"""New weights in vLLM, proven by log-probabilities against Hugging Face: tied embeddings, two replicas. The files that
carry them hold each array while it is read, and are removed at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import ray
from models import as_weights, random_model, reference_logprobs, serving

from agent_lightning.buffer.buffer import Buffer, Lease
from agent_lightning.buffer.taken import take_groups
from agent_lightning.core.types import Ending, Group, Outcome, Task

pytestmark = [pytest.mark.stack, pytest.mark.timeout(420)]
SECRET = b"0123456789abcdef"
CALLS = 24
SIZES = (5, 3, 0, 9, 2)


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
        await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=0.0))
    (group,) = await take_groups(buffer, 1, split="train")
    return group


async def test_an_update_reaches_every_replica_exactly_also_with_tied_embeddings(tmp_path: Path) -> None:
    old = random_model(tmp_path / "old", seed=0, tied=True)
    new = random_model(tmp_path / "new", seed=1, tied=True)
    settings = {"max_len": 256, "replicas": 2}
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


def in_files(arrays: list[Awaitable[Any]]) -> AsyncGenerator[str, None]:
    from agent_lightning.serving.weights import in_shared_memory  # imports vLLM

    return in_shared_memory(arrays)


def arrays(*sizes: int, error: Exception | None = None) -> list[Awaitable[Any]]:
    async def array(value: int, size: int) -> np.ndarray:
        return np.full(size, value, np.uint8)

    async def fails() -> np.ndarray:
        raise error or RuntimeError

    return [array(i, size) for i, size in enumerate(sizes)] + ([fails()] if error else [])


@pytest.mark.parametrize("count", range(len(SIZES) + 1))
async def test_each_file_begins_with_its_array_until_the_next_is_requested(count: int) -> None:
    paths = []
    async with aclosing(in_files(arrays(*SIZES[:count]))) as files:
        async for path in files:
            await asyncio.sleep(0.01)  # the next is written meanwhile
            value, size = len(paths), SIZES[len(paths)]
            assert Path(path).read_bytes()[:size] == bytes([value]) * size
            paths.append(path)
    assert len(paths) == count
    assert not any(Path(path).exists() for path in paths)


async def test_an_array_that_is_lost_raises_at_its_turn_and_leaves_no_file() -> None:
    files = in_files(arrays(4, 4, error=OSError("lost")))
    paths = [await anext(files), await anext(files)]
    with pytest.raises(OSError, match="lost"):
        await anext(files)
    assert not any(Path(path).exists() for path in paths)


async def test_files_go_when_the_reader_stops_early() -> None:
    async with aclosing(in_files(arrays(4, 1 << 20))) as files:
        path = await anext(files)
    assert not Path(path).exists()
