"""MuSiQue's hops as questions of their own, from the files of `data.root`.

A multi-hop question comes with its decomposition into single hops, many of them a relation of an entity:

    Hello Love >> performer                      -> Hank Snow
    #1 >> place of birth, of the hop before      -> Hank Snow >> place of birth

Each is answered by one of the question's own 20 paragraphs. Rows: id, question, answer, answer_aliases, paragraphs.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agent_lightning.core.errors import DataError
from agent_lightning.run.tasks import load_jsonl

logger = logging.getLogger(__name__)

FILES = {
    "train": ("train_with_paragraphs.jsonl.gz", "train_unanswerable_with_paragraphs.jsonl.gz"),
    "held_out": ("dev_with_paragraphs.jsonl.gz",),
}


def relations(*, root: str, split: str, num: int, seed: int) -> list[dict[str, Any]]:
    """At most `num` hops that ask for a relation, drawn with `seed`: "train" of the training questions, "held_out" of
    the development ones.

    Each is there once. A held-out hop that is asked in training, or is answered by a paragraph that training has, is
    left out; a line in the log counts them. Raises DataError.
    """
    if split not in FILES:
        raise DataError(f"the relations of MuSiQue have no split {split!r}; there are {', '.join(FILES)}")
    rows = {row["question"]: row for row in _hops(root, split) if " >> " in row["question"]}
    if split == "held_out":
        trained = {row["question"] for row in _hops(root, "train")}
        known = {text for _, text in passages(root=root, split="train")}
        kept = {key: row for key, row in rows.items() if key not in trained and row["support"] not in known}
        logger.warning(
            "MuSiQue, held out: %d relations; left out %d that training has", len(kept), len(rows) - len(kept)
        )
        rows = kept
    distinct = list(rows.values())
    chosen = random.Random(seed).sample(range(len(distinct)), min(num, len(distinct)))
    return [{key: distinct[i][key] for key in distinct[i] if key != "support"} for i in sorted(chosen)]


def passages(*, root: str, split: str) -> list[tuple[str, str]]:
    """Title and text of every paragraph that comes with a split's questions, once."""
    texts = {p["paragraph_text"]: p["title"] for row in _rows(root, split) for p in row["paragraphs"]}
    return [(title, text) for text, title in texts.items()]


def _rows(root: str, split: str) -> Iterator[Mapping[str, Any]]:
    for name in FILES[split]:
        path = Path(root, name)
        if not path.exists():
            raise DataError(f"{path} does not exist; set data.root to the folder of MuSiQue")
        for task in load_jsonl(path, required=("question", "answer", "paragraphs", "question_decomposition")):
            yield task.payload


def _hops(root: str, split: str) -> Iterator[dict[str, Any]]:
    """Every hop whose paragraph is there, with the answers of earlier hops put in."""
    for row in _rows(root, split):
        hops = row["question_decomposition"]
        for number, hop in enumerate(hops, start=1):
            support = [p["paragraph_text"] for p in row["paragraphs"] if p["idx"] == hop["paragraph_support_idx"]]
            if support:
                yield {
                    "id": f"{row['id']}_{number}",
                    "question": resolve(hop["question"], [earlier["answer"] for earlier in hops]),
                    "answer": hop["answer"],
                    "answer_aliases": list(row.get("answer_aliases") or ()) if number == len(hops) else [],
                    "paragraphs": row["paragraphs"],
                    "support": support[0],
                }


def resolve(question: str, answers: Sequence[str]) -> str:
    """ "#1 >> capital", ["Norway", "Oslo"] -> "Norway >> capital" """
    text = re.sub(r"#(\d+)", lambda match: answers[int(match[1]) - 1], question)
    return re.sub(r" +([,?)])", r"\1", text).strip()
