"""Runs whose processes are killed with -9, a random one again and again; the engine is the toy engine.

If the driver or the learner dies, the run is resumed from its newest checkpoint; any other part is started again at
once, as Ray and Serve do it.

    python tests/chaos/kills.py --kills 1000   # prints a line of JSON; exit code 1 if anything was lost or doubled
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from injector import Faults
from multi_process_run import PARTS, ROLLOUTS, RunProcesses, new_incarnation, run_part

KINDS = ("buffer", "gateway", "policy", "worker", "learner", "driver")
STUCK_S = float(os.environ.get("CHAOS_STUCK_S", "60"))
"""Seconds without progress after which a run counts as stuck."""
START_S = 5.0
"""Seconds without progress after which a part is killed although the run makes none: parts are probably starting."""


@dataclass(slots=True)
class Report:
    """The counts of all runs."""

    runs: int = 0
    incarnations: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    superseded: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    rollouts: int = 0
    failed: Counter[str] = field(default_factory=Counter)


class Fleet:
    """The processes of one incarnation of a run."""

    def __init__(self, run: RunProcesses) -> None:
        self.run = run
        self._context = multiprocessing.get_context("forkserver")
        self.processes: dict[str, BaseProcess] = {}
        if not any(run.checkpoints.glob("*/state.json")):  # without a checkpoint the run starts again from nothing
            shutil.rmtree(run.folder / "journal", ignore_errors=True)
        for part in PARTS:
            if not part.startswith("worker"):
                self.start(part)

    def start(self, part: str) -> None:
        process = self._context.Process(target=run_part, args=(part, self.run, os.getpid()), name=part, daemon=True)
        process.start()
        self.processes[part] = process

    def tend(self) -> str:
        """Start dead parts again. Returns "done" at the end of the run, "dead" if it must be resumed, else ""."""
        for part, process in list(self.processes.items()):
            if process.is_alive():
                continue
            process.join()
            if part == "driver":
                return "done" if process.exitcode == 0 else "dead"
            if part == "learner":
                return "dead"
            self.start(part)
        if self.run.ready.exists():
            for part in PARTS:
                if part not in self.processes:
                    self.start(part)
        return ""

    def print_stacks(self) -> None:
        """Have each process print where it waits on stderr."""
        for part, process in self.processes.items():
            sys.stderr.write(f"{part}: {process}\n")
            if process.pid and process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.3)

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join()


def one_run(folder: Path, faults: Faults, report: Report, *, kills: int, mean_s: float, **settings: int) -> None:
    """Run to the end, and kill up to `kills` processes, with `mean_s` seconds between two kills on average."""
    left, incarnation, progress = kills, 0, 0
    fleet = Fleet(new_incarnation(folder, incarnation, **settings))
    killed = moved = time.monotonic()
    pause = faults.pause(mean_s)
    try:
        while (state := fleet.tend()) != "done":
            if state == "dead":
                fleet.end()
                incarnation += 1
                fleet = Fleet(new_incarnation(folder, incarnation, **settings))
            now = time.monotonic()
            seen = sum(path.stat().st_size for path in (fleet.run.acknowledged, fleet.run.taken) if path.exists())
            if seen != progress:
                progress, moved = seen, now
            if now - max(moved, killed) > STUCK_S:
                fleet.print_stacks()
                report.broken.append(f"{folder.name}: it does not end by itself")
                return
            # The run must make progress between two kills, or it would never end; but a start may be hit as well.
            if left and now > killed + pause and (moved > killed or now > killed + START_S):
                kind = faults.victim(KINDS)
                names = [name for name in fleet.processes if name.startswith(kind)]
                victim = fleet.processes.get(faults.victim(names)) if names else None
                if victim is not None and victim.pid and victim.is_alive() and faults.kill_process(kind, victim.pid):
                    left -= 1
                    report.kills[kind] += 1
                killed, pause = time.monotonic(), faults.pause(mean_s)
            time.sleep(0.01)
    finally:
        fleet.end()
        report.runs += 1
        report.incarnations += incarnation + 1
    check(fleet.run, report)


def check(run: RunProcesses, report: Report) -> None:
    """Check that each acknowledged span is in a taken group, once, and that the counts of run and buffer agree."""
    groups, lag = {}, 0
    for line in run.taken.read_text().splitlines():
        group = json.loads(line)
        groups[group["group"]] = group["rollouts"]  # if a step was made twice, the second time counts
        lag = max(lag, group["lag"])
    final = {rollout["rollout"]: rollout for rollouts in groups.values() for rollout in rollouts}
    counted = Counter(call for rollout in final.values() for call in rollout["calls"])
    report.doubled += [call for call, times in counted.items() if times > 1]
    for line in run.acknowledged.read_text().splitlines():
        note = json.loads(line)
        report.acknowledged += 1
        rollout = final.get(note["rollout"])
        if rollout is not None and note["attempt"] < rollout["attempt"]:
            report.superseded += 1
        elif rollout is None or note["attempt"] > rollout["attempt"] or note["call"] not in rollout["calls"]:
            report.lost.append(f"{run.folder.name}: {note}")
    result = json.loads(run.result.read_text())
    stats = result["stats"]
    steps = {"train": result["steps"] * len(groups) and result["admitted"] // ROLLOUTS}
    sizes = Counter(len(rollouts) for group, rollouts in groups.items() if group.startswith("train"))
    wrong = {
        "the run's books": result["admitted"] != result["trained"] + sum(result["dropped"].values()),
        "the buffer's books": stats["admitted"]
        != sum(stats[name] for name in ("waiting", "running", "complete", "taken", "trained"))
        + sum(stats["dropped"].values()),
        "run and buffer": (result["admitted"], result["trained"]) != (stats["admitted"], stats["trained"]),
        "steps": result["steps"] != run.steps,
        f"the bound: tokens {lag} updates old": lag > run.max_lag,
        "the sizes of groups": sizes != {ROLLOUTS: steps["train"]},
        "rollouts that are open": bool(stats["waiting"] or stats["running"] or stats["complete"] or stats["taken"]),
    }
    report.broken += [f"{run.folder.name}: {what}: {result} {sizes}" for what, bad in wrong.items() if bad]
    report.rollouts += len(final)
    report.failed.update(result["failed"])


def destroy(*, kills: int, per_run: int, mean_s: float, steps: int, seed: int, max_lag: int = 0) -> dict[str, Any]:
    """Make runs until `kills` processes have been killed; returns the counts."""
    faults, report, started = Faults(seed), Report(), time.monotonic()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["multi_process_run"])
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    while (left := kills - report.kills.total()) > 0 and not report.broken:
        folder = root / f"run-{report.runs}"
        folder.mkdir()
        settings = {"steps": steps, "seed": seed + report.runs, "max_lag": max_lag}
        one_run(folder, faults, report, kills=min(per_run, left), mean_s=mean_s, **settings)
        sys.stderr.write(f"{report.kills.total()} kills, {report.runs} runs, {time.monotonic() - started:.0f} s\n")
    bad = bool(report.lost or report.doubled or report.broken)
    if not bad:
        shutil.rmtree(root)
    return {
        "benchmark": "kill -9",
        "kills": report.kills.total(),
        "of": dict(report.kills),
        "runs": report.runs,
        "resumed": report.incarnations - report.runs,
        "rollouts": report.rollouts,
        "acknowledged_spans": report.acknowledged,
        "of_attempts_made_again": report.superseded,
        "lost": len(report.lost),
        "doubled": len(report.doubled),
        "broken": report.broken[:3],
        "examples": (report.lost + report.doubled)[:5],
        "failed_rollouts": dict(report.failed),
        "seconds": round(time.monotonic() - started, 1),
        **({"folder": str(root)} if bad else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--per-run", type=int, default=50)
    parser.add_argument("--mean-s", type=float, default=0.3, help="mean seconds between two kills")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run, with 32 rollouts each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-lag", type=int, default=0, help="updates by which rollouts and training overlap")
    result = destroy(**vars(parser.parse_args()))
    sys.stdout.write(json.dumps(result) + "\n")
    return int(bool(result["lost"] or result["doubled"] or result["broken"]))


if __name__ == "__main__":
    sys.exit(main())
