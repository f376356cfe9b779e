"""Every dialect over a real connection, by the official client libraries: the same tokens, the same spans."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import openai
import pytest
from formats import FORMATS, Clients, converse
from test_gateway import Rig, open_rig, url_of

from agent_lightning.buffer.taken import take_groups
from agent_lightning.core.types import Ending, ModelCall, Outcome, RolloutKey, Task
from agent_lightning.learners.base import WeightBucket, Weights
from agent_lightning.serving.engine import Part, Refusal
from agent_lightning.serving.gateway import Gateway, GatewayConfig
from agent_lightning.testing.world import SAMPLING, serve_locally

HELLO = [{"role": "user", "content": "hello"}]
WAYS = [(name, stream) for name in FORMATS for stream in (False, True)]


async def learned(rig: Rig, seed: int) -> None:
    """A policy that prefers another word for each question."""
    table = np.random.default_rng(seed).normal(size=(1024, 4)).astype(np.float32)
    entry = {"name": "table", "dtype": "float32", "shape": [1024, 4], "offset": 0}
    bucket = WeightBucket(parameters=(entry,), data=np.frombuffer(table.tobytes(), np.uint8))
    await rig.engine.install(Weights(version=7, buckets=(bucket,)))


@asynccontextmanager
async def clients_of(rig: Rig) -> AsyncIterator[Clients]:
    async with serve_locally(rig.gateway) as root, Clients(root=root + url_of(rig.key)[: -len("/v1")]) as clients:
        yield clients


def essence(call: ModelCall) -> dict[str, Any]:
    """What must not depend on the format: all but ids and times."""
    named = {name: re.sub(r"call-\w+", "call", getattr(call, name)) for name in ("request", "reply")}
    arrays = {name: getattr(call, name).tolist() for name in ("prompt_T", "response_T", "logprob_T")}
    same = {name: getattr(call, name) for name in ("agent", "policy_version", "finish_reason")}
    return named | arrays | same


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("seed", range(2))
async def test_every_format_streamed_or_not_gives_the_same_tokens_and_the_same_spans(tools: bool, seed: int) -> None:
    spans: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for name, stream in WAYS:
        async with open_rig(split="val") as rig, clients_of(rig) as clients:
            await learned(rig, seed)
            turns = await converse(clients, name, "How much is 2+3?", tools=tools, stream=stream, temperature=0.0)
            calls = (await rig.end()).calls
        assert [turn.reply_id for turn in turns] == [call.call_id for call in calls]
        for turn, call in zip(turns, calls, strict=True):
            message = json.loads(call.reply)
            assert turn.text == (message["content"] or "")
            assert turn.reason == ("stop" if not turn.calls else "tool_calls")
            expected = [json.loads(c["function"]["arguments"]) for c in message.get("tool_calls", ())]
            assert [arguments for _, arguments in turn.calls] == expected
        spans[name, stream] = [essence(call) for call in calls]
    first = spans["chat", False]
    for way, calls_of_way in spans.items():
        assert calls_of_way == first, way
    assert {span["policy_version"] for span in first} == {7}


async def test_parallel_tool_calls_come_back_in_every_format() -> None:
    for name, stream in WAYS:
        async with open_rig(split="val", words=("call:2+3;4",)) as rig, clients_of(rig) as clients:
            (first, second) = await converse(clients, name, "?", tools=True, stream=stream, turns=2)
            before, after = (await rig.end()).calls
        assert first.calls == second.calls == [("calculator", {"expression": e}) for e in ("2+3", "4")]
        history = [*before.prompt_T.tolist(), *before.response_T.tolist()]
        assert after.prompt_T.tolist()[: len(history)] == history


async def test_a_prompt_of_token_ids_is_answered_as_the_chat_that_it_is() -> None:
    async with open_rig(split="val") as rig, clients_of(rig) as clients:
        await learned(rig, 1)
        await converse(clients, "chat", "hello", tools=False, stream=False)
        prompt = rig.engine._language.encode(HELLO).tolist()
        unstreamed = await clients.openai.completions.create(model="m", prompt=prompt, logprobs=1)
        parts = [
            part
            async for part in await clients.openai.completions.create(
                model="m", prompt=prompt, stream=True, stream_options={"include_usage": True}
            )
        ]
        several = await clients.openai.completions.create(model="m", prompt=["a", "b"], n=2)
        calls = (await rig.end()).calls
    streamed = [part.choices[0] for part in parts if part.choices]
    assert "".join(choice.text for choice in streamed) == unstreamed.choices[0].text
    assert (streamed[-1].finish_reason, parts[-1].usage) == ("stop", unstreamed.usage)
    assert unstreamed.choices[0].logprobs is not None
    assert len(unstreamed.choices[0].logprobs.token_logprobs or ()) == 2
    tokens = [(call.prompt_T.tolist(), call.response_T.tolist(), call.reply) for call in calls]
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(several.choices) == 4
    assert [call.prompt_T.size for call in calls[3:]] == [1] * 4
    assert len({call.call_id for call in calls}) == 7


async def test_tokens_of_a_prompt_are_counted_without_a_span() -> None:
    import anthropic

    async with open_rig() as rig, clients_of(rig) as clients:
        counted = await clients.anthropic.messages.count_tokens(model="m", messages=HELLO)  # type: ignore[arg-type]
        await converse(clients, "messages", "hello", tools=False, stream=False)
        with pytest.raises(anthropic.BadRequestError):
            await clients.anthropic.messages.count_tokens(model="m", messages=[{"role": "nobody", "content": ""}])  # type: ignore[typeddict-item]
        rig.engine.fail_next(1)
        with pytest.raises(anthropic.InternalServerError):
            await clients.anthropic.messages.count_tokens(model="m", messages=HELLO)  # type: ignore[arg-type]
        (call,) = (await rig.end()).calls
    assert counted.input_tokens == call.prompt_T.size


async def test_models_and_errors_as_each_client_reads_them() -> None:
    import anthropic

    async with open_rig() as rig, clients_of(rig) as clients:
        assert [model.id async for model in clients.openai.models.list()] == ["policy"]
        assert [model.id async for model in clients.anthropic.models.list()] == ["policy"]
        assert (await clients.openai.models.retrieve("gpt")).id == (await clients.anthropic.models.retrieve("gpt")).id
        stranger = clients.of(clients.root.replace("/agent", "x/agent"))
        with pytest.raises(openai.PermissionDeniedError):
            await stranger.openai.responses.create(model="m", input="hello")
        with pytest.raises(anthropic.PermissionDeniedError) as error:
            await stranger.anthropic.messages.create(model="m", max_tokens=5, messages=HELLO)  # type: ignore[arg-type]
        assert error.value.body["type"] == "error"  # type: ignore[index]


# Streams.


async def test_deltas_come_before_the_answer_is_whole_and_the_end_only_when_it_is_recorded() -> None:
    async with open_rig() as rig, clients_of(rig) as clients:
        rig.engine.delay_s = 0.1
        seen: list[tuple[str, int]] = []
        stream = await clients.openai.chat.completions.create(model="m", messages=HELLO, stream=True)  # type: ignore[arg-type]
        async for chunk in stream:
            (choice,) = chunk.choices
            recorded = (await rig.buffer.stats()).calls
            seen.append((choice.finish_reason or choice.delta.content or "", recorded))
    (_, *deltas, (reason, at_end)) = seen
    assert deltas
    assert {recorded for _, recorded in deltas} == {0}
    assert (reason, at_end) == ("stop", 1)


async def test_new_weights_wait_for_a_stream_and_the_next_agent_does_not_notice() -> None:
    async with open_rig() as rig, clients_of(rig) as clients:
        rig.engine.delay_s = 0.1
        first = asyncio.create_task(converse(clients, "chat", "a", tools=False, stream=True))
        while not rig.engine.in_flight:
            await asyncio.sleep(0.01)
        installing = asyncio.create_task(learned(rig, 0))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, installing, converse(clients, "messages", "b", tools=False, stream=True))
        assert [call.policy_version for call in (await rig.end()).calls] == [0, 7]


async def test_log_probabilities_and_choices_of_a_stream() -> None:
    async with open_rig() as rig, clients_of(rig) as clients:
        request: dict[str, Any] = {"model": "m", "messages": HELLO, "n": 3, "logprobs": True}
        async with clients.openai.chat.completions.stream(**request) as events:
            async for _ in events:
                pass
            reply = await events.get_final_completion()
        calls = (await rig.end()).calls
    for choice, call in zip(reply.choices, calls, strict=True):
        assert choice.logprobs is not None
        logged = [entry.logprob for entry in choice.logprobs.content or ()]
        np.testing.assert_allclose(logged, call.logprob_T, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
async def test_an_agent_that_leaves_a_stream_has_what_it_was_sent_on_record(name: str) -> None:
    async with open_rig() as rig, clients_of(rig) as clients:
        rig.engine.delay_s = 0.2
        if name == "messages":
            stream: Any = await clients.anthropic.messages.create(
                model="m",
                max_tokens=9,
                messages=HELLO,
                stream=True,  # type: ignore[arg-type]
            )
        elif name == "chat":
            stream = await clients.openai.chat.completions.create(model="m", messages=HELLO, stream=True)  # type: ignore[arg-type]
        else:
            stream = await clients.openai.responses.create(model="m", input="hello", stream=True)
        async for chunk in stream:
            if "delta" in str(chunk) and ("yes" in str(chunk) or "no" in str(chunk) or "maybe" in str(chunk)):
                break
        await stream.close()
        while (await rig.buffer.stats()).calls == 0:
            await asyncio.sleep(0.01)
        assert rig.engine.in_flight == 0
        (call,) = (await rig.end()).calls
    assert (call.finish_reason, call.response_T.size, call.logprob_T.size) == ("cancelled", 1, 1)


@pytest.mark.parametrize("name", FORMATS)
async def test_a_library_that_times_out_before_the_first_delta_finds_the_stream_again(name: str) -> None:
    async with open_rig() as rig, clients_of(rig) as clients:
        patient = {"timeout": 0.3, "max_retries": 3}
        hasty = replace(
            clients,
            openai=clients.openai.with_options(**patient),  # type: ignore[arg-type]
            anthropic=clients.anthropic.with_options(**patient),  # type: ignore[arg-type]
        )
        rig.engine.delay_s = 0.6
        asking = asyncio.create_task(FORMATS[name](hasty, HELLO, tools=False, stream=True))
        while not rig.engine.in_flight:
            await asyncio.sleep(0.01)
        rig.engine.delay_s = 0.0  # of the second token
        turn = await asking
        (call,) = (await rig.end()).calls
    assert (call.call_id, call.finish_reason) == (turn.reply_id, "stop")


class Cut:
    """An engine that breaks in the middle of a stream."""

    def __init__(self, rig: Rig) -> None:
        self._engine = rig.engine

    async def stream(self, request: dict[str, Any]) -> AsyncIterator[Part | Refusal]:
        async for part in self._engine.stream(request):
            yield part
            yield Refusal(status=500, message="the replica died", code="engine_error", type="server_error")
            return


@pytest.mark.parametrize("name", FORMATS)
async def test_a_stream_that_the_engine_cuts_is_an_error_of_the_protocol(name: str) -> None:
    async with open_rig(words=("yes",)) as rig:
        config = GatewayConfig(model="policy", run_secret=rig.gateway._config.run_secret, sampling=SAMPLING)
        cut = replace(rig, gateway=Gateway(engine=Cut(rig), recorder=rig.buffer, config=config))  # type: ignore[arg-type]
        async with clients_of(cut) as clients:
            with pytest.raises(Exception, match="the replica died") as error:
                await FORMATS[name](clients, HELLO, tools=False, stream=True)
        assert isinstance(error.value, openai.APIError) or type(error.value).__module__.startswith("anthropic")
        assert (await rig.end(Outcome.AGENT_ERROR)).outcome is Outcome.ENGINE_ERROR


async def test_a_rollout_that_ends_during_a_stream_is_told_so() -> None:
    async with open_rig() as rig, clients_of(rig) as clients:
        rig.engine.delay_s = 0.1
        stream = await clients.openai.chat.completions.create(model="m", messages=HELLO, stream=True)  # type: ignore[arg-type]
        await rig.end(Outcome.TIMEOUT)
        with pytest.raises(openai.APIError, match="not open"):
            async for _ in stream:
                pass


# Many.


async def test_500_agents_of_mixed_formats_at_once() -> None:
    async with open_rig(max_concurrent_calls=64) as rig, clients_of(rig) as clients:
        await rig.buffer.admit(Task(task_id="many", payload={}), split="train", num_rollouts=500)
        leases = await rig.buffer.lease(500, 1.0)
        root = clients.root.partition("/rollout")[0]
        rig.engine.delay_s = 0.02

        async def agent(number: int, key: RolloutKey) -> list[str]:
            name, stream = WAYS[number % len(WAYS)]
            own = clients.of(root + url_of(key)[: -len("/v1")])
            turns = await converse(own, name, f"question {number}", tools=number % 2 == 0, stream=stream)
            await rig.buffer.finish(key, Ending(outcome=Outcome.FINISHED, reward=0.0))
            return [turn.reply_id for turn in turns]

        reply_ids = await asyncio.gather(*(agent(number, lease.key) for number, lease in enumerate(leases)))
        (group,) = await take_groups(rig.buffer, 1, split="train")
        stats = await rig.buffer.stats()
    assert [[call.call_id for call in trajectory.calls] for trajectory in group.trajectories] == reply_ids
    assert {trajectory.outcome for trajectory in group.trajectories} == {Outcome.FINISHED}
    assert stats.calls == sum(map(len, reply_ids)) == len({i for ids in reply_ids for i in ids})
    assert stats.refused_spans == 0
