"""kill -9 of every process of a run, as the out-of-memory killer does it: `agl train` goes on, or is resumed. Ctrl-C
while it starts.


The toy model's run has all processes but vLLM's and veRL's, which the last test kills.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent_lightning.run.archive import read_rollouts

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(580)]
ROOT = Path(__file__).parents[2]


def agl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agent_lightning", *arguments]


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        agl(*arguments), cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def steps_of(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record["step"] for record in records if "train/reward" in record]


def wait_for_steps(run: Path, process: subprocess.Popen[str], more: int) -> None:
    """Until there are `more` steps than now."""
    wanted, end = len(steps_of(run)) + more, time.monotonic() + 240
    while len(steps_of(run)) < wanted:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{wanted} steps are not reached"
        time.sleep(0.2)


def pids_of(process: subprocess.Popen[str], title: str) -> list[int]:
    """The ids of the run's processes whose title matches."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child.pid for child in children if re.search(title, " ".join(child.cmdline()))]


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    rollouts = summary["rollouts"]
    assert rollouts["admitted"] == rollouts["trained"] + sum(rollouts["dropped"].values())
    return summary


def test_a_run_goes_on_whatever_of_its_processes_is_killed(tmp_path: Path) -> None:
    """The last one, the board, cannot be replaced in place: the run starts again from its checkpoint, by itself."""
    run = tmp_path / "run"
    with running(
        "train", "experiment=toy", "steps=400", "eval_every=0", "checkpoint_every=1", f"runs_dir={tmp_path}", "name=run"
    ) as process:
        wait_for_steps(run, process, 2)
        for title in ("ray::RolloutWorker", "ray::ServeReplica.*policy-policy", "ray::ServeReplica.*-gateway"):
            (pid,) = pids_of(process, title)
            os.kill(pid, signal.SIGKILL)
            wait_for_steps(run, process, 3)
        (pid,) = pids_of(process, "ray::PolicyBoard")
        os.kill(pid, signal.SIGKILL)
        wait_for_steps(run, process, 3)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "a process of the run has died: PolicyBoard" in output
    assert summary_of(run)["rollouts"]["failed"] == {}  # what was lost was made again
    finished = [row for row in read_rollouts(run).to_pylist() if row["outcome"] == "finished"]
    assert len({(row["step"], row["rollout_id"]) for row in finished}) == len(finished)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_too_few_open_files_are_named_with_what_to_do(tmp_path: Path) -> None:
    words = " ".join(agl("train", "experiment=toy", "steps=1", "serving.gateways=1", f"runs_dir={tmp_path}"))
    result = subprocess.run(
        ["bash", "-c", f"ulimit -n 1024; exec {words}"], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 2
    line = r"agl: Ray Serve's proxy did not start on 127.0.0.1:\d+ \(Cannot raise FD limit to \d+, limit is 1024.\); "
    assert re.fullmatch(line + r"it needs more open files: .*ulimit -n 16384.*\n", result.stderr), result.stderr


def test_kill_9_of_the_driver_leaves_nothing_and_the_run_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("steps=400", "eval_every=0", "checkpoint_every=2", f"runs_dir={tmp_path}", "name=run")
    with running("train", "experiment=toy", *settings) as process:
        wait_for_steps(run, process, 5)
        started = psutil.Process(process.pid).children(recursive=True)
        (raylet,) = [child for child in started if child.name() == "raylet"]
        folder = next(Path(word.partition("=")[2]).parent for word in raylet.cmdline() if "--temp_dir=" in word)
        assert folder.is_dir()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(started, timeout=150)
        assert [" ".join(survivor.cmdline()) for survivor in alive if survivor.status() != psutil.STATUS_ZOMBIE] == []
        wait_until(lambda: not folder.exists())
        assert list(run.glob("logs/ray/session_*/raylet.out"))
    done = max(steps_of(run))
    subprocess.run(agl("train", f"resume={run}", f"steps={done + 3}"), cwd=ROOT, check=True, timeout=300)
    assert summary_of(run)["steps"] == done + 3


@pytest.mark.parametrize("part", ["gcs/gcs_server", "raylet/raylet "])
def test_kill_9_of_rays_head_ends_the_run_which_is_resumed(part: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("steps=400", "eval_every=0", "checkpoint_every=2", "restarts=0", f"runs_dir={tmp_path}", "name=run")
    with running("train", "experiment=toy", *settings) as process:
        wait_for_steps(run, process, 5)
        started = psutil.Process(process.pid).children(recursive=True)
        (pid,) = pids_of(process, part)
        os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=240)
        assert process.returncode not in (0, None), output
        if part.startswith("gcs"):
            assert re.search(r"^agl: the cluster's head at \S+ does not answer any more; go on with: ", output, re.M)
            assert "Stack trace" not in output  # of Ray's C++, which would abort this process after a minute
        _, alive = psutil.wait_procs(started, timeout=150)
        assert [" ".join(child.cmdline()) for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    done = max(steps_of(run))
    subprocess.run(agl("train", f"resume={run}", f"steps={done + 3}"), cwd=ROOT, check=True, timeout=300)
    assert summary_of(run)["steps"] == done + 3


def test_kill_9_of_vllms_engine_and_of_the_learner(tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ("data.train.num=400", "data.val.num=8", "algorithm.tasks_per_step=8", "rollout.concurrency=32")
    settings = ("steps=100", "eval_every=0", "checkpoint_every=1", f"runs_dir={tmp_path}", "name=run")
    with running("train", "experiment=calc_tiny", *small, *settings) as process:
        wait_for_steps(run, process, 2)
        (engine,) = pids_of(process, "EngineCore")
        os.kill(engine, signal.SIGKILL)
        wait_for_steps(run, process, 2)
        assert pids_of(process, "EngineCore") != [engine]
        (learner,) = pids_of(process, "ray::ModelWorker")
        os.kill(learner, signal.SIGKILL)
        wait_for_steps(run, process, 2)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "a process of the run has died: ModelWorker" in output
    assert summary_of(run)["mean_abs_logprob_gap"] < 1e-3  # the new engine has the current weights


@pytest.mark.parametrize("begun", ["gcs_server", "ray::ServeController", "ray::ServeReplica"])
def test_ctrl_c_while_a_run_starts_ends_it_at_once_with_one_line(begun: str, tmp_path: Path) -> None:
    with running("train", "experiment=toy", f"runs_dir={tmp_path}", "name=run") as process:
        end = time.monotonic() + 240
        while not pids_of(process, begun):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 130, output
        assert output.splitlines()[1:] == ["stopped before it had started; nothing is changed"]
        _, alive = psutil.wait_procs(started, timeout=150)
        assert [" ".join(child.cmdline()) for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
