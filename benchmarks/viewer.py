#!/usr/bin/env python3
"""How fast `agl view` answers: the first byte of the pages of runs of 10,000 and 100,000 rollouts, and its memory.

    python benchmarks/viewer.py

The runs are made of one group that is written again and again under new numbers. Each page is asked for in a process
that has just started ("cold", which reads the index) and again ("warm", the median of 5). The last line is one object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
PAGES = (
    "",
    "/rollouts",
    "/rollouts?outcome=engine_error",
    "/group/train-200",
    "/rollout/train-200-0",
    "/tokens/train-200-0",
)


def write(root: Path, rollouts: int, groups_a_step: int = 64) -> str:
    """Write a run of `rollouts` rollouts, in steps of 64 groups of 4; returns its name."""
    from viewer_runs import group, write_run

    from agent_lightning.run.archive import RolloutWriter
    from agent_lightning.run.tracking import JsonLines

    path = write_run(root, f"run-{rollouts}", steps=1)
    writer, metrics = RolloutWriter(path / "rollouts"), JsonLines(path / "metrics.jsonl")
    for step in range(2, 2 + rollouts // (4 * groups_a_step)):
        first = step * groups_a_step
        writer.write(step, step, [group("train", first + n, [1.0, 0.0, 0.5, None]) for n in range(groups_a_step)])
        metrics.log(step, {"train/reward": 0.5, "time/step": 2.0, "tokens/sampled": 3000.0})
    metrics.close()
    return path.name


def measure(root: Path, name: str) -> dict[str, float]:
    """Seconds to the first byte of each page, and the largest memory of the process in MiB."""
    from starlette.testclient import TestClient

    from agent_lightning.api.viewer.app import Viewer
    from agent_lightning.api.viewer.command import find_rules
    from agent_lightning.api.viewer.folder import Library

    figures: dict[str, float] = {}
    viewer = Viewer(Library(root), find_rules, token="t")
    viewer.prepare()  # as `agl view` does before it prints its address
    with TestClient(viewer.app, base_url="http://127.0.0.1", cookies={"agl_view": "t"}) as client:
        for page in PAGES:
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                response = client.get(f"/run/{name}{page}")
                assert response.status_code == 200, response.text
                seconds.append(time.perf_counter() - start)
            label = page.partition("?")[0].strip("/").partition("/")[0] or "curves"
            figures[f"{label}{'_filtered' if '?' in page else ''}_cold_s"] = round(seconds[0], 3)
            figures[f"{label}{'_filtered' if '?' in page else ''}_warm_s"] = round(statistics.median(seconds[1:]), 3)
    figures["memory_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "RUN"), help="of a run that exists; used by itself")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure[0]), options.measure[1])))
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rollouts:
            command = [sys.executable, __file__, "--measure", folder, write(Path(folder), count)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[str(count)] = json.loads(output)
            print(f"{count}: {output.strip()}")
    print(json.dumps({"benchmark": "viewer", "rollouts": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
