"""Passages on disk: what both kinds of index are built from and answer with.

A corpus is any number of .jsonl, .jsonl.gz or .parquet files of rows with `doc_id`, `title` and `text`. It is cut into
shards, each a folder with its passages as JSON lines and their offsets, so that a passage is one seek away and no text
needs to be in memory.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

TEXT, OFFSETS, COUNTS = "passages.jsonl", "offsets.npy", "counts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    doc_id: str
    title: str
    text: str

    @property
    def full_text(self) -> str:
        """What is indexed."""
        return f"{self.title}\n{self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The passages of a shard, and the lines of the corpus that were no passages."""

    passages: int
    broken: int
    first_broken: str = ""
    """The place of the first such line, as file:line."""


def parse(line: bytes | str) -> Passage | None:
    """A passage from its JSON line; None where it is broken: not UTF-8, not JSON, without doc_id or text."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    doc_id, title, text = row.get("doc_id"), row.get("title"), row.get("text")
    if isinstance(doc_id, bool) or not isinstance(doc_id, str | int) or not isinstance(text, str) or not text.strip():
        return None
    return Passage(doc_id=str(doc_id), title=title if isinstance(title, str) else "", text=text)


def read_lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Every row of the files, in order, as ("file:line", JSON); one is in memory at a time."""
    for file in files:
        if file.suffix == ".parquet":
            lines: Iterator[bytes] = _parquet_lines(file)
            yield from ((f"{file.name}:{number}", line) for number, line in enumerate(lines, start=1))
        else:
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
                yield from ((f"{file.name}:{number}", line) for number, line in enumerate(stream, start=1))


def _parquet_lines(file: Path) -> Iterator[bytes]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
        for row in batch.to_pylist():
            yield json.dumps(row, default=str).encode()


def write_shard(folder: Path, lines: Iterator[tuple[str, bytes]]) -> Counts:
    """Write the passages among the lines. The counts are written last: a shard without them is not whole."""
    folder.mkdir(parents=True, exist_ok=True)
    offsets, broken, first = [0], 0, ""
    with (folder / TEXT).open("wb") as out:
        for where, line in lines:
            passage = parse(line)
            if passage is None:
                if line.strip():
                    broken, first = broken + 1, first or where
                continue
            out.write(json.dumps(asdict(passage)).encode() + b"\n")
            offsets.append(out.tell())
    np.save(folder / OFFSETS, np.asarray(offsets, np.int64))
    counts = Counts(passages=len(offsets) - 1, broken=broken, first_broken=first)
    write_json(folder / COUNTS, asdict(counts))
    return counts


def read_counts(folder: Path) -> Counts | None:
    """None where the shard is not whole."""
    file = folder / COUNTS
    return Counts(**json.loads(file.read_text())) if file.exists() else None


def write_json(file: Path, value: Any) -> None:
    """All of it or nothing, whenever the process ends."""
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(scratch, file)


class Shard:
    """The passages of a shard by their number; safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        self._offsets = np.load(folder / OFFSETS, mmap_mode="r")
        self._file = os.open(folder / TEXT, os.O_RDONLY)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Passage:
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        return Passage(**json.loads(os.pread(self._file, end - start, start)))

    def __iter__(self) -> Iterator[Passage]:
        return (self[number] for number in range(len(self)))
