"""The contract of the gateway on the toy engine; tests/stack/test_contract.py has it on vLLM."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any

import contract
import pytest
from test_gateway import open_rig, url_of

from agent_lightning.credit.tools import tool_calls


@cache
def answers() -> contract.Answers:
    async def ask() -> contract.Answers:
        async with contract.toy_engine() as (root, http):
            return await contract.ask(root, http)

    return asyncio.run(ask())


@pytest.mark.parametrize("row", contract.ROWS.values(), ids=contract.ROWS)
def test_a_request_is_answered_as_by_the_formats_own_api(row: contract.Row) -> None:
    contract.check(row, answers(), toy=True)


async def test_whatever_one_field_holds_is_answered_or_refused_in_the_protocols_words() -> None:
    async with contract.toy_engine() as (root, http):
        replies = await contract.ask_mutations(root, http, seed=1, num=400)
    for (path, body), reply in zip(contract.mutations(seed=1, num=400), replies, strict=True):
        contract.check_mutation(path, body, reply)


async def test_a_failure_that_anthropics_protocol_states_is_one_for_credit() -> None:
    use = {"type": "tool_use", "id": "a", "name": "calculator", "input": {"expression": "2+3"}}
    for is_error, status in ((True, "error"), (False, "ok")):
        async with open_rig(words=("call:2+3",)) as rig:
            body: dict[str, Any] = {"messages": [contract.USER], "tools": [contract.anthropic()], "max_tokens": 9}
            first = (await rig.http.post(f"{url_of(rig.key)}/messages", json=body)).json()["content"]
            result = {"type": "tool_result", "tool_use_id": first[0]["id"], "content": "5", "is_error": is_error}
            assert first[0]["input"] == use["input"]
            turns = [contract.said("assistant", first), contract.said("user", [result])]
            body["messages"] = [*body["messages"], *turns]
            assert (await rig.http.post(f"{url_of(rig.key)}/messages", json=body)).status_code == 200
            calls = (await rig.end()).calls
        assert [tool.status.value for tool in tool_calls(calls)] == [status, "unanswered"]
        assert ("status" in json.loads(calls[1].request)[-1]) is is_error
