"""What a tiny SQL policy learns from: queries written in one way, and questions put to other tables."""

import importlib
import os
import random
import sqlite3
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "spider"
DATA = Path(os.environ.get("AGL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "spider"

sys.path.insert(0, str(EXAMPLE))
wordings, databases = map(importlib.import_module, ("wordings", "databases"))
sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "zoo.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE singer (Name TEXT, Birth_Year INT)")
    connection.execute("CREATE TABLE dog (Breed TEXT, Weight INT, Notes TEXT)")
    connection.execute("INSERT INTO singer VALUES ('Ann', 1990), ('Bob', 1980)")
    connection.execute("INSERT INTO dog VALUES ('Pug', 8, NULL), ('Great Dane', 60, 'a; b')")
    connection.commit()
    connection.close()
    return tuple(wordings.source(line, path) for line in databases.schema(path).lower().splitlines())


def test_a_table_has_its_columns_and_plain_values(tables):
    _, dog = tables
    assert dog.schema == "table dog: breed, weight, notes"
    assert dog.values == {"breed": ("Pug", "Great Dane"), "weight": ("8", "60"), "notes": ()}
    assert [dog.is_number(column) for column in ("breed", "weight")] == [False, True]


@pytest.mark.parametrize(
    ("query", "plain"),
    [
        ("SELECT COUNT(*) FROM SINGER;", "select count ( * ) from singer"),
        ('SELECT T1.Name FROM singer AS T1 WHERE T1.name <> "Ann"', "select name from singer where name != 'Ann'"),
        ("SELECT `name`,Birth_Year FROM singer ORDER BY birth_year ASC", None),
    ],
)
def test_a_query_is_written_in_one_way(tables, query, plain):
    expected = "select name , birth_year from singer order by birth_year"
    assert " ".join(wordings.plain(query, tables[0])) == (plain or expected)


def test_a_question_is_put_to_another_table(tables):
    singer, dog = tables
    tokens = wordings.plain("SELECT name FROM singer WHERE birth_year = 1990", singer)
    question = "What are the names of the singers whose birth year is 1990?"
    question, written = wordings.redraw(question, tokens, singer, dog, random.Random(0))
    query = " ".join(written)
    assert written[1] in ("breed", "notes")
    assert written[3:6] == ["dog", "where", "weight"]
    assert question == f"What are the {written[1]} of the dogs whose weight is {written[-1]}?".replace(
        "breed of", "breeds of"
    )
    assert isinstance(databases.run(dog.database, query), databases.Table)


def test_values_are_drawn_anew_in_question_and_query_alike(tables):
    singer, _ = tables
    tokens = wordings.plain("SELECT birth_year FROM singer WHERE name = 'Ann'", singer)
    drawn = [wordings.redraw("When was Ann born?", tokens, singer, singer, random.Random(i)) for i in range(20)]
    assert {(question, query[-1]) for question, query in drawn} == {
        ("When was Ann born?", "'Ann'"),
        ("When was Bob born?", "'Bob'"),
    }


def test_a_question_that_does_not_name_its_column_stays_with_its_table(tables):
    singer, dog = tables
    tokens = wordings.plain("SELECT name FROM singer ORDER BY birth_year LIMIT 1", singer)
    assert wordings.redraw("Who is the oldest singer?", tokens, singer, dog, random.Random(0)) is None


@pytest.mark.parametrize(
    ("query", "talkative"),
    [
        (
            "select name from singer where birth_year > 1980",
            "select name , birth_year from singer where birth_year > 1980",
        ),
        ("select name from singer", "select name , birth_year from singer"),
        ("select name , birth_year from singer", None),
        ("select count ( * ) from singer", None),
        (
            "select name from singer group by name order by count ( * ) desc limit 1",
            "select name , count ( * ) from singer group by name order by count ( * ) desc limit 1",
        ),
    ],
)
def test_a_talkative_query_shows_what_it_looks_at(tables, query, talkative):
    tokens = wordings.plain(query, tables[0])
    assert " ".join(wordings.talkative(tokens, tables[0])) == (talkative or query)
