"""OpenAI Responses that continue earlier ones: from what was recorded of the attempt, by any gateway."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from test_gateway import RUN_SECRET, WORDS, Rig, open_rig, url_of

from agent_lightning.core.types import Ending, Outcome, Task
from agent_lightning.serving.gateway import Gateway, GatewayConfig, application
from agent_lightning.testing.world import SAMPLING

TOOL = {"type": "function", "name": "calculator", "parameters": {"type": "object"}}


async def ask(rig: Rig, **body: Any) -> httpx.Response:
    return await rig.http.post(f"{url_of(rig.key)}/responses", json=body)


async def reply(rig: Rig, **body: Any) -> dict[str, Any]:
    response = await ask(rig, **body)
    assert response.status_code == 200, response.text
    return dict(response.json())


@asynccontextmanager
async def another_gateway(rig: Rig) -> AsyncIterator[Rig]:
    """A gateway that has seen nothing yet: after a restart, or a second one."""
    config = GatewayConfig(model="policy", run_secret=RUN_SECRET, sampling=SAMPLING)
    gateway = Gateway(engine=rig.engine, recorder=rig.buffer, config=config)
    transport = httpx.ASGITransport(application(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        yield replace(rig, http=http, gateway=gateway)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_is_continued_as_if_all_of_it_had_been_sent(restarted: bool, stream: bool) -> None:
    async with open_rig(words=("yes",)) as rig, another_gateway(rig) as other:
        second = other if restarted else rig
        first = await reply(rig, instructions="be brief", input="one")
        await reply(second, instructions="be long", input="two", previous_response_id=first["id"], stream=False)
        text = (await ask(second, input=[user("two")], previous_response_id=first["id"], stream=stream)).text
        assert f'"previous_response_id":"{first["id"]}"' in text
        one, two, three = (json.loads(call.request) for call in (await rig.end()).calls)
    yes = {"role": "assistant", "content": "yes"}
    assert one == [{"role": "system", "content": "be brief"}, user("one")]
    assert two == [{"role": "system", "content": "be long"}, user("one"), yes, user("two")]
    assert three == [user("one"), yes, user("two")]  # instructions are not inherited


async def test_a_system_message_of_the_input_is_inherited_and_a_chain_is_followed() -> None:
    async with open_rig(words=("yes",)) as rig:
        first = await reply(rig, input=[{"role": "system", "content": "be brief"}, user("one")])
        second = await reply(rig, input="two", previous_response_id=first["id"])
        await reply(rig, input="three", previous_response_id=second["id"])
        calls = (await rig.end()).calls
    roles = [message["role"] for message in json.loads(calls[2].request)]
    assert roles == ["system", *["user", "assistant"] * 2, "user"]
    for earlier, later in itertools.pairwise(calls):
        before = [*earlier.prompt_T.tolist(), *earlier.response_T.tolist()]
        assert later.prompt_T.tolist()[: len(before)] == before


@pytest.mark.parametrize("way", ["previous", "references", "references without type", "items"])
async def test_the_results_of_tools_follow_the_calls_that_were_recorded(way: str) -> None:
    """The second turn of OpenAI's SDK, of Vercel's AI SDK, and of a client that sends everything."""
    async with open_rig(words=("call:2+3;4",)) as rig:
        first = await reply(rig, input="how much?", tools=[TOOL])
        results = [
            {"type": "function_call_output", "call_id": item["call_id"], "output": "5"} for item in first["output"]
        ]
        kind = {} if way.endswith("without type") else {"type": "item_reference"}
        references = [{"id": item["id"], **kind} for item in first["output"]]
        history = [user("how much?"), *(first["output"] if way == "items" else references)]
        if way == "previous":
            await reply(rig, input=results, tools=[TOOL], previous_response_id=first["id"])
        else:
            await reply(rig, input=[*history, *results], tools=[TOOL])
        _, call = (await rig.end()).calls
    asked, called, *told = json.loads(call.request)
    assert asked == user("how much?")
    assert [c["function"]["arguments"] for c in called["tool_calls"]] == [
        '{"expression": "2+3"}',
        '{"expression": "4"}',
    ]
    assert [m["tool_call_id"] for m in told] == [c["id"] for c in called["tool_calls"]]


async def test_a_reference_to_a_text_is_the_text() -> None:
    async with open_rig(words=("yes",)) as rig:
        first = await reply(rig, input="one")
        (item,) = first["output"]
        await reply(rig, input=[user("one"), {"type": "item_reference", "id": item["id"]}, user("two")])
        _, call = (await rig.end()).calls
    assert json.loads(call.request) == [user("one"), {"role": "assistant", "content": "yes"}, user("two")]


UNKNOWN = "0" * 32


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        ({"previous_response_id": f"resp_{UNKNOWN}"}, 400, "previous_response_not_found", UNKNOWN),
        ({"previous_response_id": "chatcmpl-1"}, 400, "previous_response_not_found", "'chatcmpl-1' not found"),
        ({"input": [{"type": "item_reference", "id": f"msg_{UNKNOWN}"}]}, 404, "not_found", UNKNOWN),
        ({"input": [{"type": "item_reference", "id": "rs_1"}]}, 404, "not_found", "'rs_1' not found"),
        ({"input": [{"type": "item_reference", "id": 5}]}, 400, "invalid_request", "input"),
        ({"previous_response_id": 5}, 400, "invalid_request", "previous_response_id"),
        ({"conversation": "conv_1"}, 400, "unsupported", "conversation is not supported"),
        ({"conversation": {"id": "conv_1"}}, 400, "unsupported", "conversation is not supported"),
    ],
)
async def test_what_was_not_recorded_is_refused_as_openai_does(
    body: dict[str, Any], status: int, code: str, message: str
) -> None:
    async with open_rig() as rig:
        response = await ask(rig, **{"input": "hello"} | body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (status, code)
        assert message in error["message"]


async def test_a_response_that_was_not_to_be_stored_cannot_be_continued() -> None:
    async with open_rig(words=("yes",)) as rig:
        for store in (False, True, None):
            first = await reply(rig, input="one", store=store)
            assert first["store"] is (store is not False)
            again = await ask(rig, input="two", previous_response_id=first["id"])
            item = {"type": "item_reference", "id": first["output"][0]["id"]}
            referred = await ask(rig, input=[item, user("two")])
            assert (again.status_code, referred.status_code) == ((400, 404) if store is False else (200, 200))


async def test_a_response_of_another_attempt_is_not_found() -> None:
    async with open_rig(words=("yes",)) as rig:
        await rig.buffer.admit(Task(task_id="other", payload={}), split="train", num_rollouts=1)
        (lease,) = await rig.buffer.lease(1, 1.0)
        other = replace(rig, key=lease.key)
        first = await reply(rig, input="one")
        refused = await ask(other, input="two", previous_response_id=first["id"])
        assert refused.json()["error"]["code"] == "previous_response_not_found"
        await rig.buffer.finish(rig.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
        late = await ask(rig, input="two", previous_response_id=first["id"])
        assert (late.status_code, late.json()["error"]["code"]) == (409, "rollout_ended")


async def test_parts_and_tool_choices_survive() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    async with open_rig(words=("yes",)) as rig:
        parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
        first = await reply(rig, input=[{"role": "user", "content": parts}])
        await reply(rig, input="go on", previous_response_id=first["id"])
        refused = await ask(rig, input=[{"role": "user", "content": [image]}])
        assert refused.status_code == 400
        _, call = (await rig.end()).calls
    assert json.loads(call.request)[0]["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert WORDS
