"""A replica of the policy: vLLM through Ray Serve LLM, which follows the PolicyBoard.

One version answers a call from its first to its last token, unless the rule of its Gate is "keep"; then the first token
of each new version is noted. No token is sampled from a KV cache that older weights have computed, not even in a call
that continues.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

from pydantic import ValidationError
from vllm.exceptions import VLLMClientError
from vllm.v1.engine.exceptions import EngineDeadError

from agent_lightning.config.running import ServingConfig
from agent_lightning.core import actors, ray_private
from agent_lightning.core.text import one_line
from agent_lightning.learners.base import Weights
from agent_lightning.serving.engine import (
    Completion,
    Part,
    Refusal,
    parse_error,
    parse_reply,
    repeat_choices,
    without_copies,
)
from agent_lightning.serving.gate import Gate
from agent_lightning.serving.grammars import use_own_grammars
from agent_lightning.serving.policy import Follower, PolicyBoard
from agent_lightning.serving.weights import in_shared_memory

logger = logging.getLogger(__name__)
_NewVersions = Mapping[int, list[tuple[int, int]]]
"""Index of a choice -> (index of the first token, version) of each version that was installed during the call."""
_INVALID = (VLLMClientError, ValidationError, ValueError, TypeError, KeyError, RecursionError)
"""What vLLM raises for a bad request: its own errors, and those that its chat templates and models do not catch."""


class PolicyServer:
    """A `PolicyReplica`: Ray's LLM server, which notes in each reply the version that sampled it, and installs new
    weights."""

    def __init__(self, settings: Mapping[str, Any], serving: ServingConfig, board: PolicyBoard) -> None:
        """`settings`: the fields of Ray's LLMConfig."""
        if parser := settings["engine_kwargs"].get("tool_call_parser"):
            use_own_grammars(parser)
        self._server = ray_private.llm_server(settings)
        self._gate = Gate(serving.on_weight_update or "wait")
        self._version = 0
        self._running: dict[str, _NewVersions] = {}
        """The calls that are being answered, by the id of their request."""
        self._follower = Follower(board, self._install, self.check_health)
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._server.start()
        await self._server.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        await self._follower.join()
        self._following = asyncio.create_task(self._follow())

    async def check_health(self) -> None:
        await self._server.check_health()

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        with _end_with_engine():
            await self._follower.wait_until_joined()
            return await self._gate.complete(lambda: self._generate(request))

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        with _end_with_engine():
            await self._follower.wait_until_joined()
            async for part in self._gate.stream(lambda: self._stream(request)):
                yield part

    async def _generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        version, (request, copies) = self._version, without_copies(request)
        with self._named(request) as (named, new_versions):
            try:
                replies = [reply async for reply in await ray_private.ask_llm(self._server, named)]
            except _INVALID as error:
                return _refused(one_line(f"{type(error).__name__}: {error}")[:500], 400)
            if (error_fields := ray_private.llm_error(replies[-1])) is not None:
                return _refused(*error_fields)
            raw = repeat_choices(_with_versions(replies[-1].model_dump(), new_versions), copies)
            return parse_reply(raw, policy_version=version)

    async def _stream(self, request: Mapping[str, Any]) -> AsyncGenerator[Part | Refusal, None]:
        version, (request, copies) = self._version, without_copies(request)
        with self._named(request) as (named, new_versions):
            try:
                async for batch in await ray_private.ask_llm(self._server, named):
                    for text in batch:
                        if (error_fields := ray_private.llm_error(text)) is not None:
                            yield _refused(*error_fields)
                            return
                        data = text.removeprefix("data: ").strip()
                        chunk = {} if data == "[DONE]" else json.loads(data)
                        if error := chunk.get("error"):
                            yield _refused(error["message"], int(error.get("code") or 500), error.get("param") or "")
                            return
                        if chunk := chunk and repeat_choices(_with_versions(chunk, new_versions), copies):
                            yield Part(chunk=chunk, policy_version=version)
            except _INVALID as invalid:
                yield _refused(one_line(f"{type(invalid).__name__}: {invalid}")[:500], 400)

    @contextmanager
    def _named(self, request: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], _NewVersions]]:
        """A block in which a request is answered: the request with an id, and what updates note about it."""
        name, new_versions = uuid.uuid4().hex, defaultdict[int, list[tuple[int, int]]](list)
        self._running[name] = new_versions
        try:
            yield {**request, "request_id": name}, new_versions
        finally:
            del self._running[name]

    async def _follow(self) -> None:
        """Install new weights as they are published. If that fails, end the process: Serve then replaces the replica at
        once, instead of after several failed health checks."""
        try:
            await self._follower.run()
        except* actors.ActorDied:
            logger.info("the board is gone, and the run with it")
        except* Exception as errors:  # whatever it is: a replica that does not follow the board must not answer
            first = errors.exceptions[0]
            _end_process(f"{type(first).__name__}: {first}")

    async def _install(self, weights: Weights) -> None:
        async with self._gate.update():
            # Running calls are paused. They keep their tokens; their KV cache, computed by the old weights, is dropped
            # and recomputed.
            await self._server.pause(mode="keep", clear_cache=True)
            await self._server.collective_rpc("start_weight_update")
            arrays = (asyncio.wrap_future(bucket.data.future()) for bucket in weights.buckets)
            async with aclosing(in_shared_memory(arrays)) as paths:
                for bucket in weights.buckets:
                    update = {"path": await anext(paths), "parameters": list(bucket.parameters)}
                    await self._server.collective_rpc("update_weights", kwargs={"update_info": update})
            await self._server.collective_rpc("finish_weight_update")
            # Before the new version can sample its first token. A call that vLLM does not know is answered already, or
            # still to be read: the latter keeps the older version, with which its lag is not understated.
            self._version = weights.version
            for name, choice, sampled in await ray_private.count_sampled(self._server):
                if name in self._running:
                    self._running[name][choice].append((sampled, weights.version))
            await self._server.resume()


def _with_versions(raw: dict[str, Any], new_versions: _NewVersions) -> dict[str, Any]:
    """A reply or a chunk of a stream with the new versions in each of its choices."""
    for choice in raw["choices"]:
        choice["new_versions"] = list(new_versions.get(choice["index"], ()))
    return raw


@contextmanager
def _end_with_engine() -> Iterator[None]:
    """End the process if a call in the block finds the engine dead."""
    try:
        yield
    except EngineDeadError:
        _end_process("its engine is dead")
        raise


def _end_process(why: str) -> None:
    logger.error("this policy replica ends: %s", why)
    os._exit(1)


def _refused(message: str, status: int, field: str = "") -> Refusal:
    logger.warning("the engine refuses a call: %s", message)
    return parse_error(message, status, field=field)
