"""Serves a policy on the real stack (HAProxy, Serve, vLLM) until its standard input ends: `python serve_policy.py
experiment=calc_tiny`. A line of JSON is answered by a line of JSON: {"open": "val"} opens a rollout and gives the root
of its URL, {"close": its key} ends it and gives the calls and tools that were recorded."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.load import load
from agent_lightning.core.types import Ending, Outcome, RolloutKey, Task
from agent_lightning.launch import launch


async def serve(overrides: list[str]) -> None:
    async with launch.system(load(overrides), train=False, workers=0) as system:
        say({"url": system.service.url})
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            if split := order.get("open"):
                await system.buffer.admit(Task(task_id="t", payload={}), split=split, num_rollouts=1)
                (lease,) = await system.buffer.lease(1, 3600.0)
                key = lease.key
                root = f"{system.service.url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{lease.secret}/agent"
                say({"root": root, "key": [key.rollout_id, key.attempt, split]})
            else:
                rollout_id, attempt, split = order["close"]
                key = RolloutKey.parse(rollout_id, attempt)
                await system.buffer.finish(key, Ending(outcome=Outcome.CANCELLED))
                (group,) = await take_groups(system.buffer, 1, split=split)
                calls = [
                    {name: getattr(call, name) for name in ("call_id", "request", "reply", "finish_reason")}
                    | {"tokens": call.response_T.tolist(), "prompt": call.prompt_T.tolist()}
                    | {"logprobs": call.logprob_T.tolist()}
                    for call in group.trajectories[0].calls
                ]
                tools = [
                    {name: getattr(tool, name) for name in ("name", "arguments", "result", "status", "call_id")}
                    for tool in group.trajectories[0].tools
                ]
                say({"calls": calls, "tools": tools})


def say(answer: dict[str, Any]) -> None:
    print(f"@{json.dumps(answer)}", flush=True)  # Ray prints lines of its own


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1:]))
