"""The long ones: kill -9 at random, a hundred thousand malformed requests, a tenth of everything failing, a soak."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest
from faults import compare
from kills import destroy
from malformed import attack
from soak import soak

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """pytest would keep every line about the faults that are injected, and grow."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_runs_whose_processes_are_killed_lose_nothing_and_end_by_themselves() -> None:
    found = destroy(kills=100, per_run=25, mean_s=0.2, steps=6, seed=42)
    assert found["kills"] == 100
    assert (found["lost"], found["doubled"], found["broken"]) == (0, 0, []), found
    assert found["acknowledged_spans"] > 1000


async def test_many_malformed_requests_leave_no_trace() -> None:
    found = await attack(100_000, seed=2)
    assert found["server_errors"] == 0, found["examples"]
    assert found["growth_mib_in_the_second_half"] < 5.0


async def test_a_step_where_a_tenth_fails_is_usable_and_not_much_longer() -> None:
    found = await compare(steps=2, rollouts=64, slow_s=1.0, kill_s=60.0)
    assert found["with_faults"]["usable_share"] >= 0.95
    assert found["times_as_long"] <= 1.5
    assert (found["with_faults"]["lost"], found["with_faults"]["doubled"]) == (0, 0)


def test_a_long_run_grows_neither_in_memory_nor_in_open_files() -> None:
    found = asyncio.run(soak(minutes=5.0))
    assert found["growth_mib_in_the_second_half"] < 5.0, found["rss_mib"]
    assert found["open_files"][1] <= found["open_files"][0] + 20
