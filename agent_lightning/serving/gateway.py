"""The gateway: OpenAI- and Anthropic-compatible endpoints that record every call before they answer.

The URL says whose call it is: /rollout/{rollout}/attempt/{n}/{secret}/{agent}/v1/chat/completions. The agent needs
nothing but that base URL. A plain class over Starlette's requests; `serving/app.py` puts it on Ray Serve. No
tokenising happens here: the engine renders templates and tokenises in its own process. docs/gateway.md is its manual.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import time
import uuid
import zlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agent_lightning.buffer.buffer import verify_secret
from agent_lightning.core.errors import UnknownRollout
from agent_lightning.core.types import ModelCall, Outcome, RolloutKey, Split
from agent_lightning.serving.answers import Answer
from agent_lightning.serving.bounds import Limits, is_deeper, reading, without
from agent_lightning.serving.calls import Attempt, Call
from agent_lightning.serving.dialects.base import Asked, BadRequest, Wire
from agent_lightning.serving.dialects.chat import ChatCompletions, Completions
from agent_lightning.serving.dialects.messages import Messages
from agent_lightning.serving.dialects.responses import Responses
from agent_lightning.serving.engine import CUT, Completion, Part, Refusal, compact, engine_request, join, spoken, within
from agent_lightning.serving.openapi import describe
from agent_lightning.serving.tracing import SpanRecorder, agent_of, parent_of, take_traces

logger = logging.getLogger(__name__)

RETRY_HEADER = "x-stainless-retry-count"
"""The client libraries of OpenAI and Anthropic count their retries here."""
WIRES: Mapping[str, Wire] = {
    "v1/chat/completions": ChatCompletions(),
    "v1/completions": Completions(),
    "v1/responses": Responses(),
    "v1/messages": Messages(),
}
"""The formats that agents speak, by the end of the path."""
_ATTEMPTS = 16_384
"""That a gateway remembers, those it heard of last: many times those that run at once."""
_COUNT = "v1/messages/count_tokens"
_TRACES = "v1/traces"


class Engine(Protocol):
    """What the gateway asks of the policy. Cancelling a call stops its work."""

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal: ...

    def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        """The parts of an answer as they come; a refusal is the last."""
        ...


class Recorder(SpanRecorder, Protocol):
    """What the gateway asks of the buffer."""

    async def record(self, call: ModelCall) -> int: ...

    async def note_failure(self, key: RolloutKey, outcome: Outcome, error: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What the gateway must know."""

    model: str
    run_secret: bytes
    sampling: Mapping[Split, Mapping[str, float | int]]
    """Per split, e.g. {"train": {"temperature": 1.0, "max_tokens": 64}, "val": {"temperature": 0.0}}."""
    seed: int | None = None
    """Of the run: what is sampled in training is then a function of it, the rollout, and what its agent asks for how
    often, so that a rollout that is run again, also as another attempt, samples the same. One gateway must see all."""
    vocab_size: int = 2**31
    """Of the model: an answer with another token id in it is the engine's error."""
    max_body_bytes: int = 4 * 1024 * 1024
    max_json_depth: int = 64
    max_choices: int = 16
    max_concurrent_calls: int = 64
    """Of one attempt, in flight at once."""
    call_timeout_s: float = math.inf
    """Seconds that the engine has for a call; it must then be another's fault than the agent's."""
    max_bytes_in_flight: int = 64 * 1024 * 1024
    """Of one attempt's requests, of any kind, that are being read or answered."""
    retry_grace_s: float = 10.0
    """Seconds in which a client library that went away finds the work still going: theirs wait 8 s at most."""
    retry_memory_s: float = 30.0
    """Seconds for which an answer that is done is kept for such a retry."""


class Gateway:
    """Answers agents. `handle` takes any request under its root and never raises."""

    def __init__(self, *, engine: Engine, recorder: Recorder, config: GatewayConfig) -> None:
        self._engine = engine
        self._recorder = recorder
        self._config = config
        self._attempts: OrderedDict[RolloutKey, Attempt] = OrderedDict()
        self._answers: OrderedDict[tuple[RolloutKey, str, str, bytes], Answer] = OrderedDict()

    async def handle(self, request: Request) -> Response:
        parts = [part for part in request.url.path.split("/") if part]
        if parts[-1:] == ["health"]:
            return JSONResponse({"status": "ok", "model": self._config.model})
        if parts[-1:] == ["openapi.json"]:
            return JSONResponse(describe(WIRES))
        wire = WIRES["v1/messages" if "anthropic-version" in request.headers else "v1/chat/completions"]
        try:
            start = parts.index("rollout")
            _, rollout_id, _, attempt, secret, agent, *rest = parts[start:]
            key = RolloutKey.parse(rollout_id, int(attempt))
        except ValueError:
            return _refuse(wire, Refusal(status=404, message=f"no such path: {request.url.path}", code="not_found"))
        if not verify_secret(self._config.run_secret, key, secret):
            return _refuse(wire, Refusal(status=403, message="wrong secret in the URL", code="forbidden"))
        end = "/".join(rest)
        if rest[:2] == ["v1", "models"] and len(rest) < 4 and request.method == "GET":
            return JSONResponse(self._models(rest[2:]))
        if end not in (*WIRES, _COUNT, _TRACES) or request.method != "POST":
            return _refuse(wire, Refusal(status=404, message=f"no such endpoint: /{end}", code="not_found"))
        config = self._config
        limits = Limits(one=config.max_body_bytes, all_together=config.max_bytes_in_flight)
        async with reading(request, self._attempt(key).held, limits) as raw:
            if isinstance(raw, Refusal):
                return _refuse(wire, raw)
            if end == _TRACES:
                return await take_traces(
                    self._recorder, key, raw, request.headers, max_bytes=config.max_body_bytes, secret=secret
                )
            wire = WIRES[end.removesuffix("/count_tokens")]
            try:
                call = self._call(key, secret, agent, wire, raw, request.headers, counts=end == _COUNT)
            except BadRequest as error:
                return _refuse(wire, Refusal(status=400, message=str(error), code=error.code))
            return await self._once(call, end, raw, request)

    def _attempt(self, key: RolloutKey) -> Attempt:
        """What is remembered of an attempt whose secret was right."""
        attempt = self._attempts.setdefault(key, Attempt())
        self._attempts.move_to_end(key)
        while len(self._attempts) > _ATTEMPTS:
            self._attempts.popitem(last=False)
        return attempt

    def _call(
        self,
        key: RolloutKey,
        secret: str,
        agent: str,
        wire: Wire,
        raw: bytes,
        headers: Mapping[str, str],
        *,
        counts: bool,
    ) -> Call:
        """The request that a body is. Raises BadRequest."""
        depth = self._config.max_json_depth
        try:
            body = json.loads(raw)
            if is_deeper(body, depth):
                raise BadRequest(f"the request is nested more than {depth} levels deep")
            compact(body).encode()  # fails where a span could not be written down: half a surrogate pair
        except (ValueError, RecursionError):
            raise BadRequest("the request is not JSON") from None
        if not isinstance(body, dict):
            raise BadRequest("the request is not a JSON object")
        engine = wire.to_engine(body)
        prompt = engine.get("prompt")
        prompts = len(prompt) if isinstance(prompt, list) and not all(isinstance(token, int) for token in prompt) else 1
        if (engine.get("n") or 1) * prompts > self._config.max_choices:
            raise BadRequest(f"n must be a number from 1 to {self._config.max_choices}, all prompts together")
        asked = Asked(
            body=body,
            engine=engine,
            reply_id=f"{wire.prefix}{uuid.uuid4().hex}",
            model=body.get("model") or self._config.model,
            created=int(time.time()),
        )
        return Call(
            key=key,
            secret=secret,
            agent=agent_of(headers, agent),
            parent_id=parent_of(headers),
            wire=wire,
            asked=asked,
            stream=wire.stream(asked),
            attempt=self._attempt(key),
            counts=counts,
        )

    async def _once(self, call: Call, end: str, raw: bytes, request: Request) -> Response:
        """Answer a client library's retry with the first answer, so that it makes no second span.

        Only a request that says it is a retry is matched: an agent may well ask the same thing twice on purpose.
        """
        config, retries = self._config, request.headers.get(RETRY_HEADER)
        digest = (call.key, call.agent, end, hashlib.sha256(raw).digest())
        answer = self._answers.get(digest) if retries not in (None, "0") else None
        if answer is None or answer.failed:
            grace = 0.0 if retries is None else config.retry_grace_s
            answer = self._answers[digest] = Answer(lambda answer: self._answer(call, answer), grace=grace)
            # The first of them was made first; whoever still reads it holds it.
            while len(self._answers) > 4096 or next(iter(self._answers.values())).age() > config.retry_memory_s:
                self._answers.popitem(last=False)
        return await answer.response(request)

    async def _answer(self, call: Call, answer: Answer) -> None:
        """Answer a call, whatever happens."""
        try:
            refusal = await self._admit(call, answer)
        except UnknownRollout as error:
            call.attempt.ended = str(error)
            refusal = Refusal(status=409, message=call.attempt.ended, code="rollout_ended")
        except Exception as error:  # whatever fails behind the gateway, the agent gets an error of its protocol
            logger.exception("a call of rollout %s could not be answered", call.key.rollout_id)
            message = f"the gateway failed: {type(error).__name__}"
            refusal = Refusal(status=500, message=message, code="engine_error", type="server_error")
        if refusal is None:
            return
        if answer.begun:
            answer.failed = True
            answer.send(call.stream.fail(refusal))
        else:
            answer.whole(_refuse(call.wire, refusal))

    async def _admit(self, call: Call, answer: Answer) -> Refusal | None:
        """Call the engine, where this attempt may call it once more. Raises UnknownRollout."""
        attempt = call.attempt
        if attempt.ended:
            return Refusal(status=409, message=attempt.ended, code="rollout_ended")
        spent = attempt.calls_left <= attempt.in_flight
        if spent or attempt.in_flight >= self._config.max_concurrent_calls:
            error = "this rollout has made all the model calls that it may make"
            if not spent:
                error = f"this rollout has {attempt.in_flight} model calls in flight, and may have no more"
            await self._recorder.note_failure(call.key, Outcome.TOO_MANY_CALLS, error)
            # 400, not 429: client libraries retry 429, and it would not get better.
            return Refusal(status=400, message=error, code="too_many_calls")
        attempt.in_flight += 1
        try:
            return await self._work(call, answer)
        finally:
            attempt.in_flight -= 1

    async def _work(self, call: Call, answer: Answer) -> Refusal | None:
        """Ask, record, and only then end the answer. Raises UnknownRollout."""
        config, started = self._config, time.time()
        # With tools an answer is streamed when it is whole: vLLM's parsers of a stream read half a tool call, or a
        # call's arguments, in another way than those of a whole answer.
        live = call.streams and not call.asked.engine.get("tools")
        # The engine counts tokens by reading them, and samples one that nobody sees.
        limits = {"max_tokens": 1, "n": 1} if call.counts else {}
        request = engine_request(
            {**call.asked.engine, **limits},
            model=config.model,
            split=call.key.split,
            sampling=config.sampling[call.key.split],
            stream=live,
        )
        if config.seed is not None and call.key.split == "train":
            request["seed"] = _seed(config.seed, call)
        try:
            async with asyncio.timeout(None if math.isinf(config.call_timeout_s) else config.call_timeout_s):
                if live:
                    found = await self._follow(call, answer, request, started)
                else:
                    found = within(await self._engine.generate(request), config.vocab_size)
        except TimeoutError:
            late = f"the engine did not answer within {config.call_timeout_s:g} s"
            found = Refusal(status=504, message=late, code="engine_error", type="server_error")
        if isinstance(found, Refusal):
            if found.code in ("context_length_exceeded", "engine_error"):
                long = found.code == "context_length_exceeded"
                outcome = Outcome.OVERLONG_PROMPT if long else Outcome.ENGINE_ERROR
                await self._recorder.note_failure(call.key, outcome, found.message)
            return found
        if call.counts:
            answer.whole(JSONResponse({"input_tokens": found.choices[0].prompt_T.size}))
            return None
        # Shielded: what was sampled to its end is recorded, also where the agent leaves just now.
        await asyncio.shield(self._record(call, found, started))
        if not call.streams:
            answer.whole(JSONResponse(call.wire.reply(call.asked, found)))
            return None
        if not answer.begun:
            answer.begin(call.stream.begin())
        answer.send(call.stream.end(found))
        return None

    async def _follow(
        self, call: Call, answer: Answer, request: Mapping[str, Any], started: float
    ) -> Completion | Refusal:
        """Hand on the deltas of a stream. Where the agent leaves it, what it was sent is recorded."""
        parts: list[Part] = []
        try:
            async for part in self._engine.stream(request):
                if isinstance(part, Refusal):
                    return part
                if not parts:
                    answer.begin(call.stream.begin())
                parts.append(part)
                for choice in part.visible():
                    answer.send(call.stream.delta(choice))
        except asyncio.CancelledError:
            if parts:
                with contextlib.suppress(UnknownRollout, ValueError):
                    seen = within(join(parts), self._config.vocab_size)
                    if isinstance(seen, Completion):
                        await self._record(call, seen, started)
            raise
        return within(join(parts), self._config.vocab_size)

    async def _record(self, call: Call, completion: Completion, started: float) -> None:
        """One span per choice: each is a sampled response to its prompt. Raises UnknownRollout."""
        ended = time.time()
        prompt = call.asked.engine.get("prompt")
        messages = call.asked.engine["messages"] if prompt is None else [{"role": "user", "content": prompt}]
        for index, choice in enumerate(completion.choices):
            if choice.finish_reason == CUT and not choice.response_T.size:
                continue
            span = ModelCall(
                key=call.key,
                call_id=call.asked.reply_id if index == 0 else f"{call.asked.reply_id}#{index}",
                agent=call.agent,
                parent_id=call.parent_id,
                policy_version=completion.policy_version,
                last_version=completion.last_version,
                prompt_T=choice.prompt_T,
                response_T=choice.response_T,
                logprob_T=choice.logprob_T,
                finish_reason=choice.finish_reason,
                started_at=started,
                ended_at=ended,
                request=without(call.secret, compact(messages)),
                reply=without(call.secret, compact(spoken(completion.reply["choices"][index]))),
            )
            left = await self._recorder.record(span)
            call.attempt.calls_left = min(call.attempt.calls_left, left)

    def _models(self, name: list[str]) -> dict[str, Any]:
        """The one model there is, by any name that an agent asks for, as OpenAI's and Anthropic's clients read it."""
        model = name[0] if name else self._config.model
        openai = {"id": model, "object": "model", "created": 0, "owned_by": "agent-lightning"}
        card = openai | {"type": "model", "display_name": model, "created_at": "1970-01-01T00:00:00Z"}
        ends = {"first_id": model, "last_id": model, "has_more": False}
        return card if name else {"object": "list", "data": [card], **ends}


def _seed(run_seed: int, call: Call) -> int:
    """Of one call: the same for every attempt at its rollout that has asked the same so far."""
    asked = zlib.crc32(compact(call.asked.engine).encode(), zlib.crc32(call.agent.encode()))
    call.attempt.asked[asked] += 1
    text = f"{run_seed}/{call.key.rollout_id}/{asked}/{call.attempt.asked[asked]}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _refuse(wire: Wire, refusal: Refusal) -> JSONResponse:
    # The client libraries obey the header: they would repeat a 409, and it would not get better; and a call that took
    # too long once has left no time for another.
    hopeless = (refusal.status < 500 and refusal.status != 429) or refusal.status == 504
    headers = {"x-should-retry": "false"} if hopeless else {}
    return JSONResponse(wire.error(refusal), status_code=refusal.status, headers=headers)
