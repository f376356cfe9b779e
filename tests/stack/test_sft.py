"""Traces of production, warm start, reinforcement: the three commands of docs/sft.md on the tiny policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.config.load import project_folder
from agent_lightning.run.archive import read_rollouts

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
EXAMPLE = project_folder("examples") / "calc_x"


def agl(*arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "agent_lightning", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == code, ended.stderr
    return ended.stdout if code == 0 else ended.stderr


def chats(number: int) -> list[dict[str, Any]]:
    """Right chats of the calculator agent, with its tool."""
    sys.path.append(str(EXAMPLE))
    from calculator import TOOL
    from problems import generate, solution

    return [{"messages": solution(row), "tools": [TOOL]} for row in generate(5, number, "train")]


def write_traces(path: Path) -> None:
    """The calls of these chats as an OpenAI client would log them; a call for each message of the assistant."""
    lines = []
    for number, chat in enumerate(chats(60)):
        for end, message in enumerate(chat["messages"]):
            if message["role"] == "assistant":
                request = {"model": "gpt", "messages": chat["messages"][:end], "tools": chat["tools"]}
                choice = {"index": 0, "message": {"content": None, **message}, "finish_reason": "stop"}
                reply = {"id": f"c{number}-{end}", "object": "chat.completion", "choices": [choice], "model": "gpt"}
                lines.append(json.dumps({"request": request, "response": reply}))
    path.write_text("\n".join(lines))


def test_traces_become_a_warm_start_that_reinforcement_goes_on_from(tmp_path: Path) -> None:
    write_traces(tmp_path / "calls.jsonl")
    small = [f"runs_dir={tmp_path}", "tracking.wandb=disabled", "algorithm.tasks_per_step=8"]
    assert "60 conversations" in agl("import", str(tmp_path / "calls.jsonl"), "--out", str(tmp_path / "imported"))

    learn = ["experiment=calc_tiny", f"data.train.path={tmp_path / 'imported' / 'sft.jsonl'}", "algorithm.lr=1e-3"]
    out = agl("sft", *learn, *small, "steps=2", "eval_every=1", "checkpoint_every=1", "name=warm")
    assert "tokens of the assistant" in out
    assert "held-out loss" in out
    agl("sft", f"resume={tmp_path / 'warm'}", "steps=4")
    summary = json.loads((tmp_path / "warm" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["val_loss_last"] < summary["val_loss_first"]
    assert (tmp_path / "warm" / "curve.png").exists()
    assert "loss" in agl("runs", str(tmp_path))
    agl("view", str(tmp_path / "warm"), "--out", str(tmp_path / "warm.html"))
    assert "Loss of the chats" in (tmp_path / "warm.html").read_text()

    assert "the policy after step 4" in agl("export", str(tmp_path / "warm"), "--model", str(tmp_path / "policy"))
    model = [f"model.path={tmp_path / 'policy'}", "algorithm.rollouts_per_task=2", "steps=1", "data.val.num=8"]
    agl("train", "experiment=calc_tiny", *small, *model, "name=reinforced")
    check_prompts(tmp_path / "reinforced", tmp_path / "policy")


def check_prompts(run: Path, policy: Path) -> None:
    """The engine read the tokens that supervised training would learn from the same messages. It also sampled them,
    except where a policy at temperature 1 spells a text in other tokens than the tokenizer does."""
    from agent_lightning.core.types import Task
    from agent_lightning.learners.chats import ChatEncoder

    encoder, same = ChatEncoder(str(policy), (), 512), []
    for row in read_rollouts(run).to_pylist():
        for call in row["calls"]:
            messages = [*json.loads(call["request"]), json.loads(call["reply"])]
            if call["finish_reason"] in ("stop", "tool_calls") and any(
                map(messages[-1].get, ("content", "tool_calls"))
            ):
                task = Task(task_id="", payload={"messages": messages, "tools": chats(1)[0]["tools"]})
                tokens = encoder.encode(task, 0)[0].token_T.tolist()
                assert tokens[: len(call["prompt_ids"])] == call["prompt_ids"]
                same.append(tokens == call["prompt_ids"] + call["response_ids"])
    assert sum(same) > 0.5 * len(same) > 0


def test_bad_chats_end_the_command_before_anything_starts(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(bad)}\n" * 2)
    error = agl(
        "sft", "experiment=calc_tiny", f"data.train.path={tmp_path / 'bad.jsonl'}", f"runs_dir={tmp_path}", code=2
    )
    assert "none of 2 chats can be learnt: 2 roles do not alternate: user after user (bad-1, bad-2)" in error
    assert not list(tmp_path.glob("sft-*"))
