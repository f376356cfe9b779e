"""One account of an attempt from what the gateway recorded and what a trace says, in whatever order it came."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from builders import model_call
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.types import ModelCall, RolloutKey, ToolStatus
from agent_lightning.spans.assemble import assemble, emitted_rewards
from agent_lightning.spans.tree import RawSpan

KEY = RolloutKey(split="train", group=0, index=0)


def call(n: int, *, reply: object = "hm", request: object = (), agent: str = "agent", parent_id: str = "") -> ModelCall:
    """The gateway's call number n, from second n to n + 0.5."""
    message = {"role": "assistant", "content": reply} if isinstance(reply, str) else reply
    item = model_call(KEY, [n], [1], agent=agent, started_at=float(n), call_id=f"chat-{n}")
    return replace(item, ended_at=n + 0.5, request=json.dumps(request), reply=json.dumps(message), parent_id=parent_id)


def raw(
    span_id: str, start: float, seconds: float = 0.5, *, parent: str = "", error: str = "", **fields: object
) -> RawSpan:
    attributes = {name.replace("__", "."): value for name, value in fields.items()}
    return RawSpan(
        span_id=span_id,
        parent_id=parent,
        name=span_id,
        started_at=start,
        ended_at=start + seconds,
        attributes=attributes,
        error=error,
    )


def chat(span_id: str, start: float, text: str, **rest: object) -> RawSpan:
    """A model call as the GenAI conventions have it."""
    output = [{"role": "assistant", "parts": [{"type": "text", "content": text}], "finish_reason": "stop"}]
    fields = {"gen_ai__output__messages": json.dumps(output)} if text else {}
    if asked := rest.pop("input", None):
        fields["gen_ai__input__messages"] = json.dumps(asked)
    return raw(span_id, start, gen_ai__operation__name="chat", gen_ai__request__model="m", **fields, **rest)  # type: ignore[arg-type]


def agent(span_id: str, name: str, start: float, seconds: float, **rest: object) -> RawSpan:
    return raw(span_id, start, seconds, gen_ai__operation__name="invoke_agent", gen_ai__agent__name=name, **rest)  # type: ignore[arg-type]


def tool(
    span_id: str, start: float, name: str, arguments: object = None, result: object = None, **rest: object
) -> RawSpan:
    fields = {"gen_ai__operation__name": "execute_tool", "gen_ai__tool__name": name}
    fields |= {} if arguments is None else {"gen_ai__tool__call__arguments": json.dumps(arguments)}
    fields |= {} if result is None else {"gen_ai__tool__call__result": json.dumps(result)}
    return raw(span_id, start, **fields, **rest)  # type: ignore[arg-type]


def reward(span_id: str, at: float, value: float, about: str = "", name: str = "reward") -> RawSpan:
    return raw(span_id, at, 0.0, agl__reward__name=name, agl__reward__value=value, agl__reward__about=about)


def asking(name: str, arguments: object, tool_call_id: str = "t-0") -> dict[str, object]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": tool_call_id, "function": function}]}


def test_without_a_trace_the_requests_tell_the_tools() -> None:
    answer = {"role": "tool", "tool_call_id": "t-0", "content": "7"}
    seen = assemble(KEY, [call(1, request=[answer]), call(0, reply=asking("add", {"a": 3}))], [])
    assert [item.call_id for item in seen.calls] == ["chat-0", "chat-1"]
    (item,) = seen.tools
    assert (item.name, item.result, item.source, item.started_at, item.ended_at) == ("add", "7", "request", 0.5, 1.0)
    assert item.parent_id == item.call_id == "chat-0"


def test_a_tool_seen_twice_is_one_span_and_the_richer_source_wins() -> None:
    answer = {"role": "tool", "tool_call_id": "t-0", "content": "error: no such table"}
    calls = [call(0, reply=asking("sql", {"q": 1})), call(5, request=[answer])]
    trace = [
        agent("a", "solver", 0, 9),
        tool("x", 2.0, "sql", {"q": 1}, seconds=2.5, parent="a", error="SqlError: gone"),
    ]
    (item,) = assemble(KEY, calls, trace).tools
    assert (item.span_id, item.call_id, item.tool_call_id, item.parent_id) == ("x", "chat-0", "t-0", "a")
    assert (item.started_at, item.ended_at, item.status) == (2.0, 4.5, ToolStatus.ERROR)
    assert item.source == "trace"


def test_what_a_trace_leaves_out_comes_from_the_request() -> None:
    answer = {"role": "tool", "tool_call_id": "t-0", "content": "Timeout"}
    calls = [call(0, reply=asking("sql", {"q": 1})), call(5, request=[answer])]
    (item,) = assemble(KEY, calls, [tool("x", 2.0, "sql", {"q": 1})]).tools
    assert (item.result, item.status, item.source) == ("Timeout", ToolStatus.TIMEOUT, "trace")


def test_a_tool_that_no_reply_asked_for_is_the_last_answered_call_s() -> None:
    seen = assemble(KEY, [call(0), call(2)], [tool("x", 1.0, "run"), tool("y", 0.1, "early")])
    assert [(item.name, item.call_id) for item in seen.tools] == [("early", ""), ("run", "chat-0")]


@pytest.mark.parametrize(
    "trace",
    [
        [chat("s", 0.0, "hm", gen_ai__response__id="chat-0", parent="a")],  # the reply's id
        [chat("s", 0.1, "hm", parent="a")],  # what it said
        [chat("s", 0.0, "", parent="a")],  # when it was
        [chat("s", 0.6, "hm", parent="a")],  # with a clock that is ahead
    ],
)
def test_a_model_call_seen_twice_is_one_with_its_place_in_the_trace(trace: list[RawSpan]) -> None:
    seen = assemble(KEY, [call(0)], [*trace, agent("a", "writer", 0, 9)])
    (item,) = seen.calls
    assert (item.call_id, item.agent, item.span_id, item.parent_id) == ("chat-0", "writer", "s", "a")
    assert item.response_T.tolist() == [1]


def test_calls_that_reach_a_busy_gateway_late_are_not_taken_for_the_next_ones() -> None:
    calls = [replace(call(n), ended_at=n + 0.1) for n in range(4)]
    trace = [chat(f"s{n}", n - 0.8, "hm", seconds=0.95) for n in range(4)]  # the next one begins at n + 0.2
    assert [(item.call_id, item.span_id) for item in assemble(KEY, calls, trace).calls] == [
        (f"chat-{n}", f"s{n}") for n in range(4)
    ]


ASKED = [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("trace", "kept"),
    [
        ([chat("cut", 0.9, "", seconds=0.3, error="CancelledError", parent="w")], ["chat-1"]),
        ([chat("cut", 0.9, "", seconds=0.3, error="TimeoutError", parent="w", input=ASKED)], ["chat-1"]),
        # Another question, another time, and a call that has its reply are calls of their own.
        ([chat("cut", 0.9, "", seconds=0.3, error="boom", parent="w", input=[*ASKED, *ASKED])], ["cut", "chat-1"]),
        ([chat("cut", 9.0, "", seconds=0.3, error="boom", parent="w", input=ASKED)], ["chat-1", "cut"]),
        ([chat(name, 0.9, "", seconds=0.3, error="boom", parent="w") for name in ("a", "b")], ["a", "b", "chat-1"]),
    ],
)
def test_a_call_that_its_agent_gave_up_is_the_call_that_the_gateway_recorded_later(
    trace: list[RawSpan], kept: list[str]
) -> None:
    late = replace(call(1, request=ASKED, reply="2"), ended_at=6.0)  # the engine was busy
    spans = assemble(KEY, [late], [agent("w", "writer", 0.0, 1.2), *trace])
    assert [found.call_id for found in spans.calls] == kept
    if len(kept) == 1:
        assert (spans.calls[0].agent, spans.calls[0].parent_id, spans.calls[0].error) == ("writer", "w", "")
        assert spans.calls[0].response_T.size == 1


def test_a_call_that_is_given_up_and_sent_again_is_two_calls() -> None:
    own = [replace(call(n, request=ASKED, reply=reply), ended_at=6.0) for n, reply in ((1, "2"), (2, "two"))]
    again = chat("again", 1.9, "two", seconds=4.2, parent="w")
    cut = chat("cut", 0.9, "", seconds=0.9, error="TimeoutError", parent="w", input=ASKED)
    spans = assemble(KEY, own, [agent("w", "writer", 0.0, 9.0), cut, again])
    assert [(kept.call_id, kept.span_id) for kept in spans.calls] == [("chat-1", "cut"), ("chat-2", "again")]


def test_the_request_may_say_which_span_it_is() -> None:
    # Two calls at once that say the same: only `traceparent` can tell them apart.
    calls = [call(0, parent_id="http-b"), replace(call(0, parent_id="http-a"), call_id="chat-0b")]
    trace = [
        agent("a", "writer", 0, 9),
        agent("b", "judge", 0, 9),
        chat("llm-a", 0.0, "hm", parent="a"),
        chat("llm-b", 0.0, "hm", parent="b"),
        raw("http-a", 0.0, parent="llm-a"),
        raw("http-b", 0.0, parent="llm-b"),
    ]
    assert [(item.call_id, item.agent) for item in assemble(KEY, calls, trace).calls] == [
        ("chat-0", "judge"),
        ("chat-0b", "writer"),
    ]


def test_a_name_in_the_url_or_a_header_goes_before_the_span_s() -> None:
    trace = [agent("a", "writer", 0, 9), chat("s", 0.0, "hm", parent="a")]
    assert assemble(KEY, [call(0, agent="judge")], trace).calls[0].agent == "judge"


def test_a_call_of_another_model_is_context() -> None:
    seen = assemble(KEY, [call(0)], [chat("s", 3.0, "fine", parent="a"), agent("a", "checker", 3, 1)])
    assert [(item.source, item.agent, item.response_T.size) for item in seen.calls] == [
        ("gateway", "agent", 1),
        ("trace", "checker", 0),
    ]


def test_a_reward_may_name_what_it_is_about_by_any_id() -> None:
    calls = [call(0, reply=asking("sql", {"q": 1})), call(5)]
    trace = [chat("s", 5.0, "hm"), tool("x", 2.0, "sql", {"q": 1})]
    about = ["", "chat-0", "chat-0/0", "x", "t-0", "s", "nothing"]
    trace += [reward(f"r{n}", 6.0 + n, n, item) for n, item in enumerate(about)]
    seen = assemble(KEY, calls, trace)
    assert [item.about for item in seen.rewards] == ["", "chat-0", "x", "x", "x", "chat-5"]
    assert seen.refused == {"a reward about an unknown span": 1}


@pytest.mark.parametrize(
    ("given_rewards", "expected"),
    [
        ([], {}),
        ([("reward", 0.5, "")], {"reward": 0.5}),
        ([("reward", 0.5, ""), ("reward", 1.0, "")], {"reward": 1.0}),
        ([("format", 1.0, ""), ("answer", 0.0, ""), ("format", 0.5, "")], {"format": 0.5, "answer": 0.0}),
        ([("reward", 0.25, ""), ("format", 1.0, "")], {"reward": 0.25, "format": 1.0}),
        ([("reward", 1.0, "chat-0")], {}),
    ],
)
def test_the_rewards_that_an_agent_emitted(
    given_rewards: list[tuple[str, float, str]], expected: dict[str, float]
) -> None:
    spans = [
        RawSpan(
            span_id=str(n),
            name="reward",
            started_at=float(n),
            ended_at=float(n),
            attributes={"agl.reward.name": name, "agl.reward.value": value, "agl.reward.about": about},
        )
        for n, (name, value, about) in enumerate(given_rewards)
    ]
    assert emitted_rewards(KEY, spans) == expected


# Properties -----------------------------------------------------------------------------------------------------------


def story(seed: int) -> tuple[list[ModelCall], list[RawSpan]]:
    """Agents with tools, some asked for, some traced, some both; parents that are missing or in a circle."""
    draw = random.Random(seed)
    calls, trace = [], []
    for n in range(draw.randint(0, 5)):
        requested = draw.random() < 0.6
        calls.append(call(n, reply=asking("sql", {"q": n % 2}, f"t-{n}") if requested else draw.choice(["hm", "yes"])))
        if draw.random() < 0.5:
            trace.append(chat(f"llm-{n}", n + draw.uniform(-0.4, 0.4), draw.choice(["hm", "yes", ""])))
        if requested and draw.random() < 0.6:
            result = draw.choice([None, "7", "error: x"])
            trace.append(tool(f"tool-{n}", n + 0.6, "sql", {"q": n % 2}, result))
    trace += [agent(f"agent-{n}", f"a{n}", 0, 9) for n in range(draw.randint(0, 2))]
    ids = [span.span_id for span in trace]
    # A tool in a tool of the same name may be one use of it: that is for test_conventions.
    places = [*(item for item in ids if not item.startswith("tool-")), "", "unknown"]
    trace = [replace(span, parent_id=draw.choice(places)) for span in trace]
    trace += [reward(f"r-{n}", n, 1.0, draw.choice([*ids, "", "chat-0", "unknown"])) for n in range(draw.randint(0, 3))]
    return calls, trace


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_nothing(seed: int, order: random.Random) -> None:
    calls, trace = story(seed)
    shuffled = assemble(KEY, order.sample(calls, len(calls)), order.sample(trace, len(trace)))
    seen = assemble(KEY, calls, trace)
    assert [plain(item) for item in seen.calls] == [plain(item) for item in shuffled.calls]
    assert (seen.tools, seen.rewards, seen.agents) == (shuffled.tools, shuffled.rewards, shuffled.agents)
    assert dict(seen.refused) == dict(shuffled.refused)


def plain(item: ModelCall) -> Sequence[object]:
    return item.call_id, item.agent, item.parent_id, item.span_id, item.source, item.response_T.tolist()


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_nothing_is_lost_and_nothing_is_there_twice(seed: int) -> None:
    calls, trace = story(seed)
    seen = assemble(KEY, calls, trace)
    # Every call of the gateway, with its tokens; every tool that a reply asked for, once.
    own = [item for item in seen.calls if item.source == "gateway"]
    assert [(item.call_id, item.response_T.tolist()) for item in own] == [(c.call_id, [1]) for c in calls]
    requested = [item for c in calls for item in json.loads(c.reply).get("tool_calls", ())]
    traced = sum(span.span_id.startswith("tool-") for span in trace)
    assert len(seen.tools) == len(requested)  # each traced tool is one that was asked for
    assert sum(item.source == "trace" for item in seen.tools) == traced
    assert len({item.span_id for item in seen.tools}) == len(seen.tools)
    ids = {item.call_id for item in seen.calls}
    assert all(item.call_id in ids for item in seen.tools)
    known = ids | {item.span_id for item in (*seen.tools, *seen.agents)} | {item.span_id for item in seen.calls}
    parents = [item.parent_id for item in (*seen.calls, *seen.tools, *seen.agents)]
    assert all(parent in known or not parent for parent in parents)
    rewards = sum(span.span_id.startswith("r-") for span in trace)
    assert len(seen.rewards) + seen.refused.get("a reward about an unknown span", 0) == rewards
