"""Work that has to end: within a time, or soon after it is cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from typing import Any, Final, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CANCELS: Final = 5
_CANCEL_WAIT: Final = 0.5
"""How often a coroutine is cancelled, and the seconds that it then has each time."""


async def awaited(work: Awaitable[T], timeout_s: float, what: str) -> T:
    """The result of async work, which is cancelled after `timeout_s` seconds. Raises TimeoutError, naming `what`."""
    clock = asyncio.timeout(timeout_s)
    try:
        async with clock:
            return await work
    except TimeoutError:
        if clock.expired():
            raise _late(what, timeout_s) from None
        raise  # its own


def begun(work: Callable[[], T], what: str) -> Future[T]:
    """Blocking work, in a thread that keeps no process alive."""
    ended: Future[T] = Future()
    ended.set_running_or_notify_cancel()
    carried = contextvars.copy_context()

    def run() -> None:
        try:
            ended.set_result(carried.run(work))
        except BaseException as error:  # the thread's boundary: it is raised where it is waited for
            ended.set_exception(error)

    threading.Thread(target=run, name=what, daemon=True).start()
    return ended


def called(work: Callable[[], T], timeout_s: float, what: str) -> T:
    """The result of blocking work, in a thread, which is left behind after `timeout_s` seconds. Raises TimeoutError."""
    ended = begun(work, what)
    if not wait((ended,), timeout_s).done:
        raise _late(what, timeout_s)
    return ended.result()


async def stoppable(work: Awaitable[Any]) -> Any:
    """The result of async work. Where this is cancelled, so is the work, again and again: code that swallows one
    cancellation seldom swallows five. What goes on even then is left behind."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        for _ in range(_CANCELS):
            if task.done():
                break
            task.cancel()
            await asyncio.wait((task,), timeout=_CANCEL_WAIT)
        else:
            logger.warning("an agent does not stop when it is cancelled, and is left behind")
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else looks at it
        raise


def _late(what: str, timeout_s: float) -> TimeoutError:
    return TimeoutError(f"{what}: not done after {timeout_s:g} s")
