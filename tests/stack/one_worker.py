"""A training process without Ray: how each of some models trains, as a JSON line for each folder.

one_worker.py FOLDER...   # a folder may hold engine.json of engine_samples.py, to compare with
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent_lightning.learners import verl_groups

os.environ.update(verl_groups.CPU_ENVIRONMENT)

import numpy as np
import torch
import torch.distributed
from models import random_batch
from verl.trainer.config import CheckpointConfig
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, TrainingWorkerConfig

from agent_lightning.config.running import LearnerConfig
from agent_lightning.core.text import error_line
from agent_lightning.core.types import Batch
from agent_lightning.learners.gap import LARGEST_DIFFERENCE
from agent_lightning.learners.verl_worker import ModelWorker

MICRO_BATCH = 100
"""Most tokens of a micro-batch: small, so that a batch has several."""


def worker(config: verl_groups.Training) -> ModelWorker:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DIST_INIT_METHOD": f"tcp://127.0.0.1:{port}"}
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **address)
    limits = {"max_token_len_per_gpu": MICRO_BATCH, "infer_max_token_len_per_gpu": MICRO_BATCH, "use_dynamic_bsz": True}
    number = {"param_dtype": "float32", "reduce_dtype": "float32", "buffer_dtype": "float32"}
    training = TrainingWorkerConfig(
        model_type="policy",
        model_config=verl_groups._model(config, "policy"),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_torch_compile=False,
            model_dtype="fp32",
            dtype="float32",
            mixed_precision=number,
            **limits,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=-1),
        checkpoint_config=CheckpointConfig(),
    )
    made = ModelWorker(training, device="cpu", seed=0, num_threads=1, revision=None)
    made.set_loss_fn(verl_groups.policy_loss_of(config))
    return made


def trains(folder: Path) -> dict[str, Any]:
    """What a model does in the learner: its layout, or why it is refused; how much rows of a batch differ from rows
    alone; how far an optimiser step moves the parameters without a gap, and with one beyond the bound."""
    config = verl_groups.Training(model_path=str(folder), learner=LearnerConfig(threads=1))
    try:
        policy = worker(config)
        layout = policy.choose_layout(LARGEST_DIFFERENCE["float32"])
    except Exception as error:
        return {"refused": error_line(error)}
    batch = random_batch(0, rows=8, vocab=policy.engine.module.get_input_embeddings().num_embeddings)

    def log_probs(batch: Batch) -> np.ndarray:
        output = policy.infer_batch(verl_groups.to_tensordict(batch, config))
        return verl_groups.from_jagged(output["log_probs"], batch)

    def row(batch: Batch, n: int) -> Batch:
        arrays = {name: array[n : n + 1] for name, array in vars_of(batch).items()}
        return replace(batch, **arrays, num_rollouts=1)

    together = log_probs(batch)
    alone = np.concatenate([log_probs(row(batch, n)) for n in range(len(batch.length_N))])
    result = {"layout": layout, "difference": float(np.abs(together - alone).max())}
    if (file := folder / "engine.json").exists():
        gaps = []
        for prompt, reply, logprobs in json.loads(file.read_text()):
            tokens = np.array([[*prompt, *reply]], np.int32)
            ours = log_probs(
                replace(
                    row(batch, 0),
                    token_NT=tokens,
                    length_N=np.array([tokens.size], np.int32),
                    **{
                        name: np.zeros(tokens.shape, array.dtype)
                        for name, array in vars_of(batch).items()
                        if array.ndim == 2 and name != "token_NT"
                    },
                )
            )
            gaps.append(ours[0, len(prompt) :] - np.array(logprobs))
        gap = np.abs(np.concatenate(gaps))
        result |= {"gap": float(gap.mean()), "max": float(gap.max()), "tokens": gap.size}
    own = replace(batch, logprob_NT=np.where(batch.mask_NT, together, 0).astype(np.float32))
    current = {"is_current": np.ones(batch.mask_NT.shape, np.float32)}

    def moved(batch: Batch) -> float:
        before = [parameter.detach().full_tensor().clone() for parameter in policy.engine.module.parameters()]
        policy.train_batch(verl_groups.to_tensordict(batch, config, current))
        after = [parameter.detach().full_tensor() for parameter in policy.engine.module.parameters()]
        return max(float((new - old).abs().max()) for old, new in zip(before, after, strict=True))

    return result | {"moved_with_gap": moved(batch), "moved": moved(own)}


def vars_of(batch: Batch) -> dict[str, np.ndarray]:
    return {name: getattr(batch, name) for name in batch.__slots__ if name != "num_rollouts"}


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        with contextlib.redirect_stdout(sys.stderr):
            line = json.dumps({"model": Path(folder).name, **trains(Path(folder))})
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
