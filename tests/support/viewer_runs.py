"""Folders of runs for the viewer: a finished run, a failed one, one whose texts are hostile, and a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from agent_lightning.config.load import load, to_yaml
from agent_lightning.core.types import AgentSpan, Group, ModelCall, Outcome, Reward, RolloutKey, Split, Task, Trajectory
from agent_lightning.credit.tools import tool_calls
from agent_lightning.run.archive import RolloutWriter
from agent_lightning.run.tracking import JsonLines, RunDirectory

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">&amp;{{ 7 * 7 }}\u202e"
)
"""Text that would run as a script, or be read as a template, if a page did not escape it."""


def trajectory(
    split: Split, group: int, index: int, reward: float | None, text: str = "The answer is 4."
) -> Trajectory:
    """A rollout of two calls around a tool; without a reward it failed."""
    key = RolloutKey(split=split, group=group, index=index)
    expression = json.dumps({"expression": f"2+{index}"})
    asked = [{"role": "system", "content": "Use the calculator."}, {"role": "user", "content": f"What is 2+2? {text}"}]
    functions = [{"id": "t1", "type": "function", "function": {"name": "calculator", "arguments": expression}}]
    wish = {"role": "assistant", "content": None, "tool_calls": functions}
    answer = {
        "role": "tool",
        "tool_call_id": "t1",
        "content": f"{2 + index} {text if text != 'The answer is 4.' else ''}",
    }
    replies = [wish, {"role": "assistant", "content": f"{text} {index}"}]
    requests = [asked, [*asked, wish, answer]]
    calls = tuple(
        ModelCall(
            key=key,
            call_id=f"{key.rollout_id}-{n}",
            agent="solver",
            policy_version=group % 3,
            prompt_T=np.arange(20, 30 + 8 * n, dtype=np.int32),
            response_T=np.arange(40, 46, dtype=np.int32),
            logprob_T=np.linspace(-0.01, -3, 6).astype(np.float32),
            finish_reason="stop",
            started_at=100.0 + n,
            ended_at=100.6 + n,
            request=json.dumps(requests[n]),
            reply=json.dumps(replies[n]),
            parent_id=f"{key.rollout_id}-agent",
        )
        for n in range(2)
    )
    failed = reward is None
    return Trajectory(
        key=key,
        task_id=f"task-{group % 4}",
        calls=calls,
        reward=reward,
        outcome=Outcome.ENGINE_ERROR if failed else Outcome.FINISHED,
        error=f"KeyError: 'row {group}'" if failed else "",
        output="" if failed else f"{text} {index}",
        started_at=100.0,
        ended_at=102.0 + index / 10,
        tools=tool_calls(calls),
        rewards=(Reward(key=key, span_id="r", name="format", value=0.5, about=calls[0].call_id, at=101.0),),
        agents=(
            AgentSpan(key=key, span_id=f"{key.rollout_id}-agent", name="solver", started_at=100.0, ended_at=102.0),
        ),
    )


def group(split: Split, number: int, rewards: list[float | None], text: str = "The answer is 4.") -> Group:
    rollouts = tuple(trajectory(split, number, index, reward, text) for index, reward in enumerate(rewards))
    return Group(
        group_id=f"{split}-{number}",
        task=Task(task_id=f"task-{number % 4}", payload={"q": text}),
        trajectories=rollouts,
    )


def write_run(root: Path, name: str, *, steps: int = 3, text: str = "The answer is 4.", error: str = "") -> Path:
    """A run of `steps` steps with 4 groups of 4 each, evaluated before the first and after the last."""
    directory = RunDirectory.create(root, "calc_tiny", 0, name)
    directory.config.write_text(to_yaml(load(["experiment=calc_tiny", "credit=air", f"steps={steps}"])))
    writer, metrics = RolloutWriter(directory.rollouts), JsonLines(directory.metrics)
    for step in range(steps + 1):
        if step:
            groups = [group("train", 4 * step + n, [1.0, 0.0, 0.5, None if n == 0 else 0.0], text) for n in range(4)]
            writer.write(step, step - 1, groups)
            record = {"train/reward": 0.2 + step / 10, "logprob_gap/mean_abs": 1e-7, "emitted/format": 0.5}
            record |= {"time/step": 2.0, "time/generate": 1.5, "time/update": 0.5, "tokens/sampled": 96.0}
            record |= {"lag/mean": 0.25, "lag/max": 1.0, "lag/tokens/0": 9.0, "lag/tokens/1": 3.0}
            metrics.log(step, record | {"rollouts/trained": 15.0, "rollouts/failed/engine_error": 1.0})
        if step in (0, steps):
            writer.write(step, step, [group("val", 4 * step + n, [float(step > 0)], text) for n in range(4)])
            metrics.log(step, {"val/reward": float(step > 0), "val/rows": 4.0})
    metrics.close()
    summary = {"experiment": "calc_tiny", "wall_s": 12.5, "state": "failed" if error else "finished", "error": error}
    directory.summary.write_text(json.dumps(summary))
    return directory.path


def write_sweep(root: Path, name: str = "sweep-calc_tiny") -> Path:
    """A sweep of two trials, one of which failed."""
    folder = root / name
    (folder / "logs").mkdir(parents=True)
    command = ["experiment=calc_tiny", "algorithm.lr=choice(1e-4,1e-3)"]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"command": command}))
    write_run(folder, "trial-000")
    rows = [
        {
            "name": "trial-000",
            "words": ["algorithm.lr=1e-4"],
            "state": "done",
            "run": "trial-000",
            "rewards": [[0, 0.1], [3, 0.6]],
        },
        {
            "name": "trial-001",
            "words": ["algorithm.lr=1e-3"],
            "state": "failed",
            "run": None,
            "rewards": [],
            "error": "no room",
        },
    ]
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_library(root: Path) -> Path:
    """A folder with a run of each kind, and a sweep."""
    write_run(root, "finished")
    write_run(root, "failed", steps=2, error="all 16 rollouts of the step failed")
    write_run(root, "hostile", steps=1, text=HOSTILE)
    (write_run(root, "killed", steps=1) / "summary.json").unlink()
    write_sweep(root)
    return root
