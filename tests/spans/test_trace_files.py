"""Every real trace that we have, call by call as a person reads it; and files that hold something else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_lightning.core.types import ModelCall, ToolCall, ToolStatus, Trajectory
from agent_lightning.spans.message_forms import to_text
from agent_lightning.spans.traces.imports import Imported, Report, conversations, read_files

TRACES = Path(os.environ.get("AGL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "traces"
FILES = sorted(TRACES.glob("*/*"))
needs_files = pytest.mark.skipif(not FILES, reason="no ../shared/data/traces")


def read_one(path: str) -> Report:
    (report,) = read_files([TRACES / path])
    return report


def roles(call: ModelCall) -> str:
    """The messages of a request by their first letters: "su" is system, user; "T" an assistant that calls tools."""
    messages = json.loads(call.request or "[]")
    return "".join("T" if message.get("tool_calls") else message["role"][0] for message in messages)


def reply_summary(call: ModelCall) -> str:
    """The text of a reply, or the tool calls in it."""
    reply = json.loads(call.reply)
    requested = [f"{item['function']['name']}({item['function']['arguments']})" for item in reply.get("tool_calls", ())]
    return "; ".join(requested) or str(reply["content"])


def cause(tool: ToolCall, imported: Trajectory) -> int:
    return [call.call_id for call in imported.calls].index(tool.call_id)


WEATHER = (
    "Great! Here's the current weather for both cities:\n\n**Berlin**: Cloudy, 59°F (15°C)\n**New York**: Sunny, 75"
)
LANGFUSE: dict[str, dict[str, Any]] = {
    # agent, model, finish reason, roles of the request, start of the reply; the calls in order
    "autogen-2025-06-06": {"calls": [("", "gpt-4o", "", "su", "Hello World!")], "tokens": 44},
    "claude-agent-2025-12-22": {
        "calls": [
            ("", "claude-sonnet-4-5-20250929", "", "u", "I'll check the weather in both Berlin and New York for you."),
            ("", "claude-sonnet-4-5-20250929", "", "", 'mcp__weather__get_weather({"city": "Berlin"})'),
            ("", "claude-sonnet-4-5-20250929", "", "", 'mcp__weather__get_weather({"city": "New York"})'),
            ("", "claude-sonnet-4-5-20250929", "", "", WEATHER),
        ],
        # name, arguments, result, number of the call that asked, id in its reply
        "tools": [
            (
                "mcp__weather__get_weather",
                '{"city": "Berlin"}',
                "Weather in Berlin: Cloudy, 59°F",
                1,
                "toolu_01TKoqQLvY2UWuC49qnD48y7",
            ),
            (
                "mcp__weather__get_weather",
                '{"city": "New York"}',
                "Weather in New York: Sunny, 75°F",
                2,
                "toolu_01NtVat4vJLFfVd5TqdLHcA7",
            ),
        ],
        "scores": {"correctness": 0.0, "hallucination": 1.0, "toxicity": 0.0},
        "tokens": 48 + 58 + 61 + 99,
        # In the trace these requests are {"content": "role"}: the instrumentor lost them.
        "refused": {"repaired: a request that is not understood": 3},
    },
    "crewai-2025-07-11": {
        "calls": [("Software developer", "gpt-4o-mini", "", "su", "I now can give a great answer  \nFinal Answer: ")],
        "agents": [("Software developer", "")],
        "scores": {"toxicity": 0.8, "hallucination": 1.0},
        "tokens": 354,
    },
    "google-adk-2025-08-28": {
        "calls": [
            ("hello_agent", "gemini-2.0-flash", "stop", "su", "say_hello({})"),
            ("hello_agent", "gemini-2.0-flash", "stop", "suTt", "Hello Langfuse 👋!\n"),
        ],
        "tools": [("say_hello", "{}", '{"greeting": "Hello Langfuse 👋"}', 0, "call_0")],
        "agents": [("hello_agent", "")],
        "scores": {"toxicity": 0.0, "hallucination": 0.0},
        "tokens": 31 + 45,
    },
    "koog-2025-08-26": {
        "calls": [
            (
                "f9f77d1a-437f-4ba6-890e-b592a50cbd21",
                "gpt-4o",
                "tool_calls",
                "su",
                'HelloTool({"name": "Bob"}); ByeTool({"name": "Bob"})',
            ),
            (
                "f9f77d1a-437f-4ba6-890e-b592a50cbd21",
                "gpt-4o",
                "stop",
                "suTtt",
                "Hello my darling Bob! And, bye my dear Bob!",
            ),
        ],
        "tools": [
            ("ByeTool", '{"name": "Bob"}', "Bye my dear Bob!", 0, "call_dOeEHJDI0liHrCdFWTpkTsuO"),
            ("HelloTool", '{"name": "Bob"}', "Hello my darling Bob!", 0, "call_n2HaWg9KFP0BZDqXv6G4b3nJ"),
        ],
        "agents": [
            ("f9f77d1a-437f-4ba6-890e-b592a50cbd21", ""),
            ("f9f77d1a-437f-4ba6-890e-b592a50cbd21", "f9f77d1a-437f-4ba6-890e-b592a50cbd21"),
        ],
        "tokens": 153 + 187,
    },
    "langgraph-js-2025-10-30": {
        "calls": [
            ("model_request", "gpt-5-mini-2025-08-07", "", "u", 'get_weather({"city":"San Francisco"})'),
            ("model_request", "gpt-5-mini-2025-08-07", "", "uTt", "It's always sunny in San Francisco! \n\nWould you"),
        ],
        "tools": [
            (
                "get_weather",
                '{"city":"San Francisco"}',
                "It's always sunny in San Francisco!",
                0,
                "call_VEZJgIQLgzcb80IIyQJm7JCi",
            )
        ],
        "agents": [("model_request", ""), ("model_request", "")],
        "scores": {"toxicity": 0.2, "hallucination": 1.0},
        "tokens": 166 + 214,
    },
    "langgraph-python-2025-08-22": {
        "calls": [
            ("agent", "gpt-4o-2024-08-06", "", "uu", 'Web-Search({"query":"example"})'),
            ("agent", "gpt-4o-2024-08-06", "", "uuTt", 'The search for "example" primarily leads to the website'),
        ],
        "tools": [
            (
                "Web-Search",
                '{"query":"example"}',
                '[{"url": "https://example.com", "title": "Example Result", "q": "example"}]',
                0,
                "call_1oGK863sxQHlPreFhDdEs3yl",
            )
        ],
        "agents": [("agent", ""), ("agent", "")],
        "scores": {"hallucination": 0.1, "toxicity": 0.0},
        "tokens": 75 + 159,
    },
    "openai-agents-2025-09-30": {
        "calls": [
            ("Hello world", "gpt-4.1-2025-04-14", "", "su", 'get_weather({"city":"Tokyo"})'),
            ("Hello world", "gpt-4.1-2025-04-14", "", "suTt", "The weather in Tokyo is currently sunny. If you need"),
        ],
        "tools": [
            ("get_weather", '{"city":"Tokyo"}', "The weather in Tokyo is sunny.", 0, "call_Kud0j0DxWSmLzv9W5m6qVqXn")
        ],
        "agents": [("Agent workflow", ""), ("Hello world", "Agent workflow")],
        "scores": {"toxicity": 0.8, "hallucination": 0.0},
        "tokens": 70 + 114,
    },
    "vercel-aisdk-2025-11-17": {
        "calls": [("", "gpt-5-2025-08-07", "tool_calls", "u", 'getWeather({"location":"San Francisco"})')],
        "tools": [
            (
                "getWeather",
                '{"location":"San Francisco"}',
                '{"location":"San Francisco","temperature":64}',
                0,
                "call_DgKARp7a7IhJPDczfifMp6Ra",
            )
        ],
        "scores": {"hallucination": 0.0, "toxicity": 0.0},
        "tokens": 147,
    },
}


@needs_files
@pytest.mark.parametrize("name", LANGFUSE)
def test_a_langfuse_trace_is_read_call_by_call(name: str) -> None:
    expected = LANGFUSE[name]
    report = read_one(f"langfuse_framework_traces/{name}.trace.json")
    (rollout,) = report.rollouts
    imported = rollout.trajectory
    assert report.formats == ("Langfuse",)
    assert dict(report.refused) == expected.get("refused", {})
    calls = [(call.agent, call.model, call.finish_reason, roles(call), reply_summary(call)) for call in imported.calls]
    assert [call[:4] for call in calls] == [call[:4] for call in expected["calls"]]
    assert [call[4].startswith(text[4]) for call, text in zip(calls, expected["calls"], strict=True)] == [True] * len(
        calls
    )
    tools = [
        (tool.name, tool.arguments, tool.result, cause(tool, imported), tool.tool_call_id) for tool in imported.tools
    ]
    assert tools == expected.get("tools", [])
    assert {tool.status for tool in imported.tools} <= {ToolStatus.OK}
    agents = {agent.span_id: agent.name for agent in imported.agents}
    assert [(item.name, agents.get(item.parent_id, "")) for item in imported.agents] == expected.get("agents", [])
    assert {reward.name: reward.value for reward in imported.rewards} == expected.get("scores", {})
    assert all(agents.get(call.parent_id, "") == call.agent for call in imported.calls)
    assert rollout.num_tokens == expected["tokens"]


PARENTS = {
    "crewai-2025-07-11": ([], []),
    "google-adk-2025-08-28": (["f6e4c65297e40c96"], []),
    "koog-2025-08-26": (["bb189bc3771ff83d"] * 2, []),
    "langgraph-js-2025-10-30": ([""], ["get_weather"]),
    "langgraph-python-2025-08-22": ([""], ["Web-Search"]),
    "openai-agents-2025-09-30": (["d950b668796240b5"], ["get_weather"]),
    "vercel-aisdk-2025-11-17": (["resp_097184780dc1e1bc00691b3756e6848195a954cd789a29c378"], ["getWeather"]),
    "claude-agent-2025-12-22": (["", ""], []),
}


@needs_files
@pytest.mark.parametrize("name", PARENTS)
def test_the_parent_of_a_tool_is_the_nearest_span_that_is_kept(name: str) -> None:
    (rollout,) = read_one(f"langfuse_framework_traces/{name}.trace.json").rollouts
    assert [tool.parent_id for tool in rollout.trajectory.tools] == PARENTS[name][0]


@needs_files
@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("google-adk-2025-08-28", ["say_hello"]),
        ("langgraph-python-2025-08-22", ["Web-Search"]),
        ("openai-agents-2025-09-30", ["get_weather"]),
        ("vercel-aisdk-2025-11-17", ["getWeather"]),
        ("koog-2025-08-26", []),
    ],
)
def test_the_tools_that_were_offered_are_kept_for_warm_starts(name: str, offered: list[str]) -> None:
    (rollout,) = read_one(f"langfuse_framework_traces/{name}.trace.json").rollouts
    (row,) = conversations([rollout])
    assert [tool["function"]["name"] for tool in row.get("tools", [])] == offered
    assert row["messages"][-1]["role"] == "assistant"


LANGSMITH = {
    "langsmith_py_wrap_openai_": ("chatcmpl-AHH0KBvLG7Wq3wfSEGQuxh0xE07Fl", "gpt-4o-mini-2024-07-18", 18, "Howdy!"),
    "langsmith_py_wrap_openai_stream": (
        "chatcmpl-AHH0HKxF2K5Rnu1DJ51k9CPTcerd1",
        "gpt-4o-mini-2024-07-18",
        18,
        "Howdy!",
    ),
    "langsmith_py_wrap_openai_reasoning": (
        "chatcmpl-AHH0LWUyAupsCrDZu564ZHwRbNQeZ",
        "o1-mini-2024-09-12",
        2540,
        "Certainly!",
    ),
}


@needs_files
@pytest.mark.parametrize("name", LANGSMITH)
def test_a_langsmith_run_is_one_call(name: str) -> None:
    report = read_one(f"langsmith_runs/{name}.json")
    (rollout,) = report.rollouts
    (call,) = rollout.trajectory.calls
    call_id, model, tokens, text = LANGSMITH[name]
    assert (report.formats, dict(report.refused)) == (("LangSmith",), {})
    assert (call.call_id, call.model, call.finish_reason, roles(call)) == (call_id, model, "stop", "u")
    assert reply_summary(call).startswith(text)
    assert rollout.num_tokens == tokens
    assert call.ended_at > call.started_at


MATHS = {
    # start of the reply's id, tokens of prompt and reply, reward, what the agent answered
    "math_poc_rollouts_20260406_stream": [
        ("chatcmpl-955154ec3f91daaf", 102, 293, 1.0, "18"),
        ("chatcmpl-b5fe4679e7fafeb8", 63, 200, 1.0, "3"),
        ("chatcmpl-93b628b667b7cd68", 94, 367, 0.0, "-50000"),
        ("chatcmpl-9ed9a6d1f2977208", 72, 256, 1.0, "540"),
        ("chatcmpl-aaa621bef939392a", 148, 351, 0.0, "7"),
    ],
    "math_poc_rollouts_20260407_nonstream": [
        ("chatcmpl-8f5802b699031139", 102, 621, 0.0, "32"),
        ("chatcmpl-85bed8ef60ae8f2e", 63, 150, 1.0, "3"),
        ("chatcmpl-925f9c8244e75e93", 94, 273, 0.0, "0"),
        ("chatcmpl-8631a86c184f2144", 72, 310, 0.0, "1620"),
        ("chatcmpl-bcb88c6e442df601", 148, 320, 1.0, "20"),
    ],
}


@needs_files
@pytest.mark.parametrize("name", MATHS)
def test_an_agent_lightning_rollout_keeps_tokens_and_reward(name: str) -> None:
    path = f"agentlightning/{name}.jsonl"
    report = read_one(path)
    assert report.formats == ("Agent Lightning",)
    # vLLM was not asked for log-probabilities.
    assert dict(report.refused) == {"repaired: log-probabilities missing": 5}
    results = []
    for rollout in report.rollouts:
        (call,) = rollout.trajectory.calls
        results.append((call.call_id, call.prompt_T.size, call.response_T.size, rollout.trajectory.reward))
        assert (call.model, call.finish_reason, roles(call)) == ("Qwen/Qwen2.5-1.5B-Instruct", "stop", "su")
        assert np.isnan(call.logprob_T).all()
        assert call.response_T[-1] == 151645
    assert results == [row[:4] for row in MATHS[name]]
    # What the agent says that it got is what the chunks of the stream add up to.
    events = [json.loads(line)["events"] for line in (TRACES / path).read_text().splitlines()]
    outputs = [event["data"] for item in events for event in item if event["event_type"] == "agent_output"]
    assert [output["answer"] for output in outputs] == [row[4] for row in MATHS[name]]
    assert [reply_summary(rollout.trajectory.calls[0]) for rollout in report.rollouts] == [
        item["raw_response"] for item in outputs
    ]
    for rollout, output in zip(report.rollouts, outputs, strict=True):
        assert rollout.trajectory.output.startswith(f'{{"answer": "{output["answer"]}"')


CACHED = {
    5: "sql_db_schema",
    6: "sql_db_query",
    7: "sql_db_query",
    13: "calculate",
    16: "calculate",
    18: "transfer_to_mathagent",
    19: "add",
    22: "transfer_to_historyagent",
    24: "transfer_to_mathagent",
    25: "add",
    28: "transfer_to_historyagent",
    30: "multiply",
    36: "calculate",
    39: "calculate",
    41: "transfer_to_mathagent",
    42: "add",
    45: "transfer_to_historyagent",
    47: "calculate",
}


@needs_files
def test_recorded_calls_are_rollouts_of_one_call_each() -> None:
    report = read_one("agentlightning/prompt_caches.jsonl")
    lines = [json.loads(line) for line in (TRACES / "agentlightning/prompt_caches.jsonl").read_text().splitlines()]
    assert (report.formats, dict(report.refused)) == (("OpenAI calls",), {})
    assert len(report.rollouts) == len(lines) == 49
    for line, rollout in zip(lines, report.rollouts, strict=True):
        (call,) = rollout.trajectory.calls
        choice = line["response"]["choices"][0]
        sent = [to_text(message.get("content")) for message in line["request"]["messages"]]
        assert [message["content"] or "" for message in json.loads(call.request)] == sent
        assert (call.call_id, call.model) == (line["response"]["id"], line["response"]["model"])
        assert call.finish_reason == choice["finish_reason"]
        assert (json.loads(call.reply)["content"] or "") == (choice["message"].get("content") or "")
        requested = [item["function"] for item in choice["message"].get("tool_calls") or ()]
        tools = rollout.trajectory.tools
        assert [(tool.name, tool.arguments) for tool in tools] == [
            (item["name"], item["arguments"]) for item in requested
        ]
        assert rollout.num_tokens == line["response"]["usage"]["total_tokens"]
        offered = [tool["function"]["name"] for tool in map(json.loads, call.offered)]
        assert offered == [tool["function"]["name"] for tool in line["request"].get("tools", ())]
    named = {index: tool.name for index, item in enumerate(report.rollouts) for tool in item.trajectory.tools}
    assert named == CACHED


@needs_files
def test_every_file_is_read_and_chats_are_whole() -> None:
    reports = read_files(FILES)
    rollouts: list[Imported] = [rollout for report in reports for rollout in report.rollouts]
    assert (len(reports), len(rollouts), sum(len(item.trajectory.calls) for item in rollouts)) == (15, 71, 79)
    assert sum(len(item.trajectory.tools) for item in rollouts) == 27
    assert len({item.trajectory.key for item in rollouts}) == len(rollouts)
    rows = list(conversations(rollouts))
    texts = ["\n".join(json.dumps(message, sort_keys=True) for message in row["messages"]) for row in rows]
    assert len(rows) == 56
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
    assert not [text for text in texts for other in texts if other.startswith(f"{text}\n")]


def test_what_a_file_holds_decides_how_it_is_read(tmp_path: Path) -> None:
    run = {"run_type": "tool", "id": "t", "trace_id": "x", "parent_run_id": "c", "name": "add", "start_time": 2}
    run |= {"inputs": {"input": "{'a': 1}"}, "outputs": {"output": "2"}, "end_time": "2025-01-01T00:00:00"}
    llm = {"run_type": "llm", "id": "c", "trace_id": "x", "name": "m", "start_time": 1, "error": "overloaded"}
    event = {"event_type": "model_request", "timestamp": 3.0, "data": {"request": {"messages": []}, "response": None}}
    records: list[Any] = [
        llm,
        run,
        {"rollout": {"rollout_id": "r", "status": "failed"}, "events": [event, {"event_type": "?"}]},
        {"request": {}, "response": "no"},
        {"rollout_id": "train-0-0", "outcome": "?", "calls": [], "attempt": 0},
        {"trace": {"id": "l", "scores": [{"name": "mood", "stringValue": "good"}]}, "observations": []},
        {"something": "else"},
        3,
    ]
    path = tmp_path / "mixed.txt"
    path.write_text("\n".join([*map(json.dumps, records), "not JSON", ""]))
    (report,) = read_files([path])
    assert report.formats == ("LangSmith runs", "Agent Lightning", "OpenAI calls", "agl export", "Langfuse")
    (rollout,) = report.rollouts
    (call,), (tool,) = rollout.trajectory.calls, rollout.trajectory.tools
    assert (call.error, call.request, call.reply) == ("overloaded", "", "")
    assert (tool.name, tool.arguments, tool.result, tool.call_id) == ("add", '{"a": 1}', "2", call.call_id)
    assert dict(report.refused) == {
        "a line that is not JSON": 1,
        "a record of no known format": 2,
        "a damaged record": 3,
        "a score that is no number": 1,
        "a trace without model calls": 1,
    }


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1e16, "a reward beyond 1e15"),
        (-1e300, "a reward beyond 1e15"),
        (math.inf, "a reward that is not a finite number"),
        ("0.5", "a reward that is not a finite number"),
        (10**400, "a reward that is not a finite number"),
    ],
)
def test_a_reward_in_a_file_that_no_step_can_use_is_refused(tmp_path: Path, value: object, reason: str) -> None:
    request = {"request": {"messages": []}, "response": {"id": "c", "choices": [{"message": {"content": "4"}}]}}
    events = [
        {"event_type": "model_request", "timestamp": 3.0, "data": request},
        {"event_type": "reward", "timestamp": 4.0, "data": {"value": value}},
    ]
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps({"rollout": {"rollout_id": "r", "status": "succeeded"}, "events": events}))
    (report,) = read_files([path])
    (rollout,) = report.rollouts
    assert rollout.trajectory.reward is None
    assert report.refused[reason] == 1


def test_a_stream_with_tool_calls_and_log_probabilities_is_put_together(tmp_path: Path) -> None:
    def chunk(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"id": "s", "created": 5, "choices": [{"index": 0, "delta": delta, **more}]}

    named = {"index": 0, "id": "c", "function": {"name": "add", "arguments": ""}}
    scored = {"content": [{"token": "x", "logprob": -0.25}]}
    chunks = [
        chunk({"role": "assistant", "content": "I "}, token_ids=[7], logprobs=scored) | {"prompt_token_ids": [1, 2]},
        chunk({"content": "add."}, token_ids=[8], logprobs=scored),
        chunk({"tool_calls": [named]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}, finish_reason="tool_calls"),
        {"id": "s", "choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 2}},
    ]
    request = {"messages": [{"role": "user", "content": "?"}], "model": "m"}
    events = [{"event_type": "model_request", "timestamp": 9, "data": {"request": request, "response": chunks}}]
    path = tmp_path / "stream.json"
    path.write_text(json.dumps({"rollout": {"rollout_id": "r", "status": "succeeded"}, "events": events}))
    (report,) = read_files([path])
    (call,) = report.rollouts[0].trajectory.calls
    assert json.loads(call.reply)["content"] == "I add."
    assert reply_summary(call) == 'add({"a": 1})'
    assert (call.prompt_T.tolist(), call.response_T.tolist(), call.finish_reason) == ([1, 2], [7, 8], "tool_calls")
    assert call.logprob_T.tolist() == [-0.25, -0.25]
    assert (call.started_at, call.ended_at) == (5.0, 9.0)
    assert not report.refused
