"""The files of a run, its metric sinks, its terminal output, its summary and its pictures."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import group, trajectory
from rich.console import Console

from agent_lightning.config.learning import CreditConfig
from agent_lightning.config.load import load
from agent_lightning.config.running import TrackingConfig
from agent_lightning.core.errors import DataError, UserError
from agent_lightning.core.types import Group, ModelCall, Outcome, RolloutKey, Split, Task, Trajectory
from agent_lightning.credit.assign import NO_SELECTED_CALL, NO_SPREAD, STALE, CreditRules
from agent_lightning.credit.samples import OVERLONG_SAMPLE
from agent_lightning.run.archive import RolloutWriter, read_group, read_rollouts
from agent_lightning.run.observer import RunObserver, summarize
from agent_lightning.run.plots import draw_curve, new_figure, plot_learning_curve, read_metrics, smooth
from agent_lightning.run.report import (
    DROPPED_BECAUSE,
    Progress,
    RolloutCounts,
    StepSeconds,
    Summary,
    duration,
    number,
    report,
    sparkline,
    untrained,
)
from agent_lightning.run.sampler import Evaluation
from agent_lightning.run.state import State
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.run.tracking import JsonLines, RunDirectory, TensorBoardSink, Tracker, WandbSink

SUMMARY = Summary(
    experiment="calc_x",
    seed=0,
    steps=100,
    wall_s=1440.2,
    val_reward_first=0.213,
    val_reward_last=0.402,
    val_rows=237,
    rollouts=RolloutCounts(admitted=6400, trained=6388, dropped={"stale": 12}, failed={"agent_error": 1, "timeout": 3}),
    sampled_tokens=1_234_567,
    trained_tokens=1_200_000,
    max_abs_logprob_gap=0.31,
    mean_abs_logprob_gap=0.0021,
    step_s=StepSeconds(total=12.3, generate=8.1, update=3.2, publish=0.5, other=0.5),
    versions=100,
    start_s=43.2,
    val_reward_best=0.41,
    val_ci95_first=0.0521,
    val_ci95_last=0.0624,
)


# The folder of a run


def test_a_run_folder_is_never_reused(tmp_path: Path) -> None:
    runs = [RunDirectory.create(tmp_path / "runs", "calc_x", 7) for _ in range(5)]
    named = [RunDirectory.create(tmp_path / "runs", "calc_x", 7, "first").path.name for _ in range(3)]
    assert len({run.path for run in runs}) == 5
    assert all(run.path.name.startswith("calc_x-s7-20") for run in runs)
    assert named == ["first", "first-2", "first-3"]
    assert all(folder.is_dir() for folder in (runs[0].rollouts, runs[0].checkpoints, runs[0].logs))


def test_the_folder_of_a_run_is_its_owners(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "new" / "runs", "calc_x", 0)
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_an_experiment_in_a_folder_gives_one_folder_name(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path, "team/calc x", 0).path.parent == tmp_path


@pytest.mark.parametrize("name", ["", "..", "a/b", "-rf", "a b"])
def test_a_bad_run_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="run name"):
        RunDirectory.create(tmp_path, "calc_x", 0, name)


def test_open_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run: it has no config\.yaml$"):
        RunDirectory.open(tmp_path)
    run = RunDirectory.create(tmp_path, "calc_x", 0)
    run.config.write_text("seed: 0\n")
    assert RunDirectory.open(run.path).path == run.path


def test_a_root_that_is_no_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for root in ("runs", "link"):
        with pytest.raises(UserError, match="cannot make a run folder"):
            RunDirectory.create(tmp_path / root, "calc_x", 0)


# Numbers


def test_json_lines_are_valid_json_and_flushed(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.log(1, {"train/reward": 0.5, "val/reward": math.nan, "gap": math.inf})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())  # before close: a killed run keeps its lines
    sink.close()
    assert line["step"] == 1
    assert line["train/reward"] == 0.5
    assert line["val/reward"] is None
    assert line["gap"] is None
    assert line["wall_s"] >= 0


def test_a_resumed_run_removes_the_lines_of_steps_that_run_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall_s": 1.0}\n{"step": 2, "wall_s": 2.0}\n{"step": 3, "wall_s": 3.0}\n{"ste')
    sink = JsonLines(path, resumed_step=2)
    sink.log(3, {"a": 1.0})
    sink.close()
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"step": 1, "wall_s": 1.0}', '{"step": 2, "wall_s": 2.0}']
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_resumed_run_writes_on_after_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "wall_s": 100.0, "train/reward": 0.5}\n{"step": 2, "wal')
    sink = JsonLines(path)
    sink.log(2, {"train/reward": 0.75})
    sink.close()
    rows = read_metrics(path)
    assert [(row["step"], row["train/reward"]) for row in rows] == [(1, 0.5), (2, 0.75)]
    assert rows[1]["wall_s"] >= 100


@pytest.mark.parametrize(
    "line", [b'{"ste', b"[]", b"7", b"null", b'{"step": "2"}', b'{"step": 1e999}', b"{}", b"\xff\0"]
)
def test_a_broken_line_costs_itself(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "wall_s": 1.0, "a\xe2\x80\xa8b": 1}\n' + line + b'\n{"step": 2, "wall_s": 2.0}\n')
    if line != b'{"step": "2"}':
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
    JsonLines(path, resumed_step=2).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_lines_of_one_step_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "a": 1}\n{"step": 1, "a": null}\nnot json\n[1]\n{"step": 2, "a": 3, "val/reward": 0.5}\n'
    )
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2]
    assert math.isnan(rows[0]["a"])
    assert rows[1] == {"wall_s": 0.0, "step": 2, "a": 3, "val/reward": 0.5}
    with pytest.raises(DataError):
        read_metrics(tmp_path / "none.jsonl")


class FullDisk:
    """A sink that fails like a full disk."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


def test_a_failing_sink_is_warned_about_once_and_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, path = FullDisk(), tmp_path / "metrics.jsonl"
    tracker = Tracker([broken, JsonLines(path)])
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            tracker.log(step, {"a": 1.0})
        tracker.close()
    assert broken.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "FullDisk stopped at step 1: OSError(28, 'No space left on device')"
    ]
    assert len(read_metrics(path)) == 3


def test_a_sink_that_cannot_close_does_not_keep_the_others_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    after = JsonLines(tmp_path / "metrics.jsonl")
    Tracker([FullDisk(), after]).close()
    assert "did not close" in caplog.text
    with pytest.raises(ValueError, match="closed file"):
        after.log(1, {})


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    sink.log(1, {"train/reward": 0.25})
    sink.log(2, {"train/reward": 0.5})
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/reward")
    assert [(event.step, event.value) for event in events] == [(1, 0.25), (2, 0.5)]


def test_wandb_offline_is_silent_and_a_resumed_run_continues_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create(tmp_path, "calc_x", 0)
    for step in (1, 2):
        tracking = TrackingConfig(project="p", group="calc_x", tags=("cpu",))
        sink = WandbSink(run, tracking, {"seed": 0, "loop": {"steps": 2}})
        sink.log(step, {"train/reward": math.nan})
        sink.close()
    assert capfd.readouterr() == ("", "")
    written = list(run.logs.glob("wandb/offline-run-*/*.wandb"))
    assert written
    assert {file.name for file in written} == {f"run-{(run.logs / 'wandb-id').read_text()}.wandb"}
    assert b"train/reward" in b"".join(file.read_bytes() for file in written)


def test_wandb_disabled_writes_nothing(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "calc_x", 0)
    sink = WandbSink(run, TrackingConfig(wandb="disabled"), {})
    sink.log(1, {"train/reward": 1.0})
    sink.close()
    assert not (run.logs / "wandb").exists()


def test_importing_is_free_and_tensorboard_needs_no_torch(tmp_path: Path) -> None:
    script = f"""
import sys, pathlib
import agent_lightning.run.tracking, agent_lightning.run.plots, agent_lightning.run.report
heavy = ("torch", "tensorflow", "wandb", "pyarrow", "matplotlib", "tensorboard")
assert not [name for name in heavy if name in sys.modules]
sink = agent_lightning.run.tracking.TensorBoardSink(pathlib.Path({str(tmp_path)!r}))
sink.log(1, {{"a": 1.0}})
sink.close()
assert not [name for name in ("torch", "tensorflow") if name in sys.modules]
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# Rollouts


def a_group(number: int, rewards: tuple[float | None, ...] = (1.0, None)) -> Group:
    def rollout(index: int, reward: float | None) -> Trajectory:
        key = RolloutKey(split="train", group=number, index=index, attempt=1)
        call = ModelCall(
            key=key,
            call_id=f"call-{number}-{index}",
            agent="solver",
            policy_version=2,
            prompt_T=np.array([5, 6], np.int32),
            response_T=np.array([7, 8, 9], np.int32),
            logprob_T=np.array([-0.5, -0.25, -1.0], np.float32),
            finish_reason="stop",
            started_at=10.0,
            ended_at=11.5,
            request='[{"role": "user"}]',
            reply="half a pair \ud83d",
            offered=('{"function":{"name":"\ud83d"}}',),
            last_version=4,
            new_versions=((1, 3), (2, 4)),
        )
        return Trajectory(
            key=key,
            task_id=f"task-{number}",
            calls=(call,) if reward is not None else (),
            reward=reward,
            outcome=Outcome.FINISHED if reward is not None else Outcome.NO_MODEL_CALL,
            output="4",
        )

    task = Task(task_id=f"task-{number}", payload={"question": "2+2", "path": Path("a")})
    trajectories = tuple(rollout(index, reward) for index, reward in enumerate(rewards))
    return Group(group_id=f"train-{number}", task=task, trajectories=trajectories)


def test_after_pass_at_steps_each_rollout_counts_by_itself(tmp_path: Path) -> None:
    rules = CreditRules(credit=CreditConfig(pass_at=2, pass_at_steps=5))
    assert [rules.at(step).credit.pass_at for step in (1, 5, 6)] == [2, 2, 1]
    assert rules.at(6).credit.scale == rules.credit.scale
    writer, rewards = RolloutWriter(tmp_path), (1.0, 1.0, 0.0)  # the best of any two is 1: nothing to learn
    for step in (5, 6):
        writer.write(step, 0, [a_group(step, rewards)], rules)
    credits = [row["calls"][0]["credit"] for row in read_rollouts(tmp_path).to_pylist()]
    assert [credit["status"] for credit in credits] == ["no_spread"] * 3 + ["trained"] * 3


def test_rollouts_come_back_exactly(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "calc_x", 0)
    writer = RolloutWriter(run.rollouts)
    rules = CreditRules(credit=CreditConfig(scale="none"))
    assert writer.write(1, 0, [a_group(0), a_group(1)], rules) == run.rollouts / "part-00000.parquet"
    assert writer.write(2, 1, []) is None
    assert RolloutWriter(run.rollouts).write(2, 1, [a_group(2)]) == run.rollouts / "part-00001.parquet"
    rows = read_rollouts(run.path).to_pylist()
    assert read_rollouts(run.rollouts).to_pylist() == rows
    assert [row["rollout_id"] for row in rows] == [f"train-{g}-{i}" for g in range(3) for i in range(2)]
    assert [row["step"] for row in rows] == [1, 1, 1, 1, 2, 2]
    first, second = rows[:2]
    assert json.loads(first["task"]) == {"question": "2+2", "path": "a"}
    assert (first["split"], first["attempt"], first["task_id"], first["num_calls"]) == ("train", 1, "task-0", 1)
    assert first["calls"][0]["prompt_ids"] == [5, 6]
    assert first["calls"][0]["response_ids"] == [7, 8, 9]
    assert first["calls"][0]["logprobs"] == [-0.5, -0.25, -1.0]
    assert first["calls"][0]["policy_version"] == 2
    assert first["calls"][0]["reply"] == "half a pair ?"
    assert first["calls"][0]["offered"] == ['{"function":{"name":"?"}}']
    assert (first["calls"][0]["last_version"], first["calls"][0]["new_versions"]) == (4, [[1, 3], [2, 4]])
    credit = {"advantage": 0.5, "intermediate": 0.0, "return_to_go": 1.0, "status": "trained"}
    assert [row["calls"][0]["credit"] for row in (first, rows[2], rows[4])] == [credit, credit, None]
    (call,) = read_group(run.path, "train-0-0").trajectories[0].calls
    assert first["calls"][0]["learner_logprobs"] is None
    assert (call.offered, call.version_T.tolist()) == (('{"function":{"name":"?"}}',), [2, 3, 4])
    assert (second["reward"], second["outcome"], second["calls"]) == (None, "no_model_call", [])


def test_rollouts_from_before_a_column_was_added_are_read(tmp_path: Path) -> None:
    written = RolloutWriter(tmp_path).write(1, 0, [a_group(0, (1.0,))])
    rows, schema = read_rollouts(tmp_path).to_pylist(), pq.read_schema(written)
    columns = schema.field("calls").type.value_type
    before = pa.list_(pa.struct([column for column in columns if column.name not in ("new_versions", "offered")]))
    schema = schema.set(schema.get_field_index("calls"), pa.field("calls", before))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), written)
    RolloutWriter(tmp_path).write(2, 1, [a_group(1, (1.0,))])
    calls = [read_group(tmp_path, f"train-{number}-0").trajectories[0].calls[0] for number in (0, 1)]
    assert [(call.last_version, call.version_T.tolist()) for call in calls] == [(4, [2, 2, 2]), (4, [2, 3, 4])]


def test_half_a_part_is_never_read(tmp_path: Path) -> None:
    RolloutWriter(tmp_path).write(1, 0, [a_group(0)])
    (tmp_path / ".part-00001.parquet.tmp").write_bytes(b"PAR1 cut off")
    assert read_rollouts(tmp_path).num_rows == 2
    with pytest.raises(DataError, match="no rollouts"):
        read_rollouts(tmp_path / "elsewhere")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"half a pair") if b"half a pair" in content else 200] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [cut, flip, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PAR1")]
)
def test_a_broken_part_costs_itself_and_is_named(
    harm: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = RolloutWriter(tmp_path)
    parts = [writer.write(step, 0, [a_group(step)]) for step in range(3)]
    assert parts[1] is not None
    harm(parts[1])
    assert read_rollouts(tmp_path).column("step").to_pylist() == [0, 0, 2, 2]
    assert f"{parts[1]} is broken" in caplog.text
    assert len(caplog.records) == 1
    with pytest.raises(DataError, match=re.escape(f"{parts[1]} is broken")):
        read_rollouts(parts[1])
    assert RolloutWriter(tmp_path).write(3, 0, [a_group(3)]) == tmp_path / "part-00003.parquet"


# The picture


@pytest.mark.parametrize("num_steps", [0, 1, 250])
def test_the_picture_has_its_size_whatever_was_logged(tmp_path: Path, num_steps: int) -> None:
    from matplotlib.image import imread

    sink = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, num_steps + 1):
        record = {"train/reward": step / 250, "logprob_gap/mean_abs": 0.01, "logprob_gap/max_abs": 0.0}
        record |= {"time/generate": 8.0, "time/update": math.nan, "val/reward": 0.5 if step % 50 == 0 else math.nan}
        record |= {"train/reward_ci95": 0.1 if step % 3 else math.nan, "val/reward_ci95": 0.1}
        sink.log(step, record)
    sink.close()
    plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", "calc_x")
    picture = imread(tmp_path / "curve.png")
    assert picture.shape[:2] == (700, 1200)
    assert picture[..., :3].std() > 0.01


@pytest.mark.parametrize(("num_steps", "window"), [(1, 1), (4, 1), (250, 17)])
def test_the_curves_have_bands_of_their_intervals(num_steps: int, window: int) -> None:
    rows = [{"step": float(step), "train/reward": 0.5, "train/reward_ci95": 0.2} for step in range(num_steps)]
    rows[0] |= {"val/reward": 0.3, "val/reward_ci95": 0.05}
    rows[-1] |= {"val/reward": 0.4, "val/reward_ci95": math.nan}  # of a single held-out task
    axes = new_figure("").add_subplot()
    draw_curve("reward", axes, rows)
    train = axes.collections[0].get_datalim(axes.transData)
    half = 0.2 / min(num_steps, window) ** 0.5  # of the mean over a window, steps being independent
    assert (train.x0, train.x1) == (0, num_steps - 1)
    if num_steps > 1:
        last = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert (last.min(), last.max()) == pytest.approx((0.3, 0.7)), "the first steps have no mean of a window yet"
        assert np.isclose(last, 0.5 + half).any()
    old = new_figure("").add_subplot()
    draw_curve("reward", old, [{name: row[name] for name in row if "ci95" not in name} for row in rows])
    assert not old.collections, "metrics of an earlier version have no intervals, and no bands"


def test_smooth_skips_values_that_are_not_finite() -> None:
    assert smooth(np.array([1.0, 3.0, math.nan, 5.0]), 2).tolist() == [1.0, 2.0, 3.0, 5.0]
    assert np.isnan(smooth(np.array([math.nan]), 3)).all()
    assert smooth(np.array([]), 3).tolist() == []


# The terminal


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A text file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def text_of(console: Console) -> list[str]:
    return [line.rstrip() for line in console.export_text().splitlines()]


def trained(console: Console, clock: Clock) -> Progress:
    """A run of 100 steps after its tenth, with two evaluations."""
    progress = Progress("calc_x", 100, console=console, clock=clock)
    progress.start()
    progress.show_evaluation(0, 0.213, 237, ci95=0.0521)
    for step in range(1, 11):
        clock.now += 12.0
        record = {"train/reward": step / 10, "tokens/sampled": 12_000.0, "time/step": 12.0}
        progress.show_step(step, record | {"rollouts/failed/timeout": float(step == 3)})
    progress.show_evaluation(10, 0.402, 237)
    progress.waiting_for("generate: 3/64 rollouts")
    clock.now += 5
    progress.waiting_for("generate: 41/64 rollouts")
    clock.now += 4
    return progress


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_block_shows_the_run_at_any_width(width: int) -> None:
    console = Console(record=True, width=width, file=io.StringIO())
    progress = trained(console, Clock())
    console.export_text()  # forget the lines of the steps
    console.print(progress.render())
    lines = text_of(console)
    inside = "\n".join(line.strip("│ ") for line in lines)
    assert lines[0].startswith("╭─ calc_x ─")
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) == min(width, 88)
    assert "10/100 ━" in inside
    assert "2:09, 17:51 left" in inside
    assert "train reward  1.000  ▁▁▂▂▃▃▅▅▇▇" in inside
    assert "val reward    0.213 -> 0.402  +0.189 at step 10" in inside
    assert "sampled       1,000 tokens/s" in inside
    assert "now           generate: 41/64 rollouts  9 s" in inside
    assert "failed        timeout 1" in inside


def test_the_live_block_draws_and_stops_on_a_terminal() -> None:
    terminal = Terminal()
    progress = trained(Console(width=60, file=terminal, force_terminal=True, legacy_windows=False), Clock())
    progress.message("service ready [at] /v1")
    progress.stop()
    progress.stop()
    assert "service ready [at] /v1" in terminal.getvalue()
    assert terminal.getvalue().count("calc_x") >= 2
    assert terminal.getvalue().endswith("\x1b[?25h")  # the cursor is shown again
    assert "step 1/100  train" not in terminal.getvalue()


@pytest.mark.parametrize("force_color", [None, True])
def test_a_pipe_gets_one_plain_line_a_step_and_no_control_codes(force_color: bool | None) -> None:
    pipe = io.StringIO()
    progress = trained(Console(width=60, file=pipe, force_terminal=force_color), Clock())
    progress.message("[bold]not markup[/bold] " + "long " * 30)
    progress.stop()
    lines = pipe.getvalue().splitlines()
    assert "\x1b" not in pipe.getvalue()
    assert len(lines) == 13
    assert lines[0] == "step 0/100  held-out 0.213 ±0.052 on 237 rows"
    assert lines[1] == "step 1/100  train 0.100  12.0 s  1,000 tokens/s  gap -  left 19:48"
    assert "failed: timeout 1" in lines[3]
    assert lines[-1].startswith("[bold]not markup")


def spent(trained: int = 0, groups: int = 16, **dropped: int) -> dict[str, float]:
    record = {"tokens/trained": float(trained), "rollouts/groups": float(groups), "train/reward": 1.0}
    return record | {f"rollouts/dropped/{reason}": float(count) for reason, count in dropped.items()}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, ""),
        (spent(5, no_spread=120), ""),
        (spent(5) | {"learner/grad_norm": 0.3}, ""),
        (spent(5) | {"learner/grad_norm": 0.0}, "the gradient was zero"),
        (spent(no_spread=128), "all 16 groups had equal rewards"),
        (spent(no_spread=128, stale=0), "all 16 groups had equal rewards"),
        (spent(masked_timeout=32), "of 32 rollouts 32 masked: timeout"),
        (spent(masked_timeout=8, no_spread=24), "of 32 rollouts 24 in groups of equal rewards, 8 masked: timeout"),
        (spent(overlong_sample=4), "of 4 rollouts 4 longer than model.max_len"),
        (spent(stale=8), "of 8 rollouts 8 older than loop.drop_beyond allows"),
        (spent(no_selected_call=8), "of 8 rollouts 8 without a reply of a trained agent"),
        (spent(of_a_later_version=2), "of 2 rollouts 2 of_a_later_version"),
        (spent(), "of 0 rollouts none"),
    ],
)
def test_a_step_that_trained_nothing_says_why(record: Mapping[str, float], words: str) -> None:
    assert untrained(record) == words
    pipe, block = io.StringIO(), Console(record=True, width=88, file=io.StringIO())
    progress = Progress("calc_x", 100, console=Console(width=88, file=pipe), clock=Clock())
    progress.show_step(3, record)
    block.print(progress.render())
    assert (f"  trained nothing: {words}  left " in pipe.getvalue()) == bool(words)
    assert ("trained       nothing: " + words[:50] in block.export_text()) == bool(words)


def test_every_reason_for_which_a_rollout_is_not_trained_has_words() -> None:
    assert {NO_SPREAD, NO_SELECTED_CALL, OVERLONG_SAMPLE, STALE} == DROPPED_BECAUSE.keys()


def test_a_block_without_numbers_says_so() -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    progress = Progress("calc_x", 100, console=console, clock=Clock())
    progress.show_evaluation(0, math.nan, 0)
    progress.show_step(1, {})
    progress.show_evaluation(1, math.nan, 0)
    console.print(progress.render())
    assert "nan" not in console.export_text()


# The closing report


def test_the_report_fits_80_columns_and_says_what_was_gained(tmp_path: Path) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    run = RunDirectory.create(tmp_path, "calc_x", 0)
    SUMMARY.write(run.summary)
    console.print(report(SUMMARY, run))
    lines = text_of(console)
    assert lines[:5] == [
        " calc_x, seed 0",
        "",
        " held-out reward  0.213 ±0.052 -> 0.402 ±0.062  +18.9 points",
        " best 0.410, 237 rows, ±: 95 % interval",
        "",
    ]
    assert lines[5:12] == [
        " steps          100 in 24:00; service ready after 43 s",
        " rollouts       6,400 admitted, 6,388 trained, 12 dropped: stale 12",
        " failed         timeout 3, agent_error 1",
        " tokens         1,234,567 sampled, 1,200,000 trained",
        " log-prob gap   mean 2.1e-03, max 3.1e-01",
        " time per step  12.3 s: generate 8.1, update 3.2, publish 0.5, other 0.5",
        " policy         100 versions published",
    ]
    assert any("summary.json" in line for line in lines)
    assert any(line.startswith(" next           agl view") for line in lines)
    assert "curve.png" not in "".join(lines)  # only files that exist


def test_missing_measurements_are_shown_as_a_dash(tmp_path: Path) -> None:
    unmeasured = replace(
        SUMMARY,
        val_reward_first=math.nan,
        val_reward_last=math.nan,
        max_abs_logprob_gap=math.nan,
        start_s=math.nan,
        step_s=replace(SUMMARY.step_s, publish=math.nan),
    )
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(report(unmeasured, RunDirectory.create(tmp_path, "calc_x", 0)))
    text = console.export_text()
    assert "nan" not in text
    assert "held-out reward  - -> -\n" in text
    assert "max -" in text
    assert "publish -," in text


def test_held_out_reward_is_reported_by_the_values_of_a_field(tmp_path: Path) -> None:
    overrides = [
        "experiment=calc_tiny",
        "data.val_group_by=level",
        "tracking.wandb=disabled",
        "tracking.tensorboard=false",
    ]
    config, run = load(overrides), RunDirectory.create(tmp_path, "calc_x", 0)

    def groups(split: Split) -> list[Group]:
        ended = [("easy", 1.0), ("easy", 0.0), ("hard", 1.0)]
        made = [
            group(trajectory(RolloutKey(split=split, group=i, index=0), reward=reward))
            for i, (_, reward) in enumerate(ended)
        ]
        return [
            replace(made_group, task=Task(task_id="a", payload={"level": level}))
            for made_group, (level, _) in zip(made, ended, strict=True)
        ]

    run.config.write_text("")
    progress = Progress("calc_x", steps=1, console=Console(quiet=True))
    observer = RunObserver(config=config, run=run, progress=progress, rules=CreditRules())
    observer.record_rollouts(0, 0, groups("train"))
    assert observer.val_reward_by == {}
    observer.record_evaluation(3, Evaluation(groups("val")))
    observer.close()
    assert observer.val_reward_by == {"easy": 0.5, "hard": 1.0}
    logged = json.loads(run.metrics.read_text())
    assert (logged["step"], logged["val/reward/easy"], logged["val/reward/hard"]) == (3, 0.5, 1.0)
    assert logged["val/reward_ci95"] == pytest.approx(1.96 * (1 / 3) ** 0.5 / 3**0.5), "rewards 1, 0 and 1"
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(report(replace(SUMMARY, val_reward_by=observer.val_reward_by), run))
    assert " held-out       easy 0.500, hard 1.000" in text_of(console)


def test_a_run_whose_folder_is_removed_says_so_at_the_next_step(tmp_path: Path) -> None:
    config, run = load(["experiment=calc_tiny", "tracking.wandb=disabled"]), RunDirectory.create(tmp_path, "calc_x", 0)
    run.config.write_text("")
    progress = Progress("calc_x", steps=1, console=Console(quiet=True))
    observer = RunObserver(config=config, run=run, progress=progress, rules=CreditRules())
    observer.record_step(1, {})
    shutil.move(run.path, tmp_path / "elsewhere")
    for record in (lambda: observer.record_step(2, {}), lambda: observer.record_evaluation(2, Evaluation([]))):
        with pytest.raises(UserError, match=f"{run.path} was removed or renamed"):
            record()
    observer.close()


def test_a_summary_comes_back(tmp_path: Path) -> None:
    SUMMARY.write(tmp_path / "summary.json")
    assert Summary.read(tmp_path / "summary.json") == SUMMARY
    replace(SUMMARY, start_s=math.nan).write(tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text())["start_s"] is None
    assert math.isnan(Summary.read(tmp_path / "summary.json").start_s)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rollouts": {}}'])
def test_a_file_that_is_not_a_summary_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"is no summary of a run: [^\n]*$"):
        Summary.read(tmp_path / "summary.json")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42.3, "42 s"), (59.7, "1:00"), (192, "3:12"), (3723, "1:02:03"), (math.nan, "-")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_small_texts() -> None:
    assert number(math.nan) == "-"
    assert number(1234.5, 1) == "1,234.5"
    assert sparkline([0, 1, 2, 3, 4], 5) == "▁▂▃▅▇"
    assert sparkline([0, 0, 1, 1], 2) == "▁▇"
    assert sparkline([0.5, 0.5, math.nan], 9) == "▃▃"
    assert sparkline([], 9) == ""


@pytest.mark.parametrize(("state", "error"), [("finished", ""), ("failed", "all rollouts failed"), ("stopped", "")])
def test_a_summary_says_how_the_run_ended(tmp_path: Path, state: str, error: str) -> None:
    config = load(["experiment=toy"])
    ended = {"start_s": 1.0, "state": state, "error": error}
    summary = summarize(config, State(cursor=TaskCursor(seed=0)), val_rows=0, val_reward_by={}, **ended)
    summary.write(tmp_path / "summary.json")
    written = json.loads((tmp_path / "summary.json").read_text())
    assert (written["state"], written["error"]) == (state, error)


@pytest.mark.parametrize(
    ("ci95", "first", "last"),
    [([(0, 0.05), (4, 0.06)], 0.05, 0.06), ([(4, 0.06)], math.nan, 0.06), ([], math.nan, math.nan)],
)
def test_a_summary_has_the_intervals_of_its_rewards(
    ci95: list[tuple[int, float]], first: float, last: float, tmp_path: Path
) -> None:
    """A resumed run of an earlier version has none of its first evaluations."""
    state = State(cursor=TaskCursor(seed=0), val_rewards=[(0, 0.2), (4, 0.3)], val_ci95=ci95)
    summary = summarize(load(["experiment=toy"]), state, val_rows=9, val_reward_by={}, start_s=1.0)
    assert (summary.val_ci95_first, summary.val_ci95_last) == pytest.approx((first, last), nan_ok=True)
    summary.write(tmp_path / "summary.json")
    again = Summary.read(tmp_path / "summary.json")
    assert again.held_out == summary.held_out
    values = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps({k: v for k, v in values.items() if "ci95" not in k}))
    assert Summary.read(tmp_path / "old.json").held_out == "0.200 -> 0.300"
