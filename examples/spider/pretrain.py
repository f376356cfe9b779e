"""Make the tiny starting policy: a Llama of 1.9M parameters with its own tokenizer, trained from scratch on a CPU.

    python examples/spider/pretrain.py --data DATA/spider --out examples/spider/tiny_policy

It learns the agent's three roles on the single-table slice of Spider's training questions: as they are, with other
values, and put to the other tables of the training databases (`wordings.py`). Nothing of the held-out queries and of
the development databases is seen. The note beside the weights has the time and the held-out execution accuracy of the
writer alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from agent import CHECKER, REWRITER, SHOWN, WRITER, query_in, shown
from data import single_table
from databases import files, run
from reward import score
from wordings import Source, plain, redraw, source

PAD, END = "<|pad|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
BUCKET = 8
LONGEST = 320
"""Tokens of a chat to learn from."""
FAILS, NOTHING, RIGHT = "The query fails.", "It finds nothing.", "CORRECT"

Example = tuple[str, list[str], Source]
Chat = list[dict[str, str]]


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Byte-level BPE where a digit is a token, and the openings of a chat's turns are one token each."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|_"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    openings = [f"<|im_start|>{role}\n" for role in ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(openings),
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in openings])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    wrapped.chat_template = TEMPLATE
    return wrapped


def build_model(tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
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
        bos_token_id=None,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def prompt(system: str, schema: str, question: str, *lines: str) -> Chat:
    """What the agent sends in a role, as `agent.py` writes it."""
    user = "\n".join((schema, f"Question: {question}", *lines))
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def chats(patterns: Sequence[Example], rng: random.Random) -> Iterator[tuple[Chat, str]]:
    """Prompts and right replies without end: 7 of 10 the writer's, then the checker's and the rewriter's."""
    tables = list({(table.database, table.name): table for *_, table in patterns}.values())
    while True:
        question, tokens, table = rng.choice(patterns)
        kind = rng.random()
        if kind < 0.7:
            other = table if kind < 0.3 else rng.choice(tables)
            drawn = redraw(question, tokens, table, other, rng)
            if drawn is not None:
                (question, tokens), table = drawn, other
        query = " ".join(tokens)
        if rng.random() < 0.7:
            yield prompt(WRITER, table.schema, question), query
            continue
        tried = query if rng.random() < 0.3 else " ".join(spoil(tokens, table, rng))
        result = shown(run(table.database, tried, SHOWN))
        verdict = FAILS if result.startswith("error") else NOTHING if result == "no rows" else RIGHT
        lines = f"Query: {tried}", f"Result: {result}"
        if verdict == RIGHT or rng.random() < 0.3:
            yield prompt(CHECKER, table.schema, question, *lines), verdict
        elif tried != query:
            yield prompt(REWRITER, table.schema, question, *lines, f"Verdict: {verdict}"), query


def spoil(tokens: Sequence[str], table: Source, rng: random.Random) -> list[str]:
    """A wrong query: a token is lost, or a name or value is another, as such a small model would have it."""
    i = rng.randrange(1, len(tokens))
    token = tokens[i]
    if token in table.columns or token == table.name:
        new = [rng.choice((*table.columns, "name", "id"))]
    elif token[0] == "'":
        new = [f"'{token[2:-1]}'"]
    else:
        new = []
    return [*tokens[:i], *new, *tokens[i + 1 :]]


def encode(tokenizer: Any, chat: Chat, reply: str) -> tuple[list[int], int]:
    """Token ids of a whole chat, and how many of them are the prompt's."""
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    return asked + tokenizer(reply + END, add_special_tokens=False)["input_ids"], len(asked)


def batches(patterns: Sequence[Example], tokenizer: Any, size: int, seed: int) -> Iterator[Any]:
    """Rows of like length: BUCKET batches are drawn at once, sorted and dealt out in random order."""
    import torch

    rng = random.Random(seed)
    stream = chats(patterns, rng)
    while True:
        rows: list[tuple[list[int], int]] = []
        while len(rows) < BUCKET * size:
            row = encode(tokenizer, *next(stream))
            rows += [row] if len(row[0]) <= LONGEST else []
        rows.sort(key=lambda row: len(row[0]))
        for start in rng.sample(range(0, len(rows), size), BUCKET):
            part = rows[start : start + size]
            ids = torch.full((size, max(len(row) for row, _ in part)), tokenizer.pad_token_id)
            labels = torch.full_like(ids, -100)
            for i, (row, asked) in enumerate(part):
                ids[i, : len(row)] = torch.tensor(row)
                labels[i, asked : len(row)] = ids[i, asked : len(row)]
            yield ids, labels


def accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Share of questions whose first greedy query matches the gold one."""
    import torch

    tokenizer.padding_side, right = "left", 0.0
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        texts = [
            tokenizer.apply_chat_template(
                prompt(WRITER, row["schema"], row["question"]), add_generation_prompt=True, tokenize=False
            )
            for row in part
        ]
        prompts = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            out = model.generate(**prompts, max_new_tokens=64, do_sample=False)
        replies = tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(score(row, query_in(reply)) for row, reply in zip(part, replies, strict=True))
    return right / len(rows)


def train(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    splits = {name: single_table(root=str(args.data), split=name, num=10_000, seed=0) for name in ("train", "held_out")}
    splits["dev"] = single_table(root=str(args.data), split="dev", num=10_000, seed=0)
    tables: dict[tuple[str, str], Source] = {}
    patterns: list[Example] = []
    for row in splits["train"]:
        key = row["db_id"], row["schema"]
        if key not in tables:
            tables[key] = source(row["schema"], files(row["databases"], row["db_id"])[0])
        patterns.append((row["question"], plain(row["query"], tables[key]), tables[key]))
    texts = [text for question, tokens, _ in patterns for text in (question, f" {' '.join(tokens)}")]
    fixed = (WRITER, CHECKER, REWRITER, FAILS, NOTHING, RIGHT, "\nQuestion: \nQuery: \nResult: \nVerdict: ")
    tokenizer = build_tokenizer([*texts, *(table.schema for table in tables.values()), *fixed * 300], args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    model = build_model(tokenizer, args.seed)
    log({"parameters": sum(p.numel() for p in model.parameters()), "tables": len(tables), "patterns": len(patterns)})

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, step / 40) * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, step / args.steps))) / 2)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    stream, started, note = batches(patterns, tokenizer, args.batch, args.seed), time.monotonic(), {}
    for step in range(1, args.steps + 1):
        ids, labels = next(stream)
        loss = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % args.evaluate_every == 0 or step == args.steps:
            note = {"step": step, "seconds": round(time.monotonic() - started), "loss": round(loss.item(), 3)}
            few = None if step == args.steps else 200
            note |= {name: round(accuracy(model, tokenizer, splits[name][:few]), 3) for name in ("held_out", "dev")}
            model.save_pretrained(args.out)
            log(note)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    (args.out / "pretrain.json").write_text(json.dumps(note | settings, indent=1) + "\n")


def log(note: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(note) + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of Spider")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--evaluate-every", type=int, default=250)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
