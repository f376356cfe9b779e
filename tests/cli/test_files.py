"""Export and import: what leaves comes back the same, without the secret; and the commands."""

from __future__ import annotations

import json
import math
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from builders import group, model_call, trajectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strict_otlp import read_strictly

from agent_lightning.api.cli.main import main
from agent_lightning.config.load import load, to_yaml
from agent_lightning.core.errors import DataError
from agent_lightning.core.json_values import compact
from agent_lightning.core.types import (
    POLICY,
    AgentSpan,
    ModelCall,
    Outcome,
    Reward,
    RolloutKey,
    ToolCall,
    ToolStatus,
    Trajectory,
)
from agent_lightning.run.archive import RolloutWriter, read_trajectories
from agent_lightning.run.state import State, checkpoint_folder, write_state
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.spans import otlp
from agent_lightning.spans.traces.export import FILES, Format, from_row, to_line, to_otlp, to_spans, write
from agent_lightning.spans.traces.imports import conversations, read_files

KEY = RolloutKey(split="train", group=3, index=1, attempt=2)
TOOL_CALL = {"id": "c0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
REQUEST: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
REPLY: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
ANSWERED = [*REQUEST, REPLY, {"role": "tool", "content": "2", "tool_call_id": "c0"}]
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
floats = st.floats(-1e3, 0, width=32)
times = st.integers(1_700_000_000_000, 1_800_000_000_000).map(lambda milliseconds: milliseconds / 1000)
contents = texts | st.none() | st.lists(st.builds(lambda text: {"type": "text", "text": text}, texts), max_size=2)
prompts = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "system"]), contents
)
replies = st.builds(lambda content: {"role": "assistant", "content": content}, contents) | st.just(REPLY)


@st.composite
def rollouts(draw: st.DrawFn) -> Trajectory:
    names = [f"span{number}" for number in range(8)]
    agents = tuple(
        AgentSpan(key=KEY, span_id=name, name=draw(texts.filter(bool)), started_at=1.7e9, ended_at=1.9e9)
        for name in names[: draw(st.integers(0, 2))]
    )
    above = st.sampled_from(["", *(agent.span_id for agent in agents)])
    calls = []
    for name in names[2 : 2 + draw(st.integers(1, 3))]:
        tokens = draw(st.lists(st.integers(0, 2**31 - 1), max_size=4))
        parent = draw(above)
        calls.append(
            ModelCall(
                key=KEY,
                call_id=name,
                agent=next((agent.name for agent in agents if agent.span_id == parent), draw(texts)),
                policy_version=draw(st.integers(0, 5)),
                prompt_T=np.array(draw(st.lists(st.integers(0, 2**31 - 1), max_size=4)), np.int32),
                response_T=np.array(tokens, np.int32),
                logprob_T=np.array([draw(floats) for _ in tokens], np.float32),
                finish_reason=draw(st.sampled_from(["stop", "length", "tool_calls", ""])),
                # Two that start at the same time have no order that a trace could keep.
                started_at=(start := draw(times.filter(lambda time: all(time != call.started_at for call in calls)))),
                ended_at=start + draw(st.floats(0, 100)),
                request=draw(st.just("") | st.lists(prompts, min_size=1, max_size=3).map(compact) | st.just("no JSON")),
                reply=draw(st.just("") | replies.map(compact)),
                parent_id=parent,
                model=draw(texts.filter(lambda text: text != POLICY)),  # "" stands for the policy
                error=draw(texts),
                new_versions=draw(st.just(()) | st.tuples(st.tuples(st.integers(0, 3), st.integers(6, 9)))),
            )
        )
    calls.sort(key=lambda call: (call.started_at, call.call_id))
    ids = [call.call_id for call in calls]
    tools = tuple(
        ToolCall(
            key=KEY,
            span_id=f"{name}/0",
            parent_id=draw(st.sampled_from(ids)),
            call_id=draw(st.sampled_from(ids)),
            tool_call_id=draw(texts),
            name=draw(texts.filter(bool)),
            arguments=draw(st.sampled_from(["{}", '{"a": 1}', "a=1"])),
            result=draw(texts),
            status=draw(st.sampled_from(ToolStatus)),
            started_at=1.75e9 + number,
            ended_at=1.75e9 + number,
            source="trace",
        )
        for number, name in enumerate(names[5 : 5 + draw(st.integers(0, 2))])
    )
    rewards = tuple(
        Reward(key=KEY, span_id=f"r{n}", name=draw(texts.filter(bool)), value=draw(floats), about=ids[0], at=1.75e9 + n)
        for n in range(draw(st.integers(0, 2)))
    )
    return Trajectory(
        key=KEY,
        task_id=draw(texts.filter(bool)),
        calls=tuple(calls),
        reward=draw(st.none() | floats),
        outcome=draw(st.sampled_from(Outcome)),
        error=draw(texts),
        output=draw(texts),
        started_at=1.7e9,
        ended_at=1.9e9,
        tools=tools,
        rewards=rewards,
        agents=agents,
    )


def plain(trajectory: Trajectory) -> dict[str, Any]:
    return dict(json.loads(to_line(trajectory)))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rollouts())
def test_a_rollout_that_leaves_as_json_comes_back_the_same(trajectory: Trajectory) -> None:
    assert plain(from_row(plain(trajectory))) == plain(trajectory)


def without_source(row: dict[str, Any]) -> dict[str, Any]:
    """Without what a trace says otherwise: a version is of one run only, and a trace has its own ids for spans."""
    for call in row["calls"]:
        call |= {"source": "", "policy_version": 0, "span_id": "", "new_versions": []}
        call["request"], call["reply"] = (_value(call[name]) for name in ("request", "reply"))
    return row


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rollouts())
def test_a_rollout_that_leaves_as_otlp_comes_back_the_same(trajectory: Trajectory) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, count = write([trajectory], Path(folder), "otlp")
        (report,) = read_files([path])
        read_strictly(path.read_text())
    assert count == 1
    assert all(reason.startswith("repaired: a model call ") for reason in report.refused)  # as the strategy draws them
    (rollout,) = report.rollouts
    assert rollout.trajectory.key == KEY
    assert without_source(plain(rollout.trajectory)) == without_source(plain(trajectory))


def a_rollout() -> Trajectory:
    call = model_call(KEY, [1, 2], [3], agent="writer", started_at=10.0, call_id="chatcmpl-1")
    call = replace(call, request=compact(REQUEST), reply=compact(REPLY), finish_reason="tool_calls")
    last = replace(model_call(KEY, [1, 2, 3, 4], [5], agent="writer", started_at=12.0, call_id="chatcmpl-2"))
    last = replace(last, request=compact(ANSWERED), reply=compact({"role": "assistant", "content": "2"}))
    return replace(trajectory(KEY, call, last), started_at=9.0, ended_at=13.0)


def test_an_exported_trace_speaks_the_genai_conventions() -> None:
    root, span, *_ = to_spans(a_rollout())
    assert (root.name, span.parent_id) == ("rollout", root.span_id)
    assert json.loads(span.attributes["gen_ai.input.messages"])[1] == {
        "role": "user",
        "parts": [{"type": "text", "content": "1+1?"}],
    }
    assert json.loads(span.attributes["gen_ai.output.messages"]) == [
        {
            "role": "assistant",
            "parts": [{"type": "tool_call", "id": "c0", "name": "add", "arguments": '{"a":1}'}],
            "finish_reason": "tool_calls",
        }
    ]
    assert "agl.request" not in span.attributes
    assert (span.attributes["gen_ai.usage.input_tokens"], span.attributes["agl.prompt_token_ids"]) == (2, "[1, 2]")
    traces, refused = otlp.decode(to_otlp(a_rollout()).encode(), content_type=otlp.JSON, max_bytes=10**6, max_spans=10)
    assert ([len(spans) for spans in traces.values()], refused) == ([4], {})


@pytest.mark.parametrize("form", FILES)
def test_no_export_shows_the_secret_of_a_rollout(form: Format, tmp_path: Path) -> None:
    secret = "0123456789abcdef" * 2
    url = f"http://127.0.0.1:8000/rollout/train-3-1/attempt/2/{secret}/agent/v1"
    call = replace(a_rollout().calls[0], request=compact([{"role": "user", "content": f"Use {url}."}]), error=url)
    tool = ToolCall(
        key=KEY,
        span_id="t",
        name="get",
        arguments=json.dumps({"url": url}),
        result=url,
        status=ToolStatus.OK,
        started_at=0,
        ended_at=0,
        source="request",
    )
    trajectory = replace(a_rollout(), calls=(call,), tools=(tool,), output=url, error=f"cannot reach {url}")
    path, _ = write([trajectory], tmp_path, form)
    text = path.read_text()
    assert "attempt/2/***/agent" in text
    assert secret not in text


@pytest.mark.parametrize("row", [{}, {"rollout_id": 3}, {"rollout_id": "train-0-0", "attempt": 0, "calls": [{}]}])
def test_a_row_that_is_no_rollout_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="no exported rollout"):
        from_row(row)


@pytest.mark.parametrize("value", [1e16, -1e300, math.inf, math.nan])
def test_a_row_with_a_reward_that_no_step_can_use_is_refused(value: float) -> None:
    row = plain(a_rollout())
    emitted = {"span_id": "r", "value": value, "at": 0.0}
    for refused in ({**row, "reward": value}, {**row, "rewards": [emitted]}):
        with pytest.raises(DataError, match=r"no exported rollout: a reward is not a finite number up to 1e\+15"):
            from_row(refused)


def test_token_ids_that_no_vocabulary_has_are_refused() -> None:
    row = plain(a_rollout())
    for ids in ([-1], [2**31], ["x"], [0.5]):
        row["calls"][0]["prompt_T"] = ids
        with pytest.raises(DataError):
            from_row(row)


def test_chats_for_a_warm_start_are_finished_whole_and_once(tmp_path: Path) -> None:
    cut = replace(a_rollout().calls[1], call_id="cut", finish_reason="length", reply=compact({"content": "2.0000"}))
    failed = replace(a_rollout().calls[1], call_id="failed", error="overloaded", reply="")
    again = replace(a_rollout(), key=replace(KEY, index=2), calls=a_rollout().calls[1:])
    path, _ = write([replace(a_rollout(), calls=(*a_rollout().calls, cut, failed)), again], tmp_path, "jsonl")
    (report,) = read_files([path])
    (row,) = conversations(report.rollouts)
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert row["reward"] == 1.0
    assert row["messages"][2]["content"] == ""


def test_a_rollout_is_imported_once_and_others_get_free_numbers(tmp_path: Path) -> None:
    own, _ = write([replace(a_rollout(), key=replace(KEY, group=0))], tmp_path, "jsonl")
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"request": {"messages": REQUEST}, "response": {"choices": []}}] * 2))
    reports = read_files([own, other, own])
    assert [[rollout.trajectory.key.group for rollout in report.rollouts] for report in reports] == [[0], [1, 2], []]
    assert dict(reports[2].refused) == {"a rollout for the second time": 1}


@pytest.mark.parametrize("place", ["{}", "file://{}", "local://{}", "memory://runs/run"])
def test_the_commands_take_a_run_out_and_in_again(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    writer = RolloutWriter(run / "rollouts")
    writer.write(1, 0, [group(replace(a_rollout(), reward=0.0))])
    writer.write(1, 0, [group(a_rollout())])  # as a run that was resumed does
    assert [trajectory.reward for trajectory in read_trajectories(run)] == [1.0]
    fsspec.filesystem("memory").put(str(run), "/runs/run", recursive=True)
    for form, name in FILES.items():
        assert main(["export", place.format(run), "--out", str(tmp_path / form), "--format", form]) == 0
        assert main(["import", str(tmp_path / form / name), "--out", str(tmp_path / "in")]) == 0
        (again,) = read_files([tmp_path / "in" / "rollouts.jsonl"])[0].rollouts
        assert [call.call_id for call in again.trajectory.calls] == ["chatcmpl-1", "chatcmpl-2"]
        (chat,) = (tmp_path / "in" / "sft.jsonl").read_text().splitlines()
        assert json.loads(chat)["messages"][-1] == {"role": "assistant", "content": "2"}
    assert "1 rollouts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("experiment", "arguments", "words"),
    [
        ("toy", [], "a toy model is a table"),
        (
            "calc_tiny",
            ["--checkpoint", "7"],
            r"step-000007/state\.json cannot be read .*; complete checkpoints: step-000004",
        ),
        ("calc_tiny", [], r"step-000004 cannot be exported: FileNotFoundError"),
        ("", [], "is no run: it has no config.yaml"),
    ],
)
def test_a_model_that_cannot_be_exported_is_one_line(
    experiment: str, arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint_folder(tmp_path / "checkpoints", 4)
    folder.mkdir(parents=True)
    write_state(folder, State(cursor=TaskCursor(seed=0), step=4))
    if experiment:
        (tmp_path / "config.yaml").write_text(to_yaml(load([f"experiment={experiment}"])))
    for place in (f"{tmp_path}", f"file://{tmp_path}", f"local://{tmp_path}"):  # the last is read as s3:// is
        assert main(["export", place, "--model", str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err
        assert re.search(words, error)
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["import", "{folder}/none.json"], "No such file"),
        (["import", "{folder}/empty.json"], "there is nothing in it"),
        (["import", "{folder}/text.txt"], "1 a record of no known format"),
        (["import", "{folder}/bytes.pb"], "1 a record of no known format"),
        (["export", "{folder}"], "no rollouts at"),
        (["export", "{folder}", "--checkpoint", "3"], "--checkpoint, --dtype and --merged are of --model DIR"),
    ],
)
def test_files_with_nothing_to_read_are_refused_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "text.txt").write_text("hello\nworld\n")
    (tmp_path / "bytes.pb").write_bytes(bytes(range(256)))
    assert main([*(argument.format(folder=tmp_path) for argument in arguments), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert not (tmp_path / "out").exists()
