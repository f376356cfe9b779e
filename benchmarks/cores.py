"""How much of what the cores can multiply a run's generation and updates use, as JSON lines; the last has the medians.

    python benchmarks/cores.py runs/smollm2     # a run on a CPU that exists, with at least two steps

The limit is measured here: float32 products of the model's own shapes, by as many threads as the run had, in GFLOP/s.
The work is what the tokens need at least: a prompt's blocks that another call of the step has left in the prefix cache
cost nothing, in an update what rows have in common at their beginning counts once, and only sampled tokens need logits
(2 operations for each weight of a forward pass, 6 with the backward pass, 4 where only adapters are trained).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from agent_lightning.config.load import Config, reload, resolve_path
from agent_lightning.learners.attention import share_prefixes
from agent_lightning.run.archive import read_rollouts
from agent_lightning.run.tracking import RunDirectory

BLOCK = 128
"""Tokens of a block of vLLM on a CPU, if the config names no other."""


def weights(model: Path) -> tuple[int, int, list[tuple[int, int]]]:
    """Number of weights of the layers and of the output head, and the shapes of the layers' matrices."""
    shapes: dict[str, list[int]] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    layers = [(shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    head = max((shape for shape in shapes.values() if len(shape) == 2), key=lambda shape: shape[0])
    return sum(rows * columns for rows, columns in layers), head[0] * head[1], layers


def gemm(layers: Sequence[tuple[int, int]], tokens: int, threads: int) -> float:
    """Operations per second of products of `tokens` rows with matrices of a layer, the median of 5 rounds."""
    torch.set_num_threads(threads)
    pairs = [(torch.randn(tokens, columns), torch.randn(columns, rows)) for rows, columns in layers[:7]]
    rates = []
    for _ in range(6):
        begun = time.perf_counter()
        for left, right in pairs * 4:
            left @ right
        rates.append(
            4 * sum(2 * left.numel() * right.shape[1] for left, right in pairs) / (time.perf_counter() - begun)
        )
    return statistics.median(rates[1:])


def computed_tokens(calls: Sequence[Mapping[str, Any]], block: int) -> int:
    """Tokens of prompts that are not in the prefix cache when the calls of a step come one after the other."""
    cached, total = set[tuple[int, ...]](), 0
    for call in sorted(calls, key=lambda call: float(call["started_at"])):
        tokens = (*call["prompt_ids"], *call["response_ids"])
        size, known = len(call["prompt_ids"]), 0
        while known + block < size and tokens[: known + block] in cached:
            known += block
        total += size - known
        cached |= {tokens[:end] for end in range(block, len(tokens) + 1, block)}
    return total


def measure(run: Path, config: Config) -> Iterator[dict[str, float]]:
    """For each training step but the first: seconds, and shares of the cores' limit."""
    body, head, layers = weights(Path(resolve_path(config.model.path)))
    threads = config.learner.threads
    block = int(config.vllm.get("block_size", BLOCK)) if config.vllm.get("enable_prefix_caching") else 2**30
    limit = gemm(layers, 2048, threads)
    rows = [row for row in read_rollouts(run).to_pylist() if row["split"] == "train"]
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        calls = [call for row in rows if row["step"] == line["step"] for call in row["calls"]]
        if line["step"] < 2 or "time/update" not in line or not calls:
            continue
        prompts = computed_tokens(calls, block)
        sampled = sum(len(call["response_ids"]) for call in calls)
        trained = [c for c in calls if c["credit"] is not None and c["credit"]["status"] == "trained"]
        kept, _ = share_prefixes([torch.tensor([*c["prompt_ids"], *c["response_ids"]]) for c in trained])
        targets = sum(len(call["response_ids"]) for call in trained)
        passes = (4 if config.model.lora.rank else 6) * config.algorithm.epochs
        update = passes * (body * sum(len(tokens) for tokens, _ in kept) + head * targets)
        generation = 2 * (body * (prompts + sampled) + head * sampled)
        yield {
            "step": line["step"],
            "generate_s": line["time/generate"],
            "update_s": line["time/update"],
            "publish_s": line["time/publish"],
            "computed_prompt_tokens": prompts,
            "sampled_tokens": sampled,
            "trained_rows": len(trained),
            "gemm_gflops": limit / 1e9,
            "generate_share": generation / limit / line["time/generate"],
            "update_share": update / limit / line["time/update"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    rows = list(measure(run, reload(RunDirectory.open(run).config, [])))
    if not rows:
        raise SystemExit(f"{run}: no step after the first that trained")
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name != "step"}
    for row in (*rows, medians):
        sys.stdout.write(json.dumps({name: round(float(value), 3) for name, value in row.items()}) + "\n")


if __name__ == "__main__":
    main()
