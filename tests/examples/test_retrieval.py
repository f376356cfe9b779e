"""The retrieval service of the MuSiQue example: corpus, both kinds of index, HTTP bodies."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import random_encoder

EXAMPLE = Path(__file__).parents[2] / "examples" / "musique"
sys.path.insert(0, str(EXAMPLE))
from retrieval import corpus  # noqa: E402

ROWS = [
    {"doc_id": "a", "title": "The Doors", "text": "Jim Morrison sang in the band."},
    {"doc_id": 7, "title": None, "text": "Oslo is the capital of Norway."},
    {"doc_id": "c", "title": "Danube", "text": "A river through Vienna and Budapest."},
    {"doc_id": "d", "title": "Light My Fire", "text": "A song of The Doors, sung by Jim Morrison."},
]
BROKEN = [
    "{\n",
    "[1]\n",
    '{"doc_id": "x"}\n',
    '{"doc_id": true, "text": "y"}\n',
    '{"doc_id": "x", "text": " "}\n',
    "\xff\n",
]


def shard_of(folder: Path, rows: list[dict[str, Any]]) -> corpus.Shard:
    corpus.write_shard(folder, ((f"f:{i}", json.dumps(row).encode()) for i, row in enumerate(rows)))
    return corpus.Shard(folder)


def test_broken_lines_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[0]) + "\n", *BROKEN, "\n", json.dumps(ROWS[1]) + "\n"]
    file = tmp_path / "c.jsonl.gz"
    file.write_bytes(gzip.compress("".join(lines).encode("latin-1")))
    counts = corpus.write_shard(tmp_path / "s", corpus.read_lines([file]))
    assert counts == corpus.Counts(passages=2, broken=len(BROKEN), first_broken="c.jsonl.gz:2")
    assert corpus.read_counts(tmp_path / "s") == counts
    assert corpus.read_counts(tmp_path / "other") is None
    first, second = corpus.Shard(tmp_path / "s")
    assert (first.title, second.doc_id, second.title) == ("The Doors", "7", "")


def test_parquet_is_read_as_json_lines(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(
        pa.Table.from_pylist([{**row, "doc_id": str(row["doc_id"])} for row in ROWS]), tmp_path / "c.parquet"
    )
    lines = list(corpus.read_lines([tmp_path / "c.parquet"]))
    assert [where for where, _ in lines] == [f"c.parquet:{i}" for i in range(1, 5)]
    assert corpus.parse(lines[2][1]) == corpus.Passage(doc_id="c", title="Danube", text=ROWS[2]["text"])


def test_bm25_merges_shards(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    pytest.importorskip("Stemmer")
    from retrieval import sparse

    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, rows in zip(folders, (ROWS[:2], ROWS[2:]), strict=True):
        shard_of(folder, rows)
        sparse.build_shard(folder)
    index = sparse.Bm25Index(folders)
    songs, rivers, nothing, empty = index.search(["Jim Morrison's songs", "rivers", "zebra", ""], 3)
    assert {hit[:2] for hit in songs} == {(0, 0), (1, 1)}
    assert [hit[:2] for hit in rivers] == [(1, 0)]
    assert nothing == empty == []
    assert songs[0][2] >= songs[1][2] > 0


@pytest.mark.parametrize("exact", [True, False])
def test_dense_search_finds_what_is_near(tmp_path: Path, exact: bool) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("sentence_transformers")
    from retrieval import dense

    encoder = str(random_encoder(tmp_path / "encoder"))
    rows = [
        {"doc_id": str(i), "title": "", "text": f"word{i} word{i * 7 % 997} word{i * 13 % 997}"} for i in range(1200)
    ]
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, part in zip(folders, (rows[:500], rows[500:]), strict=True):
        shard_of(folder, part)
        dense.encode_shard(folder, encoder)
    dense.train(folders, tmp_path / dense.TRAINED, exact_up_to=10_000 if exact else 100)
    for folder, first in zip(folders, (0, 500), strict=True):
        dense.add_shard(folder, tmp_path / dense.TRAINED, first)
    dense.merge(folders, tmp_path / dense.INDEX)
    index = dense.DenseIndex(tmp_path, folders, encoder, "")
    hits = index.search(["\n" + rows[i]["text"] for i in (3, 499, 500, 1199)], 2)
    assert [hit[0][:2] for hit in hits] == [(0, 3), (0, 499), (1, 0), (1, 699)]
    assert all(hit[0][2] == pytest.approx(1, abs=1e-2) for hit in hits)
    vectors = np.load(folders[0] / dense.VECTORS)
    assert vectors.dtype == np.float16
    assert vectors.shape[0] == 500


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"{", "not JSON"),
        (b"[]", "query must be a text"),
        (b'{"k": 3}', "query must be a text"),
        (b'{"query": ["a", 1]}', "query must be a text"),
        (b'{"query": []}', "from 1 to 256"),
        (b'{"query": "a", "k": 0}', "k must be"),
        (b'{"query": "a", "k": true}', "k must be"),
        (json.dumps({"query": "x" * 5000}).encode(), "at most 4096"),
        (b" " * (1 << 22), "longer than"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(body: bytes, fault: str) -> None:
    from retrieval.service import parse

    with pytest.raises(ValueError, match=fault):
        parse(body)


def test_a_request_has_one_query_or_many() -> None:
    from retrieval.service import parse

    assert parse(b'{"query": "a"}') == ("a", 5)
    assert parse(b'{"query": ["a", "b"], "k": 2}') == (["a", "b"], 2)
