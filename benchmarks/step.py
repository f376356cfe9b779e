"""Where a training step's seconds go, as JSON: medians over the steps of one run, the first step left out.

    python benchmarks/step.py                 # runs experiment=calc_tiny for 12 steps and measures it
    python benchmarks/step.py --run runs/…    # measures a run that exists

`share_other` is the share of a step outside generation and update; `start_s` the seconds from the command until the
service answered.
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
from typing import Any

PARTS = ("step", "generate", "update", "publish", "other")


def run(steps: int, folder: str, overrides: list[str]) -> Path:
    """A short run with nothing but its steps; returns its directory."""
    command = [sys.executable, "-m", "agent_lightning", "train", "experiment=calc_tiny", f"steps={steps}"]
    command += ["eval_every=0", "data.val.num=16", f"runs_dir={folder}", "name=step", *overrides]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return Path(folder) / "step"


def measure(directory: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "time/step" in line and line["step"] > 1 and line.get("time/update")]
    if not steps:
        raise SystemExit(f"{directory}: no step after the first that trained")
    median = {part: statistics.median(line[f"time/{part}"] for line in steps) for part in PARTS}
    outside = [1 - (line["time/generate"] + line["time/update"]) / line["time/step"] for line in steps]
    summary = json.loads((directory / "summary.json").read_text())
    tokens = [line["tokens/sampled"] / line["time/generate"] for line in steps]
    return {
        "benchmark": "step",
        "experiment": summary["experiment"],
        "cores": os.cpu_count(),
        "steps": len(steps),
        "median_s": {part: round(value, 3) for part, value in median.items()},
        "share_other": round(statistics.median(outside), 4),
        "sampled_tokens_per_s": round(statistics.median(tokens), 1),
        "start_s": summary["start_s"],
        "mean_abs_logprob_gap": summary["mean_abs_logprob_gap"],
        "max_abs_logprob_gap": summary["max_abs_logprob_gap"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="measure this run instead of making one")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(measure(options.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(run(options.steps, folder, options.overrides))))


if __name__ == "__main__":
    main()
