"""Supervision: rollout workers are replaced if they die, progress is reported, and gateways are checked for answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, Protocol

import aiohttp

from agent_lightning.buffer.buffer import Stats
from agent_lightning.core.errors import EngineError, UserError
from agent_lightning.core.text import error_line, last_line

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.5
MAX_POLL_SECONDS: Final = 5.0
MOST_DEATHS: Final = 5  # deaths of a worker within `DEATHS_WITHIN` seconds after which it is not replaced any more
DEATHS_WITHIN: Final = 300.0

FindGateway = Callable[[float], Coroutine[Any, Any, str]]
"""Waits until a gateway answers, and returns its root URL. Raises EngineError after the given number of seconds."""


class Worker(Protocol):
    """The part of a RolloutWorker that the supervision uses."""

    async def run(self) -> None: ...
    async def stop(self) -> None: ...
    async def is_alive(self) -> bool: ...


class WatchedBuffer(Protocol):
    """The part of the Buffer that the supervision uses."""

    async def release(self, worker: str) -> int: ...
    async def alarm(self, trouble: str) -> None: ...
    async def expire(self, now: float) -> int: ...
    async def stats(self) -> Stats: ...


class Workers:
    """A constant number of rollout workers, some of which may die.

    A worker is replaced if its process dies, or if it does not answer for `unresponsive_timeout_s` seconds because an
    agent blocks its event loop; its running attempts end at once. If a worker dies again and again, the buffer is told
    so, and the run stops.

        workers = Workers(make, number=2, buffer=buffer, kill=cluster.kill)
        running = asyncio.create_task(workers.run())
        ...
        await workers.stop()
        await running
    """

    def __init__(
        self,
        make: Callable[[str], Worker],
        *,
        number: int,
        buffer: WatchedBuffer,
        kill: Callable[[Worker], None],
        unresponsive_timeout_s: float = 60.0,
        pause_s: float = 1.0,
        name: str = "worker",
    ) -> None:
        """`make` starts a worker with the given name. `pause_s` is the pause before a replacement, in seconds."""
        self._make, self._number, self._buffer, self._kill = make, number, buffer, kill
        self._unresponsive_timeout_s, self._pause_s, self._name = unresponsive_timeout_s, pause_s, name
        self._stopping = asyncio.Event()
        self.replaced = 0

    async def run(self) -> None:
        """Run the workers until `stop` is called. Raises if the buffer is gone."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._number):
                group.create_task(self._keep_alive(number))

    async def stop(self) -> None:
        """Make the workers return their rollouts and end."""
        self._stopping.set()

    async def _keep_alive(self, number: int) -> None:
        deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        generation = 0
        while not self._stopping.is_set():
            name = f"{self._name}-{number}.{generation}"
            worker = self._make(name)
            died = await self._until_over(worker)
            if died is None:
                with contextlib.suppress(Exception):  # if its node is gone, it has not returned its rollouts
                    await asyncio.wait_for(self._buffer.release(name), 5.0)
                return
            lost = await self._buffer.release(name)
            reason, cause = error_line(died), last_line(str(died))
            if re.match(r"[\w.]*(Error|Exception)\b", cause) and not reason.endswith(cause):
                reason = f"{reason}: {cause}"[:500]  # the error at the end of another process's traceback
            logger.warning("rollout worker %s is replaced, with %d rollouts to run again: %s", name, lost, reason)
            deaths.append(time.monotonic())
            often = len(deaths) == MOST_DEATHS and deaths[-1] - deaths[0] < DEATHS_WITHIN
            if isinstance(died, UserError) or often:
                times = f"{MOST_DEATHS} times in a row: " if often else ""
                await self._buffer.alarm(f"a rollout worker died {times}{reason}")
                return
            self.replaced += 1
            generation += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    await self._stopping.wait()

    async def _until_over(self, worker: Worker) -> BaseException | None:
        """The error that a worker died of; None if it was stopped."""
        running, watching = asyncio.ensure_future(worker.run()), asyncio.ensure_future(self._until_unresponsive(worker))
        tasks = running, watching, asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and self._stopping.is_set():
                with contextlib.suppress(Exception):  # it is dead or dying, and has nothing to return
                    await asyncio.wait_for(worker.stop(), 5.0)
                await asyncio.wait((running,), timeout=10.0)
                return None
            if running.done():
                return None if running.cancelled() else running.exception()
            self._kill(worker)
            return watching.exception() or TimeoutError(
                f"it did not answer for {self._unresponsive_timeout_s:g} s: an agent blocks its event loop "
                "(use agent.mode=process), or its node is out of reach"
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)

    async def _until_unresponsive(self, worker: Worker) -> None:
        """Return when the worker does not answer any more. Raises if it is dead."""
        while True:
            try:
                async with asyncio.timeout(self._unresponsive_timeout_s):
                    await worker.is_alive()
            except TimeoutError:
                return
            await asyncio.sleep(self._unresponsive_timeout_s / 10)


async def watch(
    buffer: WatchedBuffer, report: Callable[[Stats], None], alive: Callable[[], Awaitable[object]] | None = None
) -> str:
    """Watch the rollouts until cancelled: report their progress, and end those whose lease has expired. Returns one
    line if the run should stop: the circuit breaker has tripped, or no worker can be kept alive. Raises what `alive`
    raises: a process without which no rollout can end is gone."""
    while True:
        if alive is not None:
            await alive()
        started = time.monotonic()
        await buffer.expire(time.time())
        stats = await buffer.stats()
        if stats.trouble:
            return stats.trouble
        report(stats)
        # The buffer looks at every rollout in flight: with 30,000 of them 70 ms, which other calls wait for.
        spent = time.monotonic() - started
        await asyncio.sleep(min(max(POLL_SECONDS, 50 * spent), MAX_POLL_SECONDS))


async def is_healthy(url: str) -> bool:
    """Whether the gateway with root `url` answers with 200: a proxy whose gateways are all gone answers otherwise."""
    try:
        clock = aiohttp.ClientTimeout(total=3.0)
        async with aiohttp.ClientSession(timeout=clock) as session, session.get(f"{url}/health") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def wait_until_healthy(url: str, timeout: float) -> str:
    """Poll the gateway until it answers, and return its URL. Raises EngineError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not await is_healthy(url):
        if time.monotonic() > deadline:
            raise EngineError(f"the gateway at {url} did not answer within {timeout:.0f} s")
        await asyncio.sleep(0.1)
    return url
