"""Spider: SQL that only reads and always ends, execution match, and the scorer."""

import gzip
import importlib
import json
import os
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.errors import DataError

EXAMPLE = Path(__file__).parents[2] / "examples" / "spider"
DATA = Path(os.environ.get("AGL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "spider"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no Spider data in {DATA}")

sys.path.insert(0, str(EXAMPLE))
databases, execution_match, scorer = map(importlib.import_module, ("databases", "execution_match", "scorer"))
sys.path.remove(str(EXAMPLE))

SOON = databases.Limits(seconds=0.5, rows=100, size=10_000)
COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
BOMB = "WITH a0 AS (SELECT 1)" + "".join(f", a{i} AS (SELECT 1 FROM a{i - 1}, a{i - 1})" for i in range(1, 41))


def make(path, *statements):
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    for statement in ("CREATE TABLE singer (name TEXT, age INT, rate REAL)", *statements):
        connection.execute(statement)
    connection.commit()
    connection.close()
    return path


@pytest.fixture(scope="module")
def singers(tmp_path_factory):
    rows = "('Ann', 30, 1.0), ('Bob', 30, 2.5), ('Bob', 30, 2.5), ('Cy', 41, NULL)"
    path = tmp_path_factory.mktemp("databases") / "concert" / "concert.sqlite"
    return make(
        path, f"INSERT INTO singer VALUES {rows}", "CREATE VIEW young AS SELECT name FROM singer WHERE age < 40"
    )


# ---- databases


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT name, age FROM singer WHERE rate > 2", [("Bob", 30), ("Bob", 30)]),
        ("SELECT count(*), avg(age) FROM young, singer", [(12, 32.75)]),
        (f"{COUNT} SELECT i FROM n LIMIT 2", [(1,), (2,)]),
        ("SELECT CAST(x'ff41fe' AS TEXT), x'00', NULL, 1e999", [("A", b"\0", None, float("inf"))]),
        ("WITH a AS (SELECT max(age) AS m FROM singer) SELECT m FROM a", [(41,)]),
    ],
)
def test_reading_works(singers, sql, rows):
    table = databases.run(singers, sql)
    assert list(table.rows) == rows
    assert not table.cut


HARM = {
    "refused": (
        "INSERT INTO singer VALUES (1, 1, 1)",
        "UPDATE singer SET age = 1",
        "DELETE FROM singer WHERE 0",
        "WITH a AS (SELECT 1) DELETE FROM singer",
        "DROP TABLE singer",
        "CREATE TEMP TABLE a AS SELECT 1",
        "ATTACH 'other.sqlite' AS other",
        "VACUUM INTO 'other.sqlite'",
        "PRAGMA journal_mode = WAL",
        "PRAGMA hard_heap_limit = 0",
        "SELECT * FROM pragma_database_list",
        "BEGIN",
        "SELECT load_extension('x')",
        "SELECT printf('%.*c', 2000000000, 'x')",
    ),
    "timeout": (
        f"{COUNT} SELECT count(*) FROM n",
        f"{COUNT} SELECT i FROM n ORDER BY i DESC",
        "SELECT count(*) FROM " + ", ".join(f"singer a{i}" for i in range(20)),
    ),
    "too_large": (
        "SELECT zeroblob(2000000000)",
        "SELECT hex(randomblob(1000000000))",
        f"{COUNT} SELECT group_concat(i) FROM (SELECT i FROM n LIMIT 100000)",
        "SELECT 1 -- " + "x" * 100_000,
        f"{BOMB} SELECT 1 FROM a40",
        "WITH a AS (SELECT hex(zeroblob(32000)) AS x) SELECT " + ", ".join(["instr(x, x || 1)"] * 60) + " FROM a",
        "SELECT trim('a', 'b'), ltrim('a', 'b'), rtrim('a', 'b')",
    ),
    "error": (
        *("", " ", "-- hello", ";", "SELEC", "SELECT 1; SELECT 2", "SELECT nobody FROM singer", "SELECT ?1"),
        *("SELECT '\ud800'", "SELECT '\0'", "(" * 5000, "SELECT 1" + "+1" * 2000),
    ),
}


@pytest.mark.parametrize(("kind", "sql"), [(kind, sql) for kind, queries in HARM.items() for sql in queries])
def test_a_query_that_does_harm_or_makes_no_sense_is_one_short_failure(singers, tmp_path, monkeypatch, kind, sql):
    monkeypatch.chdir(tmp_path)
    before, started = singers.read_bytes(), time.monotonic()
    failure = databases.run(singers, sql, SOON)
    assert isinstance(failure, databases.Failure)
    assert failure.kind == kind
    assert "\n" not in failure.message
    assert len(failure.message) <= 300
    assert time.monotonic() - started < 30
    assert singers.read_bytes() == before
    assert [*singers.parent.iterdir(), *tmp_path.iterdir()] == [singers]


@pytest.mark.parametrize(
    ("sql", "rows"), [(f"{COUNT} SELECT i FROM n", 100), (f"{COUNT} SELECT hex(zeroblob(2000)) FROM n", 2)]
)
def test_a_result_is_cut_at_its_rows_and_its_size(singers, sql, rows):
    table = databases.run(singers, sql, SOON)
    assert table.cut
    assert len(table.rows) == rows


def test_a_database_that_is_missing_or_corrupt_is_a_failure(singers, tmp_path):
    def kind(name, content):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        return databases.run(path, "SELECT name FROM singer").kind

    content = singers.read_bytes()
    assert kind("missing.sqlite", None) == "missing"
    assert databases.run(tmp_path, "SELECT 1").kind == "missing"
    assert kind("text.sqlite", b"not a database" * 1000) == "corrupt"
    assert kind("garbled.sqlite", content[:4096] + b"\xff" * (len(content) - 4096)) == "corrupt"
    assert kind("cut.sqlite", content[:4096]) == "corrupt"
    assert kind("empty.sqlite", b"") == "error"


def test_a_database_with_an_odd_name_or_a_journal_can_be_read(singers, tmp_path):
    path = make(tmp_path / "100% odd?#.sqlite", "INSERT INTO singer VALUES ('Ann', 30, 1.0)")
    assert databases.run(path, "SELECT age FROM singer").rows == ((30,),)
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("UPDATE singer SET age = 31")
    writer.commit()
    assert databases.run(path, "SELECT age FROM singer").rows == ((31,),)
    writer.close()


@pytest.mark.parametrize("db_id", ["nobody", "", ".", "..", "../concert", "concert/."])
def test_a_database_is_found_by_its_id_alone(singers, db_id):
    assert databases.files(singers.parents[1], "concert") == [singers]
    with pytest.raises(DataError, match="there is no database"):
        databases.files(singers.parents[1], db_id)


# ---- execution match


@pytest.mark.parametrize(
    ("same", "ordered", "wanted", "given"),
    [
        (True, False, [(1, "a"), (2, "b")], [("b", 2), ("a", 1)]),
        (False, True, [(1, "a"), (2, "b")], [("b", 2), ("a", 1)]),
        (True, True, [(1, "a"), (2, "b")], [("a", 1), ("b", 2)]),
        (False, False, [(1, "a"), (2, "b")], [("a", 2), ("b", 1)]),
        (False, False, [(1,), (1,)], [(1,)]),
        (False, False, [(1,), (1,), (2,)], [(1,), (2,), (2,)]),
        (True, False, [], []),
        (False, False, [(1, 2)], [(1,)]),
        (True, False, [(1, None)], [(None, 1.0)]),
        (False, False, [(1,)], [("1",)]),
        (False, False, [(b"a",)], [("a",)]),
        # Each column can be found in the other table, but not both at once.
        (False, False, [(1, 1), (2, 2)], [(1, 2), (2, 1)]),
        # Equal by value, but 1 sorts after "1.5" and 1.0 before it: the first look at the rows tells them apart.
        (False, False, [(1, "1.5")], [(1.0, "1.5")]),
        (True, False, [(*range(12), "a")], [("a", *reversed(range(12)))]),
    ],
)
def test_same_table(same, ordered, wanted, given):
    assert execution_match.same_table(wanted, given, ordered=ordered) is same


cells = st.sampled_from([0, 1, 1.0, "1", "a", None])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4).flatmap(lambda n: st.lists(st.tuples(*[cells] * n), min_size=1, max_size=5)),
    st.randoms(use_true_random=False),
)
def test_a_table_is_the_same_under_any_order_and_not_with_a_row_changed(rows, random):
    columns = random.sample(range(len(rows[0])), len(rows[0]))
    turned = [tuple(row[i] for i in columns) for row in rows]
    assert execution_match.same_table(rows, turned, ordered=True)
    shuffled = random.sample(turned, len(turned))
    assert execution_match.same_table(rows, shuffled, ordered=False)
    shuffled[0] = ("new", *shuffled[0][1:])
    assert not execution_match.same_table(rows, shuffled, ordered=False)


@pytest.mark.parametrize(
    ("sql", "prepared"),
    [
        ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
        ("select count(distinct(a)), count(Distinct b)", "select count((a)), count( b)"),
        ("SELECT 'distinct', \"DISTINCT\", `distinct`, [distinct], distinctly, _distinct", None),
        ("SELECT 'it''s distinct' -- distinct\n, a /* distinct\n */", None),
        ("SELECT a WHERE b > = 1 AND c < = 2 AND d ! = 3", "SELECT a WHERE b >= 1 AND c <= 2 AND d != 3"),
        ("SELECT DISTINCT ';' FROM t; .030 sec", "SELECT  ';' FROM t;"),
        ("SELECT '", None),
    ],
)
def test_prepare(sql, prepared):
    assert execution_match.prepare(sql) == (sql if prepared is None else prepared)


@pytest.mark.parametrize(
    ("match", "keep", "predicted", "gold"),
    [
        (True, True, "SELECT age, name FROM singer", "SELECT name, age FROM singer"),
        (True, False, "SELECT DISTINCT name FROM singer", "SELECT name FROM singer"),
        (False, False, "SELECT name FROM singer GROUP BY name", "SELECT DISTINCT name FROM singer"),
        (True, True, "SELECT name FROM singer GROUP BY name", "SELECT DISTINCT name FROM singer"),
        (False, True, "SELECT name FROM singer ORDER BY name DESC", "SELECT name FROM singer ORDER BY name"),
        (True, True, "SELECT name FROM singer ORDER BY name DESC", "SELECT name FROM singer"),
        (True, True, "SELECT 30.0", "SELECT min(age) FROM singer"),
        (True, True, "SELECT year(curdate ( )) - 2000", "SELECT 20"),
        (False, True, "SELECT '30'", "SELECT min(age) FROM singer"),
        (True, True, "SELECT name, age FROM singer WHERE 0", "SELECT name FROM singer WHERE 0"),
        (False, True, "DELETE FROM singer", "SELECT name FROM singer WHERE 0"),
        (False, True, "", "SELECT name FROM singer WHERE 0"),
        (False, True, f"{COUNT} SELECT i FROM n", "SELECT 1"),
        (False, True, f"{COUNT} SELECT count(*) FROM n", "SELECT 1"),
        (False, True, "SELECT zeroblob(60000)", "SELECT 1"),
        (False, True, "SELECT nobody FROM singer", "SELECT 1"),
    ],
)
def test_execution_match(singers, match, keep, predicted, gold):
    matches = execution_match.execution_match(predicted, gold, [singers], keep_distinct=keep, limits=SOON)
    assert matches is match


def test_a_prediction_must_match_on_every_database(singers, tmp_path):
    other = make(tmp_path / "other.sqlite", "INSERT INTO singer VALUES ('Dan', 30, 1), ('Eve', 20, 2)")
    predicted, gold = "SELECT max(rate) FROM singer", "SELECT rate FROM singer WHERE name = 'Bob' LIMIT 1"
    assert execution_match.execution_match(predicted, gold, [singers])
    assert not execution_match.execution_match(predicted, gold, [singers, other])


@pytest.mark.parametrize("gold", ["SELECT nobody FROM singer", f"{COUNT} SELECT i FROM n"])
def test_a_gold_query_that_fails_or_is_too_large_is_a_mistake_in_the_data(singers, gold):
    with pytest.raises(DataError, match=r"^the gold query (fails|returns more)"):
        execution_match.execution_match("SELECT 1", gold, [singers], limits=SOON)


@needs_data
def test_execution_match_is_the_official_label_of_every_reference_row():
    gold = {row["id"]: row["query"] for row in map(json.loads, (DATA / "dev.jsonl").open())}
    with gzip.open(DATA / "eval_reference.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 4070
    other = [
        (row["id"], row["model"], label)
        for row in rows
        for label, keep in (("exec_match", False), ("exec_match_keep_distinct", True))
        if row[label]
        != execution_match.execution_match(
            row["pred"], gold[row["id"]], databases.files(DATA / "database", row["db_id"]), keep_distinct=keep
        )
    ]
    assert other == []


# ---- scorer


def test_rows_are_scored_and_added_up(singers):
    root = singers.parents[1]
    row = {"id": "a", "pred": "SELECT age FROM singer", "db_id": "concert", "query": "SELECT age FROM singer"}
    assert scorer.score(row, databases=root) == {"score": 1}
    assert scorer.score(row | {"pred": "I do not know"}, databases=root) == {"score": 0}
    rows = [{"score": 1, "difficulty": "hard"}, {"score": 0, "difficulty": "easy"}, {"score": 1}, {"score": 1}]
    assert scorer.totals(rows) == {
        "rows": 4,
        "score": 0.75,
        "difficulty": {"easy": {"rows": 1, "score": 0.0}, "hard": {"rows": 1, "score": 1.0}},
    }
    assert scorer.totals(rows[2:]) == {"rows": 2, "score": 1.0}
    assert scorer.totals([]) == {"rows": 0, "score": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": None}, "the row has no text 'pred'$"),
        ({"db_id": 3, "query": None}, "the row has no text 'db_id' and no text 'query'$"),
        ({"db_id": "nobody"}, "there is no database 'nobody'"),
        ({"query": "SELECT nobody"}, "the gold query fails on "),
    ],
)
def test_a_row_that_cannot_be_scored_is_told_in_one_line(singers, change, message):
    row = {"id": "a", "pred": "SELECT 1", "db_id": "concert", "query": "SELECT 1"} | change
    with pytest.raises(DataError, match=f"^{message}"):
        scorer.score(row, databases=singers.parents[1])
    with pytest.raises(DataError, match="--databases"):
        scorer.score({"pred": "", "db_id": "", "query": ""})
