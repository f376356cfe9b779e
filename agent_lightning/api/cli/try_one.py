"""`agl try`: one task through agent and reward, against the policy, the toy, or any URL, with everything shown."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from rich.console import Console

from agent_lightning.api.cli import FAILED
from agent_lightning.api.viewer.terminal import explain
from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.load import Config, load
from agent_lightning.core.errors import UserError
from agent_lightning.core.text import error_line
from agent_lightning.core.types import Outcome, Split, Task
from agent_lightning.launch import checks, launch
from agent_lightning.serving.engine import Completion, Part, Refusal, engine_error, parse_reply
from agent_lightning.testing.world import ToyWorld

_OURS: Final = ("return_token_ids", "include_reasoning", "logprobs", "top_logprobs", "stream", "stream_options")
"""Fields of an engine's request that other servers need not know."""


async def try_one(overrides: Sequence[str], *, task: str, split: Split, toy: bool, url: str, model: str) -> int:
    """Run the agent once on a task, named by its number from 0 or its id, and show messages, tools, the reward and its
    parts, what was printed, and where the user's code failed. The model is the config's policy, the toy, or one at a
    URL, whose key is in OPENAI_API_KEY. Returns the exit code. Raises UserError, EngineError."""
    config = load(overrides)
    inspection = checks.Inspection(config=config, splits=(split,))
    for what, check in checks.CHECKS:
        if what in ("agent", "data.train", "data.val") or not (toy or url):
            check(inspection)
    chosen = [row for number, row in enumerate(inspection.tasks[split]) if task in (str(number), row.task_id)]
    if not chosen:
        raise UserError(
            f"--task {task}: no such task of {len(inspection.tasks[split])}; give a number from 0, or an id"
        )
    agent = config.agent.model_copy(update={"max_attempts": 1})
    config, console = config.model_copy(update={"agent": agent}), Console()
    where = url or ("the toy" if toy else config.model.path)
    console.print(f"task {chosen[0].task_id} of {split}, against {where}", highlight=False, soft_wrap=True)
    engine = RemoteEngine(url, model or config.model.path, os.environ.get("OPENAI_API_KEY", "any")) if url else None
    async with _buffer(config, chosen[0], toy, engine) as buffer:
        await buffer.admit(chosen[0], split="val", num_rollouts=1)
        (group,) = await take_groups(buffer, 1, split="val")
    (rollout,) = group.trajectories
    console.print(explain(rollout, group.task, None))
    return 0 if rollout.outcome in (Outcome.FINISHED, Outcome.UNSCORED) else FAILED


@asynccontextmanager
async def _buffer(config: Config, task: Task, toy: bool, engine: RemoteEngine | None) -> AsyncIterator[Buffer]:
    """The buffer of a running system: the complete one, or a gateway and a worker in this process over `engine`, or
    over the toy."""
    if not toy and engine is None:
        async with launch.system(config, train=False, workers=1) as system:
            yield system.buffer
        return
    words, sampling = config.model.words or tuple("0123456789"), config.sampling.val.model_dump()
    world = ToyWorld(agent=config.agent, tasks=[task], words=words, sampling={"train": {}, "val": sampling})
    world.link = lambda part, name, method: engine if name == "engine" and engine is not None else part
    async with world:
        yield world.buffer


class RemoteEngine:
    """The model at an OpenAI-compatible URL, as the gateway calls an engine. Its replies have no token ids, so that
    nothing can be trained on them."""

    def __init__(self, url: str, model: str, api_key: str) -> None:
        """`url` ends in /v1."""
        self._url, self._model, self._headers = url.rstrip("/"), model, {"Authorization": f"Bearer {api_key}"}

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        """Answer a request, or say in one line why the server did not."""
        body = {name: value for name, value in request.items() if name not in _OURS} | {"model": self._model}
        endpoint = f"{self._url}/{'completions' if 'prompt' in body else 'chat/completions'}"
        try:
            async with aiohttp.ClientSession(trust_env=True, headers=self._headers) as session:
                response = await session.post(endpoint, json=body)
                if response.status != 200:
                    text = f"{endpoint} answered {response.status}: {(await response.text())[:500]}"
                    return Refusal(status=response.status, message=text, code="invalid_request")
                raw = await response.json(content_type=None)
            choices = [{"finish_reason": "stop", **choice, "token_ids": []} for choice in raw["choices"]]
            return parse_reply({**raw, "prompt_token_ids": [], "choices": choices}, policy_version=0)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            return engine_error(f"{endpoint}: {error_line(error)}")

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        """The complete answer as one part."""
        if isinstance(answer := await self.generate(request), Refusal):
            yield answer
            return
        ids: dict[str, list[int]] = {"token_ids": [], "prompt_token_ids": []}
        choices = [{**choice, **ids, "delta": choice.get("message", {})} for choice in answer.reply["choices"]]
        yield Part(chunk={**answer.reply, "choices": choices}, policy_version=0)
