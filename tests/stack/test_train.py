"""`agl train` on the real stack: a run that is stopped by Ctrl-C and resumed to its end, and a run at its wits' end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent_lightning.config.load import load
from agent_lightning.launch.checks import load_tasks
from agent_lightning.run.archive import read_rollouts
from agent_lightning.run.tasks import TaskCursor

pytestmark = [pytest.mark.stack, pytest.mark.timeout(580)]
ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=calc_tiny",
    "data.train.num=400",
    "data.val.num=24",
    "algorithm.tasks_per_step=8",
    "algorithm.rollouts_per_batch=32",
    "eval_every=2",
]


def agl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agent_lightning", *arguments]


def records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for_step(run: Path, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it was stopped"
        if any("train/reward" in record and record["step"] >= step for record in records(run)):
            return
        time.sleep(0.5)
    pytest.fail("no step within 300 s")


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def none_left(processes: list[psutil.Process]) -> list[str]:
    _, alive = psutil.wait_procs(processes, timeout=20)
    return [f"{p.pid} {p.name()}" for p in alive if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, list[str]]]:
    """A run that got Ctrl-C after its first step: its folder, its exit code, and the processes it left."""
    folder = tmp_path_factory.mktemp("runs")
    command = agl("train", *SMALL, "steps=50", f"runs_dir={folder}", "name=run")
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        wait_for_step(folder / "run", process, 1)
        started = descendants(process.pid)
        os.kill(process.pid, signal.SIGINT)
        code = process.wait(timeout=120)
        yield folder / "run", code, none_left(started)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_leaves_a_checkpoint_and_no_process(stopped: tuple[Path, int, list[str]]) -> None:
    run, code, left = stopped
    assert code == 130
    assert left == []
    *_, checkpoint = sorted((run / "checkpoints").iterdir())
    state = json.loads((checkpoint / "state.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert state["step"] == summary["steps"] >= 1
    assert_accounted(summary)


@pytest.mark.slow
def test_the_run_goes_on_from_there_and_keeps_its_books(stopped: tuple[Path, int, list[str]]) -> None:
    run, _, _ = stopped
    before = json.loads((run / "summary.json").read_text())
    steps = before["steps"] + 2
    subprocess.run(agl("train", f"resume={run}", f"steps={steps}"), cwd=ROOT, check=True)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == steps
    assert summary["val_reward_first"] == before["val_reward_first"]
    assert summary["sampled_tokens"] > before["sampled_tokens"]
    assert summary["mean_abs_logprob_gap"] < 1e-3
    assert summary["max_abs_logprob_gap"] < 2e-2
    assert summary["versions"] > before["versions"]
    assert_accounted(summary)
    assert_files(run)
    assert_none_is_repeated_or_missing(run, steps)


def assert_none_is_repeated_or_missing(run: Path, steps: int) -> None:
    """Each step has the tasks that it would have had without the interruption, and each of their rollouts once."""
    rows = [row for row in read_rollouts(run).to_pylist() if row["split"] == "train"]
    assert len({row["rollout_id"] for row in rows}) == len(rows)
    tasks, cursor = load_tasks(load(SMALL), "train"), TaskCursor(seed=0)
    for step in range(1, steps + 1):
        wanted = Counter({task.task_id: 8 for task in cursor.next(tasks, 8)})
        assert Counter(row["task_id"] for row in rows if row["step"] == step) == wanted, step


def assert_accounted(summary: dict[str, Any]) -> None:
    rollouts = summary["rollouts"]
    assert rollouts["admitted"] == rollouts["trained"] + sum(rollouts["dropped"].values())
    assert 0 < summary["trained_tokens"] <= summary["sampled_tokens"]


def assert_files(run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "curve.png"):
        assert (run / name).stat().st_size > 0, name
    table = read_rollouts(run).to_pylist()
    assert {row["split"] for row in table} == {"train", "val"}
    trained = [row for row in table if row["split"] == "train" and row["outcome"] == "finished"]
    versions = set()
    for row in trained:
        for call in row["calls"]:
            assert len(call["response_ids"]) == len(call["logprobs"]) > 0
            versions.add(call["policy_version"])
    assert len(versions) > 1, "later rollouts must be of later versions"
    assert any("calculator" in call["reply"] for row in trained for call in row["calls"])
