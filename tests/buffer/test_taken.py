"""A taken group is assembled outside the Buffer, and no trace, however broken, costs more than itself."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import pytest
from agents_for_tests import RUN_SECRET, make_call, make_task
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.taken import TakenRollout, take_groups
from agent_lightning.config.learning import CreditConfig
from agent_lightning.core.errors import RewardError
from agent_lightning.core.types import Ending, Group, Outcome, RolloutKey
from agent_lightning.credit.assign import CreditRules, assign
from agent_lightning.spans.assemble import LOST_TRACE, assemble, emitted_rewards
from agent_lightning.spans.attributes import FIELDS, KINDS, PRESENT
from agent_lightning.spans.tree import RawSpan

KEY = RolloutKey(split="train", group=0, index=0)


def raw_span(span_id: str = "s", *, parent_id: str = "", at: float = 0.0, **attributes: Any) -> RawSpan:
    return RawSpan(
        span_id=span_id, parent_id=parent_id, name="n", started_at=at, ended_at=at + 1.0, attributes=attributes
    )


async def taken(spans: Sequence[RawSpan]) -> Group:
    """A group of two rollouts with a call each, of which the first has these spans too."""
    buffer = Buffer(run_secret=RUN_SECRET)
    await buffer.admit(make_task(), split="train", num_rollouts=2)
    for lease in await buffer.lease(2, 1.0):
        await buffer.record(make_call(lease.key, f"call-{lease.key.index}", started_at=1.0))
        if lease.key.index == 0:
            await buffer.record_spans(lease.key, spans, {})
        await buffer.finish(lease.key, Ending(outcome=Outcome.FINISHED, reward=1.0))
    (group,) = await take_groups(buffer, 1, split="train")
    return group


def check(group: Group) -> None:
    """Both rollouts are complete: the first keeps its recorded call, the other is as if it were alone."""
    first, second = group.trajectories
    assert "call-0" in {call.call_id for call in first.calls if call.source == "gateway"}
    assert [call.call_id for call in second.calls] == ["call-1"]
    assert (first.reward, second.reward, dict(second.refused_spans)) == (1.0, 1.0, {})


NAMES = sorted(
    {
        *(name.replace("*", suffix) for names in FIELDS.values() for name in names for suffix in ("0", "0.role", "x")),
        *(name.replace("*", suffix) for name, _ in PRESENT for suffix in ("0.value", "0.name", "1.content")),
        *(name for name, _ in KINDS),
    }
)
KIND_VALUES = sorted({value for _, kinds in KINDS for value in kinds})
names = st.one_of(
    st.sampled_from(NAMES),
    st.text(max_size=20),
    st.builds("{}.{}.{}".format, st.sampled_from(NAMES), st.text("0123456789²१", max_size=8), st.sampled_from(NAMES)),
    st.builds("agentlightning.reward.{}.value".format, st.integers(0, 3) | st.just("9" * 5000) | st.text(max_size=5)),
)
values = st.one_of(
    st.sampled_from(KIND_VALUES),
    st.text(max_size=20),
    st.integers() | st.floats() | st.booleans() | st.none(),
    st.sampled_from(["[" * 3000, '{"a": ' * 3000, "9" * 5000, "\ud800", '[{"role": "user"}]', "1e39", "NaN"]),
    st.lists(st.text(max_size=5) | st.integers() | st.floats(), max_size=3),
)
raw_spans = st.builds(
    RawSpan,
    span_id=st.sampled_from("abcdef"),
    parent_id=st.sampled_from(["", *"abcdefg"]),
    name=st.text(max_size=10),
    started_at=st.floats(),
    ended_at=st.floats(),
    attributes=st.dictionaries(names, values, max_size=6),
    error=st.sampled_from(["", "it failed"]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(raw_spans, max_size=8))
def test_whatever_spans_an_attempt_has_it_becomes_a_trajectory_and_the_others_are_untouched(
    spans: list[RawSpan],
) -> None:
    group = asyncio.run(taken(spans))
    check(group)
    reward_T = [reward.value for trajectory in group.trajectories for reward in trajectory.rewards]
    assert np.isfinite(np.square(np.array([sum(reward_T)], np.float32))).all()
    for sample in assign(group, CreditRules(credit=CreditConfig(method="return_to_go"))).samples:
        assert np.isfinite(sample.advantage_T).all()
        assert np.isfinite(sample.reward_T).all()


@pytest.mark.parametrize(
    "broken",
    [
        RawSpan(span_id="s", name="n", started_at=None, ended_at=1.0, attributes={}),  # type: ignore[arg-type]
        RawSpan(span_id="s", name="n", started_at=0.0, ended_at=1.0, attributes=None),  # type: ignore[arg-type]
        RawSpan(span_id="s", parent_id=[], name="n", started_at=0.0, ended_at=1.0, attributes={}),  # type: ignore[arg-type]
    ],
    ids=["no time", "no attributes", "no parent id"],
)
async def test_a_trace_that_cannot_be_assembled_is_lost_and_counted(broken: RawSpan) -> None:
    group = await taken([raw_span("other"), broken])
    check(group)
    assert group.trajectories[0].refused_spans == {LOST_TRACE: 2}
    with pytest.raises(RewardError, match="the agent's trace cannot be read for its reward"):
        emitted_rewards(KEY, [broken])


async def test_attributes_are_listed_by_number_also_if_an_index_has_five_thousand_digits() -> None:
    values = {"10": 4.0, "9" * 5000: 5.0, "02": 2.0, "0": 1.0, "3": 3.0}
    group = await taken(
        [raw_span(**{f"agentlightning.reward.{index}.value": value for index, value in values.items()})]
    )
    check(group)
    assert [reward.value for reward in group.trajectories[0].rewards] == [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("identity", ["same", ""], ids=["same id", "same name and arguments"])
def test_thousands_of_tool_calls_that_look_alike_are_matched_in_linear_time(identity: str) -> None:
    def lines(number: int) -> int:
        requests = [{"id": identity, "function": {"name": "search", "arguments": "{}"}} for _ in range(number)]
        about = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "search"}
        about |= {"gen_ai.tool.call.arguments": "{}", "gen_ai.tool.call.id": identity}
        spans = [raw_span(f"span-{n}", at=1e10 + n, **about) for n in range(number)]
        return lines_run(spans, reply=json.dumps({"role": "assistant", "tool_calls": requests}))

    assert lines(1200) < 2.2 * lines(600)


@pytest.mark.parametrize("value", [1e39, -1e39, 1e300, "1e39", float("inf")])
async def test_a_reward_that_float32_cannot_represent_is_refused_and_counted(value: object) -> None:
    attributes = {"agl.reward.value": value, "agl.reward.about": "call-0"}
    group = await taken([raw_span(**attributes), raw_span("t", **{**attributes, "agl.reward.value": 0.5})])
    (first, _) = group.trajectories
    assert [(reward.value, reward.about) for reward in first.rewards] == [(0.5, "call-0")]
    assert sum(first.refused_spans.values()) == 1
    samples = assign(group, CreditRules(credit=CreditConfig(method="return_to_go"))).samples
    assert all(np.isfinite(sample.reward_T).all() for sample in samples)


def test_refusals_on_arrival_and_in_assembling_are_added() -> None:
    rollout = TakenRollout(
        key=KEY,
        started_at=0.0,
        ending=Ending(outcome=Outcome.TIMEOUT, error="not done"),
        calls=(),
        spans=(raw_span(**{"agl.reward.value": 1.0, "agl.reward.about": "nothing"}),),
        refused_spans={"late": 2, "a reward about an unknown span": 1},
    )
    trajectory = rollout.assemble(make_task())
    assert trajectory.refused_spans == {"late": 2, "a reward about an unknown span": 2}
    assert (trajectory.reward, trajectory.task_id) == (None, "task-0")


CHAINS = {
    "calls": ["chat"],
    "tools": ["execute_tool"],
    "calls and tools": ["chat", "execute_tool"],
    "agents and calls": ["invoke_agent", "chat"],
    "nothing of ours": ["embeddings"],
}


def chain(kinds: Sequence[str], length: int) -> list[RawSpan]:
    """Spans of which each is the child of the one before."""
    return [
        raw_span(
            f"span-{n}",
            parent_id=f"span-{n - 1}",
            at=float(n),
            **{"gen_ai.operation.name": kinds[n % len(kinds)], "gen_ai.tool.name": "search"},
        )
        for n in range(length)
    ]


def lines_run(spans: Sequence[RawSpan], reply: str = "") -> int:
    """Lines of Python that assembling these spans executes, with ten calls of the gateway below the last span, of which
    the first has this reply."""
    own = [replace(make_call(KEY, f"c{n}", started_at=1e9), parent_id=spans[-1].span_id) for n in range(10)]
    own[0] = replace(own[0], reply=reply)
    count = 0

    def tracer(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        assembled = assemble(KEY, own, spans)
    finally:
        sys.settrace(before)
    assert LOST_TRACE not in assembled.refused
    return count


@pytest.mark.parametrize("kinds", CHAINS.values(), ids=CHAINS)
def test_a_deep_chain_of_spans_is_assembled_in_linear_time(kinds: list[str]) -> None:
    assert lines_run(chain(kinds, 1200)) < 2.2 * lines_run(chain(kinds, 600))


@pytest.mark.parametrize("kinds", CHAINS.values(), ids=CHAINS)
def test_ten_thousand_nested_spans_are_assembled(kinds: list[str]) -> None:
    assert LOST_TRACE not in assemble(KEY, [make_call(KEY, "c")], chain(kinds, 10_000)).refused
