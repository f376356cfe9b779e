"""kill -9, many times: whole runs with the toy engine, each part a process of its own, and a random one dies again and
again. Where the driver or the learner dies the run is over, and is resumed from its newest checkpoint; any other part
is started again at once, as Ray and Serve do it.

    python tests/chaos/kills.py --kills 1000   # one line of JSON; exit code 1 where anything was lost or doubled
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

from town import PARTS, ROLLOUTS, Town, live, new_town

from agent_lightning.toy.faults import Faults

KINDS = ("buffer", "gateway", "policy", "worker", "learner", "driver")
STUCK_S = float(os.environ.get("CHAOS_STUCK_S", "60"))
"""A run that has come no further in this time does not end by itself."""


START_S = 5.0
"""Seconds without progress after which a part is killed all the same: it is starting, probably."""


@dataclass(slots=True)
class Report:
    """What was done and found, of all runs."""

    runs: int = 0
    lives: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    superseded: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    rollouts: int = 0
    failed: Counter[str] = field(default_factory=Counter)


class Fleet:
    """The processes of one life of a run."""

    def __init__(self, town: Town) -> None:
        self.town = town
        self._context = multiprocessing.get_context("forkserver")
        self.processes: dict[str, BaseProcess] = {}
        if not any(town.checkpoints.glob("*/state.json")):  # it died before its first: there is nothing to go on from
            shutil.rmtree(town.folder / "journal", ignore_errors=True)
        for part in PARTS:
            if not part.startswith("worker"):
                self.start(part)

    def start(self, part: str) -> None:
        process = self._context.Process(target=live, args=(part, self.town, os.getpid()), name=part, daemon=True)
        process.start()
        self.processes[part] = process

    def tend(self) -> str:
        """Start again what has died. "done", "dead" where the run is to be resumed, else ""."""
        for part, process in list(self.processes.items()):
            if process.is_alive():
                continue
            process.join()
            if part == "driver":
                return "done" if process.exitcode == 0 else "dead"
            if part == "learner":
                return "dead"
            self.start(part)
        if self.town.ready.exists():
            for part in PARTS:
                if part not in self.processes:
                    self.start(part)
        return ""

    def tell(self) -> None:
        """Have each process say on stderr what it does."""
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


def one_run(folder: Path, faults: Faults, report: Report, *, kills: int, mean_s: float, steps: int, seed: int) -> None:
    """A run to its end, of whose processes up to `kills` die."""
    left, life, progress = kills, 0, 0
    fleet = Fleet(new_town(folder, life, steps=steps, seed=seed))
    killed = moved = time.monotonic()
    pause = faults.pause(mean_s)
    try:
        while (state := fleet.tend()) != "done":
            if state == "dead":
                fleet.end()
                life += 1
                fleet = Fleet(new_town(folder, life, steps=steps, seed=seed))
            now = time.monotonic()
            seen = sum(path.stat().st_size for path in (fleet.town.witness, fleet.town.books) if path.exists())
            if seen != progress:
                progress, moved = seen, now
            if now - max(moved, killed) > STUCK_S:
                fleet.tell()
                report.broken.append(f"{folder.name}: it does not end by itself")
                return
            # Some work is done between two kills, else no run would ever end; but a start may be hit as well.
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
        report.lives += life + 1
    check(fleet.town, report)


def check(town: Town, report: Report) -> None:
    """Every span that was acknowledged is in the group that was trained, once; the books are whole."""
    groups = {}
    for line in town.books.read_text().splitlines():
        one = json.loads(line)
        groups[one["group"]] = one["rollouts"]  # of a step that was done twice, the second counts
    final = {one["rollout"]: one for rollouts in groups.values() for one in rollouts}
    counted = Counter(call for one in final.values() for call in one["calls"])
    report.doubled += [call for call, times in counted.items() if times > 1]
    for line in town.witness.read_text().splitlines():
        note = json.loads(line)
        report.acknowledged += 1
        one = final.get(note["rollout"])
        if one is not None and note["attempt"] < one["attempt"]:
            report.superseded += 1
        elif one is None or note["attempt"] > one["attempt"] or note["call"] not in one["calls"]:
            report.lost.append(f"{town.folder.name}: {note}")
    result = json.loads(town.result.read_text())
    stats = result["stats"]
    steps = {"train": result["steps"] * len(groups) and result["admitted"] // ROLLOUTS}
    sizes = Counter(len(rollouts) for group, rollouts in groups.items() if group.startswith("train"))
    wrong = {
        "the run's books": result["admitted"] != result["trained"] + sum(result["dropped"].values()),
        "the buffer's books": stats["admitted"]
        != sum(stats[name] for name in ("waiting", "running", "complete", "taken", "trained"))
        + sum(stats["dropped"].values()),
        "run and buffer": (result["admitted"], result["trained"]) != (stats["admitted"], stats["trained"]),
        "steps": result["steps"] != town.steps,
        "the sizes of groups": sizes != {ROLLOUTS: steps["train"]},
        "rollouts that are open": bool(stats["waiting"] or stats["running"] or stats["complete"] or stats["taken"]),
    }
    report.broken += [f"{town.folder.name}: {what}: {result} {sizes}" for what, bad in wrong.items() if bad]
    report.rollouts += len(final)
    report.failed.update(result["failed"])


def destroy(*, kills: int, per_run: int, mean_s: float, steps: int, seed: int) -> dict[str, Any]:
    """Runs until `kills` processes were killed; what came of it."""
    faults, report, started = Faults(seed), Report(), time.monotonic()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["town"])
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    while (left := kills - report.kills.total()) > 0 and not report.broken:
        folder = root / f"run-{report.runs}"
        folder.mkdir()
        one_run(folder, faults, report, kills=min(per_run, left), mean_s=mean_s, steps=steps, seed=seed + report.runs)
        sys.stderr.write(f"{report.kills.total()} kills, {report.runs} runs, {time.monotonic() - started:.0f} s\n")
    bad = bool(report.lost or report.doubled or report.broken)
    if not bad:
        shutil.rmtree(root)
    return {
        "benchmark": "kill -9",
        "kills": report.kills.total(),
        "of": dict(report.kills),
        "runs": report.runs,
        "resumed": report.lives - report.runs,
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
    parser.add_argument("--steps", type=int, default=8, help="of each run, of 32 rollouts")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found = destroy(kills=asked.kills, per_run=asked.per_run, mean_s=asked.mean_s, steps=asked.steps, seed=asked.seed)
    sys.stdout.write(json.dumps(found) + "\n")
    return int(bool(found["lost"] or found["doubled"] or found["broken"]))


if __name__ == "__main__":
    sys.exit(main())
