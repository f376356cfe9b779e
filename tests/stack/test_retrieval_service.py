"""Build and serve an index on Ray as a user does: two processes, one of them killed on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from optional import needs

EXAMPLE = Path(__file__).parents[2] / "examples" / "musique"
pytestmark = [needs("bm25s", "Stemmer"), pytest.mark.stack, pytest.mark.slow]


def command(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "retrieval", *arguments],
        cwd=EXAMPLE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines_of(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stderr
    return iter(process.stderr.readline, "")


def post(port: int, body: Any) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/search", data=json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def test_a_killed_build_goes_on_and_the_index_is_served(tmp_path: Path) -> None:
    rows = [
        {"doc_id": f"d{i}", "title": f"Place {i}", "text": f"unique{i} stands in town{i % 50}"} for i in range(3000)
    ]
    corpus = tmp_path / "corpus.jsonl"
    text = [json.dumps(row) + "\n" for row in rows]
    corpus.write_text("".join([*text[:1700], "{broken\n", *text[1700:]]))
    index = tmp_path / "index"
    build = ["build", "--kind", "bm25", "--out", str(index), "--shard-lines", "200", "--workers", "1", str(corpus)]
    first = command(*build)
    for line in lines_of(first):
        if "shards" in line:
            os.killpg(first.pid, signal.SIGKILL)
            break
    first.wait()
    kept = {file: file.stat().st_mtime_ns for file in index.glob("shard-*/counts.json")}
    assert 0 < len(kept) < 16
    out, err = (second := command(*build)).communicate(timeout=240)
    assert second.returncode == 0, err
    assert "warning: 1 broken lines skipped, the first at corpus.jsonl:1701" in err
    assert json.loads(out.splitlines()[-1])["passages"] == 3000
    assert all(file.stat().st_mtime_ns == made for file, made in kept.items())
    assert len(list(index.glob("shard-*"))) == 16
    other, err = (refused := command(*build[:-1], str(EXAMPLE / "answers.py"))).communicate(timeout=240)
    assert (refused.returncode, other) == (2, "")
    assert "other settings or files" in err
    check_service(index)


def test_a_dense_index_is_built_shard_by_shard(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    pytest.importorskip("sentence_transformers")
    from encoders import random_encoder

    encoder = random_encoder(tmp_path / "encoder")
    rows = [
        {"doc_id": str(i), "title": "", "text": f"word{i} word{i * 7 % 997} word{i * 13 % 997}"} for i in range(500)
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = tmp_path / "index"
    settings = ["--kind", "dense", "--encoder", str(encoder), "--query-prefix", "", "--shard-lines", "200"]
    out, err = (build := command("build", *settings, "--workers", "2", "--out", str(index), str(corpus))).communicate()
    assert build.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["shards"] == ["shard-00000", "shard-00001", "shard-00002"]
    sys.path.insert(0, str(EXAMPLE))
    from retrieval.service import Retriever

    hits = Retriever(index).search(["\n" + rows[i]["text"] for i in (0, 199, 200, 499)], 1)
    assert [passages[0]["doc_id"] for passages in hits] == ["0", "199", "200", "499"]
    assert all(passages[0]["score"] == pytest.approx(1, abs=1e-2) for passages in hits)


def check_service(index: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    service = command("serve", str(index), "--port", str(port))
    try:
        assert any("serving" in line for line in lines_of(service))
        passages = post(port, {"query": "what stands at unique1234?", "k": 2})["passages"]
        assert passages[0]["doc_id"] == "d1234"
        assert passages[0]["title"] == "Place 1234"
        assert passages[0]["score"] > 0
        several = post(port, {"query": ["unique7", "nothing"], "k": 1})["results"]
        assert [[passage["doc_id"] for passage in passages] for passages in several] == [["d7"], []]
        with pytest.raises(HTTPError) as refused:
            post(port, {"query": 3})
        assert refused.value.code == 400
        assert "query must be" in json.loads(refused.value.read())["error"]
    finally:
        service.terminate()
        started = time.monotonic()
        service.wait(60)
        assert time.monotonic() - started < 60
