"""The contract of the gateway on vLLM, with the tiny policy; the toy engine refuses the same in the same words."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import contract
import httpx
import pytest
from policy_server import CONTEXT, PolicyServer

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
MUTATIONS = {"seed": 2, "num": 300}
_ANSWERS: dict[str, contract.Answers] = {}
T = TypeVar("T")


def ask(server: PolicyServer, question: Callable[[str, httpx.AsyncClient], Awaitable[T]]) -> T:
    """The answer to a question that is put to a rollout of the server."""

    async def put(root: str) -> T:
        async with httpx.AsyncClient(timeout=120.0, limits=httpx.Limits(max_connections=32)) as http:
            return await question(f"{root}/v1", http)

    with server.rollout("val") as rollout:
        return asyncio.run(put(rollout.root))


async def ask_toy(question: Callable[[str, httpx.AsyncClient], Awaitable[T]]) -> T:
    async with contract.toy_engine(CONTEXT) as (root, http):
        return await question(root, http)


@pytest.fixture
def answers(policy_server: PolicyServer) -> contract.Answers:
    """The answers of the policy's server to all rows, asked once."""
    if policy_server.url not in _ANSWERS:
        _ANSWERS[policy_server.url] = ask(policy_server, contract.ask)
    return _ANSWERS[policy_server.url]


@pytest.mark.parametrize("row", contract.ROWS.values(), ids=contract.ROWS)
def test_a_request_is_answered_as_by_the_formats_own_api(row: contract.Row, answers: contract.Answers) -> None:
    contract.check(row, answers, toy=False)


def test_the_toy_engine_refuses_what_vllm_refuses_in_the_same_words(answers: contract.Answers) -> None:
    toy = asyncio.run(ask_toy(contract.ask))
    refused = {key: answer for key, answer in answers.items() if answer[0] != 200}
    assert refused == {key: answer for key, answer in toy.items() if answer[0] != 200}


def test_whatever_one_field_holds_both_engines_answer_or_refuse_alike(policy_server: PolicyServer) -> None:
    replies = ask(policy_server, lambda root, http: contract.ask_mutations(root, http, **MUTATIONS))
    toys = asyncio.run(ask_toy(lambda root, http: contract.ask_mutations(root, http, **MUTATIONS)))
    for (path, body), reply, toy in zip(contract.mutations(**MUTATIONS), replies, toys, strict=True):
        contract.check_mutation(path, body, reply)
        assert reply.status_code == toy.status_code, (body, reply.text, toy.text)
