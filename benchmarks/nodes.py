"""What distribution costs: rollouts per second of several simulated nodes over one with as many workers, as JSON.

    python benchmarks/nodes.py                        # as root, for network namespaces; Linux
    python benchmarks/nodes.py --experiment calc_tiny # with a model that is served by vLLM and trained by veRL
    python benchmarks/nodes.py --experiment spider_tiny_single_table data.root=DIR   # and more words of `agl train`

Both have the same cores, this machine's, so nothing is gained by the nodes: the ratio is what their gateways, proxies
and messages between them cost, of the rollouts of this experiment: those of the toy cost nearly nothing else. The same
run, without evaluations and at a rate at which nothing is learned, is started on each of two clusters. They then take
turns of a few seconds, in which the other is frozen (SIGSTOP): a machine's speed may change by a third within minutes,
and that must not look like a cost. One start of the same may be a tenth faster than another, so there are several; each
gives the ratio of what its clusters made in all turns, and the result is the median of these.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "stack"))

from hosts import Hosts, can_be_made  # noqa: E402

GROUP_SIZE = 8
TOY_TASKS, TASKS = 16, 4
"""Of a step, of the toy and of any other experiment."""
CPUS = 2
"""Of a node; of one alone, as many as all of them have."""
SKIPPED = 3
"""Steps before anything is measured."""
START_SECONDS = 240


def tasks_of(experiment: str) -> int:
    return TOY_TASKS if experiment == "toy" else TASKS


def words_of(experiment: str, workers: int) -> list[str]:
    """A run that goes on until it is ended, in which nothing is evaluated, saved or learned."""
    words = ["train", f"experiment={experiment}", "steps=100000", "eval_every=0", "checkpoint_every=0", "name=run"]
    words += ["algorithm.lr=1e-9", f"algorithm.tasks_per_step={tasks_of(experiment)}", f"rollout.workers={workers}"]
    words += [f"algorithm.rollouts_per_task={GROUP_SIZE}"]
    if experiment == "toy":
        return [*words, f"serving.replicas={workers}"]  # one for each node
    return [*words, "data.val.num=8", "rollout.concurrency=32", "learner.threads=1"]


class Cluster:
    """Of `nodes` hosts; `workers` in the run of `experiment` on it, with `words` beside it."""

    def __init__(self, experiment: str, words: Sequence[str], nodes: int, workers: int) -> None:
        self._experiment, self._words, self._nodes, self._workers = experiment, words, nodes, workers
        self._stack = ExitStack()
        self.steps = 0
        self.seconds = 0.0

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            hosts = stack.enter_context(Hosts(cpus=CPUS * self._workers // self._nodes))
            for _ in range(self._nodes - 1):
                hosts.join()
            words = [*words_of(self._experiment, self._workers), *self._words]
            words += [f"hardware.address={hosts.address}", f"runs_dir={folder}"]
            command = hosts.head.command(sys.executable, "-m", "agent_lightning.cli", *words)
            run = subprocess.Popen(command, cwd=ROOT, env=hosts.environment, stdout=sys.stderr)
            self._metrics = Path(folder) / "run" / "metrics.jsonl"
            deadline = time.monotonic() + START_SECONDS
            while self._done() < SKIPPED:
                if run.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the run on {self._nodes} nodes does not start")
                time.sleep(0.2)
            self._pids = hosts.pids()
            stack.callback(self._send, signal.SIGCONT)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def freeze(self) -> None:
        self._send(signal.SIGSTOP)

    def turn(self, seconds: float) -> None:
        """Run for so long. A step that the freeze interrupts goes on in the next turn."""
        before, started = self._done(), time.monotonic()
        self._send(signal.SIGCONT)
        time.sleep(seconds)
        self.freeze()
        self.seconds += time.monotonic() - started
        self.steps += self._done() - before

    def rate(self) -> float:
        """Rollouts per second of its turns."""
        return tasks_of(self._experiment) * GROUP_SIZE * self.steps / self.seconds

    def _done(self) -> int:
        return self._metrics.read_text().count('"time/step"') if self._metrics.exists() else 0

    def _send(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def one_start(experiment: str, words: Sequence[str], nodes: int, turns: int, seconds: float) -> dict[int, float]:
    """Rollouts per second by number of nodes."""
    with ExitStack() as stack:
        clusters = {number: stack.enter_context(Cluster(experiment, words, number, nodes)) for number in (1, nodes)}
        for cluster in clusters.values():
            cluster.freeze()
        for _ in range(turns):
            for cluster in clusters.values():
                cluster.turn(seconds)
        return {number: cluster.rate() for number, cluster in clusters.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="toy")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--turns", type=int, default=20, help="of each cluster after a start")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a turn")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if not can_be_made():
        raise SystemExit("network namespaces need root and `ip`")
    measured: list[dict[int, float]] = []
    for _ in range(options.starts):
        one = one_start(options.experiment, options.words, options.nodes, options.turns, options.seconds)
        measured.append(one)
        sys.stderr.write(f"{one}\n")
    result = {
        "benchmark": "nodes",
        "experiment": options.experiment,
        "cores": os.cpu_count(),
        "workers": options.nodes,
        "rollouts_per_s": {str(number): [round(one[number], 1) for one in measured] for number in (1, options.nodes)},
        "ratio": round(statistics.median(one[options.nodes] / one[1] for one in measured), 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
