"""The gateway over a real buffer and a toy engine: through ASGI, and through the official openai client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from agent_lightning.buffer.buffer import Buffer, attempt_secret
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Ending, ModelCall, Outcome, RolloutKey, Split, Task, Trajectory
from agent_lightning.serving.engine import Completion, Refusal
from agent_lightning.serving.gateway import RETRY_HEADER, Gateway, GatewayConfig, application
from agent_lightning.testing.model import FIRST_WORD, ToyEngine, ToyLanguage
from agent_lightning.testing.world import SAMPLING, serve_locally

RUN_SECRET = b"a secret of the tests"
WORDS = ("no", "yes", "maybe", "call:2+3")
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}


def url_of(key: RolloutKey, *, secret: str | None = None, agent: str = "agent") -> str:
    secret = attempt_secret(RUN_SECRET, key) if secret is None else secret
    return f"/rollout/{key.rollout_id}/attempt/{key.attempt}/{secret}/{agent}/v1"


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A gateway with one open rollout."""

    buffer: Buffer
    engine: ToyEngine
    gateway: Gateway
    http: httpx.AsyncClient
    key: RolloutKey

    async def post(self, *, headers: Mapping[str, str] | None = None, **body: Any) -> httpx.Response:
        body = {"model": "policy", "messages": HELLO, **body}
        return await self.http.post(f"{url_of(self.key)}/chat/completions", json=body, headers=headers)

    async def end(self, outcome: Outcome = Outcome.FINISHED) -> Trajectory:
        reward = 1.0 if outcome is Outcome.FINISHED else None
        await self.buffer.finish(self.key, Ending(outcome=outcome, reward=reward))
        (group,) = await take_groups(self.buffer, 1, split=self.key.split)
        return group.trajectories[0]


@asynccontextmanager
async def open_rig(
    *,
    split: Split = "train",
    max_calls: int = 100,
    max_len: int = 4096,
    words: tuple[str, ...] = WORDS,
    **settings: Any,
) -> AsyncIterator[Rig]:
    buffer = Buffer(run_secret=RUN_SECRET, agent=AgentConfig(target="", max_calls=max_calls))
    engine = ToyEngine(ToyLanguage(words), max_len=max_len)
    config = GatewayConfig(**({"model": "policy", "run_secret": RUN_SECRET, "sampling": SAMPLING} | settings))
    gateway = Gateway(engine=engine, recorder=buffer, config=config)
    await buffer.admit(Task(task_id="t", payload={}), split=split, num_rollouts=1)
    (lease,) = await buffer.lease(1, 1.0)
    transport = httpx.ASGITransport(application(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        yield Rig(buffer=buffer, engine=engine, gateway=gateway, http=http, key=lease.key)


@asynccontextmanager
async def client_of(rig: Rig, **settings: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, over a real connection."""
    async with serve_locally(rig.gateway) as root:
        client = openai.AsyncOpenAI(base_url=root + url_of(rig.key), api_key="any", **{"max_retries": 0} | settings)
        async with client:
            yield client


def code_of(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


# Whose call it is.


async def test_a_call_is_answered_and_recorded_exactly() -> None:
    async with open_rig() as rig:
        reply = (await rig.post()).json()
        (call,) = (await rig.end()).calls
    word = reply["choices"][0]["message"]["content"]
    assert call.call_id == reply["id"]
    assert (call.key, call.agent, call.policy_version, call.finish_reason) == (rig.key, "agent", 0, "stop")
    assert call.response_T.tolist() == [FIRST_WORD + WORDS.index(word), 1]
    np.testing.assert_allclose(call.logprob_T, [-np.log(len(WORDS)), 0.0], rtol=1e-6)
    assert call.prompt_T.tolist() == ToyLanguage(WORDS).encode(HELLO).tolist()
    assert json.loads(call.request) == HELLO
    assert json.loads(call.reply) == reply["choices"][0]["message"]
    assert call.started_at <= call.ended_at


async def test_the_name_of_the_agent_is_in_the_url() -> None:
    async with open_rig() as rig:
        for agent in ("writer", "judge 2", "日本"):
            url = f"{url_of(rig.key, agent=agent)}/chat/completions"
            assert (await rig.http.post(url, json={"messages": HELLO})).status_code == 200
        assert [call.agent for call in (await rig.end()).calls] == ["writer", "judge 2", "日本"]


@pytest.mark.parametrize("change", ["", "x", "short", "upper", "é", "other attempt", "other rollout"])
async def test_a_wrong_secret_opens_nothing(change: str) -> None:
    async with open_rig() as rig:
        right = attempt_secret(RUN_SECRET, rig.key)
        secret = {
            "": "-",
            "short": right[:-1],
            "upper": right.upper(),
            "other attempt": attempt_secret(RUN_SECRET, replace(rig.key, attempt=1)),
            "other rollout": attempt_secret(RUN_SECRET, replace(rig.key, index=1)),
        }.get(change, right[:-1] + change)
        for path in ("chat/completions", "models"):
            url = f"{url_of(rig.key, secret=secret)}/{path}"
            response = await rig.http.request("GET" if path == "models" else "POST", url)
            assert code_of(response) == (403, "forbidden")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1/chat/completions",
        "/rollout",
        "/rollout/train-0-0/attempt/0/secret",
        "/rollout/train-0/attempt/0/s/a/v1/chat/completions",
        "/rollout/test-0-0/attempt/0/s/a/v1/chat/completions",
        "/rollout/train-0-0/attempt/x/s/a/v1/chat/completions",
        "/rollout/train--1-0/attempt/0/s/a/v1/chat/completions",
        f"/rollout/train-{'9' * 5000}-0/attempt/0/s/a/v1/chat/completions",
        "/rollout/%00-%ff-%2F/attempt/0/s/a/v1/chat/completions",
    ],
)
async def test_paths_that_lead_nowhere(path: str) -> None:
    async with open_rig() as rig:
        assert code_of(await rig.http.post(path, json={})) == (404, "not_found")


async def test_endpoints() -> None:
    async with open_rig() as rig:
        url = url_of(rig.key)
        assert (await rig.http.get("/anything/health")).json() == {"status": "ok", "model": "policy"}
        assert [m["id"] for m in (await rig.http.get(f"{url}/models")).json()["data"]] == ["policy"]
        assert code_of(await rig.http.post(f"{url}/embeddings", json={})) == (404, "not_found")
        assert code_of(await rig.http.get(f"{url}/chat/completions")) == (405, "method_not_allowed")
        assert (await rig.http.post(f"/agl-run{url}/chat/completions", json={"messages": HELLO})).status_code == 200


async def test_a_rollout_that_was_never_admitted() -> None:
    async with open_rig() as rig:
        other = replace(rig, key=replace(rig.key, group=7))
        assert code_of(await other.post()) == (409, "rollout_ended")
        assert (await rig.post()).status_code == 200


@pytest.mark.parametrize("fault", ["none", "engine", "too long"])
async def test_an_ended_rollout_is_refused_and_counted(fault: str) -> None:
    async with open_rig(max_len=60) as rig:
        await rig.end(Outcome.TIMEOUT)
        rig.engine.fail_next(1 if fault == "engine" else 0)
        content = "long " * 20 if fault == "too long" else "hello"
        response = await rig.post(messages=[{"role": "user", "content": content}])
        assert code_of(response) == (409, "rollout_ended")
        assert response.headers["x-should-retry"] == "false"  # or openai's client would repeat it
        assert (await rig.buffer.stats()).refused_spans == 1
        rig.engine.fail_next(1)
        assert code_of(await rig.post()) == (409, "rollout_ended")
        assert isinstance(await rig.engine.generate({"messages": HELLO}), Refusal)  # so nobody asked it for that


# What is asked and answered.


async def test_log_probabilities_only_where_asked_for_and_token_ids_never() -> None:
    async with open_rig() as rig:
        for body in ({}, {"logprobs": False}, {"return_token_ids": True, "prompt_logprobs": 1}):
            response = await rig.post(**body)
            assert response.json()["choices"][0]["logprobs"] is None
            assert "token_id" not in response.text
        response = await rig.post(logprobs=True)
        logged = [entry["logprob"] for entry in response.json()["choices"][0]["logprobs"]["content"]]
        assert "token_id" not in response.text
        calls = (await rig.end()).calls
    np.testing.assert_allclose(logged, calls[-1].logprob_T)
    assert all(len(call.logprob_T) == 2 for call in calls)


async def test_the_model_keeps_the_name_that_the_agent_used() -> None:
    async with open_rig() as rig:
        assert (await rig.post(model="gpt-4o")).json()["model"] == "gpt-4o"
        assert (await rig.post(model=None)).json()["model"] == "policy"


@pytest.mark.parametrize(
    ("split", "changes", "logprob"),
    [
        ("train", {}, -np.log(4)),
        ("train", {"temperature": 0}, -np.log(4)),
        ("val", {}, 0.0),
        ("val", {"temperature": None}, 0.0),
        ("val", {"temperature": 1.0}, -np.log(4)),
    ],
)
async def test_who_chooses_the_temperature(split: Split, changes: dict[str, Any], logprob: float) -> None:
    async with open_rig(split=split) as rig:
        await rig.post(**changes)
        (call,) = (await rig.end()).calls
    assert call.logprob_T[0] == pytest.approx(logprob)


@pytest.mark.parametrize(
    ("changes", "limit", "tokens"),
    [
        ({}, 16, 2),
        ({}, 1, 1),
        ({"max_tokens": 100}, 1, 1),
        ({"max_tokens": 1}, 16, 1),
        ({"max_completion_tokens": 1}, 16, 1),
        ({"max_completion_tokens": 1, "max_tokens": 9}, 16, 1),
    ],
)
async def test_the_smaller_limit_of_tokens_wins(changes: dict[str, Any], limit: int, tokens: int) -> None:
    async with open_rig(sampling={"train": {"temperature": 1.0, "max_tokens": limit}}) as rig:
        reply = (await rig.post(**changes)).json()
        (call,) = (await rig.end()).calls
    assert call.response_T.size == tokens
    assert reply["choices"][0]["finish_reason"] == call.finish_reason == ("stop" if tokens == 2 else "length")


async def test_two_choices_are_two_spans() -> None:
    async with open_rig() as rig:
        reply = (await rig.post(n=2)).json()
        first, second = (await rig.end()).calls
    assert (first.call_id, second.call_id) == (reply["id"], f"{reply['id']}#1")
    assert first.prompt_T.tolist() == second.prompt_T.tolist()
    spoken = [WORDS[int(call.response_T[0]) - FIRST_WORD] for call in (first, second)]
    assert spoken == [choice["message"]["content"] for choice in reply["choices"]]


async def test_tool_calls_pass_through() -> None:
    async with open_rig() as rig, client_of(rig) as client:
        replies = [
            await client.chat.completions.create(model="m", messages=HELLO, tools=[TOOL])  # type: ignore[list-item, call-overload]
            for _ in range(20)
        ]
    called = [reply.choices[0] for reply in replies if reply.choices[0].message.tool_calls]
    assert called
    assert called[0].finish_reason == "tool_calls"
    assert called[0].message.tool_calls[0].function.name == "calculator"
    assert json.loads(called[0].message.tool_calls[0].function.arguments) == {"expression": "2+3"}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": "hello"}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [], "n": 0.5}',
        b'{"messages": [], "n": true}',
        b'{"messages": [], "n": 17}',
        b'{"messages": [], "n": -1}',
        b'{"messages": [], "max_tokens": "many"}',
        b'{"messages": [], "max_tokens": 0}',
        b'{"messages": [], "max_completion_tokens": 1e999}',
        b'{"messages": [], "model": {"a": NaN}}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "nobody", "content": "x"}]}',
        b'{"messages": ["hello"]}',
    ],
)
async def test_what_is_not_a_request_is_refused(raw: bytes) -> None:
    async with open_rig() as rig:
        response = await rig.http.post(f"{url_of(rig.key)}/chat/completions", content=raw)
        status, code = code_of(response)
        assert (status, code in ("invalid_request", "unsupported")) == (400, True)
        assert not (await rig.end(Outcome.AGENT_ERROR)).calls


async def test_a_body_that_is_too_large_is_not_read_to_its_end() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 1000:
            sent += 1
            yield b"x" * 1000

    async with open_rig(max_body_bytes=10_000) as rig:
        url = f"{url_of(rig.key)}/chat/completions"
        assert code_of(await rig.http.post(url, content=b"x" * 10_001)) == (413, "size")
        assert code_of(await rig.http.post(url, content=endless())) == (413, "size")
        assert sent < 20


# Retries.


async def test_a_retry_gets_the_first_answer_and_makes_no_second_span() -> None:
    async with open_rig() as rig:
        first = await rig.post(headers={RETRY_HEADER: "0"})
        again = [await rig.post(headers={RETRY_HEADER: str(n)}) for n in (1, 2)]
        assert [response.json() for response in again] == [first.json()] * 2
        assert len((await rig.end()).calls) == 1


async def test_the_same_question_twice_is_two_spans() -> None:
    async with open_rig() as rig:
        replies = [await rig.post(), await rig.post(), await rig.post(headers={RETRY_HEADER: "0"})]
        assert len({reply.json()["id"] for reply in replies}) == 3
        assert len((await rig.end()).calls) == 3


async def test_a_retry_of_another_agent_is_its_own() -> None:
    async with open_rig() as rig:
        await rig.post()
        url = f"{url_of(rig.key, agent='judge')}/chat/completions"
        await rig.http.post(url, json={"model": "policy", "messages": HELLO}, headers={RETRY_HEADER: "1"})
        assert [call.agent for call in (await rig.end()).calls] == ["agent", "judge"]


async def test_a_failure_is_not_kept_for_the_retry() -> None:
    async with open_rig() as rig:
        rig.engine.fail_next(1)
        assert code_of(await rig.post()) == (500, "engine_error")
        assert (await rig.post(headers={RETRY_HEADER: "1"})).status_code == 200


async def test_a_failure_that_nobody_waited_for_is_not_kept_either() -> None:
    async with open_rig() as rig:
        rig.engine.delay_s = 0.05
        rig.engine.fail_next(1)
        asking = asyncio.create_task(rig.post())
        await asyncio.sleep(0.02)
        asking.cancel()
        await asyncio.sleep(0.1)
        assert (await rig.post(headers={RETRY_HEADER: "1"})).status_code == 200


async def test_a_client_that_goes_away_and_asks_again() -> None:
    """The official client times out, retries by itself, and finds the work that it began."""
    async with open_rig() as rig, client_of(rig, timeout=0.2, max_retries=3) as client:
        rig.engine.delay_s = 0.5
        reply = await client.chat.completions.create(model="m", messages=HELLO)  # type: ignore[arg-type]
        (call,) = (await rig.end()).calls
    assert call.call_id == reply.id


async def left(rig: Rig, headers: Mapping[str, str]) -> None:
    """A client that goes away before it has an answer."""
    rig.engine.delay_s = 0.2
    asking = asyncio.create_task(rig.post(headers=headers))
    while rig.engine.in_flight == 0:
        await asyncio.sleep(0.01)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await asyncio.sleep(0.05)


async def test_a_client_that_goes_away_cancels_the_work() -> None:
    async with open_rig() as rig:
        await left(rig, {})
        assert rig.engine.in_flight == 0
        assert not (await rig.end(Outcome.AGENT_ERROR)).calls


async def test_a_client_that_counts_retries_may_come_back_for_a_while() -> None:
    async with open_rig() as rig:
        await left(rig, {RETRY_HEADER: "0"})
        assert rig.engine.in_flight == 1
        await asyncio.sleep(0.2)
        assert (await rig.buffer.stats()).calls == 0  # nobody has seen an answer
        assert (await rig.post(headers={RETRY_HEADER: "1"})).status_code == 200
        assert len((await rig.end()).calls) == 1
    async with open_rig(retry_grace_s=0.01) as rig:
        await left(rig, {RETRY_HEADER: "0"})
        assert rig.engine.in_flight == 0
        assert (await rig.post(headers={RETRY_HEADER: "1"})).status_code == 200
        assert len((await rig.end()).calls) == 1


async def test_an_answer_is_kept_for_a_retry_for_a_while_only() -> None:
    async with open_rig(retry_memory_s=0.05) as rig:
        for count, calls in (("0", 1), ("1", 1), ("0", 2)):
            assert (await rig.post(headers={RETRY_HEADER: count})).status_code == 200
            await asyncio.sleep(0.1 if calls == 2 else 0.0)
        await rig.post(messages=[{"role": "user", "content": "another"}])
        await rig.post(headers={RETRY_HEADER: "1"})
        assert len((await rig.end()).calls) == 4


async def test_a_client_that_goes_away_over_a_real_connection_cancels_the_work() -> None:
    async with open_rig() as rig, client_of(rig, timeout=0.1) as client:
        rig.engine.delay_s = 30.0
        asking = client.chat.completions.create(model="m", messages=HELLO, extra_headers={RETRY_HEADER: openai.omit})  # type: ignore[arg-type, dict-item]
        with pytest.raises(openai.APITimeoutError):
            await asking
        while rig.engine.in_flight:
            await asyncio.sleep(0.01)


# Errors.


async def test_errors_are_the_classes_that_openai_users_know() -> None:
    async with open_rig(max_len=60) as rig, client_of(rig) as client:

        async def ask(content: str) -> object:
            return await client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])

        with pytest.raises(openai.BadRequestError) as long:
            await ask("word " * 100)
        assert long.value.code == "context_length_exceeded"
        rig.engine.fail_next(1)
        with pytest.raises(openai.InternalServerError) as broken:
            await ask("hello")
        assert broken.value.code == "engine_error"
        with pytest.raises(openai.PermissionDeniedError):
            await client.with_options(base_url=str(client.base_url).replace("/agent/", "x/agent/")).models.list()
        assert [model.id async for model in client.models.list()] == ["policy"]
        await rig.end(Outcome.CANCELLED)
        with pytest.raises(openai.ConflictError):
            await ask("hello")


@pytest.mark.parametrize(
    ("content", "failures", "outcome"),
    [("word " * 100, 0, Outcome.OVERLONG_PROMPT), ("hello", 1, Outcome.ENGINE_ERROR)],
)
async def test_the_reason_of_a_refusal_explains_the_agents_error(content: str, failures: int, outcome: Outcome) -> None:
    async with open_rig(max_len=60) as rig:
        rig.engine.fail_next(failures)
        await rig.post(messages=[{"role": "user", "content": content}])
        assert (await rig.end(Outcome.AGENT_ERROR)).outcome is outcome


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_that_the_model_has_not_are_the_engines_error_and_no_span(stream: bool) -> None:
    known = FIRST_WORD + len(WORDS)
    for vocab_size, outcome in ((known, Outcome.FINISHED), (FIRST_WORD, Outcome.ENGINE_ERROR)):
        async with open_rig(vocab_size=vocab_size) as rig:
            reply = await rig.post(stream=stream)
            failed = outcome is Outcome.ENGINE_ERROR
            assert (f"vocabulary of {vocab_size}" in reply.text) == failed
            ended = await rig.end(Outcome.AGENT_ERROR if failed else Outcome.FINISHED)
            assert (ended.outcome, len(ended.calls)) == (outcome, 0 if failed else 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_takes_too_long_is_to_blame_and_stops_its_work(stream: bool) -> None:
    async with open_rig(call_timeout_s=0.2) as rig:
        rig.engine.delay_s = 60.0
        async with asyncio.timeout(10):
            reply = await rig.post(stream=stream)
        assert code_of(reply) == (504, "engine_error")
        assert reply.headers["x-should-retry"] == "false"
        assert rig.engine.in_flight == 0
        ended = await rig.end(Outcome.AGENT_ERROR)
    assert (ended.outcome, ended.error) == (Outcome.ENGINE_ERROR, "the engine did not answer within 0.2 s")


async def test_no_more_calls_than_a_rollout_may_make() -> None:
    async with open_rig(max_calls=3) as rig:
        codes = [(await rig.post()).status_code for _ in range(5)]
        last = await rig.post()
        assert codes == [200] * 3 + [400] * 2
        assert code_of(last) == (400, "too_many_calls")
        ended = await rig.end(Outcome.AGENT_ERROR)
        assert (ended.outcome, len(ended.calls)) == (Outcome.TOO_MANY_CALLS, 3)


async def test_no_more_calls_at_once_than_a_rollout_may_make() -> None:
    async with open_rig(max_concurrent_calls=4) as rig:
        rig.engine.delay_s = 0.05
        replies = await asyncio.gather(*(rig.post() for _ in range(30)))
        assert sorted(reply.status_code for reply in replies) == [200] * 4 + [400] * 26
        assert (await rig.post()).status_code == 200  # it is a limit of calls in flight
        assert len((await rig.end()).calls) == 5


class SlowFirst:
    """A recorder whose first acknowledgement comes last."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._num = 0

    async def record(self, call: ModelCall) -> int:
        left = await self._buffer.record(call)
        self._num += 1
        await asyncio.sleep(0.05 if self._num == 1 else 0)
        return left

    async def note_failure(self, key: RolloutKey, outcome: Outcome, error: str) -> None:
        await self._buffer.note_failure(key, outcome, error)


class Broken:
    """An engine and a recorder behind which something is broken."""

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        raise RuntimeError("a detail that agents must not see")

    async def record(self, call: ModelCall) -> int:
        raise ConnectionError("a detail that agents must not see")

    async def note_failure(self, key: RolloutKey, outcome: Outcome, error: str) -> None:
        raise ConnectionError("a detail that agents must not see")


async def test_acknowledgements_in_any_order_open_no_closed_door() -> None:
    async with open_rig(max_calls=2) as rig:
        config = GatewayConfig(model="policy", run_secret=RUN_SECRET, sampling=SAMPLING)
        gateway = Gateway(engine=rig.engine, recorder=SlowFirst(rig.buffer), config=config)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application(gateway)), base_url="http://g") as http:
            slow = replace(rig, http=http, gateway=gateway)
            await asyncio.gather(slow.post(), slow.post())
            assert code_of(await slow.post()) == (400, "too_many_calls")


@pytest.mark.parametrize("part", ["engine", "recorder", "note_failure"])
async def test_what_breaks_behind_the_gateway_is_an_error_of_openai(part: str) -> None:
    async with open_rig() as rig:
        broken = Broken()
        rig.engine.fail_next(1 if part == "note_failure" else 0)
        gateway = Gateway(
            engine=broken if part == "engine" else rig.engine,
            recorder=rig.buffer if part == "engine" else broken,
            config=GatewayConfig(model="policy", run_secret=RUN_SECRET, sampling=SAMPLING),
        )
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application(gateway)), base_url="http://g") as http:
            response = await replace(rig, http=http).post()
    assert code_of(response) == (500, "engine_error")
    assert "detail" not in response.text
