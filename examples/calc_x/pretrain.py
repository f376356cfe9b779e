"""Make the tiny starting policy: a 1.6M-parameter Llama with its own tokenizer, pre-trained on the CPU.

    python examples/calc_x/pretrain.py --mawps DATA/calcx/mawps_train.jsonl.gz --out examples/calc_x/tiny_policy

Trains from scratch through the same learner as reinforcement learning (veRL's SFT loss) on right chats: the
generator's problems and MAWPS training questions with re-drawn numbers. In the first part every chat works its
calculation out with the calculator. In the rest, as in what people write, short sums are mostly done in the head, and
long ones hardly ever. The answers are right, but a model of this size cannot calculate: it picks up the habit without
the ability. To find out that calling the calculator pays is what it leaves for reinforcement learning.
The seed is fixed; the note beside the weights says how long it took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import calculator
import problems
import reward
from agent import SYSTEM

from agent_lightning.tasks import load_jsonl
from agent_lightning.types import Batch

CALL_OPEN = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "'
CALL_CLOSE = '"}}\n</tool_call>'
ROLES = ("system", "user", "assistant", "tool")
END = "<|im_end|>"
PAD = "<|pad|>"
BUCKET = 8

# Hermes' form: a system turn that names the tools, and calls as JSON between <tool_call> tags. What the model sampled
# is rendered back token for token, so that the next prompt extends it.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}
{%- if loop.first and tools %} Tools:{% for tool in tools %} {{ tool.function.name }}({{ tool.function.parameters.properties.keys() | join(", ") }}){% endfor %}{% endif %}
{%- for call in message.tool_calls or [] -%}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

IN_THE_HEAD = {1: 0.65}
"""Share of the chats without the calculator in the last part, by the number of operations; IN_THE_HEAD_LONG else."""
IN_THE_HEAD_LONG = 0.1

TOOLS = [{"type": "function", "function": {"name": "calculator", "parameters": {"properties": {"expression": {}}}}}]


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Byte-level BPE where two digits are a token, and the fixed parts of a chat are one token each."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # "124" is "12" and "4": most numbers are then copied in one step, which a small model learns sooner.
            pre_tokenizers.Split(Regex(r"\d{1,2}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fixed = [f"<|im_start|>{role}\n" for role in ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(fixed) - 2,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in fixed])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (CALL_OPEN, CALL_CLOSE)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    wrapped.chat_template = TEMPLATE
    return wrapped


def build_model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        initializer_range=0.02,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def encode(tokenizer: Any, chat: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Token ids of a chat, and where an assistant wrote them (its end-of-turn token included)."""
    chat = [_as_the_engine_reads(message) for message in chat]
    ids = tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=True, return_dict=False)
    opening, end = tokenizer.convert_tokens_to_ids(["<|im_start|>assistant\n", END])
    mask, writing = [], False
    for token in ids:
        mask.append(writing)
        writing = token == opening or (writing and token != end)
    return ids, mask


def _as_the_engine_reads(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls travel as JSON text; engines hand templates the object."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


def stream(
    args: argparse.Namespace, tokenizer: Any, mawps: Sequence[dict[str, Any]]
) -> Iterator[list[tuple[list[int], list[bool]]]]:
    """Batches without end: a share of the generator's problems, the rest from MAWPS with numbers re-drawn.

    Rows of a batch are of like length: BUCKET batches are drawn at once, sorted and dealt out in random order.
    """
    rng = random.Random(args.seed)
    generated = problems.generate(args.seed + 1, 20_000, "train")
    weights = list(accumulate(args.two_step_weight if row["steps"] > 1 else 1.0 for row in generated))
    for drawn in count(0, BUCKET):
        rows: list[tuple[list[int], list[bool]]] = []
        last_part = drawn >= args.calculator_only * args.steps
        while len(rows) < BUCKET * args.batch:
            if rng.random() < args.generated_share:
                row = rng.choices(generated, cum_weights=weights)[0]
            else:
                row = problems.redraw(rng.choice(mawps), rng)
            if row is not None:
                in_the_head = IN_THE_HEAD.get(problems.operations(row["equation"]), IN_THE_HEAD_LONG)
                chat = problems.solution(row, in_the_head=last_part and rng.random() < in_the_head)
                rows.append(encode(tokenizer, chat))
        rows.sort(key=lambda row: len(row[0]))
        batches = [rows[i : i + args.batch] for i in range(0, len(rows), args.batch)]
        rng.shuffle(batches)
        yield from batches


def to_batch(rows: Sequence[tuple[list[int], list[bool]]]) -> Batch:
    length = max(len(ids) for ids, _ in rows)
    shape = (len(rows), length)
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
    for i, (ids, assistant) in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, assistant
    zeros = np.zeros(shape, np.float32)
    return Batch(
        token_NT=tokens,
        mask_NT=mask,
        logprob_NT=zeros.copy(),
        advantage_NT=zeros.copy(),
        reward_NT=zeros.copy(),
        call_NT=np.zeros(shape, np.int32),
        weight_NT=zeros.copy(),
        length_N=np.asarray([len(ids) for ids, _ in rows], np.int32),
        rollout_N=np.arange(len(rows), dtype=np.int32),
        num_rollouts=len(rows),
    )


def accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], opening: str = "") -> tuple[float, float]:
    """Share of rows whose first greedy reply is right (a calculation by its value), and of those with a calculation.

    `opening` begins the reply: with CALL_OPEN, how well the model does where it always uses the calculator.
    """
    import torch

    right = called = 0
    tokenizer.padding_side = "left"
    for start in range(0, len(rows), 120):
        part = rows[start : start + 120]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}],
                tools=TOOLS,
                add_generation_prompt=True,
                tokenize=False,
            )
            + opening
            for row in part
        ]
        prompts = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            out = model.generate(**prompts, max_new_tokens=40, do_sample=False)
        for row, ids in zip(part, out[:, prompts["input_ids"].shape[1] :], strict=True):
            text = opening + tokenizer.decode(ids)
            head, _, rest = text.partition(CALL_OPEN)
            called += bool(rest)
            arguments = json.dumps({"expression": rest.split('"')[0]})
            right += reward.score(row, calculator.call(arguments) if rest else head)
    return right / len(rows), called / len(rows)


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


async def train(args: argparse.Namespace) -> None:
    import ray
    from safetensors.torch import save_file

    from agent_lightning.learners.verl import LearnerConfig, VerlLearner

    mawps = [dict(task.payload) for task in load_jsonl(args.mawps)]
    validation = [dict(t.payload) for t in load_jsonl(str(args.mawps).replace("_train", "_validation"))]
    held_out = problems.generate(args.seed + 2, 240, "val")
    texts = [row["question"] for row in mawps] * 2 + [row["question"] for row in problems.generate(0, 4000, "train")]
    numbers = " ".join(str(number) for number in range(100))
    fixed = f"{SYSTEM} Tools: calculator(expression)", "The answer is", numbers
    tokenizer = build_tokenizer([*texts, *fixed * 300], args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    model = build_model(tokenizer, args.seed)
    model.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    learner = VerlLearner(
        LearnerConfig(
            model_path=str(args.out),
            loss="sft",
            seed=args.seed,
            num_threads=args.threads,
            lr=args.lr,
            lr_schedule="cosine",
            lr_warmup_steps=20,
            total_steps=args.steps,
            weight_decay=0.01,
            betas=(0.9, 0.98),
        )
    )
    batches, started = stream(args, tokenizer, mawps), time.monotonic()
    for step in range(1, args.steps + 1):
        await learner.update([to_batch(next(batches))])
        if step % args.evaluate_every == 0 or step == args.steps:
            weights = state_dict(await learner.publish())
            save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
            model.load_state_dict(weights)
            note = {"step": step, "seconds": round(time.monotonic() - started)}
            for name, rows in ("generated_val", held_out), ("mawps_validation", validation):
                right, called = accuracy(model, tokenizer, rows)
                able, _ = accuracy(model, tokenizer, rows, CALL_OPEN)
                note |= {name: round(right, 3), f"{name}_calls": round(called, 3), f"{name}_able": round(able, 3)}
            print(json.dumps(note), flush=True)
    (args.out / "pretrain.json").write_text(
        json.dumps(note | {k: v for k, v in vars(args).items() if isinstance(v, int | float)}, indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", type=Path, required=True, help="mawps_train.jsonl.gz; its validation file beside it")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--generated-share", type=float, default=0.4)
    parser.add_argument("--two-step-weight", type=float, default=0.4)
    parser.add_argument("--evaluate-every", type=int, default=100)
    parser.add_argument(
        "--calculator-only", type=float, default=0.75, help="share of the steps that make the first part"
    )
    asyncio.run(train(parser.parse_args()))


if __name__ == "__main__":
    main()
