"""Loading tasks, and the order in which they are trained."""

import csv
import gzip
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.errors import DataError
from agent_lightning.core.types import Task
from agent_lightning.run.tasks import TaskCursor, load_file, load_hub, load_jsonl, make, sample


def row(number: int) -> dict[str, str]:
    return {"id": f"a{number}", "question": f"What is {number} plus 1?", "result": str(number + 1)}


def write(path: Path, *lines: str) -> Path:
    text = "".join(line + "\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def numbered(num: int) -> list[Task]:
    return [Task(task_id=str(i), payload={}) for i in range(num)]


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_jsonl_keeps_the_whole_row(tmp_path, name):
    path = write(tmp_path / name, json.dumps(row(1)), "", '{"question": "é"}')
    assert load_jsonl(path) == [Task(task_id="a1", payload=row(1)), Task(task_id="train-3", payload={"question": "é"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data.jsonl:2: not JSON"),
        ("[" * 100_000, "data.jsonl:2: not JSON"),
        ("[1]", "data.jsonl:2: a row must be an object, this is list"),
        ('{"id": "b"}', "data.jsonl:2: the row has no 'question' and no 'result'"),
        ('{"id": "b", "question": null, "result": "1"}', "data.jsonl:2: the row has no 'question'"),
        (json.dumps(row(1)), r"data.jsonl:2: id 'a1' is already used in .*/data.jsonl:1$"),
    ],
)
def test_jsonl_names_the_line_that_is_wrong(tmp_path, line, message):
    path = write(tmp_path / "data.jsonl", json.dumps(row(1)), line)
    with pytest.raises(DataError, match=message) as caught:
        load_jsonl(path, required=("question", "result"))
    assert "\n" not in str(caught.value)


def test_unreadable_files_say_what_to_set(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist; set data\.root to the folder that holds it"):
        load_jsonl(tmp_path / "none.jsonl")
    for name, content in {"a.jsonl.gz": b"not gzip", "b.jsonl": b"\xff\xfe\x00", "c.jsonl.gz": b"\x1f\x8b\x08"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read .*set data\.root"):
            load_jsonl(tmp_path / name)
    with pytest.raises(DataError, match=r"set data\.root"):
        load_jsonl(tmp_path)


OFFLINE = """
import sys
from agent_lightning.core.errors import DataError
from agent_lightning.run.tasks import load_hub
try:
    load_hub("MU-NLPC/Calc-X", split="train")
except DataError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local data set in the hub's layout, with two configurations; no network and no shared cache."""
    root = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        # Set before the first import of the library, which reads them only then.
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(root / "home"))
        pytest.importorskip("datasets")
        data = root / "Calc-tiny"
        (data / "data").mkdir(parents=True)
        (data / "other").mkdir()
        (data / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n"
            "  - split: train\n    path: data/train-*\n  - split: validation\n    path: data/validation-*\n"
            "- config_name: plain\n  data_files:\n  - split: train\n    path: other/train-*\n---\n"
        )
        for split, numbers in {"train": [1, 2, 3], "validation": [4]}.items():
            columns = {
                "id": [f"calc__{i}" for i in numbers],
                "question": [f"What is {i} plus 1?" for i in numbers],
                "chain": [f'<gadget id="calculator">{i}+1</gadget>' for i in numbers],
                "result": [str(i + 1) for i in numbers],
                "result_float": [float(i + 1) for i in numbers],
            }
            write_parquet(data / "data" / f"{split}-00000-of-00001.parquet", columns)
        write_parquet(data / "other" / "train-00000-of-00001.parquet", {"problem": ["1+1?", "2+2?"], "answer": [2, 4]})
        yield data


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def test_hub_layout(hub):
    tasks = load_hub(str(hub), split="train")
    assert [task.task_id for task in tasks] == ["calc__1", "calc__2", "calc__3"]
    assert tasks[0].payload["result"] == "2"
    assert tasks[0].payload["result_float"] == 2.0
    assert len(load_hub(str(hub), split="validation")) == 1
    assert len(load_hub(str(hub), split="train[:2]")) == 2


def test_hub_fields_and_configuration(hub):
    tasks = load_hub(str(hub), name="plain", split="train", question_field="problem", result_field="answer")
    assert [task.task_id for task in tasks] == ["train-0", "train-1"]
    assert tasks[1].payload["question"] == "2+2?"
    assert tasks[1].payload["result"] == "4"


def test_hub_folder_of_jsonl(hub, tmp_path):
    write(tmp_path / "train.jsonl", json.dumps(row(1)), json.dumps(row(2)))
    assert [task.task_id for task in load_hub(str(tmp_path), split="train")] == ["a1", "a2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split 'test': check name, split and files"),
        ({"name": "none", "split": "train"}, "check name, split and files"),
        ({"split": "train", "result_field": "answer"}, "has no column 'answer'; it has id, question"),
    ],
)
def test_hub_errors_say_what_to_do(hub, arguments, message):
    with pytest.raises(DataError) as caught:
        load_hub(str(hub), **arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_folder_with_a_broken_file(hub, tmp_path):
    write(tmp_path / "train.jsonl", "{")
    with pytest.raises(DataError, match=r"data set '.*' cannot be read"):
        load_hub(str(tmp_path), split="train")


def test_hub_without_network(hub):
    # In a process of its own: whether the library is offline is settled when it is first imported.
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "data set 'MU-NLPC/Calc-X': no network; give a local folder" in done.stderr.splitlines()[-1]


def test_make():
    assert [task.task_id for task in make(lambda num: map(row, range(num)), num=2)] == ["a0", "a1"]
    with pytest.raises(DataError, match="row 1: id 'a0' is already used in row 0"):
        make(lambda: [row(0), row(0)])
    with pytest.raises(DataError, match="row 0: the row has no 'id'"):
        make(lambda: [{"question": "?"}])


def test_sample():
    tasks = numbered(50)
    some = sample(tasks, 10, seed=1)
    assert len({task.task_id for task in some}) == 10
    assert some == sorted(some, key=lambda task: int(task.task_id))
    assert some == sample(tasks, 10, seed=1) != sample(tasks, 10, seed=2)
    assert sample(tasks, 99, seed=1) == tasks
    assert sample(tasks, 0, seed=1) == []


@settings(max_examples=60, deadline=None)
@given(
    num_tasks=st.integers(1, 12),
    sizes=st.lists(st.integers(0, 15), min_size=1, max_size=8),
    stop=st.integers(0, 8),
    seed=st.integers(0, 2**32),
)
def test_a_cursor_resumed_anywhere_draws_the_same_tasks(num_tasks, sizes, stop, seed):
    tasks = numbered(num_tasks)
    uninterrupted = TaskCursor(seed=seed).next(tasks, sum(sizes))
    cursor = TaskCursor(seed=seed)
    drawn = []
    for index, size in enumerate(sizes):
        if index == stop:
            cursor = TaskCursor(seed=seed, epoch=cursor.epoch, position=cursor.position)
        drawn.extend(cursor.next(tasks, size))
    assert drawn == uninterrupted
    for start in range(0, len(uninterrupted) - num_tasks + 1, num_tasks):
        assert sorted(uninterrupted[start : start + num_tasks], key=lambda task: int(task.task_id)) == tasks


def test_cursor_shuffles_each_epoch_anew_and_survives_other_data():
    tasks = numbered(20)
    cursor = TaskCursor(seed=3)
    assert cursor.next(tasks, 20) != cursor.next(tasks, 20)
    assert (cursor.epoch, cursor.position) == (2, 0)
    assert len(TaskCursor(seed=3, position=19).next(tasks[:5], 4)) == 4
    with pytest.raises(DataError, match="no tasks"):
        cursor.next([], 1)


# Files in other formats.

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": 'say "a,\nb"\u2028', "answer": ""}]
VERL = {
    "data_source": "gsm8k",
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7, "split": "train"},
}


def csv_text(rows: list[dict[str, str]], delimiter: str) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("rows.json", json.dumps(ROWS, indent=2)),
        ("rows.json", json.dumps({"version": 1, "data": ROWS})),
        ("rows.json", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("rows.txt", "\r\n".join(map(json.dumps, ROWS))),
        ("rows.csv", csv_text(ROWS, ",")),
        ("rows.tsv", csv_text(ROWS, "\t")),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_rows_come_from_files_of_several_formats(tmp_path: Path, name: str, text: str, packed: bool, mark: str) -> None:
    path = tmp_path / (name + (".gz" if packed else ""))
    content = (mark + text).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    tasks = load_file(path)
    assert [dict(task.payload) for task in tasks] == ROWS
    assert tasks[0].task_id.startswith("rows-")


def test_rows_come_from_parquet_and_veRLs_rows_have_a_question_and_a_result(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([VERL, VERL]), tmp_path / "train.parquet")
    first, second = load_file(tmp_path / "train.parquet")
    assert (first.task_id, second.task_id) == ("train-1", "train-2")
    assert dict(first.payload) == {**VERL, "question": "1+1?", "result": "2"}
    (tmp_path / "train.json").write_text(json.dumps([VERL]))
    assert load_file(tmp_path / "train.json")[0].payload == first.payload


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"q,a\n1\n", r"a.csv:2: the row has other columns than \['q', 'a'\]"),
        ("a.csv", b"q,a\n1,2,3\n", "a.csv:2: the row has other columns"),
        ("a.csv", b"q;a\n1;2\n", r"a.csv:1: columns \['q;a'\]: each needs .* a comma between two"),
        ("a.csv", b"q\ta\n1\t2\n", r"a.csv:1: columns .* a comma between two"),
        ("a.csv", b"q,q\n1,2\n", r"a.csv:1: columns \['q', 'q'\]: each needs a name of its own"),
        ("a.csv", b"q,a\n\xff,2\n", "not CSV in UTF-8"),
        ("a.json", b'{"a": 1, "b": 2}', "must hold a list of objects, or an object a line"),
        ("a.json", b"[1]", "row 1 must be an object, this is int"),
        ("a.json", b"{\n", "a.json:1: not JSON"),
        ("a.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("a.csv", None, "does not exist; set data.root"),
        ("a.parquet", None, "does not exist; set data.root"),
        ("a.jsonl", b'\n{"a": }', "a.jsonl:2: not JSON"),
    ],
)
def test_a_file_of_another_format_is_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_file(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_keeps_its_columns(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}], "n": 3}) + "\n")
    (task,) = load_hub(str(tmp_path), split="train")
    assert task == Task(
        task_id="train-0", payload={"id": "train-0", "messages": [{"role": "user", "content": "hi"}], "n": 3}
    )
