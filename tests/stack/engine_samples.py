"""Replies of vLLM with its log-probabilities, as engine.json in each folder of a model; a JSON line for each folder.

engine_samples.py FOLDER...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCH_COMPILE_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1")
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from agent_lightning.core.text import error_line
from agent_lightning.launch import models

PROMPTS = [f"What is {n} + {3 * n}? Tell me." for n in range(16)]
SAMPLING = SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, ignore_eos=True)
OPTIONS = {"enforce_eager": True, "max_num_seqs": 16, "generation_config": "vllm", "seed": 0, "max_model_len": 128}


def sample(folder: Path) -> None:
    overrides = models.read(str(folder)).engine_overrides
    engine = LLM(str(folder), dtype="float32", logprobs_mode="processed_logprobs", hf_overrides=overrides, **OPTIONS)
    samples = []
    for reply in engine.generate(PROMPTS, SAMPLING, use_tqdm=False):
        (choice,) = reply.outputs
        logprobs = [entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids, strict=True)]
        samples.append((list(reply.prompt_token_ids), list(choice.token_ids), logprobs))
    (folder / "engine.json").write_text(json.dumps(samples))


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        refused = ""
        try:
            sample(folder)
        except Exception as error:
            refused = error_line(error)
        cleanup_dist_env_and_memory()
        sys.stdout.write(json.dumps({"model": folder.name, "refused": refused}) + "\n")
        sys.stdout.flush()
