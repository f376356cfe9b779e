"""Which ends are worth another attempt, how soon, and when so many are alike that the run should stop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_lightning.buffer.breaker import Breaker, cause_of, last_failed_tool, without_details
from agent_lightning.config.running import BreakerConfig, RetryConfig
from agent_lightning.core.types import Outcome, RolloutKey, ToolCall, ToolStatus
from agent_lightning.credit.failures import Retries

KEY = RolloutKey(split="train", group=0, index=0)


@given(st.integers(0, 2000), st.floats(0, 1))
def test_a_pause_doubles_with_each_attempt_up_to_a_limit(attempt: int, drawn: float) -> None:
    retries = Retries(limits=RetryConfig(backoff_s=0.5, backoff_max_s=8.0))
    assert 0 <= retries.delay(attempt, drawn) <= min(8.0, 0.5 * 2.0 ** min(attempt, 10))
    assert [retries.delay(n, 1.0) for n in range(6)] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]


@pytest.mark.parametrize(
    ("first", "other"),
    [
        ("ConnectionError: host 'db-1' refused 10.0.0.3:5432", "ConnectionError: host 'db-22' refused 10.0.0.4:5433"),
        ("OSError: /tmp/a1/x.db is locked (pid 31)", "OSError: /tmp/b2/y.db is locked (pid 7)"),
        ("HTTPError: 503 for https://api.x.org/v1?q=a", "HTTPError: 503 for https://api.x.org/v1?q=b"),
        ("KeyError: 'a'", "KeyError: 'b'"),
    ],
)
def test_the_same_error_is_the_same_without_details(first: str, other: str) -> None:
    assert without_details(first) == without_details(other)
    assert without_details(first) != without_details("ValueError: another")


def tool(status: ToolStatus) -> ToolCall:
    return ToolCall(
        key=KEY, span_id="1", name="search", arguments="{}", status=status, started_at=0, ended_at=1, source="trace"
    )


def test_a_cause_names_the_tool_that_was_at_work_last() -> None:
    failed_tool = last_failed_tool([tool(ToolStatus.OK), tool(ToolStatus.UNANSWERED)])
    cause = cause_of(Outcome.TIMEOUT, "not done after 30 s", failed_tool)
    assert cause == "timeout: not done after # s (its last tool, search: unanswered)"
    assert cause_of(Outcome.AGENT_ERROR, "a", last_failed_tool([tool(ToolStatus.OK)])) == "agent_error: a"
    assert cause_of(Outcome.FINISHED, "") == ""


def test_the_breaker_trips_where_a_share_of_the_latest_ended_alike() -> None:
    breaker = Breaker(BreakerConfig(window=10, share=0.5))
    for number in range(9):
        breaker.note("down" if number % 2 else "")
        assert breaker.tripped == ""  # too few yet
    breaker.note("down")
    assert breaker.tripped == "5 of the last 10 attempts ended alike: down"
    breaker.note("other")  # the first, which was well, is out of sight
    breaker.note("")  # and so is one that was down
    assert breaker.tripped == ""
    for _ in range(5):
        breaker.note("")
    assert breaker.tripped == ""  # success, however much alike, is no trouble


def test_a_breaker_can_be_turned_off() -> None:
    breaker = Breaker(BreakerConfig(window=0, share=0.5))
    for _ in range(100):
        breaker.note("down")
    assert breaker.tripped == ""
