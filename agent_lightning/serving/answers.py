"""An answer that is being made: its work, and the connections that wait for it or read it.

    request -> Answer --head--> a response in one piece, or a stream whose events are sent as they come
    retry   ---^                (the same work: no second call)

If no connection is left, the work is cancelled: at once if the client cannot come back for it (its library counts no
retries, or the stream has started), else after a grace period in which a retry finds the work still running. Work that
nobody waits for is not completed: a call that no agent saw is no span.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse


class Answer:
    """The answer to a request and to its retries. `work` gets the answer and must complete it: by `respond`, or by
    `start_stream` and any number of `send`. The answer ends with the work."""

    def __init__(self, work: Callable[[Answer], Coroutine[Any, Any, None]], *, grace: float) -> None:
        """`grace`: seconds for which the work goes on without a connection, before its first byte is sent."""
        self.failed = False
        """Whether a retry should start new work."""
        self.seen = False
        """Whether a connection was sent a part of it."""
        self._grace = grace
        self._head: asyncio.Future[Response | None] = asyncio.get_running_loop().create_future()
        self._events: list[str] = []
        self._news = asyncio.Event()
        self._readers = 0
        self._attended = asyncio.Event()
        """Set while there are readers."""
        self._connections = 0
        self._delivered = 0
        self._timer: asyncio.TimerHandle | None = None
        self._ended_at = math.inf
        # In a new context: Serve cancels the calls of a request's context when its client goes away.
        self._task = asyncio.create_task(work(self), context=contextvars.Context())
        self._task.add_done_callback(self._on_end)

    @property
    def started(self) -> bool:
        """Whether something was sent that cannot be taken back."""
        return self._head.done()

    @property
    def rank(self) -> tuple[int, int, int]:
        """The order in which retries take the answers to equal requests: first those that nobody reads or was given."""
        return self._readers, self._delivered, self._connections

    async def attended(self) -> None:
        """Return as soon as a connection waits for the answer or reads it; if none comes in time, give the work up."""
        try:
            async with asyncio.timeout(max(self._grace, 1.0)):  # a stream's reader begins a moment after its head
                await self._attended.wait()
        except TimeoutError:
            raise asyncio.CancelledError from None

    def age(self) -> float:
        """Seconds since the work ended; negative while it runs."""
        return asyncio.get_running_loop().time() - self._ended_at

    def respond(self, response: Response) -> None:
        """Answer in one piece."""
        self.failed = response.status_code >= 500
        self._head.set_result(response)

    def start_stream(self, text: str) -> None:
        """Answer with a stream of server-sent events that starts with `text`."""
        self._head.set_result(None)
        self.send(text)

    def send(self, text: str) -> None:
        """Add events to the stream."""
        if text:
            self._events.append(text)
            self._wake_readers()

    async def response(self, request: Request) -> Response:
        """The response for a connection, as soon as there is one; status 499 if its client goes away before."""

        async def wait_for_disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        gone = asyncio.create_task(wait_for_disconnect())
        self._connections += 1
        self._count_reader(1)
        if self._timer is not None:
            self._timer.cancel()
        either: list[asyncio.Future[Any]] = [gone, self._head]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)  # ends with the work, at the latest
        finally:
            gone.cancel()
            self._count_reader(-1)
            if not self._head.done():
                self._timer = asyncio.get_running_loop().call_later(self._grace, self._cancel_if_unread)
        if not self._head.done() or self._head.cancelled():
            return Response(status_code=499)
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        head = self._head.result()
        self._delivered += head is not None
        return head or StreamingResponse(self._read(), media_type="text/event-stream", headers=unbuffered)

    async def _read(self) -> AsyncIterator[str]:
        """All events from the first on, as they come."""
        position = 0
        self._count_reader(1)
        try:
            while True:
                news = self._news
                while position < len(self._events):
                    position, self.seen = position + 1, True
                    yield self._events[position - 1]
                if self._task.done():
                    self._delivered += 1
                    return
                await news.wait()  # ends with the next event, or with the work
        finally:
            self._count_reader(-1)
            self._cancel_if_unread()

    def _count_reader(self, change: int) -> None:
        self._readers += change
        if self._readers:
            self._attended.set()
        else:
            self._attended.clear()

    def _cancel_if_unread(self) -> None:
        if self._readers == 0:
            self._task.cancel()

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._ended_at = asyncio.get_running_loop().time()
        self.failed = self.failed or task.cancelled() or task.exception() is not None
        self._head.cancel()
        self._wake_readers()

    def _wake_readers(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Answers:
    """The answers that retries may come back for."""

    def __init__(self, *, max_answers: int, memory_s: float) -> None:
        """At most `max_answers` are kept, and each for `memory_s` seconds after its work has ended."""
        self._max_answers, self._memory_s = max_answers, memory_s
        self._by_request: dict[Hashable, list[Answer]] = {}
        self._in_order: deque[tuple[Hashable, Answer]] = deque()  # of their start

    def add(self, request: Hashable, answer: Answer) -> None:
        """Keep the answer to a request; equal requests may have several."""
        self._by_request.setdefault(request, []).append(answer)
        self._in_order.append((request, answer))
        # Connections that still read an answer hold it themselves.
        while len(self._in_order) > self._max_answers or self._in_order[0][1].age() > self._memory_s:
            oldest, forgotten = self._in_order.popleft()
            self._by_request[oldest].remove(forgotten)
            if not self._by_request[oldest]:
                del self._by_request[oldest]

    def find(self, request: Hashable) -> Answer | None:
        """The answer for a retry of a request, None if it needs new work. Each of several retries gets another one."""
        kept = [answer for answer in self._by_request.get(request, ()) if not answer.failed]
        return min(kept, key=lambda answer: answer.rank, default=None)
