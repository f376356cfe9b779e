"""Make the tiny starting policy: a Llama of 1.9M parameters with its own tokenizer, trained from scratch on a CPU.

    python examples/spider/pretrain.py --data DATA/spider --out examples/spider/tiny_policy

It learns the agent's three roles on the single-table slice of Spider's training questions: as they are, with other
values, and put to the other tables of the training databases (`wordings.py`). Nothing of the held-out queries and of
the development databases is seen. The note beside the weights has the time and the held-out execution accuracy of the
writer alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import tiny_model
from agent import CHECKER, REWRITER, SHOWN, WRITER, query_in, shown
from data import single_table
from databases import files, run
from reward import score
from tiny_model import END, Row, replies
from wordings import Source, plain, redraw, source, talkative

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
ALONE = r"""\d|_|['"]| (?=[A-Z'"])"""
"""What is a token alone. With the space before a capital, "from New York" and 'New York' have the same tokens."""
BUCKET = 8
LONGEST = 240
"""Tokens of a chat to learn from."""
OWN = 0.5
"""Share of the questions that stay with their table."""
TALK, TALK_FROM = 0.75, 0.75
"""Share of talkative queries, from which share of the steps on."""
FAILS, NOTHING, RIGHT = "The query fails.", "It finds nothing.", "CORRECT"
UNITS = (WRITER, CHECKER, REWRITER, FAILS, NOTHING, RIGHT, "\nQuestion: ", "\nQuery: ", "\nResult: ", "\nVerdict: ")
"""Texts that are one token each."""

Example = tuple[str, list[str], Source]
Chat = list[dict[str, str]]


def prompt(system: str, schema: str, question: str, *lines: str) -> Chat:
    """What the agent sends in a role, as `agent.py` writes it."""
    user = "\n".join((schema, f"Question: {question}", *lines))
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def varied(patterns: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    """Half of them with values of their own table, where those can be drawn; half put to another table."""
    tables = list({(table.database, table.name): table for *_, table in patterns}.values())
    while True:
        question, tokens, table = rng.choice(patterns)
        if rng.random() < OWN:
            question, tokens = redraw(question, tokens, table, table, rng) or (question, tokens)
            yield question, tokens, table
            continue
        drawn = None
        while drawn is None:
            question, tokens, table = rng.choice(patterns)
            other = rng.choice(tables)
            drawn = redraw(question, tokens, table, other, rng)
        yield *drawn, other


def chats(examples: Iterator[Example], talk: float, rng: random.Random) -> Iterator[tuple[Chat, str]]:
    """Prompts and replies without end: 7 of 10 the writer's, 1 the checker's, 2 the rewriter's.

    `talk`: the share of queries that show more than was asked (`wordings.talkative`).
    """
    for question, tokens, table in examples:
        role, query = rng.random(), " ".join(talkative(tokens, table) if rng.random() < talk else tokens)
        if role < 0.7:
            yield prompt(WRITER, table.schema, question), query
            continue
        tried = query if role < 0.73 else " ".join(spoil(tokens, table, rng))
        result = shown(run(table.database, tried, SHOWN))
        verdict = FAILS if result.startswith("error") else NOTHING if result == "no rows" else RIGHT
        lines = f"Query: {tried}", f"Result: {result}"
        if role < 0.8:
            yield prompt(CHECKER, table.schema, question, *lines), verdict
        elif verdict != RIGHT:
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


def encode(tokenizer: Any, chat: Chat, reply: str) -> Row:
    """Token ids of a whole chat, of which the reply is learnt."""
    prompt_tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    reply_tokens = tokenizer(reply + END, add_special_tokens=False)["input_ids"]
    return prompt_tokens + reply_tokens, [False] * len(prompt_tokens) + [True] * len(reply_tokens)


def batches(patterns: Sequence[Example], tokenizer: Any, args: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of like length: BUCKET batches are drawn at once, sorted and dealt out in random order."""
    rng, size = random.Random(args.seed), args.batch
    examples = varied(patterns, rng)
    for drawn in itertools.count(step=BUCKET):
        stream = chats(examples, TALK if args.start or drawn >= TALK_FROM * args.steps else 0.0, rng)
        rows: list[Row] = []
        while len(rows) < BUCKET * size:
            row = encode(tokenizer, *next(stream))
            rows += [row] if len(row[0]) <= LONGEST else []
        rows.sort(key=lambda row: len(row[0]))
        for start in rng.sample(range(0, len(rows), size), BUCKET):
            yield rows[start : start + size]


def accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> float:
    """Share of questions whose first greedy query matches the gold one."""
    prompts = [prompt(WRITER, row["schema"], row["question"]) for row in rows]
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in prompts]
    queries = (text.partition(END)[0] for text in replies(model, tokenizer, texts, max_tokens=64))
    return sum(score(row, query_in(reply)) for row, reply in zip(rows, queries, strict=True)) / len(rows)


def new_tokenizer(patterns: Sequence[Example], vocab_size: int) -> Any:
    texts = [text for question, tokens, _ in patterns for text in (question, " ".join(tokens))]
    schemas = {table.name + str(table.database): table.schema for *_, table in patterns}
    return tiny_model.build_tokenizer(
        [*texts, *schemas.values()], vocab_size, roles=ROLES, alone=ALONE, template=TEMPLATE, units=UNITS
    )


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def train(args: argparse.Namespace) -> None:
    splits = {name: single_table(root=str(args.data), split=name, num=10_000, seed=0) for name in ("train", "held_out")}
    splits["dev"] = single_table(root=str(args.data), split="dev", num=10_000, seed=0)
    tables: dict[tuple[str, str], Source] = {}
    patterns: list[Example] = []
    for row in splits["train"]:
        key = row["db_id"], row["schema"]
        if key not in tables:
            tables[key] = source(row["schema"], files(row["databases"], row["db_id"])[0])
        patterns.append((row["question"], plain(row["query"], tables[key]), tables[key]))
    tokenizer = load_tokenizer(args.start) if args.start else new_tokenizer(patterns, args.vocab_size)

    def measure(model: Any) -> dict[str, float]:
        return {name: round(accuracy(model, tokenizer, splits[name][::3]), 3) for name in ("held_out", "dev")}

    rows = batches(patterns, tokenizer, args)
    asyncio.run(tiny_model.pretrain(args, tokenizer, rows, measure, start=args.start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of Spider")
    parser.add_argument("--start", type=Path, help="go on from this policy, all the time as in the last part")
    tiny_model.arguments(parser, steps=1000, batch=32, vocab_size=2048)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
