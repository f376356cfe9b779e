"""What the examples' `pretrain.py` share: a tokenizer and a small Llama from scratch, and their supervised training.

The training runs through the same learner as reinforcement learning, with a cross-entropy of weighted tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent_lightning.core.types import Batch

PAD, END = "<|pad|>", "<|im_end|>"
Row = tuple[list[int], Sequence[float]]
"""Token ids of a chat, and how much each is learnt."""


def build_tokenizer(
    texts: Sequence[str], vocab_size: int, *, roles: Sequence[str], alone: str, template: str, units: Sequence[str] = ()
) -> Any:
    """Byte-level BPE in which the opening of each role's turn is one token, and so is each text of `units`.

    `alone`: a regular expression of what is a token by itself, such as a digit.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(alone), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    openings = [f"<|im_start|>{role}\n" for role in roles]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(openings) - len(units),
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in openings])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in units])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    wrapped.chat_template = template
    return wrapped


def build_model(tokenizer: Any, seed: int, *, heads: int, tied: bool) -> Any:
    """A Llama of four layers; with five heads 1.6 to 2 million parameters with the embeddings of the tokenizer.

    `tied`: one table of embeddings for what is read and what is written, so that a token that was read can be written
    again before it was ever learnt.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32 * heads,
        intermediate_size=90 * heads // 8 * 8,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        initializer_range=0.02,
        bos_token_id=None,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def load_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def replies(model: Any, tokenizer: Any, texts: Sequence[str], *, max_tokens: int) -> Iterator[str]:
    """What the model writes after each text, greedily, special tokens included."""
    import torch

    tokenizer.padding_side = "left"
    for start in range(0, len(texts), 120):
        part = list(texts[start : start + 120])
        prompts = tokenizer(part, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            out = model.generate(**prompts, max_new_tokens=max_tokens, do_sample=False)
        yield from tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :])


async def pretrain(
    args: argparse.Namespace,
    tokenizer: Any,
    rows: Iterator[Sequence[Row]],
    measure: Callable[[Any], Mapping[str, Any]],
    *,
    start: Path | None = None,
    heads: int = 5,
    tied: bool = False,
) -> None:
    """Train a new model, or the one in `start`, on batches of `rows`.

    It is kept in `args.out` with a note of what `measure` says of it. `heads` and `tied`: see `build_model`.
    """
    import ray
    from safetensors.torch import save_file

    from agent_lightning.config.learning import AlgorithmConfig
    from agent_lightning.config.running import LearnerConfig
    from agent_lightning.learners.verl import VerlLearner
    from agent_lightning.learners.verl_groups import Training

    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    model = load_model(start) if start else build_model(tokenizer, args.seed, heads=heads, tied=tied)
    model.save_pretrained(args.out)
    log({"parameters": sum(p.numel() for p in model.parameters()), "tokens": len(tokenizer)})
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    learner = VerlLearner(
        Training(
            model_path=str(args.out),
            algorithm=AlgorithmConfig(lr=args.lr, lr_schedule="cosine", lr_warmup_steps=20, weight_decay=0.01),
            learner=LearnerConfig(threads=args.threads),
            sft=True,
            seed=args.seed,
            total_steps=args.steps,
            betas=(0.9, 0.98),
        )
    )
    note: dict[str, Any] = {}
    started = time.monotonic()
    for step in range(1, args.steps + 1):
        loss = (await learner.update([to_batch(next(rows))])).metrics["learner/nll"]
        if step % args.evaluate_every == 0 or step == args.steps:
            weights = state_dict(await learner.publish())
            if tied:
                weights.pop("lm_head.weight", None)
            save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
            model.load_state_dict(weights, strict=not tied)
            note = {"step": step, "seconds": round(time.monotonic() - started), "loss": round(loss.value, 3)}
            note |= measure(model)
            log(note)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    (args.out / "pretrain.json").write_text(json.dumps(note | settings, indent=1) + "\n")


def arguments(parser: argparse.ArgumentParser, *, steps: int, batch: int, vocab_size: int) -> None:
    """The arguments that every `pretrain.py` has."""
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=vocab_size)
    parser.add_argument("--evaluate-every", type=int, default=100)


def to_batch(rows: Sequence[Row]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    shape = (len(rows), length)
    tokens, weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for i, (ids, weights) in enumerate(rows):
        tokens[i, : len(ids)], weight[i, : len(ids)] = ids, weights
    weight[:, 0] = 0  # Nothing comes before the first token that could foretell it.
    zeros = np.zeros(shape, np.float32)
    return Batch(
        token_NT=tokens,
        mask_NT=weight > 0,
        logprob_NT=zeros.copy(),
        advantage_NT=zeros.copy(),
        reward_NT=zeros.copy(),
        call_NT=np.zeros(shape, np.int32),
        version_NT=np.zeros(shape, np.int32),
        weight_NT=weight / weight.sum(),
        length_N=np.asarray([len(ids) for ids, _ in rows], np.int32),
        rollout_N=np.arange(len(rows), dtype=np.int32),
        num_rollouts=len(rows),
    )


def state_dict(weights: Any) -> dict[str, Any]:
    import ray
    import torch

    out = {}
    for bucket in weights.buckets:
        raw = torch.from_numpy(np.array(ray.get(bucket.data)))
        for p in bucket.parameters:
            count = int(np.prod(p["shape"])) * 4
            out[p["name"]] = raw[p["offset"] : p["offset"] + count].view(torch.float32).reshape(p["shape"]).clone()
    return out


def log(note: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(note) + "\n")
    sys.stdout.flush()
