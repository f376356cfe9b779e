"""Bytes in shared memory: each array's while it is asked for, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_lightning.serving.shared import in_shared_memory

SIZES = (5, 3, 0, 9, 2)


def arrays(*sizes: int, error: Exception | None = None) -> list[Awaitable[Any]]:
    async def array(value: int, size: int) -> np.ndarray:
        return np.full(size, value, np.uint8)

    async def fails() -> np.ndarray:
        raise error or RuntimeError

    return [array(i, size) for i, size in enumerate(sizes)] + ([fails()] if error else [])


@pytest.mark.parametrize("count", range(len(SIZES) + 1))
async def test_each_file_begins_with_its_array_until_the_next_is_asked_for(count: int) -> None:
    paths = []
    async with aclosing(in_shared_memory(arrays(*SIZES[:count]))) as files:
        async for path in files:
            await asyncio.sleep(0.01)  # the next is written meanwhile
            value, size = len(paths), SIZES[len(paths)]
            assert Path(path).read_bytes()[:size] == bytes([value]) * size
            paths.append(path)
    assert len(paths) == count
    assert not any(Path(path).exists() for path in paths)


async def test_an_array_that_cannot_be_had_is_said_at_its_turn_and_leaves_no_file() -> None:
    files = in_shared_memory(arrays(4, 4, error=OSError("lost")))
    paths = [await anext(files), await anext(files)]
    with pytest.raises(OSError, match="lost"):
        await anext(files)
    assert not any(Path(path).exists() for path in paths)


async def test_files_go_when_the_reader_stops_early() -> None:
    async with aclosing(in_shared_memory(arrays(4, 1 << 20))) as files:
        path = await anext(files)
    assert not Path(path).exists()
