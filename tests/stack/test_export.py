"""A trained model that leaves: vLLM loads the export, and answers each held-out row as the last evaluation did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.run.archive import read_rollouts

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SMALL = ["experiment=calc_tiny", "data.train.num=400", "data.val.num=24", "tracking.wandb=disabled"]


def agl(*arguments: str) -> str:
    command = [sys.executable, "-m", "agent_lightning", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def evaluation(run: Path, step: int) -> dict[str, tuple[float, list[Any]]]:
    """The reward and the sampled tokens of each held-out task in the evaluation after a step."""
    rows = [row for row in read_rollouts(run).to_pylist() if row["split"] == "val" and row["step"] == step]
    return {row["task_id"]: (row["reward"], [call["response_ids"] for call in row["calls"]]) for row in rows}


def test_an_exported_model_scores_what_the_run_scored_row_by_row(tmp_path: Path) -> None:
    steps = ["algorithm.tasks_per_step=8", "algorithm.lr=1e-3", "steps=2", "eval_every=2"]
    agl("train", *SMALL, *steps, f"runs_dir={tmp_path}", "name=first")
    remote = f"local://{tmp_path / 'first'}"  # read as s3:// is
    assert "the policy after step 2" in agl("export", remote, "--model", str(tmp_path / "policy"))
    again = ["algorithm.tasks_per_step=1", "algorithm.rollouts_per_task=2", "steps=1", "buffer.journal=false"]
    agl("train", *SMALL, *again, f"model.path={tmp_path / 'policy'}", f"runs_dir={tmp_path}", "name=second")
    before, last = evaluation(tmp_path / "first", 0), evaluation(tmp_path / "first", 2)
    exported = evaluation(tmp_path / "second", 0)
    assert len(last) == 24
    assert exported == last
    assert exported != before  # two steps with a large rate have changed the policy
