"""Bytes that another process of this machine can map."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

_SHARED_MEMORY = Path("/dev/shm")


async def in_shared_memory(arrays: Iterable[Awaitable[Any]]) -> AsyncGenerator[str, None]:
    """Yields, for each uint8 array, the path of a file in memory that begins with its bytes.

    The file is that array's until the next is asked for; meanwhile the next is written, to another file. Two files
    serve all: to have fresh memory from the kernel costs more than to copy.
    """
    folder = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with (
        NamedTemporaryFile(prefix="agl-weights-", dir=folder) as file,
        NamedTemporaryFile(prefix="agl-weights-", dir=folder) as other,
    ):
        tasks: list[asyncio.Task[str]] = []
        try:
            for array in arrays:
                tasks.append(asyncio.create_task(_write(array, file)))
                if len(tasks) > 1:
                    yield await tasks[-2]
                file, other = other, file
            if tasks:
                yield await tasks[-1]
        finally:
            await asyncio.gather(*tasks, return_exceptions=True)


async def _write(array: Awaitable[Any], file: Any) -> str:
    data = memoryview(await array)

    def write() -> str:
        file.seek(0)
        file.write(data)
        file.flush()
        return str(file.name)

    return await asyncio.to_thread(write)
