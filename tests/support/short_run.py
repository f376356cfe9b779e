"""Writes the files that `agl train` writes, without training: for tests of code that watches runs.

    short_run.py train experiment=toy algorithm.lr=2 steps=8 eval_every=2 runs_dir=DIR name=trial-000

The held-out reward after a step is step x lr / 100. `seed=13` fails after its first evaluation; `seed=14` is slow.
`checkpoint_every` is 10 as in a run. SIGTERM leaves a checkpoint and exit code 130, as a run does.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import yaml

from agent_lightning.run.state import State, checkpoint_folder, newest_checkpoint, read_state, write_state
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.run.tracking import JsonLines, RunDirectory


class Stopped(Exception):
    """The process received SIGTERM."""


def main(words: list[str]) -> int:
    signal.signal(signal.SIGTERM, stop)
    given = dict(word.partition("=")[::2] for word in words)
    if "resume" in given:
        run = RunDirectory.open(Path(given["resume"]))
        step = read_state(newest_checkpoint(run.checkpoints)).step
    else:
        run, step = RunDirectory.create(Path(given["runs_dir"]), "toy", 0, given["name"]), -1
        nested = {
            "steps": int(given["steps"]),
            "eval_every": int(given["eval_every"]),
            "checkpoint_every": int(given.get("checkpoint_every", 10)),
            "seed": int(given.get("seed", 0)),
        }
        run.config.write_text(yaml.safe_dump(nested | {"algorithm": {"lr": float(given["algorithm.lr"])}}))
    config = yaml.safe_load(run.config.read_text())
    metrics, lr = JsonLines(run.metrics), config["algorithm"]["lr"]
    try:
        for now in range(step + 1, config["steps"] + 1):
            step = now
            if step % config["eval_every"] == 0 or step == config["steps"]:
                metrics.log(step, {"val/reward": step * lr / 100})
            if step % config["checkpoint_every"] == 0 or step == config["steps"]:
                save(run, step)
            if config["seed"] == 13:
                sys.stderr.write("agl: the engine broke down\n")
                return 1
            time.sleep(0.4 if config["seed"] == 14 else 0.02)
    except Stopped:
        save(run, step)
        return 130
    run.summary.write_text("{}")
    return 0


def save(run: RunDirectory, step: int) -> None:
    folder = checkpoint_folder(run.checkpoints, step)
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(json.dumps(step))
    write_state(folder, State(step=step, cursor=TaskCursor(seed=0)))


def stop(number: int, frame: object) -> None:
    raise Stopped


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
