"""Tools seen from model calls, and what AIR makes of them; above all, that it cannot be farmed."""

import json
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pytest
from builders import trajectory
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from agent_lightning.config.learning import DEFAULT_RULES, AirConfig, AirEvent, RuleConfig
from agent_lightning.core.errors import ConfigError
from agent_lightning.core.types import ModelCall, RolloutKey, ToolStatus, Trajectory
from agent_lightning.credit.air import Air, Signal, observed_events
from agent_lightning.credit.tools import looks_like_tool_call, tool_calls, tool_status

KEY = RolloutKey(split="train", group=0, index=0)
Asked = tuple[str, str, str | None]
"""Tool name, arguments, and what the agent sent back; None where it sent nothing."""


def model_call(n: int, *, request: object = (), reply: object = None, finish_reason: str = "stop") -> ModelCall:
    return ModelCall(
        key=KEY,
        call_id=f"call-{n}",
        agent="main",
        policy_version=0,
        prompt_T=np.array([n], np.int32),
        response_T=np.array([1], np.int32),
        logprob_T=np.zeros(1, np.float32),
        finish_reason=finish_reason,
        started_at=float(n),
        ended_at=float(n),
        request=json.dumps(request),
        reply=json.dumps(reply),
    )


def conversation(*turns: Sequence[Asked], answer: str = "done", ids: str = "tool-{turn}-{n}") -> tuple[ModelCall, ...]:
    """The model calls of an agent that runs the tools of each turn and then gets an answer."""
    messages: list[dict[str, object]] = [{"role": "user", "content": "?"}]
    calls = []
    for turn, requested in enumerate(turns):
        requests = [
            {"id": ids.format(turn=turn, n=n), "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments, _) in enumerate(requested)
        ]
        reply = {"role": "assistant", "tool_calls": requests}
        calls.append(model_call(turn, request=list(messages), reply=reply, finish_reason="tool_calls"))
        messages.append(reply)
        for request, (_, _, result) in zip(requests, requested, strict=True):
            if result is not None:
                messages.append({"role": "tool", "tool_call_id": request["id"], "content": result})
    return (*calls, model_call(len(turns), request=messages, reply={"role": "assistant", "content": answer}))


def make_air(*signals: Signal, **settings: Any) -> Air:
    return Air(AirConfig(enabled=True, **settings), signals)


def seen(calls: Sequence[ModelCall]) -> Trajectory:
    return trajectory(KEY, *calls)


def test_tools_are_seen_with_no_instrumentation() -> None:
    calls = conversation([("sql", '{"q": 1}', "error: no such table"), ("sql", '{"q": 2}', "7")], [("sql", "{}", None)])
    first, second, third = tool_calls(calls)
    assert (first.call_id, first.status, first.result) == ("call-0", ToolStatus.ERROR, "error: no such table")
    assert (second.call_id, second.status, second.arguments) == ("call-0", ToolStatus.OK, '{"q": 2}')
    assert (third.call_id, third.status) == ("call-1", ToolStatus.UNANSWERED)


def test_an_id_used_again_is_another_call() -> None:
    calls = conversation([("sql", '{"q": 1}', "error: bad")], [("sql", '{"q": 2}', "7")], ids="same")
    assert [item.status for item in tool_calls(calls)] == [ToolStatus.ERROR, ToolStatus.OK]


@pytest.mark.parametrize(
    ("arguments", "result", "status"),
    [
        ("{}", "34", "ok"),
        ("{}", "No rows match the word error", "ok"),
        ("{}", '{"rows": [1]}', "ok"),
        ("{}", '{"error": null, "rows": []}', "ok"),
        ("{}", "error: division by zero", "error"),
        ("{}", "ValueError: nope", "error"),
        ("{}", "Traceback (most recent call last): …", "error"),
        ("{}", '{"error": "no such table"}', "error"),
        ("{}", '{"isError": true, "message": "gone"}', "error"),
        ("{}", "Error: request timed out after 5 s", "timeout"),
        ("{}", "Timeout", "timeout"),
        ("{}", "error: arguments are not JSON", "invalid_arguments"),
        ("{}", "error: missing required argument 'query'", "invalid_arguments"),
        ("{'a': 1}", "34", "invalid_arguments"),
        ("[1]", "34", "invalid_arguments"),
        ("", "34", "ok"),
        ("{}", "  ", "empty"),
        ("{}", "[]", "empty"),
        ("{}", None, "unanswered"),
    ],
)
def test_status(arguments: str, result: str | None, status: str) -> None:
    assert tool_status(arguments, result) == status


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ({"content": '<tool_call>\n{"name": "calculator", "argu'}, True),
        ({"content": '{"name": "calculator", "arguments": {}}'}, True),
        ({"content": '```json\n{"name": "x"'}, True),
        ({"content": "The answer is 3."}, False),
        ({"content": None, "tool_calls": [{"id": "a"}]}, False),
        ({"content": "<tool_call> and one that was read", "tool_calls": [{"id": "a"}]}, False),
        (["not a message"], False),
    ],
)
def test_a_reply_that_tried_to_be_a_tool_call(reply: object, expected: bool) -> None:
    assert looks_like_tool_call(model_call(0, reply=reply)) is expected


def test_events_of_a_rollout() -> None:
    same = ("sql", '{"q": 1, "db": 2}', "error: x")
    calls = conversation([same], [("sql", '{"db": 2,"q": 1}', "7")], answer="<tool_call>")
    cut = model_call(3, reply={"content": "and so on"}, finish_reason="length")
    assert [(e.call, e.kind) for e in observed_events(seen([*calls, cut]))] == [
        (0, "error"),
        (1, "repeated"),
        (2, "unparsed"),
        (3, "cut"),
    ]


def test_the_reward_goes_to_the_call_that_caused_it() -> None:
    calls = conversation([("sql", "{}", "error: x")], [("sql", "{}", "y")], [("sql", '{"q": 2}', "7")])
    np.testing.assert_allclose(Air().rewards(seen(calls)), [-0.05, -0.05, 0.1, 0.0], atol=1e-6)
    np.testing.assert_allclose(make_air(form="potential").rewards(seen(calls)), [-0.05, -0.05, 0.1, 0.0], atol=1e-6)
    # Twice the range of the final reward, twice the bound.
    many = conversation(*([("sql", json.dumps({"q": n}), "error: x")] for n in range(9)))
    worst = make_air(rules=(RuleConfig(on="error", value=-0.1, cap=9),))
    assert worst.rewards(seen(many)).sum() == pytest.approx(-0.3)
    assert worst.rewards(seen(many), reward_range=2.0).sum() == pytest.approx(-0.6)


def test_the_first_rule_that_applies_counts() -> None:
    rules = (
        RuleConfig(on="error", tool="sql*", match="NO SUCH", value=-0.2, cap=0.2),
        RuleConfig(on="error", value=-0.05, cap=0.1),
    )
    calls = conversation([("sql_run", '{"a": 1}', "error: no such table"), ("web", '{"a": 2}', "error: no such host")])
    assert make_air(rules=rules).rewards(seen(calls)).tolist() == pytest.approx([-0.25, 0.0])


def test_a_signal_of_ones_own() -> None:
    calls = conversation([("sql", "{}", "7")])
    air = make_air(lambda t: np.array([len(call.reply) > 1 for call in t.calls]) * 0.05, rules=())
    assert air.rewards(seen(calls)).tolist() == pytest.approx([0.05, 0.05])
    with pytest.raises(ConfigError, match="must return 2 finite numbers"):
        make_air(lambda _: np.zeros(1, np.float32)).rewards(seen(calls))
    with pytest.raises(ConfigError, match="raised ZeroDivisionError"):
        make_air(lambda t: np.full(len(t.calls), 1 / 0)).rewards(seen(calls))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"on": "okay", "value": 0.1, "cap": 0.1}, "Input should be 'ok', 'error'"),
        ({"on": "ok", "value": 0.2, "cap": 0.1}, "a cap of at least its size"),
        ({"on": "ok", "value": 0.0, "cap": 0.1}, "not 0"),
        ({"on": "ok", "value": float("nan"), "cap": 0.1}, "should be a finite number"),
        ({"on": "repeated", "value": 0.1, "cap": 0.1}, "repeating an action would pay"),
        ({"on": "ok", "value": 0.1, "cap": 0.1, "match": "("}, "not a regular expression"),
    ],
)
def test_rules_that_are_refused(rule: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        RuleConfig(**rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("bound", [0.0, 0.5, 1.0])
def test_a_bound_that_could_overturn_the_final_reward_is_refused(bound: float) -> None:
    with pytest.raises((ConfigError, ValidationError), match=r"below 0\.5|greater than 0"):
        make_air(bound=bound)


# Properties: rewards cannot be farmed ---------------------------------------------------------------------------------

RESULTS = ("7", "", "error: x", "error: bad argument", "Timeout", None)
turns = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]), st.sampled_from(["{}", '{"x":1}', '{"x":2}', "{"]), st.sampled_from(RESULTS)
        ),
        min_size=1,
        max_size=3,
    ),
    max_size=8,
)
rules = st.lists(
    st.builds(
        lambda on, value, factor: RuleConfig(
            on=on, value=-abs(value) if on == "repeated" else value, cap=abs(value) * factor
        ),
        st.sampled_from(["ok", "error", "invalid_arguments", "timeout", "empty", "unanswered", "repeated"]),
        st.floats(0.01, 1.0) | st.floats(-1.0, -0.01),
        st.floats(1.0, 5.0),
    ),
    max_size=6,
).map(tuple)
airs = st.builds(make_air, rules=rules | st.just(DEFAULT_RULES), bound=st.floats(0.01, 0.49), form=st.just("sum"))


@settings(max_examples=1000, deadline=None)
@given(airs, turns)
def test_the_total_stays_within_the_bound_at_every_call(air: Air, requested: list[list[Asked]]) -> None:
    total = np.cumsum(air.rewards(seen(conversation(*requested))).astype(np.float64))
    assert np.abs(total).max(initial=0.0) <= air.config.bound + 1e-6


@settings(max_examples=1000, deadline=None)
@given(airs, turns, turns)
def test_no_failed_rollout_overtakes_one_that_succeeded(
    air: Air, good: list[list[Asked]], bad: list[list[Asked]]
) -> None:
    assert 1.0 + air.rewards(seen(conversation(*good))).sum() > 0.0 + air.rewards(seen(conversation(*bad))).sum()


@settings(max_examples=1000, deadline=None)
@given(airs, turns.filter(bool), st.data())
def test_doing_the_same_again_never_pays(air: Air, requested: list[list[Asked]], data: st.DataObject) -> None:
    name, arguments, _ = data.draw(st.sampled_from([item for turn in requested for item in turn]))
    again = [*requested, [(name, arguments, data.draw(st.sampled_from(RESULTS)))]]
    assert air.rewards(seen(conversation(*again))).sum() <= air.rewards(seen(conversation(*requested))).sum() + 1e-6


@settings(max_examples=1000, deadline=None)
@given(airs, turns, st.floats(0.5, 1.0))
def test_the_potential_form_changes_no_return(air: Air, requested: list[list[Asked]], discount: float) -> None:
    shaped = make_air(rules=air.config.rules, bound=air.config.bound, form="potential")
    reward_T = shaped.rewards(seen(conversation(*requested)), discount=discount).astype(np.float64)
    assert abs((reward_T * discount ** np.arange(reward_T.size)).sum()) < 1e-5


def test_rules_can_be_about_every_status_of_a_tool_and_about_replies() -> None:
    assert set(get_args(AirEvent)) == {*ToolStatus, "repeated", "unparsed", "cut"}


def test_no_calls_no_rewards() -> None:
    assert Air().rewards(seen(())).shape == (0,)
    assert make_air(form="potential").rewards(seen(())).shape == (0,)
