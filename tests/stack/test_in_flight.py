"""Calls that run in vLLM during a publish: the version of each token, by log-probabilities against Hugging Face."""

from __future__ import annotations

import asyncio
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
CALLS, TOKENS = 8, 400


@pytest.mark.parametrize("rule", ["wait", "keep", "restart"])
async def test_calls_in_flight_during_a_publish(rule: OnWeightUpdate, tmp_path: Path) -> None:
    old = random_model(tmp_path / "old", seed=0, tied=True)
    new = random_model(tmp_path / "new", seed=1, tied=True)
    settings = {"max_len": 512, "on_weight_update": rule}
    async with serving(tmp_path / "old", secret=SECRET, max_tokens=TOKENS, **settings) as (buffer, board, service):
        streamed, *unstreamed = await calls_around(
            buffer, service.url, board.publish(as_weights(new, 1, ray.put), 300.0)
        )
    versions = [(call.policy_version, call.last_version) for call in unstreamed]
    match rule:
        case "wait":
            assert versions == [(0, None)] * CALLS
        case "restart":
            assert versions == [(1, None)] * CALLS
            assert (streamed.policy_version, streamed.last_version) == (0, None)  # it was seen: it is waited for
        case "keep":
            assert versions == [(0, 1)] * CALLS
            assert (streamed.policy_version, streamed.last_version) == (0, 1)
            assert 0 < switch(streamed, old, new) < TOKENS
    for call in (streamed, *unstreamed):
        assert call.response_T.size == TOKENS
        assert call.last_version is not None or switch(call, old, new) == (0 if call.policy_version else TOKENS)


async def calls_around(buffer: Buffer, url: str, publish: Any) -> list[ModelCall]:
    """A streamed call and CALLS unstreamed calls, and weights that are published once the first token is out."""
    await buffer.admit(Task(task_id="t", payload={}), split="train", num_rollouts=1 + CALLS)
    leases = await buffer.lease(1 + CALLS, 10.0)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        started = asyncio.Event()

        async def ask(number: int) -> None:
            key = leases[number].key
            address = f"{url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{leases[number].secret}/writer/v1"
            messages = [{"role": "user", "content": f"What is {number} + 4?"}]
            body = {"model": "policy", "messages": messages, "stream": number == 0, "ignore_eos": True}
            async with session.post(f"{address}/chat/completions", json=body) as response:
                assert response.status == 200, await response.text()
                async for _ in response.content.iter_any():
                    started.set()

        for number in range(1, 1 + CALLS):
            group.create_task(ask(number))
        await asyncio.sleep(0.02)
        group.create_task(ask(0))
        await started.wait()
        await publish
    for lease in leases:
        await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=0.0))
    (ended,) = await take_groups(buffer, 1, split="train")
    by_index = sorted(ended.trajectories, key=lambda trajectory: trajectory.key.index)
    return [call for trajectory in by_index for call in trajectory.calls]


def switch(call: ModelCall, old: Any, new: Any) -> int:
    """The number of tokens that the old model sampled; each log-probability must be that of either model."""
    gaps = [np.abs(call.logprob_T - reference_logprobs(model, call)) for model in (old, new)]
    assert gaps[0].mean() > 0.1 or gaps[1].mean() > 0.1, "the two models must differ, or this test could not fail"
    before, after = (np.concatenate([[0.0], gap.cumsum()]) for gap in gaps)
    count = int(np.argmin(before + after[-1] - after))
    assert max(gaps[0][:count].max(initial=0.0), gaps[1][count:].max(initial=0.0)) < 2e-2
    return count
