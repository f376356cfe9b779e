"""Random models of many architectures: each trains exactly, or is refused with a line. There is no third case.

AGL_WRITE_MODELS=1 pytest -m slow tests/stack/test_architectures.py   # writes the table of docs/models.md
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zoo

from agent_lightning.config.load import load
from agent_lightning.launch import models
from agent_lightning.learners.gap import LARGEST_GAP

pytestmark = [pytest.mark.stack, pytest.mark.timeout(3000)]
HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "models.md"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
BEGIN, END = "<!-- the table -->\n", "<!-- end -->\n"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, check=False)


def train(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """What the learner says of each model, by the name of its folder."""
    done = run("one_worker.py", *map(str, folders))
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["model"]: row for row in rows_of(done)}


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """The JSON lines of a script; vLLM also prints errors."""
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(name: str, row: dict[str, Any]) -> None:
    """Rows of a batch are as rows alone, and a gap beyond its bound lets no optimiser step happen."""
    assert row["difference"] < 1e-4, (name, row)
    assert row["moved_with_gap"] == 0, (name, row)
    assert row["moved"] > 1e-3, (name, row)


def test_a_layout_is_chosen_by_trying_and_a_gap_lets_no_step_happen(tmp_path: Path) -> None:
    names = {"Llama": "packed, rows_sdpa, fused, shared", "Granite": "packed, rows_sdpa, shared"}
    names["LFM2"] = "padded, sdpa, fused"
    for name in names:
        zoo.make(name, tmp_path / name)
    rows = train([tmp_path / name for name in names])
    assert {name: row["layout"] for name, row in rows.items()} == names
    for name, row in rows.items():
        check(name, row)


@pytest.mark.slow
def test_every_architecture_is_exact_or_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in zoo.ARCHITECTURES]
    for folder in folders:
        zoo.make(folder.name, folder)
    refused = {folder.name: before_a_start(folder) for folder in folders}
    served = [str(folder) for folder in folders if not refused[folder.name]]
    engines = {row["model"]: row["refused"] for row in rows_of(run("engine_samples.py", *served))}
    rows = train(folders)
    for name, row in rows.items():
        if "refused" not in row:
            check(name, row)
    table = "".join(f"{line}\n" for line in lines_of(rows, refused, engines))
    sys.stdout.write(table)
    if os.environ.get("AGL_WRITE_MODELS"):
        before, _, rest = DOCS.read_text().partition(BEGIN)
        DOCS.write_text(before + BEGIN + table + END + rest.partition(END)[2])
    undecided = [line for line in table.splitlines()[2:] if not re.search(r"\| exact \|$|refused .*: `", line)]
    assert not undecided


def before_a_start(folder: Path) -> str:
    """Why a dry run refuses a model on a CPU in float32, as its first line; "" if it does not."""
    words = ["experiment=calc_tiny", f"model.path='{folder}'", "model.max_len=128", "sampling.train.max_tokens=24"]
    facts, config = models.read(str(folder)), load([*words, "sampling.val.max_tokens=24"])
    lines = [*models.problems(facts, config), *models.engine_problems(facts, config), ""]
    return lines[0].replace(f"model.path={folder}: ", "")


def lines_of(rows: dict[str, dict[str, Any]], refused: dict[str, str], engines: dict[str, str]) -> list[str]:
    lines = ["| model | rows of a batch | against rows alone | engine against learner, mean and max | verdict |"]
    lines += ["|---|---|---|---|---|"]
    for name in zoo.ARCHITECTURES:
        row, verdict = rows[name], "exact"
        learner, gap = f"{row.get('layout', '')} | {row['difference']:.1e}" if "layout" in row else " | ", ""
        if refused[name]:
            verdict = f"refused before the start: `{refused[name]}`"
        elif "refused" in row:
            verdict = f"refused at the start by the learner: `{row['refused'][:160]}`"
        elif "gap" not in row:
            verdict = f"refused at the start by vLLM: `{engines[name][:160]}`"
        else:
            gap = f"{row['gap']:.1e}, {row['max']:.1e}"
            verdict = "exact" if row["gap"] < LARGEST_GAP["float32"] else "refused at the first step: `the gap`"
        lines.append(f"| {name} | {learner} | {gap} | {verdict} |")
    return lines
