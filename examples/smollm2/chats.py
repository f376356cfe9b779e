"""Chats to warm-start SmolLM2 with: MAWPS training questions as the calculator agent of calc_x answers them.

    python examples/smollm2/chats.py --root DATA/calcx --num 480 --out chats.jsonl     # files of the normalised layout
    python examples/smollm2/chats.py --num 480 --out chats.jsonl                       # MU-NLPC/Calc-mawps on the hub

A chat has the agent's own messages: system and question, the call of the calculator with the question's equation, its
result, and that number as the answer. Questions whose equation does not give their result are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "calc_x"))

from calculator import TOOL
from parts import rows
from problems import normalise_equation, solution

from agent_lightning.core.errors import UserError
from agent_lightning.run.tasks import load_hub


def chats(questions: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """{"id", "messages", "tools"} of each question with an equation that leads to its result."""
    for row in questions:
        try:
            messages = solution({**row, "equation": normalise_equation(str(row.get("equation") or row["expression"]))})
        except (ValueError, KeyError):
            continue
        messages[-1]["content"] = messages[-2]["content"]  # the tool's result is the answer
        yield {"id": row["id"], "messages": messages, "tools": [TOOL]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with mawps_train.jsonl[.gz]; without it, the hub")
    parser.add_argument("--num", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        if options.root:
            questions = rows(root=options.root, names=["mawps_train"], split="train", num=10**6, seed=0)
        else:
            questions = [dict(task.payload) for task in load_hub("MU-NLPC/Calc-mawps", split="train")]
    except UserError as error:
        raise SystemExit(str(error)) from None
    random.Random(options.seed).shuffle(questions)
    lines = [json.dumps(chat) for chat in chats(questions)][: options.num]
    options.out.write_text("".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"{options.out}: {len(lines)} chats\n")


if __name__ == "__main__":
    main()
