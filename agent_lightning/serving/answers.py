"""An answer in the making: one piece of work, and the connections that wait for it or read it.

    request -> Answer --head--> a response of one piece, or a stream, whose events come one by one
    retry   ---^                (the same work: no second call)

Nobody reads any more -> the work is cancelled: at once where the client cannot come back for it (its client library
counts no retries, or the stream has begun), else after a grace in which its retry finds the work still going.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse


class Answer:
    """`work` gets the answer, and must end it: by `whole`, or by `begin`, any number of `send`, and `close`."""

    def __init__(self, work: Callable[[Answer], Coroutine[Any, Any, None]], *, grace: float) -> None:
        """`grace`: seconds that the work goes on for nobody, before its first byte."""
        self.failed = False
        """Whether a retry should ask again."""
        self._grace = grace
        self._head: asyncio.Future[Response | None] = asyncio.get_running_loop().create_future()
        self._events: list[str] = []
        self._news = asyncio.Event()
        self._readers = 0
        self._timer: asyncio.TimerHandle | None = None
        self._ended_at = math.inf
        # A context of its own: Serve cancels what a request's context has asked for when its client goes away.
        self._task = asyncio.create_task(work(self), context=contextvars.Context())
        self._task.add_done_callback(self._ended)

    @property
    def begun(self) -> bool:
        """Whether something was sent that cannot be taken back."""
        return self._head.done()

    @property
    def done(self) -> bool:
        return self._task.done()

    def age(self) -> float:
        """Seconds since it was done; 0 while it is not."""
        return asyncio.get_running_loop().time() - self._ended_at if self.done else 0.0

    def whole(self, response: Response) -> None:
        """The answer is one piece."""
        self.failed = response.status_code >= 500
        self._head.set_result(response)

    def begin(self, text: str) -> None:
        """The answer is a stream, and this is how it starts."""
        self._head.set_result(None)
        self.send(text)

    def send(self, text: str) -> None:
        if text:
            self._events.append(text)
            self._tell()

    async def response(self, request: Request) -> Response:
        """What a client is answered, as soon as that is known; a client that goes away first gets nothing."""
        gone = asyncio.create_task(_gone(request))
        self._readers += 1
        if self._timer is not None:
            self._timer.cancel()
        either: list[asyncio.Future[Any]] = [gone, self._head]
        try:
            # Ends with the work, at the latest.
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            self._readers -= 1
            if not self._head.done():
                self._timer = asyncio.get_running_loop().call_later(self._grace, self._give_up)
        if not self._head.done() or self._head.cancelled():
            return Response(status_code=499)
        head = self._head.result()
        return head or StreamingResponse(self._read(), media_type="text/event-stream", headers=_UNBUFFERED)

    async def _read(self) -> AsyncIterator[str]:
        """All events from the first, as they come."""
        position = 0
        self._readers += 1
        try:
            while True:
                news = self._news
                while position < len(self._events):
                    position += 1
                    yield self._events[position - 1]
                if self.done:
                    return
                await news.wait()  # ends with the next event, or with the work
        finally:
            self._readers -= 1
            self._give_up()

    def _give_up(self) -> None:
        if self._readers == 0:
            self._task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._ended_at = asyncio.get_running_loop().time()
        self.failed = self.failed or task.cancelled() or task.exception() is not None
        self._head.cancel()
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


_UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def _gone(request: Request) -> None:
    """Until the client of a request, whose body was read, is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
