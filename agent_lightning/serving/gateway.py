"""The gateway: an OpenAI-compatible endpoint that records every call before it answers.

The URL says whose call it is: /rollout/{rollout}/attempt/{n}/{secret}/{agent}/v1/chat/completions. The agent needs
nothing but that base URL. A plain class over Starlette's requests; `serving/app.py` puts it on Ray Serve. No
tokenising happens here: the engine renders templates and tokenises in its own process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from agent_lightning.buffer import verify_secret
from agent_lightning.errors import UnknownRollout
from agent_lightning.serving.dialects import (
    MAX_TOKENS,
    Completion,
    Refusal,
    agent_reply,
    compact,
    engine_request,
)
from agent_lightning.serving.tracing import SpanRecorder, agent_of, take_traces
from agent_lightning.types import ModelCall, Outcome, RolloutKey, Split

logger = logging.getLogger(__name__)

RETRY_HEADER = "x-stainless-retry-count"
"""OpenAI's client libraries count their retries here."""


class Engine(Protocol):
    """What the gateway asks of the policy."""

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal: ...


class Recorder(SpanRecorder, Protocol):
    """What the gateway asks of the buffer."""

    async def record(self, call: ModelCall) -> int: ...

    async def mark(self, key: RolloutKey, outcome: Outcome, error: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What the gateway must know."""

    model: str
    run_secret: bytes
    sampling: Mapping[Split, Mapping[str, float | int]]
    """Per split, e.g. {"train": {"temperature": 1.0, "max_tokens": 64}, "val": {"temperature": 0.0}}."""
    max_body_bytes: int = 4 * 1024 * 1024
    max_choices: int = 16
    max_concurrent_calls: int = 64
    """Of one attempt, in flight at once."""


@dataclass(slots=True)
class _Attempt:
    """What the gateway remembers of an attempt that it has seen."""

    calls_left: int = sys.maxsize
    """The least that the buffer ever told: its answers to calls in flight may come back in any order."""
    in_flight: int = 0
    ended: str = ""
    """Why the buffer knows this attempt no more: the engine does not work for those that run on."""


class Gateway:
    """Answers agents. `handle` takes any request under its root and never raises."""

    def __init__(self, *, engine: Engine, recorder: Recorder, config: GatewayConfig) -> None:
        self._engine = engine
        self._recorder = recorder
        self._config = config
        self._attempts: OrderedDict[RolloutKey, _Attempt] = OrderedDict()
        self._answers: OrderedDict[tuple[RolloutKey, str, bytes], asyncio.Future[Response]] = OrderedDict()

    async def handle(self, request: Request) -> Response:
        parts = [part for part in request.url.path.split("/") if part]
        if parts[-1:] == ["health"]:
            return JSONResponse({"status": "ok", "model": self._config.model})
        try:
            start = parts.index("rollout")
            _, rollout_id, _, attempt, secret, agent, *rest = parts[start:]
            key = RolloutKey.parse(rollout_id, int(attempt))
        except ValueError:
            return _refuse(Refusal(status=404, message=f"no such path: {request.url.path}", code="not_found"))
        if not verify_secret(self._config.run_secret, key, secret):
            return _refuse(Refusal(status=403, message="wrong secret in the URL", code="forbidden"))
        if rest == ["v1", "models"] and request.method == "GET":
            return JSONResponse({"object": "list", "data": [self._model_card()]})
        if rest not in (["v1", "chat", "completions"], ["v1", "traces"]) or request.method != "POST":
            return _refuse(Refusal(status=404, message=f"no such endpoint: /{'/'.join(rest)}", code="not_found"))
        raw = await self._read(request)
        if isinstance(raw, Refusal):
            return _refuse(raw)
        if rest == ["v1", "traces"]:
            limit = self._config.max_body_bytes
            return await take_traces(self._recorder, key, raw, request.headers, max_bytes=limit)
        agent = agent_of(request.headers, agent)
        return await self._once(key, agent, raw, retry=request.headers.get(RETRY_HEADER, "0") != "0")

    async def _read(self, request: Request) -> bytes | Refusal:
        """The body, never more of it in memory than it may have."""
        limit, raw = self._config.max_body_bytes, bytearray()
        try:
            async for part in request.stream():
                raw += part
                if len(raw) > limit:
                    return Refusal(status=413, message=f"the request is over {limit} bytes", code="size")
        except ClientDisconnect:
            return Refusal(status=400, message="the client went away", code="disconnected")
        return bytes(raw)

    async def _once(self, key: RolloutKey, agent: str, raw: bytes, *, retry: bool) -> Response:
        """Answer a client library's retry with the first answer, so that it makes no second span.

        Only a request that says it is a retry is matched: an agent may well ask the same thing twice on purpose.
        """
        digest = (key, agent, hashlib.sha256(raw).digest())
        first = self._answers.get(digest) if retry else None
        if first is not None:
            return await asyncio.shield(first)
        answer = asyncio.ensure_future(self._answer(key, agent, raw))
        self._answers[digest] = answer
        while len(self._answers) > 4096:
            self._answers.popitem(last=False)

        def forget_failure(done: asyncio.Future[Response]) -> None:
            failed = done.cancelled() or done.exception() is not None or done.result().status_code >= 500
            if failed and self._answers.get(digest) is done:
                del self._answers[digest]  # a retry asks the engine again

        answer.add_done_callback(forget_failure)
        # Shielded: a client that times out and retries must find the work still going.
        return await asyncio.shield(answer)

    async def _answer(self, key: RolloutKey, agent: str, raw: bytes) -> Response:
        body = self._parse(raw)
        if isinstance(body, Refusal):
            return _refuse(body)
        attempt = self._attempts.setdefault(key, _Attempt())
        while len(self._attempts) > 65536:
            self._attempts.popitem(last=False)
        if attempt.ended:
            return _refuse(Refusal(status=409, message=attempt.ended, code="rollout_ended"))
        try:
            return await self._admit(key, agent, body, attempt)
        except UnknownRollout as error:
            attempt.ended = str(error)
            return _refuse(Refusal(status=409, message=attempt.ended, code="rollout_ended"))
        except Exception as error:  # whatever fails behind the gateway, the agent gets an OpenAI error
            logger.exception("a call of rollout %s could not be answered", key.rollout_id)
            message = f"the gateway failed: {type(error).__name__}"
            return _refuse(Refusal(status=500, message=message, code="engine_error", type="server_error"))

    async def _admit(self, key: RolloutKey, agent: str, body: dict[str, Any], attempt: _Attempt) -> Response:
        """Call the engine, where this attempt may call it once more. Raises UnknownRollout."""
        spent = attempt.calls_left <= attempt.in_flight
        if spent or attempt.in_flight >= self._config.max_concurrent_calls:
            error = "this rollout has made all the model calls that it may make"
            if not spent:
                error = f"this rollout has {attempt.in_flight} model calls in flight, and may have no more"
            await self._recorder.mark(key, Outcome.TOO_MANY_CALLS, error)
            # 400, not 429: client libraries retry 429, and it would not get better.
            return _refuse(Refusal(status=400, message=error, code="too_many_calls"))
        attempt.in_flight += 1
        try:
            return await self._call(key, agent, body, attempt)
        finally:
            attempt.in_flight -= 1

    async def _call(self, key: RolloutKey, agent: str, body: dict[str, Any], attempt: _Attempt) -> Response:
        config = self._config
        request = engine_request(body, model=config.model, split=key.split, sampling=config.sampling[key.split])
        started = time.time()
        completion = await self._engine.generate(request)
        if isinstance(completion, Refusal):
            if completion.code in ("context_length_exceeded", "engine_error"):
                long = completion.code == "context_length_exceeded"
                outcome = Outcome.OVERLONG_PROMPT if long else Outcome.ENGINE_ERROR
                await self._recorder.mark(key, outcome, completion.message)
            return _refuse(completion)
        for call in _calls(key, agent, body, completion, started):
            left = await self._recorder.record(call)
            attempt.calls_left = min(attempt.calls_left, left)
        return JSONResponse(agent_reply(body, completion, model=config.model))

    def _parse(self, raw: bytes) -> dict[str, Any] | Refusal:
        try:
            body = json.loads(raw)
            compact(body).encode()  # fails where a span could not be written down: half a surrogate pair
        except (ValueError, RecursionError):
            return Refusal(status=400, message="the request is not JSON", code="invalid_request")
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            return Refusal(status=400, message="the request has no list of messages", code="invalid_request")
        if not isinstance(body.get("model"), str | None):
            return Refusal(status=400, message="model must be a text", code="invalid_request")
        for name in MAX_TOKENS:
            if body.get(name) is not None and (type(body[name]) is not int or body[name] < 1):
                return Refusal(status=400, message=f"{name} must be a number from 1", code="invalid_request")
        if body.get("stream"):
            return Refusal(status=400, message="ask without stream: answers come whole", code="unsupported")
        choices = body.get("n") or 1
        if type(choices) is not int or not 1 <= choices <= self._config.max_choices:
            message = f"n must be a number from 1 to {self._config.max_choices}"
            return Refusal(status=400, message=message, code="invalid_request")
        return body

    def _model_card(self) -> dict[str, Any]:
        return {"id": self._config.model, "object": "model", "created": 0, "owned_by": "agent-lightning"}


def _calls(
    key: RolloutKey, agent: str, body: Mapping[str, Any], completion: Completion, started: float
) -> list[ModelCall]:
    """One span per choice: each is a sampled response to the same prompt."""
    reply = completion.reply
    ended = time.time()
    return [
        ModelCall(
            key=key,
            call_id=str(reply["id"]) if index == 0 else f"{reply['id']}#{index}",
            agent=agent,
            policy_version=completion.policy_version,
            prompt_T=completion.prompt_T,
            response_T=choice.response_T,
            logprob_T=choice.logprob_T,
            finish_reason=choice.finish_reason,
            started_at=started,
            ended_at=ended,
            request=compact(body["messages"]),
            reply=compact(reply["choices"][index]["message"]),
        )
        for index, choice in enumerate(completion.choices)
    ]


def _refuse(refusal: Refusal) -> JSONResponse:
    # OpenAI's client libraries obey the header: they would repeat a 409, and it would not get better.
    headers = {"x-should-retry": "false"} if refusal.status < 500 else {}
    return JSONResponse(refusal.body(), status_code=refusal.status, headers=headers)
