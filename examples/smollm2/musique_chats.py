"""Chats to warm-start SmolLM2 with: facts of MuSiQue's passages as the agent that searches would look them up.

    python examples/smollm2/musique_chats.py --root DATA/musique --num 480 --out chats.jsonl

A chat has the agent's own messages: "Hello Love >> performer", a search for the entity, the opening of the passage
found, the answer. The facts are those that patterns read off the paragraphs of the training questions
(examples/musique/relations.py); no question of MuSiQue and none of its answers is used.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "musique"))

from agent import SHORT_WORDS
from hops import passages
from pretrain import chat
from relations import all_facts

from agent_lightning.core.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="the folder of MuSiQue")
    parser.add_argument("--num", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        facts = list(all_facts(passages(root=options.root, split="train"), SHORT_WORDS))
    except UserError as error:
        raise SystemExit(str(error)) from None
    random.Random(options.seed).shuffle(facts)
    lines = [
        json.dumps({"id": f"fact-{number}", "messages": chat(fact, search=True)})
        for number, fact in enumerate(facts[: options.num])
    ]
    options.out.write_text("".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"{options.out}: {len(lines)} chats\n")


if __name__ == "__main__":
    main()
