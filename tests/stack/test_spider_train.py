"""Spider's three roles on the real stack with the tiny policy: a step of training, and reward by difficulty."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from optional import needs

from agent_lightning.run.archive import read_rollouts

pytestmark = [needs("langgraph", "langchain_openai"), pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
ALLERGIES = ("Nuts", "Milk", "Nuts", "Shellfish")
TRAIN = [
    (
        "Show all allergies with number of students affected.",
        "SELECT Allergy, count(*) FROM Has_allergy GROUP BY Allergy",
    ),
    (
        "Which allergy has most number of students affected?",
        "SELECT Allergy FROM Has_allergy GROUP BY Allergy ORDER BY count(*) DESC LIMIT 1",
    ),
    (
        "Show all student IDs who have at least two allergies.",
        "SELECT StuID FROM Has_allergy GROUP BY StuID HAVING count(*) >= 2",
    ),
]
"""On a table like one of Spider's training databases, whose names the tiny policy knows."""
NOTHING = ("Show all student IDs who have at least nine allergies.", TRAIN[2][1].replace("2", "9"))


def spider(folder: Path) -> Path:
    """A folder in the layout of Spider's release, with one database."""
    path = folder / "database" / "allergy" / "allergy.sqlite"
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE Has_allergy (StuID INT, Allergy TEXT)")
    connection.executemany(
        "INSERT INTO Has_allergy VALUES (?, ?)", [(i % 3, allergy) for i, allergy in enumerate(ALLERGIES)]
    )
    connection.commit()
    connection.close()
    rows = [{"question": question, "db_id": "allergy", "query": query} for question, query in TRAIN]
    (folder / "train_spider.json").write_text(json.dumps(rows * 8))
    (folder / "train_others.json").write_text("[]")
    dev = [rows[0] | {"difficulty": "easy"}, {"question": NOTHING[0], "db_id": "allergy", "query": NOTHING[1]}]
    dev[1]["difficulty"] = "medium"
    (folder / "dev.jsonl").write_text("".join(json.dumps(row | {"id": str(i)}) + "\n" for i, row in enumerate(dev * 4)))
    return folder


def test_writer_checker_and_rewriter_are_recorded_and_the_checker_is_not_trained(tmp_path: Path) -> None:
    options = [
        "experiment=spider_tiny_single_table",
        f"data.root={spider(tmp_path / 'spider')}",
        "data.val.split=dev",
        "steps=1",
        "algorithm.tasks_per_step=6",
        f"runs_dir={tmp_path}",
        "name=run",
    ]
    command = [sys.executable, "-m", "agent_lightning", "train", *options]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"CHECKER_BASE_URL": ""})
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["val_reward_by"]) == {"easy", "medium"}
    rows = read_rollouts(tmp_path / "run").to_pylist()
    assert {row["outcome"] for row in rows} == {"finished"}
    roles = [[call["agent"] for call in row["calls"]] for row in rows]
    assert all(
        rollout_roles[:2] == ["writer", "checker"] and set(rollout_roles[2:]) <= {"checker", "rewriter"}
        for rollout_roles in roles
    )
    assert any("rewriter" in rollout_roles for rollout_roles in roles)
    calls = {role: 0 for rollout_roles in roles for role in rollout_roles}
    for row in rows:
        for call in row["calls"] if row["split"] == "train" else ():
            calls[call["agent"]] += len(call["response_ids"])
    assert 0 < summary["trained_tokens"] <= calls["writer"] + calls["rewriter"]
