"""SIGTERM to a run, alone or to its whole process group: the run ends in words, with what it has."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.timeout(240)]


def has_raylet(process: int, log: str) -> bool:
    return any("raylet" in child.name() for child in psutil.Process(process).children(recursive=True))


def has_trained(process: int, log: str) -> bool:
    return "step 2/" in log


CASES = {
    "single-start": (os.kill, has_raylet, "stopped before it had started; nothing is changed"),
    "group-start": (os.killpg, has_raylet, "stopped before it had started; nothing is changed"),
    "group-run": (os.killpg, has_trained, "checkpoints   to resume from"),
}


@pytest.mark.parametrize("name", CASES)
def test_sigterm_ends_a_run_in_words(name: str, tmp_path: Path) -> None:
    kill, reached, words = CASES[name]
    command = [sys.executable, "-m", "agent_lightning", "train", "experiment=toy", "steps=100000", "eval_every=0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"runs_dir={tmp_path}", "name=run"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: reached(process.pid, (tmp_path / "log").read_text()))
        if reached is has_raylet:
            time.sleep(2.0)  # Ray's core is about to take over SIGTERM, or has done it
        kill(process.pid, signal.SIGTERM)
        assert process.wait(120) == 130
    finally:
        process.kill()
    text = (tmp_path / "log").read_text()
    assert words in text
    assert "SIGTERM received" not in text
    assert "Traceback" not in text


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
