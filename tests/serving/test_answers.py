"""Equal requests in parallel whose clients go away and come back: each retry gets an answer of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from formats import FORMATS
from test_dialects import clients_of
from test_gateway import HELLO, Rig, client_of, open_rig, url_of

from agent_lightning.serving.answers import Answer, Answers
from agent_lightning.serving.gateway import RETRY_HEADER


async def post(rig: Rig, retries: int | None, **body: Any) -> httpx.Response:
    headers = {} if retries is None else {RETRY_HEADER: str(retries)}
    return await rig.http.post(f"{url_of(rig.key)}/chat/completions", json={"messages": HELLO} | body, headers=headers)


async def leave(rig: Rig, number: int, **body: Any) -> None:
    """Equal requests whose clients go away before they have an answer."""
    asking = [asyncio.create_task(post(rig, 0, **body)) for _ in range(number)]
    while rig.engine.in_flight < number:
        await asyncio.sleep(0.01)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("finished", [False, True])
async def test_each_retry_takes_another_answer(stream: bool, finished: bool) -> None:
    async with open_rig() as rig:
        rig.engine.delay_s = 0.2
        await leave(rig, 4, stream=stream)
        await asyncio.sleep(0.6 if finished else 0.0)
        replies = await asyncio.gather(*(post(rig, 1, stream=stream) for _ in range(4)))
        calls = (await rig.end()).calls
    assert len({reply.text for reply in replies}) == 4
    assert len(calls) == 4
    assert all(any(call.call_id in reply.text for reply in replies) for call in calls)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_nobody_comes_back_for_is_no_span(stream: bool) -> None:
    async with open_rig(retry_grace_s=1.0) as rig:
        rig.engine.delay_s = 0.2
        await leave(rig, 4, stream=stream)
        replies = [await post(rig, 1, stream=stream) for _ in range(2)]
        await asyncio.sleep(1.5)
        assert rig.engine.in_flight == 0
        calls = (await rig.end()).calls
    assert len(calls) == 2
    assert all(call.call_id in reply.text for call, reply in zip(calls, replies, strict=True))


async def test_a_retry_that_is_given_up_again_finds_its_answer_the_next_time() -> None:
    async with open_rig() as rig:
        rig.engine.delay_s = 0.5
        await leave(rig, 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(post(rig, 1), 0.1)
        replies = await asyncio.gather(post(rig, 2), post(rig, 1))
        assert {reply.json()["id"] for reply in replies} == {call.call_id for call in (await rig.end()).calls}


async def test_four_official_clients_that_time_out_together() -> None:
    async with open_rig() as rig, client_of(rig, timeout=0.3, max_retries=4) as client:
        rig.engine.delay_s = 0.7
        asking = (client.chat.completions.create(model="m", messages=HELLO) for _ in range(4))  # type: ignore[call-overload]
        replies = await asyncio.gather(*asking)
        assert {reply.id for reply in replies} == {call.call_id for call in (await rig.end()).calls}


@pytest.mark.parametrize("name", FORMATS)
async def test_one_that_was_answered_leaves_its_answer_to_no_other(name: str) -> None:
    async with open_rig() as rig, clients_of(rig) as clients:
        turns = [await FORMATS[name](clients, HELLO, tools=False, stream=True) for _ in range(3)]
        assert len({turn.reply_id for turn in turns}) == 3
        assert len((await rig.end()).calls) == 3


async def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    async def work(answer: Answer) -> None:
        await asyncio.sleep(0)

    answers = Answers(max_answers=2, memory_s=30.0)
    for name in ("a", "a", "b"):
        answers.add(name, Answer(work, grace=0.0))
    assert answers.find("b") is not None
    assert answers.find("c") is None
    assert len(answers._in_order) == sum(map(len, answers._by_request.values())) == 2
