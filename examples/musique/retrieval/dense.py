"""Dense search: passages encoded by sentence-transformers (BGE, say), found by FAISS.

Up to EXACT_UP_TO vectors are compared one by one. Beyond, IVF-PQ: 64 bytes and an id for a vector, so that 21 million
fit into 1.5 GB, where exact vectors take 64 GB and an HNSW graph more than that. What its rounding loses is mostly won
back by comparing the best candidates again with their half-precision vectors, which stay on disk.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from .corpus import Shard

VECTORS, SHARD_INDEX, TRAINED, INDEX = "vectors.npy", "dense.faiss", "trained.faiss", "dense.faiss"
EXACT_UP_TO = 50_000
CODE_BYTES = 64
TRAIN_PER_LIST = 40
TRAIN_ROUNDS = 10
PROBES = 64
CANDIDATES = 10
"""Compared again for each passage that is asked for."""
BATCH = 256


@functools.cache
def load_encoder(path: str) -> Any:
    """A sentence-transformers model from a folder or the hub; once for each process, on a GPU where there is one."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(path)


def encode(encoder: str, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors, float32, [len(texts), dimension]: their inner product is the cosine."""
    vectors = load_encoder(encoder).encode(
        list(texts), batch_size=BATCH, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
    )
    return np.asarray(vectors, np.float32)


def encode_shard(folder: Path, encoder: str) -> None:
    """The vectors of a shard's passages in half precision, batch by batch; renamed into place when it is whole."""
    if (folder / VECTORS).exists():
        return
    shard, scratch = Shard(folder), folder / f"{VECTORS}.tmp"
    out, texts = None, (passage.full_text for passage in shard)
    for start in range(0, len(shard), BATCH):
        vectors = encode(encoder, list(islice(texts, BATCH)))
        if out is None:
            shape = (len(shard), vectors.shape[1])
            out = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float16, shape=shape)
        out[start : start + len(vectors)] = vectors
    assert out is not None
    out.flush()
    os.replace(scratch, folder / VECTORS)


def train(folders: Sequence[Path], file: Path, *, exact_up_to: int = EXACT_UP_TO, seed: int = 0) -> None:
    """The empty index for the vectors of all shards, trained on a sample of them; does nothing where it is there."""
    if file.exists():
        return
    shards = [np.load(folder / VECTORS, mmap_mode="r") for folder in folders]
    total, dimension = sum(map(len, shards)), shards[0].shape[1]
    if total <= exact_up_to:
        index: Any = faiss.IndexFlatIP(dimension)
    else:
        lists = lists_for(total)
        index = make_ivfpq(dimension, lists)
        rng, share = np.random.default_rng(seed), min(1.0, TRAIN_PER_LIST * lists / total)
        chosen = [np.sort(rng.choice(len(shard), int(share * len(shard)), replace=False)) for shard in shards]
        index.train(
            np.concatenate([shard[rows].astype(np.float32) for shard, rows in zip(shards, chosen, strict=True)])
        )
    _write(index, file)


def lists_for(total: int) -> int:
    """Inverted lists: the power of two at 4 sqrt(total), FAISS's own rule of thumb; 16,384 for 21 million."""
    return int(2 ** np.round(np.log2(4 * np.sqrt(total))))


def make_ivfpq(dimension: int, lists: int) -> Any:
    """An untrained IVF-PQ index for the inner product."""
    index = faiss.index_factory(dimension, f"IVF{lists},PQ{CODE_BYTES}", faiss.METRIC_INNER_PRODUCT)
    # FAISS's 25 rounds over 65,536 vectors take many times longer and find hardly more.
    index.cp.niter = index.pq.cp.niter = TRAIN_ROUNDS
    # A minute that only a Hamming filter, which is not used here, would make good.
    index.do_polysemous_training = False
    index.pq.cp.max_points_per_centroid = TRAIN_PER_LIST
    return index


def add_shard(folder: Path, trained: Path, first: int) -> None:
    """A shard's own index: its vectors get the numbers from `first` on."""
    if (folder / SHARD_INDEX).exists():
        return
    index, vectors = faiss.read_index(str(trained)), np.load(folder / VECTORS, mmap_mode="r")
    for start in range(0, len(vectors), 1 << 16):
        part = vectors[start : start + (1 << 16)].astype(np.float32)
        if isinstance(index, faiss.IndexFlat):
            index.add(part)
        else:
            index.add_with_ids(part, np.arange(first + start, first + start + len(part)))
    _write(index, folder / SHARD_INDEX)


def merge(folders: Sequence[Path], file: Path) -> None:
    """One index of the shards' indexes, in their order."""
    index = faiss.read_index(str(folders[0] / SHARD_INDEX))
    for folder in folders[1:]:
        index.merge_from(faiss.read_index(str(folder / SHARD_INDEX)), 0)
    _write(index, file)


def _write(index: Any, file: Path) -> None:
    scratch = file.with_suffix(".tmp")
    faiss.write_index(index, str(scratch))
    os.replace(scratch, file)


class DenseIndex:
    """The merged index of a finished build; the exact vectors stay on disk."""

    def __init__(self, folder: Path, folders: Sequence[Path], encoder: str, query_prefix: str) -> None:
        self._index = faiss.read_index(str(folder / INDEX))
        self._vectors = [np.load(shard / VECTORS, mmap_mode="r") for shard in folders]
        self._first = np.cumsum([0, *map(len, self._vectors)])
        self._encoder, self._prefix = encoder, query_prefix
        self._exact = isinstance(self._index, faiss.IndexFlat)
        if not self._exact:
            self._index.nprobe = min(PROBES, self._index.nlist)

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[int, int, float]]]:
        """For each query at most k (shard, number, cosine), best first."""
        vectors = encode(self._encoder, [self._prefix + query for query in queries])
        _, numbers = self._index.search(vectors, k if self._exact else CANDIDATES * k)
        return [
            list(islice(self._ranked(vector, row[row >= 0]), k)) for vector, row in zip(vectors, numbers, strict=True)
        ]

    def _ranked(self, query: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """The candidates by their exact cosine."""
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        places = [(int(s), int(n - self._first[s])) for s, n in zip(shards, numbers, strict=True)]
        scores = [float(query @ self._vectors[s][n].astype(np.float32)) for s, n in places]
        for i in np.argsort(-np.asarray(scores), kind="stable"):
            yield *places[i], scores[i]
