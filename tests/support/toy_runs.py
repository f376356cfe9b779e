"""Runs of the toy policy in one process, with the real agents and every file that `agl train` writes.

    toy_runs.py ROOT    # trains until SIGTERM, slowly enough to be watched: ROOT/running

The loop, the gateway, the agents, the credit and the files are real; the policy says one of a few texts, in no time.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from agent_lightning.config.load import load, to_yaml
from agent_lightning.core.errors import StepFailed
from agent_lightning.core.types import Task
from agent_lightning.launch.sweeps.plan import SweepFolder, TrialRecord, plan_sweep
from agent_lightning.run.observer import RunObserver, summarize
from agent_lightning.run.report import Progress
from agent_lightning.run.state import credit_rules, make_plan
from agent_lightning.run.tracking import RunDirectory
from agent_lightning.testing.world import ToyWorld


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """An experiment, what the toy policy says in it, and its rows."""

    words: Sequence[str]
    says: Sequence[str]
    rows: Sequence[Mapping[str, Any]]


SUMS: Final = [
    {"id": f"sum-{a}-{b}", "question": f"What is {a} plus {b}?", "result": str(a + b)} for a in (2, 3) for b in (2, 4)
]
CALCULATES: Final = ("call:2+2", "call:3+4", "call:2+", "The answer is 4.", "The answer is 7.")
SONGS: Final = [
    {
        "id": f"song-{n}",
        "question": f"{title} >> performer",
        "answer": singer,
        "paragraphs": [{"idx": 0, "title": title, "paragraph_text": f"{title} is a song by {singer}."}],
    }
    for n, (title, singer) in enumerate([("Harbour Light", "Anna Bergman"), ("Blue Garden", "The Kinks")])
]
SEARCHES: Final = (
    "<think>I search.</think><query>Harbour Light</query>",
    "<think>It says so.</think><answer>Anna Bergman</answer>",
    "I do not know.",
)
KINDS: Final[Mapping[str, Kind]] = {
    "calc_tiny": Kind(words=["experiment=calc_tiny"], says=CALCULATES, rows=SUMS),
    "calc_team": Kind(words=["experiment=calc_team", "credit=air"], says=CALCULATES, rows=SUMS),
    "musique": Kind(words=["experiment=musique_tiny_relations", "data.root=."], says=SEARCHES, rows=SONGS),
    # The reward of another kind of row: every rollout fails.
    "failed": Kind(
        words=["experiment=calc_tiny", "agent.reward=examples/calc_x/reward.py:score_sheet"], says=CALCULATES, rows=SUMS
    ),
}


async def train(root: Path, name: str, kind: Kind, *, steps: int = 2, delay_s: float = 0.0) -> Path:
    """Make the run root/name of `steps` steps, or until SIGTERM. `delay_s`: the seconds of each answer."""
    sizes = [f"algorithm.tasks_per_step={len(kind.rows)}", "algorithm.rollouts_per_task=4", f"steps={steps}"]
    policy = ["model=toy", f"model.words={json.dumps(kind.says)}", "eval_every=1"]
    policy += ["algorithm.lr_warmup_steps=0", "algorithm.clip_ratio_high=0.2"]  # all that the toy's learner knows
    config = load([*kind.words, *policy, *sizes, "tracking.wandb=disabled", "tracking.tensorboard=false"])
    run = RunDirectory.create(root, config.experiment, 0, name)
    tasks = [Task(task_id=row["id"], payload=row) for row in kind.rows]
    with run.lock():
        run.config.write_text(to_yaml(config))
        progress = Progress(config.experiment, steps, Console(quiet=True))
        observer = RunObserver(config=config, run=run, progress=progress, rules=credit_rules(config))
        world = ToyWorld(
            agent=config.agent, tasks=tasks, words=kind.says, algorithm=config.algorithm, journal=run.path / "journal"
        )
        how, error = "finished", ""
        async with world:
            world.engine.delay_s = delay_s
            world.loop.observer, world.loop.plan = observer, replace(make_plan(config), row_multiple=1)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, world.stop)
            try:
                await world.train(steps=steps)
            except StepFailed as failure:
                how, error = "failed", str(failure)
        how = "stopped" if world.loop.stop.is_set() else how
        ended: Any = {"val_rows": len(tasks), "val_reward_by": {}, "start_s": 0.0, "state": how, "error": error}
        summarize(config, world.loop.state, **ended).write(run.summary)
        observer.close()
    return run.path


async def sweep(root: Path) -> Path:
    """Make a sweep of two trials that have learned at different rates, and of one that failed."""
    kind = KINDS["calc_tiny"]
    plan, _ = plan_sweep([*kind.words, "algorithm.lr=choice(1e-4,1e-3,1e-2)", "sweep=grid"])
    folder, records = SweepFolder.create(root, plan), []
    for number, lr in enumerate(("1e-4", "1e-3")):
        word = f"algorithm.lr={lr}"
        path = await train(folder.path, f"trial-{number:03d}", replace(kind, words=[*kind.words, word]))
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        rewards = tuple((int(line["step"]), line["val/reward"]) for line in lines if "val/reward" in line)
        values: Any = {"name": path.name, "run": path.name, "state": "done", "rewards": rewards}
        records.append(TrialRecord(words=(word,), **values))
    records.append(TrialRecord(name="trial-002", words=("algorithm.lr=1e-2",), state="failed", error="no room"))
    folder.write(records)
    return folder.path


async def make_all(root: Path) -> Path:
    """Make a run of each kind, and a sweep. Returns the folder of the sweep."""
    for name, kind in KINDS.items():
        await train(root, name, kind)
    return await sweep(root)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(train(Path(sys.argv[1]), "running", KINDS["calc_tiny"], steps=100_000, delay_s=0.1))
