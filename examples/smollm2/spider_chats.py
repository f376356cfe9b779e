"""Chats to warm-start SmolLM2 with: Spider's questions on one table as the agent's writer, checker and rewriter answer.

    python examples/smollm2/spider_chats.py --root DATA/spider --num 480 --out chats.jsonl

A chat has the agent's own messages, and the gold query or a verdict as the reply. The databases are of Spider's
training split; a rewriter's chat has a query that was spoiled, and its result.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "spider"))

from data import single_table
from databases import files
from pretrain import Example, chats
from wordings import Source, plain, source

from agent_lightning.core.errors import UserError


def examples(root: str, seed: int) -> list[Example]:
    """(question, tokens of the gold query, table) of every training question on one table, in random order."""
    tables: dict[tuple[str, str], Source] = {}
    found = []
    for row in single_table(root=root, split="train", num=10_000, seed=seed):
        key = row["db_id"], row["schema"]
        if key not in tables:
            tables[key] = source(row["schema"], files(row["databases"], row["db_id"])[0])
        found.append((row["question"], plain(row["query"], tables[key]), tables[key]))
    random.Random(seed).shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="the folder of Spider")
    parser.add_argument("--num", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        rows = examples(options.root, options.seed)
    except UserError as error:
        raise SystemExit(str(error)) from None
    told = chats(iter(rows), 0.0, random.Random(options.seed))
    lines = [
        json.dumps({"id": f"spider-{number}", "messages": [*prompt, {"role": "assistant", "content": reply}]})
        for number, (prompt, reply) in zip(range(options.num), told, strict=False)
    ]
    options.out.write_text("".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"{options.out}: {len(lines)} chats\n")


if __name__ == "__main__":
    main()
