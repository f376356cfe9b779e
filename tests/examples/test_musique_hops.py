"""MuSiQue's relation hops as tasks, and the facts that the tiny policy learns from."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.config.load import load as config_load
from agent_lightning.config.load import resolve_path
from agent_lightning.core.errors import DataError
from agent_lightning.rollouts.agents import load

sys.path.append(resolve_path("examples/musique"))
import relations as facts

relations: Any = load("examples/musique/hops.py:relations")


def row(name: str, *hops: tuple[str, str, str]) -> dict[str, Any]:
    """A row of MuSiQue from (question, answer, paragraph) of its hops."""
    paragraphs = [{"idx": i, "title": text[:4], "paragraph_text": text} for i, (*_, text) in enumerate(hops)]
    steps = [{"question": q, "answer": a, "paragraph_support_idx": i} for i, (q, a, _) in enumerate(hops)]
    return {
        "id": name,
        "question": "?",
        "answer": hops[-1][1],
        "answer_aliases": ["alias"],
        "paragraphs": paragraphs,
        "question_decomposition": steps,
    }


@pytest.fixture
def root(tmp_path: Path) -> str:
    hello = ("Hello Love >> performer", "Hank Snow", "A single by Hank Snow.")
    born = ("#1 >> place of birth", "Brooklyn, Nova Scotia", "Born in Brooklyn.")
    unsupported = row("u", ("Brand >> author", "Henrik Ibsen", "A play."))
    unsupported["question_decomposition"][0]["paragraph_support_idx"] = None
    files = {
        "train_with_paragraphs": [row("t", hello, born, ("When did #2 open ?", "1900", "In 1900."))],
        "train_unanswerable_with_paragraphs": [unsupported],
        "dev_with_paragraphs": [
            row("d", ("Oslo >> country", "Norway", "In Norway."), ("#1 >> capital", "Oslo", "Its capital is Oslo.")),
            row("asked", hello),
            row("known", ("A >> performer", "Hank Snow", "A single by Hank Snow.")),
        ],
    }
    for name, rows in files.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(tmp_path)


def test_a_hop_is_a_question_of_its_own_with_earlier_answers_put_in(root: str) -> None:
    train = relations(root=root, split="train", num=10, seed=0)
    assert [(row["question"], row["answer"], row["answer_aliases"]) for row in train] == [
        ("Hello Love >> performer", "Hank Snow", []),
        ("Hank Snow >> place of birth", "Brooklyn, Nova Scotia", []),
    ]
    assert len(train[0]["paragraphs"]) == 3


def test_what_is_held_out_shares_no_question_and_no_answering_paragraph_with_training(root: str) -> None:
    held_out = relations(root=root, split="held_out", num=10, seed=0)
    assert [row["question"] for row in held_out] == ["Oslo >> country", "Norway >> capital"]
    assert held_out[1]["answer_aliases"] == ["alias"]


def test_a_wrong_split_or_folder_is_named(root: str) -> None:
    with pytest.raises(DataError, match="train, held_out"):
        relations(root=root, split="dev", num=10, seed=0)
    with pytest.raises(DataError, match=r"data\.root"):
        relations(root=f"{root}/none", split="train", num=10, seed=0)


@pytest.mark.parametrize(
    ("title", "text", "expected"),
    [
        ("Brother (song)", '"Brother" is a song by the American rock band Pearl Jam.', ("performer", "Pearl Jam")),
        ("McRae, Arkansas", "McRae is a city in White County, Arkansas.", (
            "located in the administrative territorial entity", "White County",
        )),
        ("Bubye", "Bubye is a river in Gwanda District, Zimbabwe.", ("country", "Zimbabwe")),
        ("A Reid", "A Reid (born October 24, 1972, Nashville, U.S.) is a boxer.", ("place of birth", "Nashville")),
        ("Red Wall", "Red Wall is a 1986 novel by Brian Jacques.", ("author", "Brian Jacques")),
    ],
)  # fmt: skip
def test_facts_are_read_off_passages(title: str, text: str, expected: tuple[str, str]) -> None:
    assert expected in [(fact.relation, fact.answer) for fact in facts.facts_in(title, text)]


def test_other_names_are_put_into_question_passage_and_answer_alike() -> None:
    known = facts.Redraw(
        [
            facts.Fact("Brand", "author", "Ibsen", "Brand (play)", "Brand is a play by Ibsen."),
            facts.Fact("Red Wall", "author", "Brian Jacques", "Red Wall", "Red Wall is a novel by Brian Jacques."),
        ]
    )
    rng, seen = random.Random(0), set()
    for _ in range(60):
        fact = known.redrawn(known.draw(rng), rng)
        assert fact.entity in fact.title
        assert fact.text in (
            f"{fact.entity} is a play by {fact.answer}.",
            f"{fact.entity} is a novel by {fact.answer}.",
        )
        seen.add((fact.entity, fact.answer))
    assert len(seen) == 4


@pytest.mark.parametrize("experiment", ["musique_tiny_relations", "musique_tiny"])
def test_the_tiny_experiments_search_with_the_agent_that_reads_little(experiment: str) -> None:
    config = config_load([f"experiment={experiment}"])
    assert (config.experiment, config.agent.target) == (experiment, "examples/musique/agent.py:solve_short")
    assert config.agent.reward == "examples/musique/reward.py:score"
