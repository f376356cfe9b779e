"""Random models of many architectures: each trains exactly, or is refused with a line. There is no third case.

AGL_WRITE_MODELS=1 pytest -m slow tests/stack/test_architectures.py   # writes the table of docs/models.md
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zoo

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
    names = {"Llama": "packed, rows_sdpa, fused", "Granite": "packed, rows_sdpa", "LFM2": "padded, sdpa, fused"}
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
    engines = {row["model"]: row["refused"] for row in rows_of(run("engine_samples.py", *map(str, folders)))}
    rows = train(folders)
    for name, row in rows.items():
        if "refused" not in row:
            check(name, row)
    table = "".join(f"{line}\n" for line in lines_of(rows, engines))
    sys.stdout.write(table)
    if os.environ.get("AGL_WRITE_MODELS"):
        before, _, rest = DOCS.read_text().partition(BEGIN)
        DOCS.write_text(before + BEGIN + table + END + rest.partition(END)[2])


def lines_of(rows: dict[str, dict[str, Any]], engines: dict[str, str]) -> list[str]:
    lines = ["| model | rows of a batch | against rows alone | engine against learner, mean and max | verdict |"]
    lines += ["|---|---|---|---|---|"]
    for name in zoo.ARCHITECTURES:
        row = rows[name]
        if "refused" in row:
            lines.append(f"| {name} | | | | refused at the start: `{row['refused'][:160]}` |")
            continue
        gap = f"{row['gap']:.1e}, {row['max']:.1e}" if "gap" in row else ""
        verdict = "exact"
        if "gap" not in row:
            verdict = f"the learner is exact; refused by vLLM's CPU engine at the start: `{engines[name][:90]}`"
        elif row["gap"] > 1e-3:
            verdict = "refused at the first step: the gap is beyond its bound"
        lines.append(f"| {name} | {row['layout']} | {row['difference']:.1e} | {gap} | {verdict} |")
    return lines
