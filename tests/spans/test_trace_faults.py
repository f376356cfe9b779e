"""What was lost or misread in traces, by kind: containers, attributes, accounts, times, servers, lines, names."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.types import RolloutKey, ToolStatus
from agent_lightning.spans.assemble import LOST_TRACE, assemble, emitted_rewards
from agent_lightning.spans.attributes import FIELDS
from agent_lightning.spans.conventions import REASONS, TraceContent, read_spans
from agent_lightning.spans.message_forms import parse_value
from agent_lightning.spans.messages import read_reply, read_request
from agent_lightning.spans.traces.imports import Report, conversations, read_files
from agent_lightning.spans.traces.records import read_time
from agent_lightning.spans.tree import RawSpan

FAULTS = Path(os.environ.get("AGL_DATA", Path(__file__).parents[3] / "shared" / "data")).parent / "faults"
needs_faults = pytest.mark.skipif(not FAULTS.is_dir(), reason="no ../shared/faults")
KEY = RolloutKey(split="train", group=0, index=0)


def span(identity: str, attributes: dict[str, Any], parent: str = "", *, at: float = 0.0, to: float = 9.0) -> RawSpan:
    return RawSpan(span_id=identity, parent_id=parent, name="chat", started_at=at, ended_at=to, attributes=attributes)


def messages_of(call: Any) -> list[tuple[str, Any]]:
    """Role and content of each message of a request; of a message with tool calls the ids of these."""
    messages = json.loads(call.request or "[]")
    return [(m["role"], [c["id"] for c in m["tool_calls"]] if "tool_calls" in m else m["content"]) for m in messages]


def rows_of(report: Report) -> list[list[str]]:
    """The roles of each row of sft.jsonl."""
    return [[message["role"] for message in row["messages"]] for row in conversations(report.rollouts)]


def read(*calls: dict[str, Any], nested: bool = False) -> TraceContent:
    """The content of a trace of calls, a second apart, side by side or in each other."""
    given = [{"gen_ai.operation.name": "chat", **attributes} for attributes in calls]
    if nested:
        return read_spans([span(f"s{n}", item, f"s{n - 1}", at=n, to=99.0 - n) for n, item in enumerate(given)], KEY)
    return read_spans([span(f"s{n}", item, at=n, to=n + 0.5) for n, item in enumerate(given)], KEY)


BOTH = ("aA", "bB")
ASKED = ("assistant", ["a", "b"])
FILES: dict[str, tuple[list[list[tuple[str, Any]]], list[list[str]], dict[str, int]]] = {
    "t1_parallel_results_anthropic.json": (
        [[("user", "q"), ASKED, ("tool", "A"), ("tool", "B"), ("user", "and now?")]],
        [["user", "assistant", "tool", "tool", "user", "assistant"]],
        {},
    ),
    "t1_parallel_results_otel.json": (
        [[("user", "q"), ASKED, ("tool", "A"), ("tool", "B")]],
        [["user", "assistant", "tool", "tool", "assistant"]],
        {},
    ),
    "t3_logfire_v1_request_data.json": ([[("user", "q")]], [["user", "assistant"]], {}),
    "t4_langsmith_js_times.json": ([[("user", "q")]], [["user", "assistant"]], {}),
    "t5_server_side_conversation.json": ([[("tool", "5")]], [], {"repaired: a conversation without its beginning": 1}),
    "t6_u2028.jsonl": ([[("user", "a\u2028b")], [("user", "a\u2028b")]], [["user", "assistant"]], {}),
}


@needs_faults
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_faults_is_read_call_by_call(name: str) -> None:
    (report,) = read_files([FAULTS / name])
    calls = [call for rollout in report.rollouts for call in rollout.trajectory.calls]
    assert ([messages_of(call) for call in calls], rows_of(report), dict(report.refused)) == FILES[name]
    if name.startswith("t4"):
        assert (calls[0].started_at, calls[0].ended_at) == (1728803137.17, 1728803138.285)


RESULTS: dict[str, list[dict[str, Any]]] = {
    "GenAI conventions": [
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": i, "response": r} for i, r in BOTH]}
    ],
    "GenAI conventions, results of the user": [
        {"role": "user", "parts": [{"type": "tool_call_response", "id": i, "result": r} for i, r in BOTH]}
    ],
    "Anthropic": [
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": i, "content": [{"type": "text", "text": r}]} for i, r in BOTH
            ],
        }
    ],
    "Bedrock": [
        {"role": "user", "content": [{"toolResult": {"toolUseId": i, "content": [{"text": r}]}} for i, r in BOTH]}
    ],
    "Vercel AI SDK": [
        {
            "role": "tool",
            "content": [
                {"type": "tool-result", "toolCallId": i, "toolName": "f", "output": {"type": "text", "value": r}}
                for i, r in BOTH
            ],
        }
    ],
    "OpenAI": [{"role": "tool", "tool_call_id": i, "content": r} for i, r in BOTH],
    "OpenAI's Responses": [{"type": "function_call_output", "call_id": i, "output": r} for i, r in BOTH],
    "LangChain": [{"type": "tool", "tool_call_id": i, "name": "f", "content": r} for i, r in BOTH],
    "OpenLLMetry": [
        {"role": "user", "content": json.dumps([{"type": "tool_result", "tool_use_id": "a", "content": "A"}])},
        {"role": "user", "content": json.dumps([{"type": "tool_result", "tool_use_id": "b", "content": "B"}])},
    ],
}
CALLS: dict[str, list[dict[str, Any]]] = {
    "OpenAI": [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "ab"],
        }
    ],
    "GenAI conventions": [
        {"role": "assistant", "parts": [{"type": "tool_call", "id": i, "name": "f", "arguments": {}} for i in "ab"]}
    ],
    "Anthropic": [
        {"role": "assistant", "content": [{"type": "tool_use", "id": i, "name": "f", "input": {}} for i in "ab"]}
    ],
    "Bedrock": [
        {"role": "assistant", "content": [{"toolUse": {"toolUseId": i, "name": "f", "input": {}}} for i in "ab"]}
    ],
    "OpenAI's Responses": [{"type": "function_call", "call_id": i, "name": "f", "arguments": "{}"} for i in "ab"],
    "Responses as chat": [
        {"role": "assistant", "tool_calls": [{"id": i, "function": {"name": "f", "arguments": "{}"}}]} for i in "ab"
    ],
}


@pytest.mark.parametrize("results", RESULTS)
@pytest.mark.parametrize("calls", CALLS)
def test_every_result_of_parallel_tools_is_kept_in_every_form(calls: str, results: str) -> None:
    items = [{"role": "user", "content": "q"}, *CALLS[calls], *RESULTS[results], {"role": "user", "content": "now?"}]
    messages, _ = read_request(items) or ([], [])
    called = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "ab"]
    assert messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": called},
        {"role": "tool", "content": "A", "tool_call_id": "a"},
        {"role": "tool", "content": "B", "tool_call_id": "b"},
        {"role": "user", "content": "now?"},
    ]


def test_gemini_s_results_without_ids_answer_the_calls_of_their_names() -> None:
    parts = [{"functionCall": {"name": name, "args": {}}} for name in "fg"]
    results = [{"functionResponse": {"name": name, "response": {"result": name}}} for name in "gf"]
    contents = [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": parts}]
    messages, _ = read_request({"contents": [*contents, {"role": "user", "parts": [*results, {"text": "now?"}]}]}) or (
        [],
        [],
    )
    assert [(m["role"], m["content"], m.get("tool_call_id", "")) for m in messages[2:]] == [
        ("tool", '{"result": "g"}', "call_1"),
        ("tool", '{"result": "f"}', "call_0"),
        ("user", "now?", ""),
    ]


@pytest.mark.parametrize(
    "result",
    [
        {"type": "tool_result", "tool_use_id": "a", "content": "out of stock", "is_error": True},
        {"toolResult": {"toolUseId": "a", "content": [{"text": "out of stock"}], "status": "error"}},
        {"type": "tool-result", "toolCallId": "a", "output": {"type": "error-text", "value": "out of stock"}},
        {"type": "tool-error", "toolCallId": "a", "error": "out of stock"},
    ],
)
def test_a_failure_that_the_trace_states_is_an_error(result: dict[str, Any]) -> None:
    called = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    first = {"gen_ai.input.messages": [{"role": "user", "content": "q"}]}
    first |= {"gen_ai.output.messages": [{"role": "assistant", "content": None, "tool_calls": called}]}
    history = [*first["gen_ai.input.messages"], *first["gen_ai.output.messages"], {"role": "user", "content": [result]}]
    traced = read(first, {"gen_ai.input.messages": history, "gen_ai.output.messages": "sorry"})
    seen = assemble(KEY, traced.calls, ())
    assert [(tool.result, tool.status) for tool in seen.tools] == [("out of stock", ToolStatus.ERROR)]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}
LINK = {"type": "image_url", "image_url": {"url": "https://x/a.png"}}
PARTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "uri": ({"type": "uri", "modality": "image", "uri": "https://x/a.png"}, LINK),
    "blob": ({"type": "blob", "modality": "image", "mime_type": "image/png", "content": "iVBO"}, IMAGE),
    "file": ({"type": "file", "modality": "document", "file_id": "f1"}, {"type": "file", "file": {"file_id": "f1"}}),
    "image": ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}, IMAGE),
    "inlineData": ({"inlineData": {"mimeType": "image/png", "data": "iVBO"}}, IMAGE),
    "image_url": (LINK, LINK),
    "generic": ({"type": "generic", "x": 1}, None),
    "server_tool_call": ({"type": "server_tool_call", "name": "web_search", "server_tool_call": {}}, None),
    "compaction": ({"type": "compaction", "content": "summary"}, None),
    "tool_call": ({"type": "tool_call", "id": "z"}, None),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_an_unknown_part_is_counted_by_its_type_and_the_rest_is_read(name: str, role: str, tmp_path: Path) -> None:
    part, kept = PARTS[name]
    content = [{"type": "text", "content": "look"}, part]
    history = [{"role": "user", "parts": content if role == "user" else content[:1]}]
    reply = [{"role": "assistant", "parts": content if role == "assistant" else content[:1]}]
    traced = read({"gen_ai.input.messages": history, "gen_ai.output.messages": json.dumps(reply)})
    (call,) = traced.calls
    reason = f"repaired: a part that is not {'text' if kept else 'understood'} ({name})"
    assert dict(traced.refused) == {reason: 1}
    changed = json.loads(call.reply) if role == "assistant" else json.loads(call.request)[0]
    assert changed["content"] == ([{"type": "text", "text": "look"}, kept] if kept else "look")
    assert traced.partial == (frozenset() if kept else {"s0"})


def test_only_messages_that_are_understood_are_in_sft(tmp_path: Path) -> None:
    def sent(number: int, parts: list[Any]) -> dict[str, Any]:
        text = json.dumps([{"role": "user", "parts": parts}])
        given = {"gen_ai.operation.name": "chat", "gen_ai.input.messages": text, "gen_ai.output.messages": '"yes"'}
        ids = {"traceId": f"{number:032x}", "spanId": f"{number:016x}", "startTimeUnixNano": 10**18}
        return ids | {"attributes": [{"key": key, "value": {"stringValue": value}} for key, value in given.items()]}

    known, unknown = [{"type": "text", "content": "hi"}], [{"type": "text", "content": "ho"}, {"type": "generic"}]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [sent(1, known), sent(2, unknown)]}]}]}))
    (report,) = read_files([path])
    assert len(report.rollouts) == 2
    assert [row["messages"][0]["content"] for row in conversations(report.rollouts)] == ["hi"]


HI = [{"role": "user", "content": "hi"}]
ADD = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": "{}"}}],
}


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, "repaired: a model call without messages"),
        ({"acme.chat": json.dumps(HI)}, "repaired: a model call without messages (acme.chat)"),
        ({"a (b)": HI}, "repaired: a model call without messages (?)"),
        ({"gen_ai.output.messages": "yes"}, "repaired: a model call without a request"),
        ({"gen_ai.input.messages": HI}, "repaired: a model call without a reply"),
    ],
)
def test_a_model_call_without_messages_is_never_silent(attributes: dict[str, Any], reason: str) -> None:
    assert dict(read(attributes).refused) == {reason: 1}


STRUCTURED = {"gen_ai.input.messages": HI, "gen_ai.output.messages": [ADD]}
PRINTED = {"input.value": "Human: hi", "output.value": "None", "openinference.span.kind": "LLM"}


@pytest.mark.parametrize("order", ["sp", "ps", "psp", "pps", "spp"])
def test_structure_beats_text_whatever_the_nesting(order: str) -> None:
    traced = read(*({"s": STRUCTURED, "p": PRINTED}[name] for name in order), nested=True)
    (call,) = traced.calls
    assert json.loads(call.request) == HI
    assert [item["function"]["name"] for item in json.loads(call.reply)["tool_calls"]] == ["add"]
    assert not traced.refused


MOMENT = datetime(2024, 10, 13, 7, 5, 37, 170000, UTC).timestamp()


@pytest.mark.parametrize(
    "value",
    [
        *(MOMENT, MOMENT * 1e3, 1728803137170, 1728803137170000, 1728803137170000000, "1728803137170", "1728803137.17"),
        *(
            "2024-10-13T07:05:37.170Z",
            "2024-10-13T07:05:37.170",
            "2024-10-13 09:05:37.17+02:00",
            [1728803137, 170000000],
        ),
        *("2024-10-13T07:05:37.170000000Z", "2024-10-13 07:05:37.170 UTC", datetime(2024, 10, 13, 7, 5, 37, 170000)),
    ],
)
def test_the_unit_of_a_time_is_told_by_its_size(value: Any) -> None:
    assert read_time(value) == pytest.approx(MOMENT, abs=1e-6)


@pytest.mark.parametrize("value", [None, True, "", "yesterday", {}, math.nan, [1], "1e400"])
def test_what_is_no_time_is_not_a_number(value: Any) -> None:
    assert math.isnan(read_time(value))


ANSWER = {"type": "function_call_output", "call_id": "c", "output": "5"}
CONVERSATION = "conv_" + "7" * 32
REQUESTED = {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"}
FIRST: dict[str, Any] = {"input.value": {"input": "2+3?"}, "output.value": {"id": "resp_1", "output": [REQUESTED]}}


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ({"input.value": {"input": [ANSWER], "previous_response_id": "resp_1"}}, True),
        ({"input.value": {"input": [ANSWER]}, "llm.invocation_parameters": '{"previous_response_id": "resp_1"}'}, True),
        ({"input.value": {"input": [ANSWER]}, "gen_ai.conversation.id": "resp_1"}, True),
        ({"input.value": {"input": [ANSWER]}}, True),  # by the tool call
        ({"input.value": {"input": [{**ANSWER, "call_id": "d"}]}}, False),
        ({"input.value": {"input": "and 3+3?", "previous_response_id": "resp_1"}}, True),
        ({"input.value": {"input": "and 3+3?", "previous_response_id": "resp_0"}}, False),
        ({"input.value": {"input": "and 3+3?", "conversation": {"id": CONVERSATION}}}, True),
        ({"input.value": {"input": "and 3+3?"}, "gen_ai.conversation.id": "thread_1"}, False),
    ],
)
def test_a_conversation_that_a_server_keeps_is_joined_by_its_id_or_counted(given: dict[str, Any], joined: bool) -> None:
    own = {"input.value": {**FIRST["input.value"], "conversation": CONVERSATION}}
    first = FIRST | ({"gen_ai.conversation.id": "thread_1"} if "gen_ai.conversation.id" in given else own)
    traced = read(first, {"output.value": "it is 5", **given})
    roles = [role for role, _ in messages_of(traced.calls[1])]
    assert roles[:2] == (["user", "assistant"] if joined else roles[:2])
    assert traced.partial == (frozenset() if joined else {"s1"})
    assert dict(traced.refused) == ({} if joined else {"repaired: a conversation without its beginning": 1})


def test_another_agent_of_the_same_thread_is_no_continuation() -> None:
    texts = ["Be a writer.", "Be a critic."]
    messages = [[{"role": "system", "content": text}, {"role": "user", "content": "q"}] for text in texts]
    same = {"gen_ai.conversation.id": "thread_" + "7" * 24, "output.value": "a"}
    traced = read(*({"gen_ai.input.messages": given, **same} for given in messages))
    assert [json.loads(call.request) for call in traced.calls] == messages
    assert not traced.refused


def test_a_text_that_is_json_is_no_part() -> None:
    texts = ['{"a": 1}', "[1, 2]", '[{"text": "a"}]']
    messages, _ = read_request([{"role": "user", "content": text} for text in texts]) or ([], [])
    assert [message["content"] for message in messages] == texts
    assert read_request([{"role": "user", "content": texts}]) == ([{"role": "user", "content": "".join(texts)}], [])


def test_a_request_that_has_its_history_is_not_joined_again() -> None:
    history = [{"role": "user", "content": "2+3?"}, *FIRST["output.value"]["output"], ANSWER]
    traced = read(FIRST, {"input.value": {"input": history, "previous_response_id": "resp_1"}, "output.value": "5"})
    assert [role for role, _ in messages_of(traced.calls[1])] == ["user", "assistant", "tool"]
    assert not traced.partial


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_a_line_feed_ends_a_line(separator: str, end: str, tmp_path: Path) -> None:
    texts = [f"a{separator}b", "c"]
    replied = {"choices": [{"message": {"content": "d"}}]}
    lines = [{"request": {"messages": [{"role": "user", "content": text}]}, "response": replied} for text in texts]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(end.join(json.dumps(line, ensure_ascii=separator < " ") for line in lines).encode() + end.encode())
    (report,) = read_files([path])
    assert [row["messages"][0]["content"] for row in conversations(report.rollouts)] == texts
    assert not report.refused


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': (1, None), 'b': [True, False,]}", {"a": [1, None], "b": [True, False]}),
        ("['it\\'s', \"a 'b'\", 'say \"hi\"']", ["it's", "a 'b'", 'say "hi"']),
        ("['\\x41\\n\\\\', '\\U0001f600', 'é']", ["A\n\\", "😀", "é"]),
        ("{'None': 'True, ) (1,)'}", {"None": "True, ) (1,)"}),
        ("{'a': Foo(1)}", "{'a': Foo(1)}"),
        ("[1, 2", "[1, 2"),
        ("{1: 2}", "{1: 2}"),
    ],
)
def test_python_s_notation_is_read_as_json(text: str, value: Any) -> None:
    assert parse_value(text) == value


LONG: dict[str, Callable[[int], str]] = {
    "open": lambda size: "{'a': [" * (size // 7),
    "quotes": lambda size: "'\\'" * (size // 3),
    "both quotes": lambda size: "\"'" * (size // 2),
    "commas": lambda size: "[,  " * (size // 4),
    "blanks": lambda size: "[" + " " * size,
    "backslashes": lambda size: "['" + "\\" * size,
    "one text": lambda size: "{'" + "a" * size,
    "texts": lambda size: "[" + "'a', " * (size // 5) + "]",
    "dicts": lambda size: "[" + "{}, " * (size // 4) + "]",
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_text_in_python_s_notation_costs_little(name: str) -> None:
    started = time.process_time()
    parse_value(LONG[name](2_000_000))
    assert time.process_time() - started < 10  # Python's own parser takes as long, and 1 GB


CHAT = {"gen_ai.operation.name": "chat"}


def nested(number: int) -> list[RawSpan]:
    """Spans of model calls, tools and agents, each the child of the last."""
    kinds = [CHAT, {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "f"}, {"agent.name": "x"}]
    return [span(f"{n}", kinds[n % 3], f"{n - 1}") for n in range(number)]


def wrapped(number: int) -> list[RawSpan]:
    """A model call of many attributes, inside as many spans that tell of the same call."""
    prompt = {f"gen_ai.prompt.{n}.role": "user" for n in range(number)}
    around = [span(f"{n}", CHAT | {"output.value": "x"}, f"{n - 1}") for n in range(number)]
    return [*around, span("in", CHAT | prompt, f"{number - 1}", at=1.0)]


def continued(number: int) -> list[RawSpan]:
    """Calls, each of which continues the last on the server."""
    texts = CHAT | {"input.value": "m" * 50, "output.value": "x"}
    ids = [{"gen_ai.response.id": f"r{n}", "previous_response_id": f"r{n - 1}"} for n in range(number)]
    return [span(f"s{n}", texts | given, at=float(n), to=n + 0.5) for n, given in enumerate(ids)]


def answered(number: int) -> list[RawSpan]:
    """A call whose request has many tool calls, and as many results in the opposite order."""
    calls = [{"id": f"{n}", "function": {"name": "f", "arguments": "{}"}} for n in range(number)]
    results = [{"role": "tool", "tool_call_id": f"{n}", "content": ""} for n in reversed(range(number))]
    messages = [{"role": "assistant", "tool_calls": calls}, *results]
    return [span("s", {"gen_ai.input.messages": messages, "gen_ai.output.messages": "x"})]


@pytest.mark.parametrize("make", [nested, wrapped, continued, answered])
def test_the_work_of_reading_a_trace_is_bounded_by_its_size(make: Callable[[int], list[RawSpan]]) -> None:
    spans = make(5_000)
    started = time.process_time()
    seen = assemble(KEY, (), spans)
    assert time.process_time() - started < 30  # what is quadratic takes minutes
    assert LOST_TRACE not in seen.refused


pieces = st.sampled_from(["0", "1", "00", "9" * 5000, "٣", "²", "role", "message", "value", "", "tool_calls"])
pieces |= st.text(max_size=3)
prefixes = [name[:-2] for names in FIELDS.values() for name in names if name.endswith(".*")]
plain_names = [name for names in FIELDS.values() for name in names if not name.endswith(".*")]
any_name = st.builds(
    lambda start, path: ".".join([start, *path]), st.sampled_from(prefixes), st.lists(pieces, max_size=20)
)
any_name |= st.sampled_from(plain_names) | st.text(max_size=5)
any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["chat", "LLM"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(pieces, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(any_name, any_value, max_size=8), max_size=3))
def test_any_names_and_nestings_are_read_or_counted(attributes: list[dict[str, Any]]) -> None:
    spans = [span(f"{n}", given_attributes) for n, given_attributes in enumerate(attributes)]
    seen = read_spans(spans, KEY)
    assert {reason.partition(" (")[0] for reason in seen.refused} <= set(REASONS)
    assert LOST_TRACE not in assemble(KEY, (), spans).refused
    emitted_rewards(KEY, spans)


words = st.sampled_from(["user", "assistant", "tool", "text", "tool_call", "image", "tool_result"])
keys = st.sampled_from(
    [
        "role",
        "content",
        "parts",
        "type",
        "text",
        "tool_calls",
        "id",
        "name",
        "messages",
        "input",
        "output",
        "choices",
        "message",
        "contents",
        "function",
        "toolUse",
        "toolResult",
        "image",
        "arguments",
        "tools",
    ]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_any_json_is_a_request_or_a_reply_or_neither(value: Any) -> None:
    for form in (value, json.dumps(value), repr(value)):
        read_request(form)
        read_reply(form)


def test_a_reward_s_name_of_any_size_is_read() -> None:
    seen = assemble(KEY, (), [span("r", {f"agentlightning.reward.{'9' * 5000}.value": 0.5})])
    assert [reward.value for reward in seen.rewards] == [0.5]


RECORDS: list[dict[str, Any]] = [
    {"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "7", "spanId": "a", "attributes": []}]}]}]},
    {"trace": {"id": "x", "scores": [{}]}, "observations": [{"id": "o", "metadata": {"attributes": {}}}]},
    {"traceId": "x", "type": "GENERATION", "startTime": 1, "id": "o", "input": [], "output": ""},
    {"post": [{"id": "r", "run_type": "llm", "start_time": 1}], "patch": [{"id": "r", "outputs": {"messages": []}}]},
    {"run_type": "llm", "id": "r", "start_time": 1, "inputs": {"messages": []}, "outputs": {}, "extra": {}},
    {
        "rollout": {"rollout_id": "r"},
        "events": [{"event_type": "model_request", "timestamp": 1, "data": {"request": {}}}],
    },
    {"request": {"messages": []}, "response": {"choices": [{"message": {}}]}},
    {"info": {"trace_id": "m", "assessments": [{}]}, "data": {"spans": [{"span_id": "s", "start_time": 1}]}},
    {"context": {"trace_id": "7", "span_id": "a"}, "attributes": {"llm": {"input_messages": [{}]}}, "events": [{}]},
    {"context.span_id": "a", "context.trace_id": "7", "attributes.llm.output_messages": [], "start_time": 1},
    {"context.span_id": {"0": "a"}, "name": {"0": "x"}},
    {"data": [{"traceId": "x", "id": "a", "attributes": {}, "timestamp": 1}]},
]


@st.composite
def damaged_records(draw: st.DrawFn) -> Any:
    """A record of a known format in which a value at any depth is another."""
    record: Any = copy.deepcopy(draw(st.sampled_from(RECORDS)))
    at: Any = record
    while True:
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], dict | list) or not at[key] or draw(st.booleans()):
            at[key] = draw(json_values)
            return record
        at = at[key]


@settings(max_examples=300, deadline=None)
@given(st.lists(damaged_records(), max_size=3))
def test_any_record_is_read_or_counted(records: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        (report,) = read_files([path])
    assert len(list(conversations(report.rollouts))) <= len(records)


def test_a_value_nested_without_end_costs_its_record(tmp_path: Path) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    path = tmp_path / "deep.jsonl"
    path.write_text("\n".join(json.dumps({**record, "deep": deep, "metadata": deep}) for record in RECORDS))
    (report,) = read_files([path])
    assert report.refused["a record nested too deep"] == len(RECORDS) - 2  # a page and a table are unpacked first
