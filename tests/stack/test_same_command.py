"""One command line, here and as a trial of a sweep: the same figures. ASHA and `agl explain` if rollouts and training
overlap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent_lightning.run.archive import read_rollouts
from agent_lightning.run.plots import read_metrics

pytestmark = [pytest.mark.stack, pytest.mark.slow]
WORDS = ["experiment=toy", "steps=3", "eval_every=1", "seed=5"]


def agl(*arguments: str) -> None:
    command = [sys.executable, "-m", "agent_lightning", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert "INFO" not in ended.stdout + ended.stderr, "notes of Ray or Serve are on the terminal"


def figures(run: Path) -> list[dict[str, float]]:
    """What a run measured, but for how long things took."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{name: v for name, v in row.items() if not name.startswith(("time/", "wall_s"))} for row in rows]


def test_a_trial_of_a_sweep_is_the_run_that_its_words_are(tmp_path: Path) -> None:
    agl("train", *WORDS, "algorithm.lr=4.0", f"runs_dir={tmp_path}", "name=here")
    agl("sweep", *WORDS, "algorithm.lr=choice(4.0)", "sweep=grid", f"runs_dir={tmp_path}")
    (trial,) = tmp_path.glob("sweep-toy-*/trial-000")
    here = figures(tmp_path / "here")
    elsewhere = figures(trial)
    assert len(elsewhere) == len(here)
    for ours, other in zip(here, elsewhere, strict=True):
        # The rows of a batch come in the order in which rollouts end: a sum of floats may differ in its last bit.
        assert other == pytest.approx(ours, abs=1e-9, nan_ok=True)
    assert [row["step"] for row in here] == [0, 1, 2, 3]
    assert here[-1]["val/reward"] > here[0]["val/reward"]


def test_asha_and_explain_if_rollouts_and_training_overlap(tmp_path: Path) -> None:
    words = ["experiment=toy", "steps=4", "eval_every=1", "loop.max_lag=2", "sweep=asha", "sweep.trials=3"]
    agl("sweep", *words, "sweep.reduction=2", "algorithm.lr=uniform(1,4)", f"runs_dir={tmp_path}")
    trials = sorted(tmp_path.glob("sweep-toy-*/trial-*"))
    assert len(trials) == 3
    rows = [[row for row in figures(trial) if "lag/max" in row] for trial in trials]
    assert max(len(steps) for steps in rows) == 4, "the best trial has every step"
    assert 0 < max(row["lag/max"] for steps in rows for row in steps) <= 2
    rollout = read_rollouts(trials[0]).column("rollout_id").to_pylist()[-1]
    agl("explain", str(trials[0]), rollout, "--tokens")
