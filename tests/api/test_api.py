"""The Python API: words of a command line, functions by value, rows, and runs as data frames."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from viewer_runs import write_run

import agent_lightning as agl
from agent_lightning.api import process
from agent_lightning.api.words import target, words_of, write_rows
from agent_lightning.config.load import load as load_config
from agent_lightning.core.errors import ConfigError, RunFailed, UserError
from agent_lightning.rollouts.agents import load


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"steps": 4, "algorithm": {"lr": 1e-3}}, ["steps=4", "algorithm.lr=0.001"]),
        ({"model": None, "checkpoint": True}, ["model=null", "checkpoint=true"]),
        ({"agent.instrument": ["langchain"]}, ["agent.instrument=[langchain]"]),
        ({"algorithm.lr": "loguniform(1e-4,3e-3)"}, ["algorithm.lr=loguniform(1e-4,3e-3)"]),
        ({"agent.target": "my agent.py:solve"}, ["agent.target='my agent.py:solve'"]),
        ({"note": "it's {odd}"}, ["note='it\\'s {odd}'"]),
    ],
)
def test_keys_become_words(keys: dict[str, Any], words: list[str]) -> None:
    assert words_of(keys) == words


def test_words_reach_the_config_as_they_are() -> None:
    names = ["a 'quoted' one", "back\\slash", "commas, and [brackets]", "x=y"]
    config = load_config(words_of({"experiment": "toy", "steps": 3, "tracking": {"tags": names}, "algorithm.lr": 1e-4}))
    assert (config.steps, list(config.tracking.tags), config.algorithm.lr) == (3, names, 1e-4)


def test_a_function_travels_by_value(tmp_path: Path) -> None:
    factor = 3

    def triple(task: dict[str, int]) -> int:
        return factor * task["n"]

    name = target(triple)
    assert load(name)({"n": 2}) == 6
    assert load_config(words_of({"experiment": "toy", "agent.target": name})).agent.target == name
    script = "import sys; from agent_lightning.rollouts.agents import load; print(load(sys.argv[1])({'n': 5}))"
    output = subprocess.run([sys.executable, "-c", script, name], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert output.strip() == "15", "another process has it by value"
    with pytest.raises(ConfigError, match="cannot be loaded here"):
        load("pickle:nonsense")


@pytest.mark.parametrize("size", [10, 1_000, 80_000, 400_000])
def test_a_function_of_any_size_reaches_the_config(size: int) -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + size // 3)))

    def solve(task: dict[str, int]) -> str:
        return text

    words = words_of({"experiment": "toy", "agent.target": target(solve), "agent.reward": target(solve)})
    config = load_config(words)
    assert load(config.agent.target)({}) == text


def test_rows_of_any_kind_are_written_once(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "1+1"}, {"id": "b", "question": "2+2"}]
    path = write_rows(rows, tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert write_rows(pd.DataFrame(rows), tmp_path) == path
    assert write_rows(iter(rows[:1]), tmp_path) != path


def test_a_run_is_data(tmp_path: Path) -> None:
    run = agl.load_run(write_run(tmp_path, "first"))
    assert run.metrics["val/reward"].dropna().tolist() == [0.0, 1.0]
    assert run.rollouts.query("split == 'train'").reward.count() == 45
    assert run.config["experiment"] == "calc_tiny"
    assert run.summary["state"] == "finished"
    assert run.checkpoints == []
    assert run.view(tmp_path / "run.html").stat().st_size > 10_000
    with pytest.raises(UserError, match="is no run"):
        agl.load_run(tmp_path)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such key; did you mean"):
        agl.train(experiment="toy", stepps=3)
    with pytest.raises(UserError, match=r"there is no file .nowhere\.py."):
        agl.train(agent="nowhere.py:solve", train=tmp_path / "nowhere.jsonl")


def test_a_process_that_dies_says_why() -> None:
    with pytest.raises(RunFailed, match="has no attribute 'nothing'"):
        process.run("nothing")


@pytest.mark.slow
@pytest.mark.stack
def test_a_function_of_a_cell_is_trained_and_resumed(tmp_path: Path) -> None:
    """`make test` trains the functions of the notebook's cells."""
    bonus = 0.0
    rows = [{"id": f"t{n}", "question": "Say yes."} for n in range(4)]

    async def solve(task: dict[str, Any], policy: Any) -> str:
        from openai import AsyncOpenAI

        async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key) as client:
            messages: Any = [{"role": "user", "content": task["question"]}]
            reply = await client.chat.completions.create(model=policy.model, messages=messages)
        return reply.choices[0].message.content or ""

    def score(task: dict[str, Any], output: str) -> float:
        return bonus + float(len(output) % 2)

    run = agl.train(
        agent=solve, reward=score, train=rows, val=rows[:2], experiment="toy", steps=1, runs_dir=str(tmp_path)
    )
    assert run.summary["steps"] == 1
    assert set(run.rollouts.task_id) <= {row["id"] for row in rows}
    assert agl.train(resume=run, steps=2).summary["steps"] == 2


@pytest.mark.slow
@pytest.mark.stack
def test_chats_are_learnt_and_the_model_leaves(tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"What is {n} + 1?"}, {"role": "assistant", "content": f"{n + 1}"}]}
        for n in range(8)
    ]
    keys: Any = {"algorithm.tasks_per_step": 4, "algorithm.lr": 1e-3, "algorithm.lr_warmup_steps": 0}
    run = agl.sft(chats, val=chats[:2], experiment="calc_tiny", steps=2, runs_dir=str(tmp_path), **keys)
    assert run.summary["val_loss_last"] < run.summary["val_loss_first"]
    assert (run.export_model(tmp_path / "warm") / "config.json").is_file()
