"""The long tests: kill -9 at random, a hundred thousand malformed requests, a tenth of everything failing, a soak."""

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
    """pytest would keep a line for each injected fault, and its memory would grow."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("max_lag", [0, 1, 4])
def test_runs_whose_processes_are_killed_lose_nothing_and_end_by_themselves(max_lag: int) -> None:
    result = destroy(kills=100, per_run=25, mean_s=0.2, steps=6, seed=42, max_lag=max_lag)
    assert result["kills"] == 100
    assert (result["lost"], result["doubled"], result["broken"]) == (0, 0, []), result
    assert result["acknowledged_spans"] > 1000


async def test_many_malformed_requests_leave_no_trace() -> None:
    result = await attack(100_000, seed=2)
    assert result["server_errors"] == 0, result["examples"]
    assert result["growth_mib_in_the_second_half"] < 5.0


async def test_a_step_where_a_tenth_fails_is_usable_and_not_much_longer() -> None:
    result = await compare(steps=2, rollouts=64, slow_s=1.0, kill_s=60.0)
    assert result["with_faults"]["usable_share"] >= 0.95
    assert result["times_as_long"] <= 1.5
    assert (result["with_faults"]["lost"], result["with_faults"]["doubled"]) == (0, 0)


def test_a_long_run_grows_neither_in_memory_nor_in_open_files() -> None:
    result = asyncio.run(soak(minutes=5.0))
    assert result["growth_mib_in_the_second_half"] < 5.0, result["rss_mib"]
    assert result["open_files"][1] <= result["open_files"][0] + 20
