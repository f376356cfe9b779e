"""Bytes that another process of this machine can map."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

_SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def shared_bytes(data: Any) -> Iterator[str]:
    """A file in memory holding `data` (a uint8 array) while the block runs; yields its path."""
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with NamedTemporaryFile(prefix="agl-weights-", dir=folder) as file:
        file.write(memoryview(data))
        file.flush()
        yield file.name
