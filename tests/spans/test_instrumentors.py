"""Traces as real instrumentors write them, of one agent: two parallel calls of a tool, then an answer.

instrumentors.jsonl has a line for each: Logfire 5.4, pydantic-ai 2.68 (its versions 2 and 6), OpenLLMetry 0.62,
OpenTelemetry's own for Gemini 1.3, OpenInference, Langfuse 5.0, the Vercel AI SDK 5 and 6, LangSmith 0.15, MLflow 3.17,
Phoenix 20.26 (a page of its API, its table by rows and by columns), and OpenTelemetry's console exporter. The spans are
as they were exported, with ids in base64 where that was in Python, less what says nothing of the agent.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agent_lightning.core.types import ToolStatus
from agent_lightning.spans.traces import export
from agent_lightning.spans.traces.imports import conversations, read_files

TRACES = {row["name"]: row["file"] for row in map(json.loads, Path(__file__).with_name("instrumentors.jsonl").open())}
ONE_CALL = {"logfire_gemini", "otel_google"}
"""These write both calls of the model as one span: the first request, the tools inside, and the last reply."""
KEPT = "repaired: a conversation without its beginning"
REFUSED = {
    **{name: {"repaired: a model call around its tools": 1} for name in ONE_CALL},
    "openllmetry_responses": {KEPT: 1},  # it records neither `previous_response_id` nor `call_id`
    "openllmetry_langchain": {"a trace without model calls": 1},  # a trace of its own for LangGraph's state
}
REQUEST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Berlin and Rome?"}]


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_of_a_real_instrumentor_is_read_call_by_call(name: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(TRACES[name]))
    (report,) = read_files([path])
    assert dict(report.refused) == REFUSED.get(name, {})
    calls = [call for rollout in report.rollouts for call in rollout.trajectory.calls]
    tools = [tool for rollout in report.rollouts for tool in rollout.trajectory.tools]
    requests: list[Any] = [json.loads(call.request) for call in calls]
    assert requests[0] == REQUEST
    assert json.loads(calls[-1].reply)["content"] == "It is 20 and 25 degrees."
    assert {call.error for call in calls} == {""}
    assert all(1.7e9 < call.started_at <= call.ended_at < 2e9 for call in calls)
    rows = [[message["role"] for message in row["messages"]] for row in conversations(report.rollouts)]
    if name in ONE_CALL:
        assert (len(calls), len(tools), rows) == (1, 2, [])
        return
    uses = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in json.loads(calls[0].reply)["tool_calls"]
    ]
    assert uses == [("get_weather", {"city": "Berlin"}), ("get_weather", {"city": "Rome"})]
    if REFUSED.get(name, {}).get(KEPT):
        assert rows == [["system", "user", "assistant"]]
        return
    asked = ["user"] if name.endswith("anthropic") else []
    assert rows == [["system", "user", "assistant", "tool", "tool", *asked, "assistant"]]
    results = {json.loads(tool.arguments)["city"]: tool.result for tool in tools}
    assert (len(calls), results) == (2, {"Berlin": "20", "Rome": "25"})
    assert {tool.status for tool in tools} == {ToolStatus.OK}


def test_phoenix_s_table_as_parquet_is_read_like_its_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(TRACES["phoenix_rows"]))
    pq.write_table(pa.Table.from_pylist(TRACES["phoenix_rows"]), tmp_path / "rows.parquet")
    (rows,), (table,) = (read_files([tmp_path / name])[0].rollouts for name in ("rows.json", "rows.parquet"))
    assert export.to_line(table.trajectory) == export.to_line(rows.trajectory)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-99])
    (report,) = read_files([tmp_path / "cut.parquet"])
    assert dict(report.refused) == {"a record of no known format": 1}
