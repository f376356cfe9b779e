"""What distribution costs: rollouts per second of several simulated nodes over one with as many workers, as JSON.

    python benchmarks/nodes.py --steps 8              # as root, for network namespaces; Linux
    python benchmarks/nodes.py --experiment calc_tiny # with a model that is served by vLLM and trained by veRL
    python benchmarks/nodes.py --experiment spider_tiny_single_table data.root=DIR   # and more words of `agl train`

Both have the same cores, this machine's, so nothing is gained by the nodes: the ratio is what their gateways, proxies
and messages between them cost, of the rollouts of this experiment: those of the toy cost nearly nothing else. The same
run, without evaluations and at a rate at which nothing is learned, is started on each of two clusters. They then take
turns of some steps, in which the other is frozen (SIGSTOP): a machine's speed may change by a third within minutes, and
that must not look like a cost. The first step of a turn is not counted: what stood still is made up for in it. One
start of the same may be a tenth faster than another, so there are several; each gives the ratio of what its clusters
made in all turns, and the result is the median of these.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "stack"))

from hosts import Hosts, can_be_made  # noqa: E402

COUNTED = ("rollouts/trained", "rollouts/dropped/")
"""Metrics of a step that together are its rollouts."""
CPUS = 2
"""The CPUs of each node; a node that is alone has as many as all of them."""
SKIPPED = 3
"""Steps before anything is measured."""
START_SECONDS = 240


def words_of(experiment: str, workers: int) -> list[str]:
    """The experiment as it is, until it is ended, but that nothing is evaluated, saved or learned, and that no rollout
    is late: while a cluster is frozen its clocks go on."""
    words = ["train", f"experiment={experiment}", "steps=100000", "eval_every=0", "checkpoint_every=0", "name=run"]
    words += ["algorithm.lr=1e-9", f"rollout.workers={workers}", "data.val.num=8", "agent.timeout_s=3600"]
    return [*words, f"serving.replicas={workers}"] if experiment == "toy" else words  # the toy's: one for each node


class Cluster:
    """A cluster of `nodes` hosts, with a run of `experiment` and the overrides `words` that has `workers` workers."""

    def __init__(self, experiment: str, words: Sequence[str], nodes: int, workers: int) -> None:
        self._experiment, self._words, self._nodes, self._workers = experiment, words, nodes, workers
        self._stack = ExitStack()
        self.rollouts = 0
        self.seconds = 0.0

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            hosts = stack.enter_context(Hosts(cpus=CPUS * self._workers // self._nodes))
            for _ in range(self._nodes - 1):
                hosts.join()
            words = [*words_of(self._experiment, self._workers), *self._words]
            words += [f"hardware.address={hosts.address}", f"runs_dir={folder}"]
            command = hosts.head.command(sys.executable, "-m", "agent_lightning", *words)
            run = subprocess.Popen(command, cwd=ROOT, env=hosts.environment, stdout=sys.stderr)
            self._metrics = Path(folder) / "run" / "metrics.jsonl"
            deadline = time.monotonic() + START_SECONDS
            while len(self._done()) < SKIPPED:
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

    @contextmanager
    def dozing(self) -> Iterator[None]:
        """Awake one second of ten, which is enough for Ray not to take its processes for dead."""
        ended = Event()

        def doze() -> None:
            while not ended.is_set():
                self.freeze()
                ended.wait(9)
                self._send(signal.SIGCONT)
                ended.wait(1)
            self.freeze()

        thread = Thread(target=doze)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def turn(self, steps: int) -> None:
        """Run for so many steps after a first, in which what stood still while frozen is made up for."""
        self._send(signal.SIGCONT)
        self._steps_more(1)
        started = time.monotonic()
        self.rollouts += self._steps_more(steps)
        self.seconds += time.monotonic() - started
        self.freeze()

    def _steps_more(self, steps: int) -> int:
        """Wait until so many more are over; the rollouts of these."""
        before = len(self._done())
        while len(done := self._done()) < before + steps:
            time.sleep(0.02)
        return sum(done[before:])

    def rate(self) -> float:
        """Rollouts per second of its turns."""
        return self.rollouts / self.seconds

    def _done(self) -> list[int]:
        """The rollouts of each step that is over, those that taught nothing too."""
        lines = self._metrics.read_text().splitlines() if self._metrics.exists() else []
        steps = [json.loads(line) for line in lines if line.endswith("}") and '"time/step"' in line]
        return [sum(int(n) for key, n in step.items() if key.startswith(COUNTED)) for step in steps]

    def _send(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def one_start(experiment: str, words: Sequence[str], nodes: int, turns: int, steps: int) -> dict[int, float]:
    """Rollouts per second by number of nodes."""
    with ExitStack() as stack:
        clusters = {1: stack.enter_context(Cluster(experiment, words, 1, nodes))}
        with clusters[1].dozing():
            clusters[nodes] = stack.enter_context(Cluster(experiment, words, nodes, nodes))
            clusters[nodes].freeze()
        for _ in range(turns):
            for cluster in clusters.values():
                cluster.turn(steps)
        return {number: cluster.rate() for number, cluster in clusters.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="toy")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--turns", type=int, default=8, help="of each cluster after a start")
    parser.add_argument("--steps", type=int, default=2, help="of a turn, which should take seconds")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if not can_be_made():
        raise SystemExit("network namespaces need root and `ip`")
    measured: list[dict[int, float]] = []
    for _ in range(options.starts):
        rates = one_start(options.experiment, options.words, options.nodes, options.turns, options.steps)
        measured.append(rates)
        sys.stderr.write(f"{rates}\n")
    result = {
        "benchmark": "nodes",
        "experiment": options.experiment,
        "cores": os.cpu_count(),
        "workers": options.nodes,
        "rollouts_per_s": {
            str(number): [round(rates[number], 1) for rates in measured] for number in (1, options.nodes)
        },
        "ratio": round(statistics.median(rates[options.nodes] / rates[1] for rates in measured), 3),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
