"""Plain classes in processes that may be killed at any moment: like Ray's actors, at a hundredth of their cost.

A process is forked from a process that has imported everything, and serves the public methods of one object on a
socket. A `Peer` calls them. If the process dies, the call fails, or is repeated at its successor, as
`core.actors.Remote` does it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import pickle
import uuid
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

_LENGTH = 8
_RETRY_S = 0.02


class Peer:
    """`await peer.method(x)` runs `method` in the process that listens at `path`."""

    def __init__(self, path: Path, *, cls: type | None = None, patience_s: float = 0.0) -> None:
        """
        Args:
            cls: the class of the object; its methods with a `request` get an id of the call.
            patience_s: the seconds for which calls of a dead process are repeated.
        """
        self._path = str(path)
        self._patience_s = patience_s
        methods = inspect.getmembers(cls, inspect.iscoroutinefunction) if cls is not None else []
        self._identified = {name for name, method in methods if "request" in inspect.signature(method).parameters}
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._connecting = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if name.startswith("_"):
            raise AttributeError(name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if name in self._identified:
                kwargs.setdefault("request", uuid.uuid4().hex)
            end = asyncio.get_running_loop().time() + self._patience_s
            while True:
                try:
                    return await self._once(name, args, kwargs)
                except (ConnectionError, FileNotFoundError) as error:
                    if asyncio.get_running_loop().time() > end:
                        raise ConnectionError(f"{self._path}.{name}: {error}") from None
                    await asyncio.sleep(_RETRY_S)

        return call

    async def _once(self, name: str, args: Any, kwargs: Any) -> Any:
        async with self._connecting:
            if self._writer is None:
                reader, self._writer = await asyncio.open_unix_connection(self._path)
                self._reading = asyncio.create_task(self._read(reader, self._writer))
        number, future = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        _send(self._writer, (number, name, args, kwargs))
        try:
            return await future
        except asyncio.CancelledError:
            if self._writer is not None:
                _send(self._writer, (number, "", (), {}))
            raise
        finally:
            self._waiting.pop(number, None)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                number, result, error = await _receive(reader)
                future = self._waiting.get(number)
                if future is None or future.done():
                    continue
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        writer.close()
        self._writer = None
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the process is gone"))


async def listen(path: Path, part: object) -> asyncio.Server:
    """Serve the public methods of `part` on a socket at `path`."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        running: dict[int, asyncio.Task[None]] = {}

        async def run(number: int, name: str, args: Any, kwargs: Any) -> None:
            try:
                answer = (number, await getattr(part, name)(*args, **kwargs), None)
            except Exception as error:  # raised in the caller
                answer = (number, None, error)
            running.pop(number, None)
            with contextlib.suppress(ConnectionError):
                _send(writer, answer)

        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:  # until the connection is closed
                number, name, args, kwargs = await _receive(reader)
                if name:
                    running[number] = asyncio.create_task(run(number, name, args, kwargs))
                elif number in running:
                    running.pop(number).cancel()
        for task in running.values():  # their caller is gone
            task.cancel()
        writer.close()

    path.unlink(missing_ok=True)
    return await asyncio.start_unix_server(connected, str(path))


async def end_with(parent: int) -> None:
    """End this process soon after its parent has ended."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(3)
        await asyncio.sleep(1.0)


def _send(writer: asyncio.StreamWriter, value: object) -> None:
    data = pickle.dumps(value)
    writer.write(len(data).to_bytes(_LENGTH, "big") + data)


async def _receive(reader: asyncio.StreamReader) -> Any:
    return pickle.loads(await reader.readexactly(int.from_bytes(await reader.readexactly(_LENGTH), "big")))
