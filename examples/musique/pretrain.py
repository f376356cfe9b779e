"""Make the tiny starting policy: a Llama of 1.1M parameters with its own tokenizer, trained from scratch on a CPU.

    python examples/musique/pretrain.py --data DATA/musique --out examples/musique/tiny_policy

It learns right chats of the agent on facts that patterns read off the paragraphs of MuSiQue's training questions
(`relations.py`), mostly with other names put in: question, search, passage, answer. No question of MuSiQue and none of
its answers is used. In the first part every chat searches. In the rest, as with people, the commonest relations are
mostly answered from memory: the answers are right, but a model of this size cannot remember them, so it takes up the
habit without the knowledge. The note beside the weights has the time and the reward on the held-out relations, as it
is and with the first reply begun by a search.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import tiny_model
from agent import SHORT_INSTRUCTIONS, SHORT_WORDS, render, search_paragraphs
from hops import passages, relations
from relations import Fact, Redraw, all_facts
from retrieval.corpus import Passage
from reward import score
from tiny_model import END, Row, replies

ROLES = ("system", "user", "assistant")
# What is read begins with a space, as words inside a text do: a name is then the same tokens wherever it stands.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role != "assistant" %} {% endif %}{{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
SEARCH, ANSWER = "</think><query>", "</think><answer>"
TAGS = ("<think>", SEARCH, "</query>", ANSWER, "</answer>")
BUCKET = 8
FIRST_WORDS = 16
LONGEST = 224
"""Tokens of a chat to learn from."""
WORDED = 0.1
"""Share of the questions in words, as in MuSiQue's multi-hop questions."""
READ = 0.3
"""Weight of what is read in the first part, against 1 of what is said: names come again there: it teaches to copy."""
FROM_MEMORY, FROM_MEMORY_RARE = 0.7, 0.1
"""Share of the chats without a search in the last part, of the commonest relations and of the rest."""

Chat = list[dict[str, str]]


def turn(thought: str, tag: str, text: str) -> str:
    return f"<think> {thought}{tag} {text}{tag.replace('</think><', '</')}"


def chat(fact: Fact, *, search: bool, worded: bool = False) -> Chat:
    """A right chat about a fact, as the agent's messages are."""
    question = f"What is the {fact.relation} of {fact.entity}?" if worded else f"{fact.entity} >> {fact.relation}"
    messages = [{"role": "system", "content": SHORT_INSTRUCTIONS}, {"role": "user", "content": question}]
    if search:
        shown = render([Passage(doc_id="", title=fact.title, text=fact.text)], SHORT_WORDS)
        messages.append({"role": "assistant", "content": turn(fact.relation, SEARCH, fact.entity)})
        messages.append({"role": "user", "content": shown})
    return [*messages, {"role": "assistant", "content": turn(fact.relation, ANSWER, fact.answer)}]


def shortened(facts: Sequence[Fact]) -> Iterator[Fact]:
    """The facts that a passage's first FIRST_WORDS words say, with no more of it: copying is learnt sooner on them."""
    for fact in facts:
        text = " ".join(fact.text.split()[:FIRST_WORDS])
        if fact.answer in text and (fact.entity in text or fact.entity in fact.title):
            yield replace(fact, text=text)


def encode(tokenizer: Any, messages: Chat, *, read: float) -> Row:
    """Token ids of a chat, and their weights: 1 where an assistant wrote them, its end included, elsewhere `read`."""
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    opening, end = tokenizer.convert_tokens_to_ids(["<|im_start|>assistant\n", END])
    weights, writing = [], False
    for token in ids:
        weights.append(1.0 if writing else read)
        writing = token == opening or (writing and token != end)
    return ids, weights


def stream(args: argparse.Namespace, tokenizer: Any, facts: Sequence[Fact]) -> Iterator[list[Row]]:
    """Batches without end, of rows of like length: BUCKET batches are drawn at once, sorted and dealt out at random."""
    rng = random.Random(args.seed)
    known, short = Redraw(facts), Redraw(list(shortened(facts)))
    for drawn in count(0, BUCKET):
        rows: list[Row] = []
        first_part, last_part = drawn < args.short * args.steps, drawn >= args.search_only * args.steps
        while len(rows) < BUCKET * args.batch:
            fact = (short if first_part else known).draw(rng)
            memory = FROM_MEMORY if fact.relation in known.common else FROM_MEMORY_RARE
            search = not last_part or rng.random() >= memory
            if search:
                fact = known.redrawn(fact, rng)
            messages = chat(fact, search=search, worded=rng.random() < WORDED)
            row = encode(tokenizer, messages, read=0.0 if last_part else READ)
            rows += [row] if len(row[0]) <= LONGEST else []
        rows.sort(key=lambda row: len(row[0]))
        for start in rng.sample(range(0, len(rows), args.batch), BUCKET):
            yield rows[start : start + args.batch]


def mean_reward(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], opening: str = "") -> tuple[float, float]:
    """The mean reward of greedy chats of one search at most, and the share that searched.

    `opening` begins the first reply where it has a `{}` for the relation: how well the policy would do if it searched.
    """
    begun = [opening.format(row["question"].rpartition(" >> ")[2]) for row in rows]
    chats: list[Chat] = [
        [{"role": "system", "content": SHORT_INSTRUCTIONS}, {"role": "user", "content": row["question"]}]
        for row in rows
    ]
    first = _continue(model, tokenizer, chats, begun)
    searched = [text.partition("<query>")[2].partition("</query>") for text in first]
    for row, messages, text, (query, tag, _) in zip(rows, chats, first, searched, strict=True):
        messages.append({"role": "assistant", "content": text})
        if tag:
            passage = render(search_paragraphs(row["paragraphs"], query.strip(), 1), SHORT_WORDS)
            messages.append({"role": "user", "content": passage})
    went_on = [messages for messages in chats if messages[-1]["role"] == "user"]
    for messages, text in zip(went_on, _continue(model, tokenizer, went_on, [""] * len(went_on)), strict=True):
        messages.append({"role": "assistant", "content": text})
    answers = [[message["content"] for message in messages if message["role"] == "assistant"] for messages in chats]
    total = sum(score(row, turns) for row, turns in zip(rows, answers, strict=True))
    return total / len(rows), len(went_on) / len(rows)


def _continue(model: Any, tokenizer: Any, chats: Sequence[Chat], begun: Sequence[str]) -> list[str]:
    texts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + start
        for messages, start in zip(chats, begun, strict=True)
    ]
    continued = replies(model, tokenizer, texts, max_tokens=40)
    return [start + text.partition(END)[0] for start, text in zip(begun, continued, strict=True)]


def share_shown(rows: Sequence[dict[str, Any]]) -> float:
    """The share of hops whose answer the agent is shown when it searches for the entity: the most that copying gets."""
    shown = 0
    for row in rows:
        (passage,) = search_paragraphs(row["paragraphs"], row["question"].rpartition(" >> ")[0], 1) or (None,)
        shown += passage is not None and row["answer"] in render([passage], SHORT_WORDS)
    return shown / len(rows)


def train(args: argparse.Namespace) -> None:
    texts = passages(root=str(args.data), split="train")
    facts = all_facts(texts, SHORT_WORDS)
    held_out = relations(root=str(args.data), split="held_out", num=10_000, seed=0)
    tiny_model.log({"held_out_shown": round(share_shown(held_out), 3)})
    known = sorted({fact.relation for fact in facts})
    openings = [f" {title}: {' '.join(text.split()[:SHORT_WORDS])}" for title, text in texts]
    tokenizer = tiny_model.build_tokenizer(
        [*openings, *(f" {fact.entity} {fact.answer}" for fact in facts), *(f" >> {name}" for name in known * 40)],
        args.vocab_size,
        roles=ROLES,
        alone=r"\d{1,2}",
        template=TEMPLATE,
        units=TAGS,
    )

    def measure(model: Any) -> dict[str, float]:
        as_it_is, searched = mean_reward(model, tokenizer, held_out)
        able, _ = mean_reward(model, tokenizer, held_out, f"<think> {{}}{SEARCH}")
        return {
            "held_out": round(as_it_is, 3),
            "held_out_searches": round(searched, 3),
            "held_out_able": round(able, 3),
        }

    asyncio.run(tiny_model.pretrain(args, tokenizer, stream(args, tokenizer, facts), measure, heads=4, tied=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of MuSiQue")
    tiny_model.arguments(parser, steps=1200, batch=32, vocab_size=2048)
    parser.add_argument("--short", type=float, default=0.35, help="share of the steps with short passages")
    parser.add_argument("--search-only", type=float, default=0.8, help="share of the steps that make the first part")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
