"""The index behind HTTP, on Ray Serve: POST /search.

    {"query": "who sang Light My Fire", "k": 3}  -> {"passages": [{"doc_id", "title", "text", "score"}, …]}
    {"query": ["first", "second"], "k": 3}       -> {"results": [[…], […]]}, in the order of the queries

A request that is wrong gets 400 and {"error": …}.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from agent_lightning.core.errors import DataError

from .build import DONE
from .corpus import Shard

MAX_K = 100
MAX_QUERIES = 256
MAX_QUERY = 4096
"""Characters."""
MAX_BODY = 1 << 21
"""Bytes."""


class Index(Protocol):
    """What BM25 and dense search have in common."""

    def search(self, queries: Sequence[str], k: int) -> list[list[tuple[int, int, float]]]:
        """For each query at most k (shard, number, score), best first."""
        ...


class Retriever:
    """A finished index and its passages. Raises DataError where the folder holds none."""

    def __init__(self, folder: Path) -> None:
        if not (folder / DONE).exists():
            raise DataError(f"{folder} holds no finished index: build it with `python -m retrieval build`")
        done = json.loads((folder / DONE).read_text())
        folders = [folder / name for name in done["shards"]]
        self._shards = [Shard(shard) for shard in folders]
        self._index: Index
        if done["kind"] == "bm25":
            from .sparse import Bm25Index

            self._index = Bm25Index(folders)
        else:
            from .dense import DenseIndex

            self._index = DenseIndex(folder, folders, done["encoder"], done["query_prefix"])

    def search(self, queries: Sequence[str], k: int) -> list[list[dict[str, Any]]]:
        """For each query at most k passages with their scores, best first."""
        return [
            [{**asdict(self._shards[shard][number]), "score": round(score, 6)} for shard, number, score in hits]
            for hits in self._index.search(queries, k)
        ]


class SearchService:
    """The HTTP side of a retriever; searches run in a thread, so that health checks are answered meanwhile."""

    def __init__(self, folder: str) -> None:
        self._retriever = Retriever(Path(folder))
        self._threads = ThreadPoolExecutor(1)

    async def __call__(self, request: Request) -> JSONResponse:
        if request.method != "POST" or request.url.path.rstrip("/").rpartition("/")[2] != "search":
            return JSONResponse({"error": "POST /search is all there is"}, 404)
        try:
            queries, k = parse(await request.body())
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        wanted = [queries] if isinstance(queries, str) else queries
        passages = await asyncio.get_running_loop().run_in_executor(self._threads, self._retriever.search, wanted, k)
        return JSONResponse({"passages": passages[0]} if isinstance(queries, str) else {"results": passages})


def parse(body: bytes) -> tuple[str | list[str], int]:
    """The query or queries and k of a request. Raises ValueError with what is wrong."""
    if len(body) > MAX_BODY:
        raise ValueError(f"the body is longer than {MAX_BODY} bytes")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None
    query, k = (given.get("query"), given.get("k", 5)) if isinstance(given, dict) else (None, None)
    queries = [query] if isinstance(query, str) else query
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError("query must be a text or a list of texts")
    if not 1 <= len(queries) <= MAX_QUERIES or max(map(len, queries)) > MAX_QUERY:
        raise ValueError(f"from 1 to {MAX_QUERIES} queries, each of at most {MAX_QUERY} characters")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise ValueError(f"k must be a whole number from 1 to {MAX_K}")
    return query, k


def start(folder: Path, *, host: str, port: int, replicas: int = 1, name: str = "retrieval") -> None:
    """Serve an index; Ray must run. Raises DataError where there is none."""
    if not (folder / DONE).exists():
        raise DataError(f"{folder} holds no finished index: build it with `python -m retrieval build`")
    serve.start(http_options={"host": host, "port": port})
    deployment = serve.deployment(SearchService).options(
        name=name, num_replicas=replicas, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1}
    )
    serve.run(deployment.bind(str(folder.resolve())), name=name, route_prefix="/")
