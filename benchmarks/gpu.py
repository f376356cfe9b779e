"""A run on one GPU with a model of real size and random weights, as JSON: seconds of a step, tokens/s, peak memory.

    python benchmarks/gpu.py                                   # the shape of Llama-3.2-3B, hardware=gpu1
    python benchmarks/gpu.py --steps 6 serving.replicas=1 …    # more words of `agl train`

The policy's numbers are random, so it writes as many tokens as it may, and rewards are a coin's: what is measured is
the stack's speed, not learning. The first step is left out. The run is killed after its last step, before it writes a
checkpoint of 36 GiB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai

LLAMA_3B = {
    "vocab_size": 128_256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
}
PROMPT_WORDS, CALLS, TOKENS = 256, 2, 128
"""Words of a rollout's first prompt, its model calls, and the tokens of each reply."""
TASKS, GROUP_SIZE = 16, 8
"""The tasks of a step, and the rollouts of each."""
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


async def solve(task: Mapping[str, Any], policy: Any) -> str:
    """The agent: the task's prompt, and then a second call that adds the reply."""
    client = openai.AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key, timeout=600)
    words = str(task["question"]).split()
    prompt = [f"w{zlib.crc32(word.encode()) % 9999}" for word in (words * PROMPT_WORDS)[:PROMPT_WORDS]]
    messages: list[Any] = [{"role": "user", "content": " ".join(prompt)}]
    text = ""
    for _ in range(CALLS):
        reply = await client.chat.completions.create(model=policy.model, messages=messages)
        text = reply.choices[0].message.content or ""
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "w1 w2"}]
    await client.close()
    return text


def coin(task: Mapping[str, Any], output: str) -> float:
    """The reward: a bit of the answer's length in letters."""
    return float(len(output) % 2)


def random_model(folder: Path, shape: Mapping[str, Any]) -> int:
    """A Llama with random weights and a tokenizer of its vocabulary, one word a token; how many parameters it has."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w3", pad_token="w3", unk_token="w0")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=3, pad_token_id=3))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def used_gib() -> float:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return max(float(line) for line in subprocess.check_output(query, text=True).split()) / 1024


def run(folder: Path, model: Path, steps: int, words: list[str]) -> dict[str, Any]:
    """Until the last step is over, and then to its end by force."""
    here = Path(__file__).resolve()
    command = [sys.executable, "-m", "agent_lightning", "train", "experiment=calc_tiny", "hardware=gpu1"]
    command += [f"model.path={model}", "model.dtype=bfloat16", "model.max_len=2048", "model.tool_parser=null"]
    command += [f"agent.target={here}:solve", f"agent.reward={here}:coin", f"sampling.train.max_tokens={TOKENS}"]
    command += ["data.val.num=8", "sampling.val.max_tokens=8", "eval_every=0", "checkpoint_every=0", "restarts=0"]
    command += [f"algorithm.tasks_per_step={TASKS}", f"algorithm.rollouts_per_task={GROUP_SIZE}"]
    command += ["algorithm.lr=1e-6", f"steps={steps + 9}"]
    command += [f"runs_dir={folder}", "name=gpu", "tracking.wandb=disabled", *words]
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=here.parents[1], stdout=sys.stderr, start_new_session=True)
    metrics, most, first_s = folder / "gpu" / "metrics.jsonl", 0.0, None
    try:
        while True:
            most = max(most, used_gib())
            lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
            done = [line for line in lines if "time/update" in line]
            first_s = first_s or (time.monotonic() - began if done else None)
            if len(done) >= steps:
                break
            if process.poll() is not None:
                raise SystemExit(f"the run ended with exit code {process.returncode} after {len(done)} steps")
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    measured = done[1:]
    parts = ("step", "generate", "update", "publish", "other")
    return {
        "steps": len(measured),
        "median_s": {part: round(statistics.median(line[f"time/{part}"] for line in measured), 2) for part in parts},
        "sampled_tokens_per_s": round(statistics.median(x["tokens/sampled"] / x["time/generate"] for x in measured)),
        "rollouts_a_step": TASKS * GROUP_SIZE,
        "peak_gpu_gib": round(most, 1),
        "first_step_after_s": round(first_s or 0.0, 1),
        "mean_abs_logprob_gap": round(statistics.median(line["logprob_gap/mean_abs"] for line in measured), 5),
        "last": {key: value for key, value in measured[-1].items() if key.startswith(("tokens/", "learner/"))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LLAMA_3B["num_hidden_layers"], help="fewer: a smaller model")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if shutil.which("nvidia-smi") is None:
        print(json.dumps({"benchmark": "gpu", "skipped": "no GPU here: nvidia-smi was not found"}))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        shape = LLAMA_3B | {"num_hidden_layers": options.layers}
        # In a process of its own, which leaves none of the GPU's memory taken.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as maker:
            parameters = maker.submit(random_model, model, shape).result()
        measured = run(Path(folder), model, options.steps, options.words)
    name = subprocess.check_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True).strip()
    print(json.dumps({"benchmark": "gpu", "gpu": name, "parameters": parameters, **measured}))


if __name__ == "__main__":
    main()
