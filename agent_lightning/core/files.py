"""Files that appear complete or not at all, and folders that one process has at a time."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


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


def lock_folder(folder: Path, name: str = "lock", *, wait_s: float = 0.0) -> IO[bytes]:
    """Create a folder and lock it by a file in it: no other process has it until the returned file is closed, or this
    process ends. Raises BlockingIOError if another process has it for `wait_s` seconds, or another OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, until = (folder / name).open("wb"), time.monotonic() + wait_s
    while True:  # ends when the folder is free, or after `wait_s`
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() > until:
                lock.close()
                raise
            time.sleep(0.05)
