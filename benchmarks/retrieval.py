"""Retrieval of the MuSiQue example, as JSON lines: what BM25 finds and how fast, and what 21 million vectors cost.

    python benchmarks/retrieval.py --data DATA/musique --plot docs/retrieval.png > retrieval.jsonl
    python benchmarks/retrieval.py --data DATA/musique --encoder FOLDER --sizes   # dense and hybrid too

Passages: MuSiQue's 7,697, the development questions that come with paragraphs; recall@k is the share of a question's
supporting paragraphs among the first k. BM25 in one shard and in eight; with --encoder also dense (exact) and hybrid:
reciprocal rank fusion of both (Cormack, Clarke and Buettcher, SIGIR 2009, k = 60), 100 passages of each. Vectors:
synthetic unit vectors of 768 dimensions (2,000 clusters in 32 dimensions, plus noise), IVF-PQ as
examples/musique/retrieval/dense.py builds it, at each of --sizes; recall@10 against exact search, with and without
comparing the best candidates again. What 21 million cost is extrapolated by the terms that the work is made of (recall:
by a line through the two largest sizes). All on one core.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "musique"))

import faiss
from retrieval import dense, sparse
from retrieval.corpus import Shard, parse, read_lines, write_shard

WIKIPEDIA = 21_015_324
"""Passages of 100 words of the 2018 Wikipedia, as in DPR."""
DIMENSION, RANK, QUERIES, K = 768, 32, 200, 10
CUTOFFS = (2, 5, 10, 20)


def timed(search: Callable[[Any], Any], queries: Any) -> tuple[list[Any], dict[str, float]]:
    """One query after the other: its answer, and the latency."""
    answers, seconds = [], []
    for query in queries:
        started = time.perf_counter()
        answers.append(search(query))
        seconds.append(time.perf_counter() - started)
    p50, p95 = np.percentile(seconds, [50, 95])
    return answers, {"p50_ms": p50 * 1e3, "p95_ms": p95 * 1e3, "queries_per_s": len(queries) / sum(seconds)}


Hits = list[tuple[int, int, float]]
"""(shard, number, score) of the passages of an answer, best first."""


def build(data: Path, folder: Path, shards: int, encoder: str = "") -> tuple[list[Path], int]:
    """The files that the service reads, with the number of passages: BM25, or dense with an encoder."""
    lines = list(read_lines([data / "corpus.jsonl.gz"]))
    folders = [folder / str(i) for i in range(shards)]
    for i, shard in enumerate(folders):
        write_shard(shard, iter(lines[i::shards]))
        if encoder:
            dense.encode_shard(shard, encoder)
        else:
            sparse.build_shard(shard)
    if encoder:
        dense.train(folders, folder / dense.TRAINED)
        dense.add_shard(folders[0], folder / dense.TRAINED, 0)
        dense.merge(folders, folder / dense.INDEX)
    return folders, sum(parse(line) is not None for _, line in lines)


def measure(data: Path, folders: Sequence[Path], search: Callable[[str], Hits]) -> dict[str, Any]:
    """Recall and latency of a search over MuSiQue's own passages."""
    with gzip.open(data / "dev_with_paragraphs.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    texts = [Shard(folder) for folder in folders]
    answers, speed = timed(lambda row: search(row["question"]), rows)
    recall = dict.fromkeys(CUTOFFS, 0.0)
    for row, hits in zip(rows, answers, strict=True):
        gold = {(p["title"], p["paragraph_text"]) for p in row["paragraphs"] if p["is_supporting"]}
        titles = [(texts[shard][number].title, texts[shard][number].text) for shard, number, _ in hits]
        for k in CUTOFFS:
            recall[k] += len(gold & set(titles[:k])) / len(gold) / len(rows)
    return {"questions": len(rows), **{f"recall@{k}": value for k, value in recall.items()}, **speed}


def bm25(data: Path, shards: int) -> dict[str, Any]:
    """BM25, through the files that the service reads."""
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        folders, passages = build(data, Path(name), shards)
        build_s = time.perf_counter() - started
        index = sparse.Bm25Index(folders)
        figures = measure(data, folders, lambda query: index.search([query], max(CUTOFFS))[0])
        size = sum(file.stat().st_size for folder in folders for file in (folder / sparse.FOLDER).iterdir())
    scale = WIKIPEDIA / passages
    return {
        "figure": "bm25",
        "shards": shards,
        "passages": passages,
        **figures,
        "build_s": build_s,
        "index_bytes": size,
        "wikipedia_index_gb": size * scale / 1e9,
        "wikipedia_build_core_h": build_s * scale / 3600,
    }


def fuse(*answers: Hits) -> Hits:
    """Reciprocal rank fusion: a passage scores the sum of 1 / (60 + rank) over the answers that have it."""
    scores: dict[tuple[int, int], float] = defaultdict(float)
    for hits in answers:
        for rank, (shard, number, _) in enumerate(hits, 1):
            scores[shard, number] += 1 / (60 + rank)
    ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    return [(*place, score) for place, score in ranked]


def dense_and_hybrid(data: Path, encoder: str, query_prefix: str) -> list[dict[str, Any]]:
    """Exact search over the vectors of a real encoder, alone and fused with BM25; one shard."""
    with tempfile.TemporaryDirectory() as name:
        folders, passages = build(data, Path(name) / "bm25", 1)
        started = time.perf_counter()
        vectors, _ = build(data, Path(name) / "dense", 1, encoder)
        build_s = time.perf_counter() - started
        words = sparse.Bm25Index(folders)
        index = dense.DenseIndex(Path(name) / "dense", vectors, encoder, query_prefix)
        searches = {
            "dense": lambda query: index.search([query], max(CUTOFFS))[0],
            "hybrid": lambda query: fuse(words.search([query], 100)[0], index.search([query], 100)[0]),
        }
        figures = {name: measure(data, folders, search) for name, search in searches.items()}
    model = Path(encoder).parent.name if Path(encoder).is_dir() else encoder
    shared = {"encoder": model, "shards": 1, "passages": passages}
    return [{"figure": name, **shared, **row, "build_s": build_s} for name, row in figures.items()]


class Synthetic:
    """Unit vectors near a subspace of RANK dimensions, in clusters."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._basis = rng.standard_normal((RANK, DIMENSION), dtype=np.float32)
        self._centres = rng.standard_normal((2_000, RANK), dtype=np.float32)

    def make(self, num: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng([seed, num])
        inner = self._centres[rng.integers(0, len(self._centres), num)]
        inner = inner + 0.7 * rng.standard_normal((num, RANK), dtype=np.float32)
        outer = inner @ self._basis + rng.standard_normal((num, DIMENSION), np.float32)
        return np.asarray(outer / np.linalg.norm(outer, axis=1, keepdims=True), np.float32)


def vectors(size: int, seed: int = 0) -> dict[str, Any]:
    """Build and search an IVF-PQ index of `size` synthetic vectors."""
    world = Synthetic(seed)
    base, queries = world.make(size, 1), world.make(QUERIES, 2)
    exact, exact_speed = timed(lambda query: np.argpartition(-(base @ query), K)[:K], queries)
    lists = dense.lists_for(size)
    index = dense.make_ivfpq(DIMENSION, lists)
    started = time.perf_counter()
    sample = np.random.default_rng(seed).choice(size, min(size, dense.TRAIN_PER_LIST * lists), replace=False)
    index.train(base[sample])
    train_s = time.perf_counter() - started
    started = time.perf_counter()
    index.add(base)
    add_s = time.perf_counter() - started
    index.nprobe = min(dense.PROBES, lists)

    def again(query: np.ndarray) -> np.ndarray:
        numbers = index.search(query[None], dense.CANDIDATES * K)[1][0]
        return numbers[np.argsort(-(base[numbers] @ query))[:K]]

    plain, speed = timed(lambda query: index.search(query[None], K)[1][0], queries)
    better, again_speed = timed(again, queries)
    return {
        "figure": "ivfpq",
        "vectors": size,
        "lists": lists,
        "probes": index.nprobe,
        "index_bytes": bytes_of(size, lists),
        "train_s": train_s,
        "add_s": add_s,
        "add_per_s": size / add_s,
        "recall@10": overlap(plain, exact),
        **speed,
        "recall@10_again": overlap(better, exact),
        **{f"{name}_again": value for name, value in again_speed.items()},
        "exact_p50_ms": exact_speed["p50_ms"],
    }


def bytes_of(size: int, lists: int) -> int:
    """Codes and ids, centroids of the lists, codebooks."""
    return size * (dense.CODE_BYTES + 8) + lists * DIMENSION * 4 + 256 * DIMENSION * 4


def overlap(nearest: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(nearest, exact, strict=True)]))


def extrapolate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the corpus of Wikipedia would cost: each time by the terms that its work is made of.

    Lists grow with the square root of the size, and so do training vectors: training is a constant (the codebooks) and
    a term in lists x lists; adding compares each vector with each list; a search compares with each list and scans
    probes x size / lists codes.
    """
    lists = dense.lists_for(WIKIPEDIA)

    def fit(name: str, terms: Callable[[float, float], Sequence[float]]) -> float:
        table = np.asarray([terms(row["vectors"], row["lists"]) for row in rows], float)
        value = np.asarray([row[name] for row in rows])
        # Relative errors count, and a cost is never negative.
        weights = nnls(table / value[:, None], np.ones(len(rows)))[0]
        return float(weights @ np.asarray(terms(WIKIPEDIA, lists), float))

    return {
        "figure": "wikipedia",
        "vectors": WIKIPEDIA,
        "lists": lists,
        "index_gb": bytes_of(WIKIPEDIA, lists) / 1e9,
        "half_precision_on_disk_gb": WIKIPEDIA * DIMENSION * 2 / 1e9,
        "exact_in_memory_gb": WIKIPEDIA * DIMENSION * 4 / 1e9,
        "hnsw32_in_memory_gb": WIKIPEDIA * (DIMENSION * 4 + 2 * 32 * 4) / 1e9,
        "train_s": fit("train_s", lambda _, lists: (1, lists**2)),
        "add_s": fit("add_s", lambda size, lists: (size, size * lists)),
        "p50_ms": fit("p50_ms", lambda size, lists: (1, lists, size / lists)),
        "p50_ms_again": fit("p50_ms_again", lambda size, lists: (1, lists, size / lists)),
        "exact_p50_ms": fit("exact_p50_ms", lambda size, _: (size,)),
        "recall@10": recall_line(rows, "recall@10"),
        "recall@10_again": recall_line(rows, "recall@10_again"),
    }


def recall_line(rows: Sequence[dict[str, Any]], name: str) -> float:
    """A straight line over the logarithm of the size through the two largest, where the lists are in use as later."""
    slope, start = np.polyfit(np.log([row["vectors"] for row in rows[-2:]]), [row[name] for row in rows[-2:]], 1)
    return float(np.clip(start + slope * np.log(WIKIPEDIA), 0, 1))


def plot(rows: Sequence[dict[str, Any]], end: dict[str, Any], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (time_axis, speed_axis, recall_axis) = plt.subplots(1, 3, figsize=(12, 3.6))
    sizes = [row["vectors"] for row in rows]
    for axis, names, unit in (
        (time_axis, {"train_s": "train", "add_s": "add"}, "seconds"),
        (
            speed_axis,
            {"p50_ms": "IVF-PQ", "p50_ms_again": "compared again", "exact_p50_ms": "exact"},
            "ms a query, p50",
        ),
        (recall_axis, {"recall@10": "IVF-PQ", "recall@10_again": "compared again"}, "recall@10 against exact"),
    ):
        for name, label in names.items():
            (drawn,) = axis.plot(sizes, [row[name] for row in rows], "o-", label=label)
            axis.plot([sizes[-1], WIKIPEDIA], [rows[-1][name], end[name]], "x:", color=drawn.get_color())
        axis.set(xscale="log", xlabel="vectors", ylabel=unit, yscale="linear" if axis is recall_axis else "log")
        axis.legend()
    recall_axis.set_ylim(0, 1.02)
    figure.suptitle("IVF-PQ, 768 dimensions, measured (o) and extrapolated to 21 million (x)")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of MuSiQue; without it BM25 is not measured")
    parser.add_argument("--encoder", help="a sentence-transformers model, as a folder or a hub id: dense and hybrid")
    parser.add_argument("--query-prefix", default="", help="what the encoder wants before a query")
    parser.add_argument("--sizes", type=int, nargs="*", default=[20_000, 60_000, 200_000, 500_000])
    parser.add_argument("--plot", type=Path, help="also draw the curve here")
    args = parser.parse_args()
    # One core: beside other work FAISS's threads wait for each other, and figures of one core add up.
    faiss.omp_set_num_threads(1)
    if args.data is None:
        sys.stderr.write("BM25 is not measured: give --data, the folder of MuSiQue\n")
    else:
        for shards in (1, 8):
            say(bm25(args.data, shards))
        if args.encoder:
            for row in dense_and_hybrid(args.data, args.encoder, args.query_prefix):
                say(row)
    if not (rows := [say(vectors(size)) for size in args.sizes]):
        return
    end = say(extrapolate(rows))
    if args.plot:
        plot(rows, end, args.plot)


def say(row: dict[str, Any]) -> dict[str, Any]:
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in row.items()}
    sys.stdout.write(json.dumps(rounded) + "\n")
    sys.stdout.flush()
    return row


if __name__ == "__main__":
    main()
