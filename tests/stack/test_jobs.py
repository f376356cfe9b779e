"""`agl submit` and `ray job submit` on a cluster of one node: two runs at once, exit codes, files, a clean stop."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
TOY = ("experiment=toy", "steps=3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """A head as `ray start --head` makes one, with the project's environment activated."""
    port, gcs = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="agl-ray-")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_ADDRESS")}
    environment |= TOKEN | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_worker_niceness": "0"}
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}", f"--temp-dir={folder}"]
    command += [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}"]
    head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: listens(port), 240)
        yield f"http://127.0.0.1:{port}"
    finally:
        processes = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        _, alive = psutil.wait_procs([*processes, psutil.Process(head.pid)] if head.poll() is None else processes, 30)
        for process in alive:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(what: object, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():  # type: ignore[operator]
            return
        time.sleep(0.5)
    pytest.fail(f"not within {seconds} s")


def agl(*arguments: str) -> subprocess.Popen[str]:
    command = [str(BIN / "agl"), *arguments]
    environment = os.environ | TOKEN
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def metrics(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], round(row["train/reward"], 5)) for row in rows if "train/reward" in row]


def test_two_runs_at_once_do_not_meet_and_say_what_a_local_one_says(dashboard: str, tmp_path: Path) -> None:
    submitted = [
        agl("submit", *TOY, "--address", dashboard, "--follow", "--out", str(tmp_path / name)) for name in ("a", "b")
    ]
    for job in submitted:
        out, err = job.communicate(timeout=600)
        assert job.returncode == 0, out + err
        assert "step 3/3" in out
    local = agl("train", *TOY, f"runs_dir={tmp_path}", "name=local")
    out, err = local.communicate(timeout=300)
    assert local.returncode == 0, out + err
    runs = [next((tmp_path / name).iterdir()) for name in ("a", "b")]
    assert metrics(runs[0]) == metrics(runs[1]) == metrics(tmp_path / "local")
    assert all((run / "summary.json").exists() and not (run / "checkpoints").exists() for run in runs)


def test_a_stopped_job_leaves_a_checkpoint(dashboard: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ("experiment=toy", "steps=1000", "loop.max_lag=2", f"runs_dir={runs}")  # stopped with rollouts in flight
    follower = agl("submit", *words, "--address", dashboard, "--wait")
    assert follower.stderr is not None
    names = (re.search(r"submitted (\S+);", line) for line in follower.stderr)  # Ray's client may speak first
    name = next(match[1] for match in names if match)
    wait_for(lambda: any("train/reward" in metrics.read_text() for metrics in runs.glob("*/metrics.jsonl")), 300)
    subprocess.run([BIN / "ray", "job", "stop", name, "--address", dashboard], env=os.environ | TOKEN, check=True)
    follower.communicate(timeout=120)
    assert follower.returncode == 130
    command = [BIN / "ray", "job", "logs", name, "--address", dashboard]
    logs = subprocess.run(command, env=os.environ | TOKEN, capture_output=True, text=True, check=True).stdout
    assert "run folder" in logs
    assert "SIGTERM received" not in logs, "a stop that was asked for is no crash with a stack trace"
    *_, path = sorted(runs.glob("*/checkpoints/*/state.json"))
    state = json.loads(path.read_text())
    assert state["step"] >= 1
    assert state["in_flight"] == []
    assert state["dropped"]["run_stopped"] > 0
    assert state["admitted"] == state["trained"] + sum(state["dropped"].values())


def test_rays_own_command_and_the_exit_code_of_a_run_that_is_refused(dashboard: str) -> None:
    command = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--runtime-env", "runtime_env.yaml", "--"]
    ended = subprocess.run(
        [*command, "agl", "train", "experiment=calc_tiny", "hardware=gpu8"],
        cwd=ROOT,
        env=os.environ | TOKEN,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode != 0
    assert "agl: this machine is too small: needs 8 GPUs, has 0" in ended.stdout + ended.stderr


def test_a_cluster_that_does_not_answer_is_one_line() -> None:
    ended = agl("submit", *TOY, "--address", f"http://127.0.0.1:{free_port()}")
    out, err = ended.communicate(timeout=120)
    assert (ended.returncode, out) == (2, "")
    assert re.fullmatch(r"agl: --address=http://127\.0\.0\.1:\d+: does not answer .*\n", err)
    ended = agl("train", *TOY, f"hardware.address=127.0.0.1:{free_port()}")
    out, err = ended.communicate(timeout=120)
    assert (ended.returncode, out) == (2, "")
    assert re.fullmatch(r"agl: hardware\.address=127\.0\.0\.1:\d+: does not answer .*\n", err)
