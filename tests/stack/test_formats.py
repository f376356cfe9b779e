"""The dialects on the real stack: HAProxy, Serve, vLLM and the tiny policy, which calls its calculator."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import pytest
from formats import FORMATS, FUNCTION, Clients, chat, converse
from ray import serve

from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.load import load
from agent_lightning.core.types import Ending, ModelCall, Outcome, Task
from agent_lightning.launch import checks, launch
from agent_lightning.serving.engine import engine_request, join_parts

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(420)]
SYSTEM = "Solve the problem. Use the calculator."
TOKENS = [5, 6, 7, 8, 9]
QUESTION = "Gita takes 76 figs out of a tray that held 85 figs. How many stay?"


class Stack:
    """A running service, and a new rollout for each question of a test."""

    def __init__(self, system: launch.System, questions: list[str]) -> None:
        self.system = system
        self.questions = questions

    @asynccontextmanager
    async def rollout(self, calls: list[ModelCall]) -> AsyncIterator[str]:
        """Yields the root of the rollout's URL; afterwards `calls` holds what was recorded."""
        await self.system.buffer.admit(Task(task_id="t", payload={}), split="val", num_rollouts=1)
        (lease,) = await self.system.buffer.lease(1, 10.0)
        key = lease.key
        yield f"{self.system.service.url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{lease.secret}/agent"
        await self.system.buffer.finish(key, Ending(outcome=Outcome.CANCELLED))
        (group,) = await take_groups(self.system.buffer, 1, split="val")
        calls.extend(group.trajectories[0].calls)


async def test_formats_streams_and_cancelling_on_the_real_stack() -> None:
    config = load(["experiment=calc_tiny", "model.max_len=512", "sampling.val.max_tokens=200", "agent.max_calls=100"])
    questions = [str(task.payload["question"]) for task in checks.require(config, "val").tasks["val"][:6]]
    async with launch.system(config, train=False, workers=0) as system:
        stack = Stack(system, questions)
        await the_same_spans(stack, tools=True)
        await the_same_spans(stack, tools=False)
        await a_prompt_of_token_ids(stack)
        await json_if_the_request_wants_it(stack)
        await tokens_of_a_stream_with_tools(stack)
        await deltas_pass_the_proxy(stack)
        await errors_of_the_protocol(stack)
        await a_client_that_leaves(stack, stream=True)
        await a_client_that_leaves(stack, stream=False)


def essence(call: ModelCall) -> dict[str, Any]:
    named = {name: re.sub(r"(call|chatcmpl-tool)[-_]\w+", "call", getattr(call, name)) for name in ("request", "reply")}
    return named | {
        "prompt_T": call.prompt_T.tolist(),
        "response_T": call.response_T.tolist(),
        "logprob_T": [round(value, 4) for value in call.logprob_T.tolist()],
        "finish_reason": call.finish_reason,
    }


async def the_same_spans(stack: Stack, *, tools: bool) -> None:
    spans = {}
    for name in FORMATS:
        for stream in (False, True):
            calls: list[ModelCall] = []
            async with stack.rollout(calls) as root, Clients(root=root) as clients:
                turns = [
                    turn
                    for question in stack.questions
                    for turn in await converse(clients, name, question, system=SYSTEM, tools=tools, stream=stream)
                ]
            assert [turn.reply_id for turn in turns] == [call.call_id for call in calls]
            spans[name, stream] = [essence(call) for call in calls]
    first = spans["chat", False]
    assert not tools or any(span["finish_reason"] == "tool_calls" for span in first), "the policy calls its tool"
    for way, calls_of_way in spans.items():
        assert calls_of_way == first, way


async def a_prompt_of_token_ids(stack: Stack) -> None:
    calls: list[ModelCall] = []
    async with stack.rollout(calls) as root, Clients(root=root) as clients:
        await converse(clients, "chat", QUESTION, tools=False, stream=False)
        counted = await clients.anthropic.messages.count_tokens(
            model="policy", messages=[{"role": "user", "content": QUESTION}]
        )
        unstreamed = await clients.openai.completions.create(model="policy", prompt=TOKENS, max_tokens=64)
        stream = await clients.openai.completions.create(model="policy", prompt=TOKENS, max_tokens=64, stream=True)
        streamed = "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])
    chat, *raw = calls
    assert counted.input_tokens == chat.prompt_T.size
    assert streamed == unstreamed.choices[0].text
    assert raw[0].prompt_T.tolist() == TOKENS
    assert [call.response_T.tolist() for call in raw] == [raw[0].response_T.tolist()] * 2


async def json_if_the_request_wants_it(stack: Stack) -> None:
    """A response_format in each dialect, streamed or not: the answer has that form, with the same tokens."""
    properties = {"sure": {"type": "boolean"}, "unit": {"enum": ["figs", "trays"]}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    named = {"name": "answer", "schema": schema}
    ways = {
        "chat": {"response_format": {"type": "json_schema", "json_schema": named}},
        "responses": {"text": {"format": {"type": "json_schema", **named}}},
        "messages": {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    }
    request = [{"role": "user", "content": QUESTION}]
    # The brace that ends an object: a policy that was never told to write JSON would not find an end.
    whatever = {"response_format": {"type": "json_object"}, "logit_bias": {"94": 100}}
    calls: list[ModelCall] = []
    async with stack.rollout(calls) as root, Clients(root=root) as clients:
        for name, extra in ways.items():
            for stream in (False, True):
                turn = await FORMATS[name](clients, request, tools=False, stream=stream, **extra)
                answer = json.loads(turn.text)
                assert turn.reason == "stop"
                assert (type(answer["sure"]), answer["unit"] in ("figs", "trays"), len(answer)) == (bool, True, 2)
        for stream in (False, True):
            assert json.loads((await chat(clients, request, tools=False, stream=stream, **whatever)).text) == {}
    spans = [essence(call) for call in calls]
    assert spans[1:6] == spans[:1] * 5
    assert spans[6] == spans[7]


async def tokens_of_a_stream_with_tools(stack: Stack) -> None:
    """vLLM itself, with its tool parser: the ids are right, also if a chunk has no text."""
    handle = serve.get_deployment_handle("policy-policy", stack.system.service.app)
    reasons = set()
    for question in stack.questions:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        body = {"messages": messages, "tools": [{"type": "function", "function": FUNCTION}]}
        request = {"model": "policy", "split": "val", "sampling": {"temperature": 0.0, "max_tokens": 60}}
        unstreamed = await handle.generate.remote(engine_request(body, **request))  # type: ignore[arg-type]
        parts = handle.options(stream=True).stream.remote(engine_request(body, **request, stream=True))  # type: ignore[arg-type]
        streamed = join_parts([part async for part in parts])
        (choice,), (joined,) = unstreamed.choices, streamed.choices
        assert choice.response_T.tolist() == joined.response_T.tolist()
        assert np.abs(choice.logprob_T - joined.logprob_T).max() < 1e-4
        assert choice.prompt_T.tolist() == joined.prompt_T.tolist()
        reasons.add(choice.finish_reason)
    assert "tool_calls" in reasons


async def deltas_pass_the_proxy(stack: Stack) -> None:
    """The first event arrives long before the last."""
    calls: list[ModelCall] = []
    async with stack.rollout(calls) as root, aiohttp.ClientSession() as session:
        times = []
        body = {"prompt": TOKENS, "stream": True, "max_tokens": 200, "ignore_eos": True, "n": 16, "temperature": 1.0}
        async with session.post(f"{root}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: "):
                    times.append(time.monotonic())
    assert len(calls) == 16
    assert {call.response_T.size for call in calls} == {200}
    spread = times[-1] - times[0]
    assert len({round(t, 2) for t in times}) > 3, f"all events came within {spread:.2f} s"


async def errors_of_the_protocol(stack: Stack) -> None:
    import anthropic

    calls: list[ModelCall] = []
    async with stack.rollout(calls) as root, Clients(root=root) as clients:
        long = [{"role": "user", "content": "word " * 3000}]
        for name, ask in FORMATS.items():
            for stream in (False, True):
                with pytest.raises(Exception, match="maximum") as error:
                    await ask(clients, long, tools=False, stream=stream)
                assert error.value.status_code == 400, name  # type: ignore[attr-defined]
        async with aiohttp.ClientSession() as session:
            half = {"name": FUNCTION["name"], "arguments": '{"expression": "2+'}
            assistant = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": half}]}
            for changed in (
                {"messages": [{"role": "user", "content": "a"}, assistant]},
                {
                    "messages": [{"role": "user", "content": "a"}],
                    "tools": [{"type": "function", "function": {"name": 5}}],
                },
                {"messages": [{"role": "user", "content": "a"}], "stop": [1]},
                {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
                {"messages": []},
                {"messages": [{"content": "a", "role": "nobody"}], "temperature": 1e999},
                {"messages": [{"role": "user", "content": "a"}], "n": 10**9},
                {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 5},
                {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema"}},
            ):
                async with session.post(f"{root}/v1/chat/completions", json=changed) as response:
                    error_body = await response.json()
                    assert response.status < 500, (changed, error_body)
                    assert response.status == 200 or "message" in error_body["error"]
        with pytest.raises(anthropic.BadRequestError, match="web_search"):
            await clients.anthropic.messages.create(
                model="m",
                max_tokens=5,
                messages=long,
                tools=[{"type": "web_search_20250305", "name": "web_search"}],  # type: ignore[arg-type, list-item]
            )


async def a_client_that_leaves(stack: Stack, *, stream: bool) -> None:
    """The call of a client that goes away ends long before its last token, and new weights need not wait for it."""
    calls: list[ModelCall] = []
    async with stack.rollout(calls) as root, aiohttp.ClientSession() as session:
        body = {"prompt": TOKENS, "stream": stream, "max_tokens": 200, "ignore_eos": True, "n": 16, "temperature": 1.0}
        if stream:
            async with session.post(f"{root}/v1/completions", json=body) as response:
                await response.content.readany()
                response.close()
        else:
            with pytest.raises(TimeoutError):
                await session.post(f"{root}/v1/completions", json=body, timeout=aiohttp.ClientTimeout(total=0.05))
        await asyncio.sleep(2.0)
    assert {call.finish_reason for call in calls} <= {"cancelled"}
    assert all(call.response_T.size < 200 for call in calls)
    assert bool(calls) == stream
