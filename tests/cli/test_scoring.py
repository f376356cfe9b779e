"""agl score: anyone's predictions, with the benchmarks' own figures."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.api.cli.main import USER_ERROR, main
from agent_lightning.rollouts.agents import load
from agent_lightning.run.tasks import load_jsonl

DATA = Path(os.environ.get("AGL_DATA", Path(__file__).parents[3] / "shared" / "data"))
f1: Any = load("examples/musique/answers.py:f1")
exact_match: Any = load("examples/musique/answers.py:exact_match")
reward: Any = load("examples/musique/reward.py:score")


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("answer", "golds", "em", "fit"),
    [
        ("The Danube.", ["Danube"], 1, 1.0),
        ("river Danube", ["Danube", "Donau"], 0, 2 / 3),
        ("Donau", ["Danube", "Donau"], 1, 1.0),
        ("a  U.S.-based   THE band", ["usbased band"], 1, 1.0),
        ("x x y", ["x y y"], 0, 2 / 3),
        ("", ["the"], 1, 1.0),
        ("", ["Danube"], 0, 0.0),
        ("Athena", ["an Athena"], 1, 1.0),
    ],
)
def test_em_and_f1(answer: str, golds: list[str], em: int, fit: float) -> None:
    assert exact_match(answer, golds) == em
    assert f1(answer, golds) == pytest.approx(fit)


@pytest.mark.skipif(not (DATA / "musique").is_dir(), reason=f"no MuSiQue data in {DATA}")
def test_em_and_f1_equal_the_official_metric_on_every_row() -> None:
    rows = [task.payload for task in load_jsonl(DATA / "musique" / "eval_reference.jsonl.gz")]
    assert len(rows) > 400
    for row in rows:
        assert exact_match(row["prediction"], row["gold_answers"]) == row["em"], row["id"]
        # The reference is written with six decimals.
        assert round(f1(row["prediction"], row["gold_answers"]), 6) == row["f1"], row["id"]


@pytest.mark.parametrize(
    ("turns", "value"),
    [
        (["<think>a</think><query>b</query>", "<think>c</think>\n<answer>Oslo</answer>"], 1.0),
        (["<think>c</think><answer>the city Oslo</answer>"], 0.9 * 2 / 3 + 0.1),
        (["<think>c</think><answer>Rome</answer>"], 0.1),
        (["<answer>Oslo</answer>"], 0.9),
        (["<think>a</think><query></query>", "<think>c</think><answer>Oslo</answer>"], 0.9),
        (["<think>a<think></think><answer>Oslo</answer>"], 0.9),
        (["<think>a</think><query>Oslo</query>"], 0.0),
        (["Oslo"], 0.0),
        ([], 0.0),
    ],
)
def test_the_reward_is_f1_and_format(turns: list[str], value: float) -> None:
    assert reward({"answer": "Oslo", "answer_aliases": ["Kristiania"]}, turns) == pytest.approx(value)


def test_rows_come_back_with_their_figures_and_totals_come_last(tmp_path: Path, capsys: Any) -> None:
    rows = [
        {"id": "1", "pred": "the Danube", "answer": "Donau", "answer_aliases": ["Danube"], "more": [1, "ü"]},
        {"id": "2", "pred": "x y", "answer": "x"},
    ]
    assert main(["score", "musique", write(tmp_path / "p.jsonl", *rows)]) == 0
    first, second, totals = lines(capsys.readouterr().out)
    assert first == {**rows[0], "score": 1.0, "em": 1, "f1": 1.0}
    assert second == {**rows[1], "score": pytest.approx(2 / 3), "em": 0, "f1": pytest.approx(2 / 3)}
    assert totals == {"rows": 2, "score": pytest.approx(5 / 6), "em": 0.5, "f1": pytest.approx(5 / 6)}


def test_calc_x_reads_packed_files_and_numbers(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "p.jsonl.gz"
    rows = [{"pred": 34, "result": "34"}, {"pred": "It is 3/4", "result": 0.75}, {"pred": "35", "result": "34"}]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert main(["score", "calc_x", str(path)]) == 0
    *scored, totals = lines(capsys.readouterr().out)
    assert [row["score"] for row in scored] == [1, 1, 0]
    assert totals == {"rows": 3, "score": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("{\n", "not JSON"),
        ("[1]\n", "a row must be an object"),
        ({"pred": "x"}, "the row has no 'answer'"),
        ({"answer": "x"}, "the row has no 'pred'"),
        ({"pred": None, "answer": "x"}, "the row has no 'pred'"),
        ({"pred": 3, "answer": "x"}, "pred must be a text, this is int"),
        ({"pred": "x", "answer": "x", "answer_aliases": "y"}, "answer_aliases must be a list of texts"),
    ],
)
def test_a_row_that_cannot_be_scored_ends_it_without_totals(tmp_path: Path, capsys: Any, row: Any, fault: str) -> None:
    good = {"pred": "x", "answer": "x"}
    path = write(tmp_path / "p.jsonl", good, "\n", row, good)
    assert main(["score", "musique", path]) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.err.startswith(f"agl: {path}:3: {fault}")
    assert captured.err.count("\n") == 1
    assert lines(captured.out) == [{**good, "score": 1.0, "em": 1, "f1": 1.0}]


def test_bytes_that_are_no_text_name_their_line(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"pred": "x", "result": "1"}\n\xff\n')
    assert main(["score", "calc_x", str(path)]) == USER_ERROR
    assert f"{path}:2: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["calc_x", "EMPTY"], ["calc_x", "nowhere.jsonl"], ["calc_x", "EMPTY", "--databases", "x"]]
)
def test_nothing_to_score_is_one_line(tmp_path: Path, arguments: list[str], capsys: Any) -> None:
    empty = write(tmp_path / "empty.jsonl", "\n")
    assert main(["score", *[empty if item == "EMPTY" else item for item in arguments]]) == USER_ERROR
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_standard_input_is_read() -> None:
    command = [sys.executable, "-m", "agent_lightning", "score", "calc_x", "-"]
    text = '{"pred": "12", "result": "12"}\n'
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert lines(done.stdout)[-1] == {"rows": 1, "score": 1.0}


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *['{"pred": "12", "result": "12"}\n'] * 20_000)
    command = [sys.executable, "-m", "agent_lightning", "score", "calc_x", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
