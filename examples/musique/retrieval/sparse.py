"""BM25 by bm25s: each shard scored by itself, the best of all shards merged, as Elasticsearch does by default.

Term statistics are a shard's own. Shards are of like size and large, so theirs are near the corpus's; docs/results.md
has what it costs in recall.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer

from .corpus import Passage, Shard

FOLDER = "bm25"


def build_shard(folder: Path) -> None:
    """Index the passages of a shard's folder; renamed into place when it is whole."""
    if (folder / FOLDER).exists():
        return
    scratch = folder / f"{FOLDER}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    index_of(Shard(folder)).save(str(scratch), show_progress=False)
    os.replace(scratch, folder / FOLDER)


def index_of(passages: Sequence[Passage] | Shard) -> Any:
    """A bm25s index of passages in memory. Raises ValueError where there are none."""
    if not len(passages):
        raise ValueError("there are no passages")
    index = bm25s.BM25(method="lucene")
    tokens = bm25s.tokenize(
        [passage.full_text for passage in passages], stopwords="en", stemmer=_stemmer(), show_progress=False
    )
    index.index(tokens, show_progress=False)
    return index


def best(index: Any, queries: Sequence[str], k: int) -> list[list[tuple[int, float]]]:
    """For each query the numbers and scores of at most k passages that share a word with it, best first."""
    tokens = bm25s.tokenize(
        list(queries), stopwords="en", stemmer=_stemmer(), show_progress=False, return_ids=False, allow_empty=True
    )
    best_per_query = []
    for words in tokens:
        known = [word for word in words if word in index.vocab_dict]
        scores = index.get_scores(known) if known else np.zeros(index.scores["num_docs"], np.float32)
        top = np.argpartition(-scores, k - 1)[:k] if k < len(scores) else np.arange(len(scores))
        # Ties by number, so that an answer does not depend on the partition.
        top = top[np.lexsort((top, -scores[top]))]
        best_per_query.append([(int(number), float(scores[number])) for number in top if scores[number] > 0])
    return best_per_query


class Bm25Index:
    """The shards of a finished build, memory-mapped."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._indexes = [bm25s.BM25.load(str(folder / FOLDER), mmap=True, verbosity=0) for folder in folders]

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[int, int, float]]]:
        """For each query at most k (shard, number, score), best first."""
        merged: list[list[tuple[int, int, float]]] = [[] for _ in queries]
        for shard, index in enumerate(self._indexes):
            for hits, matches in zip(merged, best(index, queries, k), strict=True):
                hits.extend((shard, number, score) for number, score in matches)
        return [sorted(hits, key=lambda hit: (-hit[2], hit[:2]))[:k] for hits in merged]


@functools.cache
def _stemmer() -> Any:
    return Stemmer.Stemmer("english")
