"""Replies of vLLM, with its log-probabilities, as engine.json in a model's folder: engine_samples.py FOLDER"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCH_COMPILE_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1")
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    folder = Path(sys.argv[1])
    options = {"enforce_eager": True, "max_num_seqs": 16, "generation_config": "vllm"}
    engine = LLM(str(folder), dtype="float32", max_model_len=128, logprobs_mode="processed_logprobs", seed=0, **options)
    prompts = [f"What is {n} + {3 * n}? Tell me." for n in range(16)]
    replies = engine.generate(prompts, SamplingParams(temperature=1.0, max_tokens=24, logprobs=0, ignore_eos=True))
    samples = []
    for reply in replies:
        (choice,) = reply.outputs
        logprobs = [entry[token].logprob for entry, token in zip(choice.logprobs, choice.token_ids, strict=True)]
        samples.append((list(reply.prompt_token_ids), list(choice.token_ids), logprobs))
    (folder / "engine.json").write_text(json.dumps(samples))
