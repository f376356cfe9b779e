"""What distribution costs: rollouts per second of several simulated nodes over one with as many workers, as JSON.

    sudo python benchmarks/nodes.py        # root, for network namespaces; Linux

Both have the same cores, this machine's, so nothing is gained by the nodes: the ratio is what their gateways, proxies
and messages between them cost. The toy model's run (experiment=toy, without an evaluation), a new cluster each time,
in turns; medians of the rounds, of the seconds of whole steps without the first two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "stack"))

from hosts import Hosts, can_be_made  # noqa: E402

GROUPS, GROUP_SIZE = 16, 8
SKIPPED = 2


def rollouts_per_s(nodes: int, workers: int, steps: int) -> float:
    words = ["train", "experiment=toy", f"steps={steps + SKIPPED}", "eval_every=0", "checkpoint_every=0", "name=run"]
    words += [f"algorithm.tasks_per_step={GROUPS}", f"algorithm.rollouts_per_task={GROUP_SIZE}"]
    words += [f"rollout.workers={workers}", f"serving.replicas={workers}"]
    with tempfile.TemporaryDirectory() as folder, Hosts() as hosts:
        for _ in range(nodes - 1):
            hosts.join()
        words += [f"hardware.address={hosts.address}", f"runs_dir={folder}"]
        command = hosts.head.command(sys.executable, "-m", "agent_lightning.cli", *words)
        subprocess.run(command, check=True, cwd=ROOT, env=hosts.environment, stdout=sys.stderr)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["time/step"] for line in lines if line.get("time/step") and line["step"] > SKIPPED]
    return GROUPS * GROUP_SIZE * len(seconds) / sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if not can_be_made():
        raise SystemExit("network namespaces need root and `ip`")
    measured: dict[int, list[float]] = {1: [], options.nodes: []}
    for turn in range(options.rounds):
        for nodes in sorted(measured, reverse=bool(turn % 2)):
            measured[nodes].append(rollouts_per_s(nodes, options.nodes, options.steps))
    medians = {nodes: statistics.median(values) for nodes, values in measured.items()}
    result = {
        "benchmark": "nodes",
        "cores": os.cpu_count(),
        "workers": options.nodes,
        "rollouts_per_s": {str(nodes): [round(one, 1) for one in values] for nodes, values in measured.items()},
        "ratio": round(medians[options.nodes] / medians[1], 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
