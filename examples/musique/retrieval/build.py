"""Build an index on Ray: the corpus streams in, is cut into shards, and tasks index them side by side.

A killed build goes on where it stood when it is started again: a shard's files are renamed into place when they are
whole. Memory is bounded by the shards that are worked on at once; a new one is cut only when a worker is free. On a
cluster the index must be in a folder that all nodes see.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal

import ray

from agent_lightning.core.errors import DataError, UserError

from .corpus import Counts, read_counts, read_lines, write_json, write_shard

MANIFEST, DONE, CUT = "manifest.json", "index.json", "cut.json"
BGE_QUERY = "Represent this sentence for searching relevant passages: "
"""What BGE's English models want before a query, and not before a passage."""
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is built; a build is gone on with only where these are the same."""

    kind: Literal["bm25", "dense"]
    files: tuple[str, ...]
    shard_lines: int = 500_000
    encoder: str = ""
    query_prefix: str = BGE_QUERY

    def check(self) -> None:
        """Raises DataError, UserError."""
        for file in self.files:
            if not Path(file).is_file():
                raise DataError(f"{file} does not exist")
        if self.kind == "dense" and not self.encoder:
            raise UserError("--kind dense needs --encoder: a sentence-transformers model, as a folder or a hub id")
        if self.shard_lines < 1:
            raise UserError("--shard-lines must be at least 1")


def build(settings: Settings, out: Path, *, workers: int, gpus: float = 0, report: Report) -> dict[str, Any]:
    """Build or go on building; what DONE then holds. Ray must run. Raises UserError, DataError."""
    settings.check()
    _claim(settings, out)
    if (out / DONE).exists():
        return dict(json.loads((out / DONE).read_text()))
    started, shards = time.monotonic(), {}
    tasks = _side_by_side(index_shard, ((folder, settings) for folder in _cut(settings, out)), workers, gpus)
    for folder, counts in tasks:
        shards[folder] = counts
        passages = sum(counts.passages for counts in shards.values())
        rate = passages / (time.monotonic() - started)
        report(f"{len(shards)} shards, {passages:,} passages indexed, {rate:,.0f} a second")
    shards = {folder: shards[folder] for folder in sorted(shards)}
    full = {folder: counts.passages for folder, counts in shards.items() if counts.passages}
    if not full:
        raise DataError(f"no passages in {', '.join(settings.files)}: rows need doc_id and text")
    if settings.kind == "dense":
        _join_vectors(out, full, workers, report)
    done = {
        "kind": settings.kind,
        "encoder": settings.encoder,
        "query_prefix": settings.query_prefix,
        "shards": [folder.name for folder in full],
        "passages": sum(full.values()),
        "broken": sum(counts.broken for counts in shards.values()),
    }
    if done["broken"]:
        first = next(counts.first_broken for counts in shards.values() if counts.broken)
        report(f"warning: {done['broken']} broken lines skipped, the first at {first}")
    write_json(out / DONE, done)
    return done


def index_shard(folder: Path, settings: Settings) -> Counts:
    """Ray's task: index one shard whose text is whole."""
    counts = read_counts(folder)
    assert counts is not None
    if counts.passages and settings.kind == "bm25":
        from .sparse import build_shard

        build_shard(folder)
    elif counts.passages:
        from .dense import encode_shard

        encode_shard(folder, settings.encoder)
    return counts


def _claim(settings: Settings, out: Path) -> None:
    """The folder belongs to one build. Raises UserError where it is another's."""
    manifest = {**asdict(settings), "files": [[file, Path(file).stat().st_size] for file in settings.files]}
    out.mkdir(parents=True, exist_ok=True)
    file = out / MANIFEST
    if file.exists() and json.loads(file.read_text()) != manifest:
        raise UserError(f"{out} holds an index of other settings or files: give another --out, or remove it")
    write_json(file, manifest)


def _cut(settings: Settings, out: Path) -> Iterator[Path]:
    """The folders of the shards, each as soon as its text is whole. What was cut before is only counted over."""
    if (out / CUT).exists():
        yield from (out / f"shard-{i:05d}" for i in range(json.loads((out / CUT).read_text())["shards"]))
        return
    lines, number = read_lines([Path(file) for file in settings.files]), 0
    for first in lines:
        folder = out / f"shard-{number:05d}"
        rest = islice(lines, settings.shard_lines - 1)
        if read_counts(folder) is None:
            write_shard(folder, chain([first], rest))
        else:
            for _ in rest:
                pass
        number += 1
        yield folder
    write_json(out / CUT, {"shards": number})


def _side_by_side(
    task: Callable[..., Any], jobs: Iterable[tuple[Path, *tuple[Any, ...]]], workers: int, gpus: float = 0
) -> Iterator[tuple[Path, Any]]:
    """Run `task` on each job in Ray, at most `workers` at once: (the job's folder, the result), as they come."""
    # Ray's workers find this package as this process does.
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    remote = ray.remote(task).options(
        num_cpus=1, num_gpus=gpus, max_retries=3, runtime_env={"env_vars": {"PYTHONPATH": path}}
    )
    running: dict[Any, Path] = {}
    for job in chain(jobs, [None]):
        if job is not None:
            running[remote.remote(*job)] = job[0]
        while running and (job is None or len(running) >= workers):
            for reference in ray.wait(list(running))[0]:
                yield running.pop(reference), ray.get(reference)


def _join_vectors(out: Path, shards: dict[Path, int], workers: int, report: Report) -> None:
    """Train on a sample of all vectors, add each shard's side by side, merge."""
    from . import dense

    folders, trained = list(shards), out / dense.TRAINED
    report("training on a sample of the vectors")
    dense.train(folders, trained)
    firsts = accumulate(shards.values(), initial=0)
    for folder, _ in _side_by_side(
        dense.add_shard, ((folder, trained, first) for folder, first in zip(folders, firsts, strict=False)), workers
    ):
        report(f"{folder.name}: {shards[folder]:,} vectors added")
    dense.merge(folders, out / dense.INDEX)
