"""MuSiQue's searching agent, of the OpenAI Agents SDK, on the real stack with the tiny policy: a step of training."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from optional import needs

from agent_lightning.run.archive import read_rollouts

pytestmark = [needs("agents", "bm25s"), pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
HOPS = {
    "Harbour Light": ("performer", "Anna Bergman", "Harbour Light is a song by the Swedish singer Anna Bergman."),
    "Blue Garden": ("performer", "The Kinks", "Blue Garden is a song by the English rock band The Kinks."),
    "Silver River": ("author", "John Smith", "Silver River is a novel by John Smith, published in 1972."),
    "North Park": ("country", "Canada", "North Park is a village in Ontario, Canada."),
}


def rows(prefix: str) -> list[dict[str, object]]:
    """Questions of MuSiQue with their paragraphs; those of another `prefix` have other names."""
    paragraphs = [
        {"idx": i, "title": f"{prefix} {name}", "paragraph_text": text.replace(name, f"{prefix} {name}")}
        for i, (name, (*_, text)) in enumerate(HOPS.items())
    ]
    return [
        {
            "id": f"{prefix}-{i}",
            "question": "?",
            "answer": answer,
            "answer_aliases": [],
            "paragraphs": paragraphs,
            "question_decomposition": [
                {"question": f"{prefix} {name} >> {relation}", "answer": answer, "paragraph_support_idx": i}
            ],
        }
        for i, (name, (relation, answer, _)) in enumerate(HOPS.items())
    ]


def test_searches_arrive_as_tool_spans_and_calls_are_trained(tmp_path: Path) -> None:
    files = {
        "train_with_paragraphs": [row for prefix in ("Old", "New", "East", "West") for row in rows(prefix)],
        "train_unanswerable_with_paragraphs": [],
        "dev_with_paragraphs": rows("Great"),
    }
    for name, content in files.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in content)
    options = ["experiment=musique_tiny_relations", f"data.root={tmp_path}", "steps=1", "algorithm.tasks_per_step=16"]
    command = [sys.executable, "-m", "agent_lightning", "train", *options, f"runs_dir={tmp_path}", "name=run"]
    subprocess.run(command, cwd=ROOT, check=True)
    rollouts = read_rollouts(tmp_path / "run").to_pylist()
    assert {row["outcome"] for row in rollouts} == {"finished"}
    searches = [tool for row in rollouts for tool in row["tools"] if tool["name"] == "search"]
    assert searches
    assert all(len(row["tools"]) >= len(row["calls"]) - 1 for row in rollouts)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["trained_tokens"] > 0
