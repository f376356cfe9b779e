"""The contract of the gateway on vLLM, with the tiny policy; the toy engine refuses the same in the same words."""

from __future__ import annotations

import asyncio

import contract
import httpx
import pytest
from policy_server import PolicyServer

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
_ANSWERS: dict[str, contract.Answers] = {}


@pytest.fixture
def answers(policy_server: PolicyServer) -> contract.Answers:
    """The answers of the policy's server to all rows, asked once."""

    async def ask(root: str) -> contract.Answers:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(timeout=120.0, limits=limits) as http:
            return await contract.ask(f"{root}/v1", http)

    if policy_server.url not in _ANSWERS:
        with policy_server.rollout("val") as rollout:
            _ANSWERS[policy_server.url] = asyncio.run(ask(rollout.root))
    return _ANSWERS[policy_server.url]


@pytest.mark.parametrize("row", contract.ROWS.values(), ids=contract.ROWS)
def test_a_request_is_answered_as_by_the_formats_own_api(row: contract.Row, answers: contract.Answers) -> None:
    contract.check(row, answers, toy=False)
