"""What LoRA saves in the learner, and what it costs, as JSON lines; the last line holds the ratios.

    python benchmarks/lora.py --model FOLDER             # all parameters against rank 16, in turns

The same batch of 8 rows is trained `--updates` times and published after each: the fastest of each is given, in
seconds, with the resident memory of the learner's process in GiB and the size of a checkpoint in MB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.load import resolve_path
from agent_lightning.config.running import LearnerConfig, LoraConfig
from agent_lightning.core import actors
from agent_lightning.core.types import RolloutKey, Sample
from agent_lightning.credit import batching
from agent_lightning.learners.verl import VerlLearner
from agent_lightning.learners.verl_groups import Training

ROWS, PROMPT, RESPONSE = 8, 32, 8


def samples(vocab: int) -> list[Sample]:
    """Rows of random tokens, each of a rollout of its own; the last RESPONSE tokens are trained."""
    rng = np.random.default_rng(0)
    length = PROMPT + RESPONSE
    mask_T = np.arange(length) >= PROMPT
    return [
        Sample(
            key=RolloutKey(split="train", group=0, index=index),
            token_T=rng.integers(0, vocab, length).astype(np.int32),
            mask_T=mask_T.copy(),
            logprob_T=np.where(mask_T, -5.0, 0.0).astype(np.float32),
            advantage_T=np.where(mask_T, rng.normal(), 0.0).astype(np.float32),
            reward_T=np.zeros(length, np.float32),
            call_T=np.zeros(length, np.int32),
            version_T=np.zeros(length, np.int32),
        )
        for index in range(ROWS)
    ]


async def measure(model: Path, rank: int, updates: int, threads: int) -> dict[str, float]:
    actors.init_ray(num_cpus=6)
    try:
        learner = VerlLearner(
            Training(
                model_path=str(model),
                algorithm=AlgorithmConfig(lr=1e-5),
                learner=LearnerConfig(threads=threads, max_logprob_gap=None),
                lora=LoraConfig(rank=rank),
            )
        )
        vocab = int(json.loads((model / "config.json").read_text())["vocab_size"])
        batches = batching.pack(samples(vocab), pad_token=0, row_multiple=1)
        update_s, publish_s = [], []
        for _ in range(updates):
            started = time.perf_counter()
            await learner.update(batches)
            updated = time.perf_counter()
            await learner.publish()
            update_s.append(updated - started)
            publish_s.append(time.perf_counter() - updated)
        processes = [process.info for process in psutil.process_iter(["cmdline", "memory_info"])]  # None of a zombie
        memory = max(info["memory_info"].rss for info in processes if "ModelWorker" in " ".join(info["cmdline"] or ()))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            await learner.save(Path(folder))
            save_s = time.perf_counter() - started
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        seconds = {"update_s": min(update_s), "publish_s": min(publish_s), "save_s": save_s}
        return {"rank": rank, **seconds, "memory_gib": memory / 2**30, "checkpoint_mb": size / 1e6}
    finally:
        actors.shutdown_ray()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tiny = resolve_path("examples/calc_x/tiny_policy")
    parser.add_argument("--model", type=Path, default=tiny, help=f"a folder in Hugging Face format (default: {tiny})")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = [asyncio.run(measure(args.model, rank, args.updates, args.threads)) for rank in (0, args.rank)]
    ratios = {name: rows[1][name] / rows[0][name] for name in rows[0] if name != "rank"}
    for row in (*rows, {"benchmark": "lora", "rank": args.rank, **{f"{n}_ratio": v for n, v in ratios.items()}}):
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
        sys.stdout.write(json.dumps(rounded) + "\n")


if __name__ == "__main__":
    main()
