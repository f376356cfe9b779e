"""Files that appear complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which takes its place at the end of the block, atomically.

    If the block raises, `path` stays as it was and the temporary file is removed. Temporary names begin with a dot and
    end with `.tmp`, so that no reader of the folder takes one for a finished file.

        with replacing(folder / "summary.json") as unfinished:
            unfinished.write_text(text)
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; a reader sees the old file or the new one, never a part."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
