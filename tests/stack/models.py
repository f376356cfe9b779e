"""Small random models in Hugging Face format, and what Hugging Face says of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch

from agent_lightning.buffer.buffer import Buffer
from agent_lightning.config.load import resolve_path
from agent_lightning.config.running import ModelConfig, ServingConfig
from agent_lightning.core import actors as cluster
from agent_lightning.core.ray_private import free_port, prepare_environment
from agent_lightning.core.types import Batch, ModelCall
from agent_lightning.learners.base import WeightBucket, Weights
from agent_lightning.serving import app
from agent_lightning.serving.gateway import GatewayConfig
from agent_lightning.serving.policy import PolicyBoard

if TYPE_CHECKING:  # transformers takes seconds to import: in the functions, and not when the tests are collected
    from transformers import LlamaForCausalLM


def random_model(folder: Path, *, seed: int, tied: bool) -> LlamaForCausalLM:
    """A Llama of 0.1M parameters with the tiny policy's tokenizer, saved to `folder`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(resolve_path("examples/calc_x/tiny_policy"))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        # Large enough that two models differ clearly in what they predict.
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@asynccontextmanager
async def serving(
    model: Path, *, secret: bytes, max_tokens: int, **settings: Any
) -> AsyncIterator[tuple[Any, Any, app.Service]]:
    """Buffer, board and service of a model on a Ray of their own; `settings` are of the serving section, of the model
    section (max_len, dtype), and of app.Deployment (device, bundles, engine)."""
    of_model = {key: settings.pop(key) for key in ("max_len", "dtype") if key in settings}
    of_run = {key: settings.pop(key) for key in ("device", "bundles", "engine") if key in settings}
    sections = {
        "model": ModelConfig(path=str(model), **of_model),
        "serving": ServingConfig(port=free_port("127.0.0.1"), **settings),
    }
    prepare_environment()
    cluster.init_ray(num_cpus=4)
    try:
        buffer, board = cluster.spawn(Buffer, run_secret=secret), cluster.spawn(PolicyBoard)
        sampling = {"temperature": 1.0, "max_tokens": max_tokens}
        service = await asyncio.to_thread(
            app.start,
            name="model",
            config=app.Deployment(**sections, **of_run),
            gateway=GatewayConfig(model="policy", run_secret=secret, sampling={"train": sampling, "val": sampling}),
            recorder=buffer,
            board=board,
        )
        yield buffer, board, service
    finally:
        cluster.shutdown_ray()


def as_weights(model: LlamaForCausalLM, version: int, put: Any) -> Weights:
    """A model's parameters as a learner publishes them; `put` stores the bytes."""
    entries, pieces, size = [], [], 0
    for name, tensor in model.named_parameters():
        raw = tensor.detach().contiguous().view(torch.uint8).reshape(-1).numpy()
        entries.append({"name": name, "dtype": "float32", "shape": list(tensor.shape), "offset": size})
        pieces.append(raw)
        size += raw.size
    bucket = WeightBucket(parameters=tuple(entries), data=put(np.concatenate(pieces)))
    return Weights(version=version, buckets=(bucket,))


def to_arrays(weights: Weights) -> dict[str, np.ndarray]:
    """Published parameters by name, as float32."""
    out = {}
    for bucket in weights.buckets:
        raw = torch.from_numpy(np.array(ray.get(bucket.data)))
        for p in bucket.parameters:
            dtype = vars(torch)[p["dtype"]]
            end = p["offset"] + int(np.prod(p["shape"])) * dtype.itemsize
            out[p["name"]] = raw[p["offset"] : end].view(dtype).reshape(p["shape"]).float().numpy()
    return out


def reference_logprobs(model: Any, call: ModelCall) -> np.ndarray:
    """The log-probabilities of the call's response tokens, by Hugging Face: float32[T]."""
    tokens = torch.tensor(np.concatenate([call.prompt_T, call.response_T]).astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(tokens).logits.float().log_softmax(-1)[0]
    start = len(call.prompt_T)
    return np.array([float(logprobs[start + i - 1, t]) for i, t in enumerate(call.response_T)], np.float32)


def load(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def random_batch(seed: int, *, rows: int, vocab: int, version: int = 0) -> Batch:
    """Rows of unequal length, each two with the same first tokens, with about half of the later tokens trained and
    advantages of both signs."""
    rng = np.random.default_rng(seed)
    length = rng.integers(12, 32, rows).astype(np.int32)
    shape = (rows, int(length.max()))
    mask = np.zeros(shape, np.bool_)
    for i, end in enumerate(length):
        mask[i, 6:end] = rng.random(end - 6) < 0.5
        mask[i, 6] = True
    weight = mask / mask.sum(1, keepdims=True) / rows
    token = rng.integers(0, vocab, shape).astype(np.int32)
    token[1::2, :9] = token[: 2 * (rows // 2) : 2, :9]
    return Batch(
        token_NT=token,
        mask_NT=mask,
        logprob_NT=np.where(mask, -rng.uniform(5, 9, shape), 0).astype(np.float32),
        advantage_NT=np.where(mask, rng.normal(size=(rows, 1)), 0).astype(np.float32),
        reward_NT=(mask * (rng.random(shape) < 0.2)).astype(np.float32),
        call_NT=np.zeros(shape, np.int32),
        version_NT=np.full(shape, version, np.int32),
        weight_NT=weight.astype(np.float32),
        length_N=length,
        rollout_N=np.arange(rows, dtype=np.int32),
        num_rollouts=rows,
    )
