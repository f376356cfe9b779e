"""The contract of the gateway on the toy engine; tests/stack/test_contract.py has it on vLLM."""

from __future__ import annotations

import asyncio
from functools import cache

import contract
import pytest
from test_gateway import open_rig, url_of


@cache
def answers() -> contract.Answers:
    async def ask() -> contract.Answers:
        async with open_rig(split="val", max_len=512, max_calls=10**6, words=("no", "yes")) as rig:
            return await contract.ask(f"http://gateway{url_of(rig.key)}", rig.http)

    return asyncio.run(ask())


@pytest.mark.parametrize("row", contract.ROWS.values(), ids=contract.ROWS)
def test_a_request_is_answered_as_by_the_formats_own_api(row: contract.Row) -> None:
    contract.check(row, answers(), toy=True)
