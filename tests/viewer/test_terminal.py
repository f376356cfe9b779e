"""agl runs and agl explain, on the files of a run of the toy world's nouns."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType
from viewer_runs import write_run, write_sweep

from agent_lightning.api.cli.main import main
from agent_lightning.api.viewer.decode import decoder
from agent_lightning.api.viewer.terminal import coloured, explain, list_runs, token_counts
from agent_lightning.config.load import load, to_yaml
from agent_lightning.core.types import Group, ModelCall, Outcome, RolloutKey, Task, Trajectory
from agent_lightning.credit.assign import CallCredit
from agent_lightning.credit.tools import tool_calls
from agent_lightning.run.archive import RolloutWriter, read_group
from agent_lightning.run.tracking import RunDirectory, take_folder

DECODE = decoder(Path(__file__).parents[2] / "examples/calc_x/tiny_policy/tokenizer.json")
TOOL_CALLS = [{"id": "t", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1/0"}'}}]


def call(key: RolloutKey, n: int, *, agent: str, request: object, reply: object) -> ModelCall:
    return ModelCall(
        key=key,
        call_id=f"{key.rollout_id}-{n}",
        agent=agent,
        policy_version=3,
        prompt_T=np.array([key.index, n], np.int32),
        response_T=np.array([7, 8, 9], np.int32),
        logprob_T=np.array([-0.1, -2.0, -0.1], np.float32),
        finish_reason="stop",
        started_at=100.0 + n,
        ended_at=100.5 + n,
        request=json.dumps(request),
        reply=json.dumps(reply),
    )


def trajectory(index: int, reward: float | None) -> Trajectory:
    key = RolloutKey(split="train", group=4, index=index)
    result = {"role": "tool", "tool_call_id": "t", "content": "error: division by zero"}
    calls = (
        call(key, 0, agent="solver", request=[], reply={"content": None, "tool_calls": TOOL_CALLS}),
        call(key, 1, agent="judge", request=[], reply={"content": "fine"}),
        call(key, 2, agent="solver", request=[result], reply={"content": "The answer is 0."}),
    )
    finished = reward is not None
    return Trajectory(
        key=key,
        task_id="t4",
        calls=calls,
        reward=reward,
        outcome=Outcome.FINISHED if finished else Outcome.ENGINE_ERROR,
        error="" if finished else "the engine is gone",
        output="The answer is 0." if finished else "",
        started_at=100.0,
        ended_at=103.0,
        tools=tool_calls(calls),
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    directory = RunDirectory.create(tmp_path, "calc_tiny", 0, "first")
    directory.config.write_text(
        to_yaml(load(["experiment=calc_tiny", "credit=air", "credit.scale=none", "agent.trained=solver"]))
    )
    rollouts = tuple(trajectory(index, reward) for index, reward in enumerate([1.0, 0.0, None]))
    group = Group(
        group_id="train-4", task=Task(task_id="t4", payload={"question": "What is 1/0?"}), trajectories=rollouts
    )
    RolloutWriter(directory.rollouts).write(1, 3, [group])
    return directory.path


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setenv("COLUMNS", "140")
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def as_text(part: RenderableType, width: int = 140) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(part)
    return console.export_text()


def test_a_group_comes_back_as_it_was(run: Path) -> None:
    group = read_group(run, "train-4-1")
    assert [trajectory.key.rollout_id for trajectory in group.trajectories] == ["train-4-0", "train-4-1", "train-4-2"]
    assert group.task == Task(task_id="t4", payload={"question": "What is 1/0?"})
    first = trajectory(0, 1.0)
    assert group.trajectories[0].calls[2].request == first.calls[2].request
    assert group.trajectories[0].calls[2].response_T.tolist() == first.calls[2].response_T.tolist()


def test_explain_shows_spans_rewards_advantages_and_token_counts(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(capsys, monkeypatch, "explain", run, "train-4-0")
    assert "finished  reward 1.000" in text
    assert "What is 1/0?" in text
    assert 'tool  calculator  error  {"expression": "1/0"} → error: division by zero' in text
    lines = [line.split() for line in text.splitlines()]
    rows = [line for line in lines if line and line[0] in ("0", "1", "2")]
    # Returns 0.95 and 1.0 against -0.05 and 0.0 of the other rollout: the baseline is 0.475.
    assert rows[0] == ["0", "error", "-0.050", "0.950", "+0.475", "3", "trained"]
    assert rows[1] == ["1", "1.000", "+0.000", "3", "not", "selected"]
    assert rows[2] == ["2", "1.000", "+0.525", "3", "trained"]
    assert "tokens: 6 sampled = 6 trained; 3 not selected" in text


@pytest.mark.parametrize("width", [60, 80, 99, 140])
def test_each_span_of_the_waterfall_is_one_line(
    width: int, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["explain", str(run), "train-4-0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    head = next(number for number, line in enumerate(lines) if "seconds" in line)
    spans = [line for line in lines[head + 1 :] if re.match(r" *\d\.\d\d  ", line)]
    assert spans == lines[head + 1 : head + 5], "three calls and a tool, and no line that goes on"
    assert all("━" in line for line in spans)
    assert "model  solver  v3" in spans[0]
    assert "error: division by zero" in "".join(lines), "cut in the waterfall, and with the messages"


def test_a_masked_rollout_says_why(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(capsys, monkeypatch, "explain", run, "train-4-2")
    assert "the engine is gone" in text
    assert "tokens: 6 sampled = 0 trained + 6 masked_engine_error; 3 not selected" in text


def test_tokens_are_coloured_by_advantage(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "+0.475  " in shown(capsys, monkeypatch, "explain", run, "train-4-0", "--tokens").splitlines()[-3]
    group = read_group(run, "train-4-0")
    credit = CallCredit(call_id="a", intermediate=0, return_to_go=1, advantage=-1.0, tokens=3, status="trained")
    console = Console(width=100, force_terminal=True, color_system="standard", record=True)
    console.print(coloured(group.trajectories[0].calls[:1], [credit], DECODE))
    styles = console.export_text(styles=True)
    assert "\x1b[31m" in styles  # red
    assert "\x1b[4;31m" in styles  # and unlikely


def test_what_only_the_critic_knew_is_not_made_up() -> None:
    key = RolloutKey(split="train", group=4, index=0)
    calls = (call(key, 0, agent="solver", request=[], reply={"content": "0"}),)
    credit = CallCredit(call_id="a", intermediate=0, return_to_go=1, advantage=math.nan, tokens=3, status="trained")
    rollout = Trajectory(key=key, task_id="t", calls=calls, reward=1.0, outcome=Outcome.FINISHED)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(explain(rollout, Task(task_id="t", payload={}), [credit]))
    console.print(coloured(calls, [credit], DECODE))
    text = console.export_text()
    assert "by the critic" in text
    assert "nan" not in text


def test_token_counts_add_up() -> None:
    def credit(tokens: int, status: str) -> CallCredit:
        return CallCredit(call_id="", intermediate=0, return_to_go=0, advantage=0, tokens=tokens, status=status)

    credits = [credit(20, "trained"), credit(11, "overlong_sample"), credit(7, "not selected"), credit(2, "trained")]
    assert str(token_counts(credits)) == "tokens: 33 sampled = 22 trained + 11 overlong_sample; 7 not selected"


def test_runs_lists_runs_and_filters_rollouts(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(run.parent)
    write_run(run.parent, "done", steps=2)
    write_run(run.parent, "bad", steps=1, error="the reward failed")
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 1, "wall_s": 65.0, "val/reward": 0.5, "val/rows": 4, "val/reward_ci95": 0.125}\n')
    for width in (80, 140):
        lines = [line.split() for line in as_text(list_runs(run.parent), width).splitlines()]
        rows = {line[0]: line for line in reversed(lines)}  # a note's last line may be the end of the run's path
        assert rows["first"][-4:] == ["0.500", "±0.125", "1:05", "killed"], "one evaluation is one figure"
        assert rows["done"][1:6] == ["calc_tiny", "0", "2/2", "0.000", "->"]
        assert rows["done"][-1] == "finished"
        assert rows["bad:"] == ["bad:", "the", "reward", "failed"]
        assert rows["sweep-calc_tiny"][-1] == "finished"
        assert rows["sweep-calc_tiny:"][1:6] == ["2", "of", "2", "trials", "ended;"]
        assert rows["first:"][1:6] == ["it", "ended", "without", "a", "summary;"]
    with take_folder(run, "run"):
        rows = {line.split()[0]: line for line in reversed(as_text(list_runs(run.parent)).splitlines())}
        assert rows["first"].split()[-1] == "running"
    assert "3 of 3 rollouts: 2 finished, 1 engine_error" in shown(capsys, monkeypatch, "runs", run)
    text = shown(capsys, monkeypatch, "runs", run, "--max-reward", "0.5")
    assert "train-4-1" in text
    assert "1 of 3 rollouts: 1 finished" in text
    assert "the engine is gone" in shown(capsys, monkeypatch, "runs", run, "--outcome", "engine_error")
    assert "0 of 3 rollouts" in shown(capsys, monkeypatch, "runs", run, "--split", "val")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "{run}", "train-9-9"), "has no rollout train-9-9; `agl runs "),
        (("explain", "{run}/rollouts", "train-4-0"), "is no run: it has no config.yaml"),
        (("runs", "{run}/rollouts"), "no runs in "),
    ],
)
def test_bad_input_is_one_line(
    run: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
