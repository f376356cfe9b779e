"""Work with a time limit: blocking functions run in threads, coroutines are cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


def start_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Run a blocking function in a daemon thread of its own, with the caller's context variables. A hanging function
    takes no slot of a pool from others, and does not keep the process alive."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result.set_result(context.run(work))
        except StopIteration:  # asyncio's futures refuse it
            result.set_exception(RuntimeError("StopIteration"))
        except BaseException as error:  # the thread's boundary: the error is raised where the result is read
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result


def call_with_timeout(work: Callable[[], T], timeout_s: float, name: str) -> T:
    """Run a blocking function in a thread, and abandon the thread after `timeout_s` seconds. Raises TimeoutError."""
    result = start_thread(work, name)
    if not wait((result,), timeout_s).done:
        raise TimeoutError(f"{name}: not done after {timeout_s:g} s")
    return result.result()


async def await_with_timeout(work: Awaitable[T], timeout_s: float, name: str) -> T:
    """Await `work`, and cancel it after `timeout_s` seconds. Raises TimeoutError with `name` in its message."""
    clock = asyncio.timeout(timeout_s)
    try:
        async with clock:
            return await work
    except TimeoutError:
        if clock.expired():
            raise TimeoutError(f"{name}: not done after {timeout_s:g} s") from None
        raise  # the work itself raised it


async def run_cancellable(work: Awaitable[Any]) -> Any:
    """Await `work`. If this call is cancelled, cancel the work up to five times, each time wait half a second for its
    end, then abandon it. Code that swallows one cancellation seldom swallows five."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        for _ in range(5):
            if task.done():
                break
            task.cancel()
            await asyncio.wait((task,), timeout=0.5)
        else:
            logger.warning("an agent does not stop when it is cancelled, and is left behind")
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else retrieves the error
        raise
