"""Spider's questions as tasks: from both layouts, without those that cannot be scored, and the single-table slice."""

import gzip
import importlib.util
import json
import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from agent_lightning.config.load import load
from agent_lightning.core.errors import DataError
from agent_lightning.launch.checks import load_tasks

EXAMPLE = Path(__file__).parents[2] / "examples" / "spider"
DATA = Path(os.environ.get("AGL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "spider"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no Spider data in {DATA}")

sys.path.insert(0, str(EXAMPLE))
spec = importlib.util.spec_from_file_location("spider_data", EXAMPLE / "data.py")
data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(data)
sys.path.remove(str(EXAMPLE))

ROWS = [
    {"question": "How many singers?", "db_id": "concert", "query": "SELECT count(*) FROM singer"},
    {"question": "Who is 99?", "db_id": "concert", "query": "SELECT name FROM singer WHERE age = 99"},
    {"question": "Who?", "db_id": "nowhere", "query": "SELECT 1"},
    {"question": "What?", "db_id": "concert", "query": "SELECT nothing FROM singer"},
    {"question": "Where?", "db_id": "concert", "query": "SELECT town FROM stage JOIN singer ON singer = name"},
]


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "database" / "concert" / "concert.sqlite"
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE singer (name TEXT PRIMARY KEY, age INT)")
    connection.execute("CREATE TABLE stage (town TEXT, singer TEXT REFERENCES singer)")
    connection.execute("INSERT INTO singer VALUES ('Ann', 30), ('Bob', 41)")
    connection.execute("INSERT INTO stage VALUES ('Bonn', 'Bob')")
    connection.commit()
    connection.close()
    (tmp_path / "train_spider.json").write_text(json.dumps(ROWS))
    (tmp_path / "train_others.json").write_text("[]")
    with gzip.open(tmp_path / "dev.jsonl.gz", "wt") as file:
        file.writelines(
            json.dumps({"id": f"dev-{i}", "difficulty": "easy", **row}) + "\n" for i, row in enumerate(ROWS)
        )
    return tmp_path


def test_what_cannot_be_scored_is_left_out_and_counted(root, caplog):
    rows = data.questions(root=str(root), split="train", num=100, seed=0)
    assert rows[0] == ROWS[0] | {
        "id": "train_spider_0",
        "schema": "table singer: name, age\ntable stage: town, singer\nstage.singer = singer",
        "databases": str(root / "database"),
    }
    assert [row["id"] for row in rows] == ["train_spider_0", "train_spider_4"]
    assert caplog.messages == [
        "Spider, train: 2 questions; skipped 1 with an empty gold result, 1 without a database, "
        "1 whose gold query fails"
    ]
    caplog.clear()
    rows = data.questions(root=str(root), split="dev", num=100, seed=0)
    assert [(row["id"], row["difficulty"]) for row in rows] == [(f"dev-{i}", "easy") for i in (0, 1, 4)]
    assert caplog.messages == ["Spider, dev: 3 questions; skipped 1 without a database, 1 whose gold query fails"]
    config = load(["experiment=spider", f"data.root={root}", "data.val.num=2"])
    assert len(load_tasks(config, "val")) == 2


@pytest.mark.parametrize(
    ("reads_one", "query"),
    [
        (True, "SELECT count(*), name FROM singer AS s WHERE age IN (1, 2) GROUP BY name HAVING count(*) > 1"),
        (False, "SELECT name FROM singer JOIN stage"),
        (False, "SELECT name FROM singer AS a, stage AS b"),
        (False, "SELECT name FROM singer WHERE age = (SELECT max(age) FROM singer)"),
        (False, "SELECT name FROM singer UNION SELECT name FROM stage"),
    ],
)
def test_the_single_table_slice(reads_one, query):
    assert data.reads_one_table(query) is reads_one


@pytest.mark.parametrize(
    ("function", "split", "message"),
    [
        ("questions", "test", r"^Spider has no split 'test'; it has train, dev$"),
        ("single_table", "test", r"^the single-table slice has no split 'test'; it has train, held_out, dev$"),
        ("questions", "train", r"train_spider.json\[l, l.gz\] does not exist; set data.root"),
    ],
)
def test_a_split_or_a_file_that_is_not_there_is_one_line(tmp_path, function, split, message):
    with pytest.raises(DataError, match=message):
        getattr(data, function)(root=str(tmp_path), split=split, num=1, seed=0)


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '[{"question": "Who?"}]'])
def test_a_broken_file_is_one_line(root, text):
    (root / "train_spider.json").write_text(text)
    if text == "{}":
        assert len(data.questions(root=str(root), split="train", num=9, seed=0)) == 0
        return
    with pytest.raises(DataError, match=r"train_spider.json is not a file of Spider's release"):
        data.questions(root=str(root), split="train", num=9, seed=0)


def test_chats_to_warm_start_from_are_what_the_agent_would_say(root):
    command = [sys.executable, EXAMPLE.parent / "smollm2" / "spider_chats.py", "--root", root, "--out", root / "chats"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("chats: 1 chats\n")
    chat = json.loads((root / "chats").read_text())
    assert [message["role"] for message in chat["messages"]] == ["system", "user", "assistant"]
    assert chat["messages"][1]["content"].startswith("table singer: name, age\nQuestion: How many singers?")
    (root / "train_spider.json").unlink()
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "does not exist; set data.root to the folder of Spider" in failed.stderr


@needs_data
def test_spider_as_it_is(caplog):
    caplog.set_level(logging.WARNING)
    config = load(["experiment=spider", f"data.root={DATA}", "data.train.num=50"])
    assert len(load_tasks(config, "train")) == 50
    assert len(load_tasks(config, "val")) == 814
    assert caplog.messages == [
        "Spider, train: 6,944 questions; skipped 1,616 with an empty gold result, 96 without a database, "
        "3 whose gold query fails",
        "Spider, dev: 814 questions; skipped 62 without a database",
    ]


@needs_data
def test_the_slice_holds_out_whole_queries_of_the_training_databases():
    splits = {
        split: data.single_table(root=str(DATA), split=split, num=10_000, seed=0)
        for split in ("train", "held_out", "dev")
    }
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3024, "held_out": 587, "dev": 432}
    queries = {split: {(row["db_id"], row["query"].lower()) for row in rows} for split, rows in splits.items()}
    assert not queries["train"] & queries["held_out"]
    databases = {split: {row["db_id"] for row in rows} for split, rows in splits.items()}
    assert databases["held_out"] <= databases["train"]
    assert not databases["train"] & databases["dev"]
    assert splits["dev"][0]["schema"].startswith("table singer: singer_id, name, country,")
    assert all("\n" not in row["schema"] for rows in splits.values() for row in rows)


def test_the_papers_settings():
    config = load(["experiment=spider"])
    algorithm, sampling = config.algorithm, config.sampling.train
    assert config.model.path == "meta-llama/Llama-3.2-3B-Instruct"
    assert (algorithm.tasks_per_step, algorithm.rollouts_per_task, algorithm.lr) == (32, 4, 1e-6)
    assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high) == (0.2, 0.3)
    assert (config.model.max_len - sampling.max_tokens, sampling.max_tokens) == (4096, 2048)
    assert config.agent.trained == "writer,rewriter"


@pytest.mark.parametrize("name", ["spider_tiny", "spider_tiny_single_table"])
def test_the_tiny_experiments_differ_in_their_questions_only(name):
    config = load([f"experiment={name}"])
    slice_ = load(["experiment=spider_tiny_single_table"])
    assert (config.experiment, config.data.val_group_by) == (name, "difficulty")
    assert (config.model, config.agent, config.algorithm) == (slice_.model, slice_.agent, slice_.algorithm)
    assert (config.data == slice_.data) is (config.experiment == slice_.experiment)
