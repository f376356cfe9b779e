"""The gateway: OpenAI- and Anthropic-compatible endpoints that record every call before they answer.

The URL says whose call it is: /rollout/{rollout}/attempt/{n}/{secret}/{agent}/v1/chat/completions. The agent needs
nothing but that base URL. A plain class over Starlette's requests; `serving/app.py` puts it on Ray Serve. The gateway
does not tokenise: the engine renders templates and tokenises in its own process. docs/gateway.md is the manual.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from agent_lightning.buffer.buffer import verify_secret
from agent_lightning.core.errors import JournalError, UnknownRollout
from agent_lightning.core.json_values import compact
from agent_lightning.core.text import hide_secret
from agent_lightning.core.types import ModelCall, Outcome, RolloutKey, Split
from agent_lightning.serving import calls, engine, paths
from agent_lightning.serving.answers import Answer, Answers
from agent_lightning.serving.bodies import Reader
from agent_lightning.serving.calls import Attempt, Call, Recorder
from agent_lightning.serving.dialects.base import BadRequest, Dialect
from agent_lightning.serving.dialects.chat import ChatCompletions, Completions
from agent_lightning.serving.dialects.google import Google
from agent_lightning.serving.dialects.messages import Messages
from agent_lightning.serving.dialects.responses import Responses
from agent_lightning.serving.engine import Completion, Part, Refusal, engine_error

logger = logging.getLogger(__name__)

RETRY_HEADER = "x-stainless-retry-count"
"""The client libraries of OpenAI and Anthropic count their retries in this header."""
DIALECTS: Mapping[str, Dialect] = {
    "chat/completions": ChatCompletions(),
    "completions": Completions(),
    "responses": Responses(),
    "messages": Messages(),
    "messages/count_tokens": Messages(),
    **dict.fromkeys(paths.GOOGLE, Google()),
}
"""The formats that agents speak, by their endpoints."""
_METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
_MAX_ATTEMPTS = 16_384
"""Number of attempts that a gateway remembers, the most recent ones: many times those that run at once."""
_MAX_ANSWERS = 4_096
"""Number of answers that a gateway keeps for retries."""
_OUTCOMES = {
    "context_length_exceeded": Outcome.OVERLONG_PROMPT,
    "engine_error": Outcome.ENGINE_ERROR,
    "too_many_calls": Outcome.TOO_MANY_CALLS,
}
"""How the attempt ends if the agent fails after a call was refused with this code."""


class Engine(Protocol):
    """The policy as the gateway calls it. Cancelling a call stops its work."""

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        """Answer a request of `engine.engine_request` in one piece."""

    def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        """Answer a request in parts, as they are sampled; a refusal is the last part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Settings of the gateway. Limits "of an attempt" hold for all its requests together."""

    model: str
    run_secret: bytes
    sampling: Mapping[Split, Mapping[str, float | int]]
    """Sampling parameters for each split: {"train": {"temperature": 1.0, "max_tokens": 64}, "val": {…}}."""
    seed: int | None = None
    """The run's seed: it makes each training call's sampling a function of the rollout, the request and how often the
    request was repeated, so that a rollout that is run again samples the same. One gateway must see all calls."""
    vocab_size: int = 2**31
    """Vocabulary of the model: an answer with a token id from here on is an error of the engine."""
    max_body_bytes: int = 4 * 1024 * 1024
    max_json_depth: int = 64
    max_json_values: int = 200_000
    """Values in the JSON of a body, such as the token ids of a prompt."""
    max_json_objects: int = 20_000
    """Objects among these values, such as messages, parts of messages, tools and parts of their schemas."""
    max_choices: int = 16
    max_concurrent_calls: int = 64
    """Calls of an attempt that may run at once."""
    call_timeout_s: float = math.inf
    """Seconds that the engine has for a call; a call that takes longer is counted as the engine's error."""
    max_bytes_in_flight: int = 64 * 1024 * 1024
    """Bytes of an attempt's requests, of any kind, that are being read or answered."""
    retry_grace_s: float = 10.0
    """Seconds for which work goes on after its client went away: client libraries retry after 8 s at most."""
    retry_memory_s: float = 30.0
    """Seconds for which a finished answer is kept for a retry."""


class Gateway:
    """Answers the requests of agents: model calls, token counts, traces and the list of models."""

    def __init__(self, *, engine: Engine, recorder: Recorder, config: GatewayConfig) -> None:
        self._engine, self._recorder, self._config = engine, recorder, config
        self._attempts: OrderedDict[RolloutKey, Attempt] = OrderedDict()
        self._answers = Answers(max_answers=_MAX_ANSWERS, memory_s=config.retry_memory_s)
        self._reader = Reader(
            max_bytes=config.max_body_bytes,
            max_bytes_in_flight=config.max_bytes_in_flight,
            max_depth=config.max_json_depth,
            max_values=config.max_json_values,
            max_objects=config.max_json_objects,
        )

    async def handle(self, request: Request) -> Response:
        """The response to any request under the gateway's root; never raises. Errors have the shape of the dialect."""
        segments = paths.split(request.scope)
        if "rollout" not in segments and segments[-1:] == ["health"]:
            return JSONResponse({"status": "ok", "model": self._config.model})
        signs = {"anthropic-version": "messages", "x-goog-api-key": "generateContent"}
        sign = next((signs[name] for name in signs if name in request.headers), paths.guess_endpoint(segments))
        dialect = DIALECTS.get(sign, DIALECTS["chat/completions"])
        try:
            route = paths.find(segments)
            dialect = DIALECTS.get(route.endpoint, dialect)
            return await self._handle(request, route)
        except BadRequest as error:
            response = _refuse(dialect, error.refusal)
            if response.status_code == 405:
                response.headers["allow"] = ", ".join(route.methods)
            return response
        except (AttributeError, LookupError, TypeError, ValueError):  # a fault of ours, but the agent gets an error
            logger.exception("a request could not be read")
            return _refuse(dialect, engine_error("the gateway failed"))

    async def _handle(self, request: Request, route: paths.Route) -> Response:
        """The response to a request for an attempt. Raises BadRequest."""
        if not verify_secret(self._config.run_secret, route.key, route.secret):
            raise BadRequest("wrong secret in the URL", "forbidden", 403)
        if not route.endpoint:
            raise BadRequest(f"no such endpoint: /{route.path[:200]}", "not_found", 404)
        if request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": ", ".join(route.methods)})
        if request.method not in route.methods:
            message = f"/{route.path[:200]} takes {route.methods[0]}, not {request.method[:20]}"
            raise BadRequest(message, "method_not_allowed", 405)
        if route.fields.get("stream") and request.query_params.get("alt") != "sse":
            raise BadRequest("streamGenerateContent gives server-sent events: add ?alt=sse", "unsupported", param="alt")
        if route.endpoint == paths.MODELS:
            return _models(route.fields.get("model"), self._config.model)
        attempt = self._attempts.setdefault(route.key, Attempt(route.key, route.secret))
        self._attempts.move_to_end(route.key)
        while len(self._attempts) > _MAX_ATTEMPTS:
            self._attempts.popitem(last=False)
        if route.endpoint == paths.TRACES and attempt.over_budget:
            return calls.refuse_traces(attempt)
        async with self._reader.reading(request, attempt) as raw:
            if route.endpoint == paths.TRACES:
                return await calls.take_traces(self._recorder, attempt, raw, request.headers, self._reader)
            return await self._call(attempt, route, raw, request)

    async def _call(self, attempt: Attempt, route: paths.Route, raw: bytes, request: Request) -> Response:
        """The response to a model call or token count. A client library's retry gets the first answer, so that it makes
        no second span: only a request that says it is a retry, since an agent may repeat a request on purpose."""
        call = await self._read(attempt, route, raw, request.headers)
        retries = request.headers.get(RETRY_HEADER)
        digest = (attempt.key, call.agent, route.endpoint, *route.fields.items(), hashlib.sha256(raw).digest())
        answer = self._answers.find(digest) if retries not in (None, "0") else None
        if answer is None:
            grace = 0.0 if retries is None else self._config.retry_grace_s
            answer = Answer(lambda answer: self._answer(call, answer), grace=grace)
            self._answers.add(digest, answer)
        return await answer.response(request)

    async def _read(self, attempt: Attempt, route: paths.Route, raw: bytes, headers: Mapping[str, str]) -> Call:
        """The call that a body describes, with the earlier replies that it refers to. Raises BadRequest."""
        config, dialect, apart = self._config, DIALECTS[route.endpoint], self._reader.apart

        def read() -> tuple[dict[str, Any], Mapping[str, bool]]:
            body = self._reader.parse(raw, headers.get("content-type", "")) | dict(route.fields)
            return body, dialect.recalls(body)

        body, wanted = await apart(attempt, len(raw), read)
        if wanted:
            try:
                dialect = dialect.remembering(await self._recorder.recorded_messages(attempt.key, wanted))
            except UnknownRollout as error:
                raise BadRequest(str(error), "rollout_ended", 409) from None
        parse = partial(calls.parse_request, model=config.model, max_choices=config.max_choices)
        context = await apart(attempt, len(raw), lambda: parse(body, dialect))
        return Call(
            attempt=attempt,
            agent=calls.agent_of(headers, route.agent),
            parent_id=calls.parent_of(headers),
            dialect=dialect,
            context=context,
            stream=dialect.stream(context),
            is_token_count=route.endpoint in paths.COUNT_TOKENS,
        )

    async def _answer(self, call: Call, answer: Answer) -> None:
        """Complete the answer to a call, whatever happens."""
        attempt = call.attempt
        try:
            refusal = await self._complete(call, answer)
            if refusal is not None and refusal.code in _OUTCOMES:
                await self._recorder.note_failure(
                    attempt.key, _OUTCOMES[refusal.code], refusal.detail or refusal.message
                )
        except UnknownRollout as error:
            attempt.ended = str(error)
            refusal = Refusal(status=409, message=attempt.ended, code="rollout_ended")
        except JournalError as error:
            logger.error("rollout %s: %s", attempt.key.rollout_id, error)
            refusal = engine_error("the run can record no more calls: its journal is full or broken", status=507)
        except Exception as error:  # whatever fails behind the gateway, the agent gets an error of its protocol
            logger.exception("a call of rollout %s could not be answered", attempt.key.rollout_id)
            refusal = engine_error("the gateway failed", detail=f"the gateway failed: {type(error).__name__}")
        if refusal is not None and answer.started:
            answer.failed = True
            answer.send(call.stream.fail(refusal))
        elif refusal is not None:
            answer.respond(_refuse(call.dialect, refusal))

    async def _complete(self, call: Call, answer: Answer) -> Refusal | None:
        """Call the engine, record the call, and only then end the answer; returns why the call is refused, if it is.
        Raises UnknownRollout if the attempt has ended."""
        attempt, started_at = call.attempt, time.time()
        if attempt.ended:
            raise UnknownRollout(attempt.ended)
        # 400, not 429: client libraries would retry a 429, in vain.
        if attempt.calls_left <= attempt.calls_in_flight:
            message = "this rollout has made all the model calls, or sent all the bytes, that it may"
            return Refusal(status=400, message=message, code="too_many_calls")
        if attempt.calls_in_flight >= self._config.max_concurrent_calls:
            message = f"this rollout has {attempt.calls_in_flight} model calls in flight, and may have no more"
            return Refusal(status=400, message=message, code="too_many_calls")
        attempt.calls_in_flight += 1
        try:
            completion = await self._ask_engine(call, answer, started_at)
            if isinstance(completion, Refusal):
                return completion
            if call.is_token_count:
                answer.respond(JSONResponse(call.dialect.count(completion.choices[0].prompt_T.size)))
                return None
            await answer.attended()
            # Shielded: a call that was sampled to its end is recorded, even if the agent goes away at this moment.
            await asyncio.shield(self._record(call, completion, started_at))
            if call.wants_stream:
                if not answer.started:
                    answer.start_stream(call.stream.begin())
                answer.send(call.stream.end(completion))
            else:
                answer.respond(JSONResponse(call.dialect.reply(call.context, completion)))
            return None
        finally:
            attempt.calls_in_flight -= 1

    async def _ask_engine(self, call: Call, answer: Answer, started_at: float) -> Completion | Refusal:
        """The engine's answer, or why there is none; a stream's deltas are sent on as they come."""
        config, split = self._config, call.attempt.key.split
        # With tools, the engine's answer is not streamed: vLLM's parsers of a stream read half a tool call, or a call's
        # arguments, in another way than its parsers of a complete answer.
        streamed = call.wants_stream and not call.context.engine.get("tools")
        # The engine counts a prompt's tokens by reading them, and samples one token that nobody sees.
        body = {**call.context.engine, **({"max_tokens": 1, "n": 1} if call.is_token_count else {})}
        request = engine.engine_request(
            body, model=config.model, split=split, sampling=config.sampling[split], stream=streamed
        )
        if config.seed is not None and split == "train":
            request["seed"] = call.seed(config.seed)
        try:
            async with asyncio.timeout(None if math.isinf(config.call_timeout_s) else config.call_timeout_s):
                if streamed:
                    return await self._follow_stream(call, answer, request, started_at)
                return engine.check_vocabulary(await self._engine.generate(request), config.vocab_size)
        except TimeoutError:
            return engine_error(f"the engine did not answer within {config.call_timeout_s:g} s", status=504)

    async def _follow_stream(
        self, call: Call, answer: Answer, request: Mapping[str, Any], started_at: float
    ) -> Completion | Refusal:
        """Send a stream's deltas on. If an agent that reads them goes away, what was sent is recorded."""
        parts: list[Part] = []
        try:
            async for part in self._engine.stream(request):
                if isinstance(part, Refusal):
                    return part
                if not parts:
                    answer.start_stream(call.stream.begin())
                parts.append(part)
                for choice in part.visible():
                    answer.send(call.stream.delta(choice))
        except asyncio.CancelledError:
            if parts and answer.seen:
                with contextlib.suppress(UnknownRollout, ValueError):
                    completion = engine.check_vocabulary(engine.join_parts(parts), self._config.vocab_size)
                    if isinstance(completion, Completion):
                        await self._record(call, completion, started_at)
            raise
        return engine.check_vocabulary(engine.join_parts(parts), self._config.vocab_size)

    async def _record(self, call: Call, completion: Completion, started_at: float) -> None:
        """Record a span for each choice, since each is a sampled response to the prompt. Raises UnknownRollout."""
        ended_at, context = time.time(), call.context
        prompt = context.engine.get("prompt")
        messages = context.engine["messages"] if prompt is None else [{"role": "user", "content": prompt}]
        offered = tuple(hide_secret(tool, call.attempt.secret) for tool in engine.offered_tools(context.engine))
        # Unknown log-probabilities are computed by the learner.
        is_unknown = call.attempt.key.split == "train" and engine.is_constrained(context.engine)
        for index, choice in enumerate(completion.choices):
            if choice.finish_reason == engine.CUT and not choice.response_T.size:
                continue
            reply = engine.assistant_message(completion.reply["choices"][index])
            span = ModelCall(
                key=call.attempt.key,
                call_id=context.reply_id if index == 0 else f"{context.reply_id}#{index}",
                agent=call.agent,
                parent_id=call.parent_id,
                policy_version=completion.policy_version,
                last_version=choice.new_versions[-1][1] if choice.new_versions else None,
                new_versions=choice.new_versions,
                prompt_T=choice.prompt_T,
                response_T=choice.response_T,
                logprob_T=np.full_like(choice.logprob_T, np.nan) if is_unknown else choice.logprob_T,
                finish_reason=choice.finish_reason,
                started_at=started_at,
                ended_at=ended_at,
                request=hide_secret(compact(messages), call.attempt.secret),
                reply=hide_secret(compact(reply), call.attempt.secret),
                offered=offered,
            )
            calls_left = await self._recorder.record(span)
            call.attempt.calls_left = min(call.attempt.calls_left, calls_left)


def application(gateway: Gateway) -> Starlette:
    """An ASGI application that passes every request to the gateway, and refuses WebSockets."""

    async def refuse(socket: WebSocket) -> None:
        message = "WebSockets are not spoken here: send the request by POST"
        refusal = Refusal(status=426, message=message, code="unsupported")
        await socket.send_denial_response(_refuse(DIALECTS["responses"], refusal))

    path = "/{path:path}"
    return Starlette(routes=[Route(path, gateway.handle, methods=_METHODS), WebSocketRoute(path, refuse)])


def _models(name: str | None, default: str) -> Response:
    """The model of a name, or the list of models without one, in the forms of all clients at once: every name means the
    policy."""
    model = name or default
    openai = {"id": model, "object": "model", "created": 0, "owned_by": "agent-lightning"}
    card = openai | {"type": "model", "display_name": model, "created_at": "1970-01-01T00:00:00Z"}
    card |= {"name": f"models/{model}", "supportedGenerationMethods": ["generateContent", "countTokens"]}  # Google's
    ends = {"first_id": model, "last_id": model, "has_more": False}  # Anthropic's
    return JSONResponse(card if name else {"object": "list", "data": [card], "models": [card], **ends})


def _refuse(dialect: Dialect, refusal: Refusal) -> JSONResponse:
    # Client libraries obey the header. Without it they would repeat a 409 in vain, and a call that timed out, though no
    # time is left for a repetition.
    hopeless = (refusal.status < 500 and refusal.status != 429) or refusal.status in (504, 507)
    headers = {"x-should-retry": "false"} if hopeless else {}
    return JSONResponse(dialect.error(refusal), status_code=refusal.status, headers=headers)
