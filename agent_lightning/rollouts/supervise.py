"""Keeping a run alive: rollout workers that die are replaced, and whoever waits for rollouts hears of trouble.

Workers   one task for each worker: run it, ask it now and then whether it lives, replace it
watch     says how far the rollouts are; ends with one line where the run had better stop
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from agent_lightning.buffer.buffer import Stats
from agent_lightning.core.errors import UserError

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.5
MOST_DEATHS: Final = 5
"""Of one worker within `DEATHS_WITHIN` seconds: more is no accident."""
DEATHS_WITHIN: Final = 300.0


class Worker(Protocol):
    """The part of a RolloutWorker that is watched."""

    async def run(self) -> None: ...
    async def stop(self) -> None: ...
    async def is_alive(self) -> bool: ...


class WatchedBuffer(Protocol):
    """The part of the Buffer that is used here."""

    async def release(self, worker: str) -> int: ...
    async def alarm(self, trouble: str) -> None: ...
    async def expire(self, now: float) -> int: ...
    async def stats(self) -> Stats: ...


class Workers:
    """A number of rollout workers, whatever becomes of each.

    A worker whose process dies, or that does not answer for `hung_s` seconds because an agent blocks its event loop,
    is replaced; the rollouts that it had are over at once. One that cannot be kept alive is reported to the buffer.

    Example:

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
        hung_s: float = 60.0,
        pause_s: float = 1.0,
        name: str = "worker",
    ) -> None:
        """`make` starts a worker of the name that it is given. `pause_s`: before a replacement."""
        self._make, self._number, self._buffer, self._kill = make, number, buffer, kill
        self._hung_s, self._pause_s, self._name = hung_s, pause_s, name
        self._stopping = asyncio.Event()
        self.replaced = 0

    async def run(self) -> None:
        """Until `stop`. Raises where the buffer is gone."""
        async with asyncio.TaskGroup() as group:
            for number in range(self._number):
                group.create_task(self._keep(number))

    async def stop(self) -> None:
        """Have the workers give back what they run, and end."""
        self._stopping.set()

    async def _keep(self, number: int) -> None:
        deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        generation = 0
        while not self._stopping.is_set():
            name = f"{self._name}-{number}.{generation}"
            worker = self._make(name)
            died = await self._until_over(worker)
            if died is None:
                with contextlib.suppress(Exception):  # where its node is gone, it has not given back what it ran
                    await asyncio.wait_for(self._buffer.release(name), 5.0)
                return
            lost = await self._buffer.release(name)
            said = _reason(died)
            logger.warning("rollout worker %s is replaced, with %d rollouts to run again: %s", name, lost, said)
            deaths.append(time.monotonic())
            often = len(deaths) == MOST_DEATHS and deaths[-1] - deaths[0] < DEATHS_WITHIN
            if isinstance(died, UserError) or often:
                times = f"{MOST_DEATHS} times in a row: " if often else ""
                await self._buffer.alarm(f"a rollout worker died {times}{said}")
                return
            self.replaced += 1
            generation += 1
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_s):
                    await self._stopping.wait()

    async def _until_over(self, worker: Worker) -> BaseException | None:
        """What a worker died of; None where it was told to stop."""
        tasks = {
            "running": asyncio.ensure_future(worker.run()),
            "watching": asyncio.ensure_future(self._until_hung(worker)),
            "stopping": asyncio.ensure_future(self._stopping.wait()),
        }
        running = tasks["running"]
        try:
            await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
            if not running.done() and self._stopping.is_set():
                with contextlib.suppress(Exception):  # it is dead, or dies: there is nothing to give back
                    await asyncio.wait_for(worker.stop(), 5.0)
                await asyncio.wait((running,), timeout=10.0)
                return None
            if running.done():
                return None if running.cancelled() else running.exception()
            self._kill(worker)
            return tasks["watching"].exception() or TimeoutError(
                f"it did not answer for {self._hung_s:g} s: an agent blocks its event loop (use agent.mode=process), "
                "or its node is out of reach"
            )
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.wait(tasks.values(), timeout=1.0)

    async def _until_hung(self, worker: Worker) -> None:
        """Ends where the worker does not answer. Raises where it is dead."""
        while True:
            try:
                async with asyncio.timeout(self._hung_s):
                    await worker.is_alive()
            except TimeoutError:
                return
            await asyncio.sleep(self._hung_s / 10)


def _reason(error: BaseException) -> str:
    """In one line; of a traceback that came over the wire, the error at its end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    cause = [f": {lines[-1]}"] if re.match(r"[\w.]*(Error|Exception)\b", lines[-1]) and len(lines) > 1 else []
    return f"{type(error).__name__}: {lines[0]}{''.join(cause)}"[:500]


async def watch(
    buffer: WatchedBuffer, tell: Callable[[Stats], None], alive: Callable[[], Awaitable[object]] | None = None
) -> str:
    """Look after the rollouts until cancelled: say how far they are, and give up those whose worker is not heard of.

    Ends with one line where they had better stop: the circuit breaker has tripped, or no worker can be kept alive.
    Raises what `alive` raises: something is gone without which no rollout will end.
    """
    while True:
        if alive is not None:
            await alive()
        await buffer.expire(time.time())
        stats = await buffer.stats()
        if stats.trouble:
            return stats.trouble
        tell(stats)
        await asyncio.sleep(POLL_SECONDS)
