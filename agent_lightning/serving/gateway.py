"""The gateway: an OpenAI-compatible endpoint that records every call before it answers.

The URL says whose call it is: /rollout/{rollout}/attempt/{n}/{secret}/{agent}/v1/chat/completions. The agent needs
nothing but that base URL. A plain class over Starlette's requests; `serving/app.py` puts it on Ray Serve. No
tokenising happens here: the engine renders templates and tokenises in its own process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agent_lightning.buffer import verify_secret
from agent_lightning.errors import UnknownRollout
from agent_lightning.serving.dialects import Completion, Refusal, agent_reply, compact, engine_request
from agent_lightning.types import ModelCall, Outcome, RolloutKey, Split

RETRY_HEADER = "x-stainless-retry-count"
"""OpenAI's client libraries count their retries here."""


class Engine(Protocol):
    """What the gateway asks of the policy."""

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal: ...


class Recorder(Protocol):
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

    calls_left: int = 1
    in_flight: int = 0


class Gateway:
    """Answers agents. `handle` takes any request under its root and never raises."""

    def __init__(self, *, engine: Engine, recorder: Recorder, config: GatewayConfig) -> None:
        self._engine = engine
        self._recorder = recorder
        self._config = config
        self._attempts: OrderedDict[RolloutKey, _Attempt] = OrderedDict()
        self._answers: OrderedDict[tuple[RolloutKey, bytes], asyncio.Future[Response]] = OrderedDict()

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
        if rest != ["v1", "chat", "completions"] or request.method != "POST":
            return _refuse(Refusal(status=404, message=f"no such endpoint: /{'/'.join(rest)}", code="not_found"))
        raw = await request.body()
        return await self._once(key, agent, raw, retry=request.headers.get(RETRY_HEADER, "0") != "0")

    async def _once(self, key: RolloutKey, agent: str, raw: bytes, *, retry: bool) -> Response:
        """Answer a client library's retry with the first answer, so that it makes no second span.

        Only a request that says it is a retry is matched: an agent may well ask the same thing twice on purpose.
        """
        digest = (key, hashlib.sha256(raw).digest())
        first = self._answers.get(digest) if retry else None
        if first is not None:
            return await asyncio.shield(first)
        answer = asyncio.ensure_future(self._answer(key, agent, raw))
        self._answers[digest] = answer
        while len(self._answers) > 4096:
            self._answers.popitem(last=False)
        try:
            # Shielded: a client that times out and retries must find the work still going.
            response = await asyncio.shield(answer)
        finally:
            if answer.done() and (answer.cancelled() or answer.exception() or answer.result().status_code >= 500):
                self._answers.pop(digest, None)
        return response

    async def _answer(self, key: RolloutKey, agent: str, raw: bytes) -> Response:
        body = self._parse(raw)
        if isinstance(body, Refusal):
            return _refuse(body)
        attempt = self._attempts.setdefault(key, _Attempt())
        while len(self._attempts) > 65536:
            self._attempts.popitem(last=False)
        if attempt.calls_left <= 0 or attempt.in_flight >= self._config.max_concurrent_calls:
            error = "this rollout has made all the model calls that it may make"
            if attempt.calls_left > 0:
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
        try:
            for call in _calls(key, agent, body, completion, started):
                attempt.calls_left = await self._recorder.record(call)
        except UnknownRollout as error:
            return _refuse(Refusal(status=409, message=str(error), code="rollout_ended"))
        return JSONResponse(agent_reply(body, completion, model=config.model))

    def _parse(self, raw: bytes) -> dict[str, Any] | Refusal:
        if len(raw) > self._config.max_body_bytes:
            return Refusal(status=413, message=f"the request is over {self._config.max_body_bytes} bytes", code="size")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return Refusal(status=400, message="the request is not JSON", code="invalid_request")
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            return Refusal(status=400, message="the request has no list of messages", code="invalid_request")
        if body.get("stream"):
            return Refusal(status=400, message="ask without stream: answers come whole", code="unsupported")
        choices = body.get("n") or 1
        if not isinstance(choices, int) or not 1 <= choices <= self._config.max_choices:
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
    return JSONResponse(refusal.body(), status_code=refusal.status)
