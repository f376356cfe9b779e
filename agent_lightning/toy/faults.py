"""Faults on purpose, decided by a seed: what goes wrong between two parts of a run, how often and in which order.

    faults = Faults(seed=1)
    engine = faults.between(ToyEngine(language), "engine", Rates(error=0.1, hang=0.05))  # used like the engine
    gateway = Gateway(engine=engine, ...)
    ...
    faults.counts  # Counter({"engine.generate: error": 12, "engine.generate: hang": 4})

A Link stands where a network and the border of a process would be. Nothing is patched: a part is handed to another
one with a link around it. Killing a plain object is cutting its links: what it has sent goes on, it hears no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar, cast

T = TypeVar("T")

_SECONDS: Final = ("slow_s", "jump_s")


class InjectedError(ConnectionError):
    """A call that failed on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The share of calls that each fault befalls, from 0 to 1; at most one a call."""

    error: float = 0.0
    """Fails before the part hears of it."""
    drop: float = 0.0
    """The part does it, and the answer is lost."""
    hang: float = 0.0
    """Never answered: ends when the caller gives up."""
    slow: float = 0.0
    """Late by up to `slow_s`."""
    duplicate: float = 0.0
    """The part is asked twice, at the same time; the caller has the first answer."""
    reorder: float = 0.0
    """Held back until another call has overtaken it, for `slow_s` at most."""
    disk_full: float = 0.0
    """Fails as a write to a full disk does."""
    clock_jump: float = 0.0
    """An argument named `now` is `jump_s` too late."""
    kill: float = 0.0
    """The link is cut: this call and all others fail, those in flight too, until `mend`."""
    slow_s: float = 0.05
    jump_s: float = 3600.0

    def drawn(self, number: float) -> str:
        """The fault that a number from 0 to 1 stands for, "" for none."""
        for item in fields(self):
            if item.name in _SECONDS:
                continue
            number -= cast(float, getattr(self, item.name))
            if number < 0:
                return item.name
        return ""


class Faults:
    """All the links of a run, and what has gone wrong on them. The same seed and calls have the same faults."""

    def __init__(self, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        """ "link.method: fault" -> how often; of killed processes "name: kill -9"."""
        self.links: dict[str, Link] = {}
        self._seed = seed
        self._random = random.Random(f"{seed}/kills")

    def between(self, part: T, name: str, rates: Rates, *, methods: Collection[str] | None = None) -> T:
        """`part`, with faults on the way to it. `methods`: those that faults befall; None: all."""
        link = Link(part, name, rates, random.Random(f"{self._seed}/{name}"), self.counts, methods)
        self.links[name] = link
        return cast(T, link)

    def victim(self, names: Sequence[str]) -> str:
        """Which of these is to die next."""
        return self._random.choice(names)

    def pause(self, mean: float) -> float:
        """Seconds until the next kill: of a Poisson process, so that every moment is as likely."""
        return self._random.expovariate(1.0 / mean)

    def kill_process(self, name: str, process_id: int) -> bool:
        """kill -9. False where it is dead already."""
        try:
            os.kill(process_id, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.counts[f"{name}: kill -9"] += 1
        return True


class Link:
    """A part with faults on the way to it: coroutines, plain methods and streams are called through it."""

    def __init__(
        self,
        part: object,
        name: str,
        rates: Rates,
        draw: random.Random,
        counts: Counter[str],
        methods: Collection[str] | None,
    ) -> None:
        self.rates = rates
        """May be changed at any time."""
        self._part = part
        self._name = name
        self._draw = draw
        self._counts = counts
        self._methods = methods
        self._cut = asyncio.Event()
        self._passed = asyncio.Event()

    def cut(self) -> None:
        """Whoever asks, or waits for an answer, gets an InjectedError from now on."""
        self._cut.set()

    def mend(self, part: object | None = None) -> None:
        """Answer again; from `part`, where the old one is dead."""
        self._part = self._part if part is None else part
        self._cut = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._part, name)
        if name.startswith("_") or not inspect.ismethod(found):
            return found
        if inspect.isasyncgenfunction(found):
            return lambda *args, **kwargs: self._stream(name, args, kwargs)
        if inspect.iscoroutinefunction(found) or isinstance(self._part, Link):
            return lambda *args, **kwargs: self._call(name, args, kwargs)
        return lambda *args, **kwargs: self._plain(name, found, args, kwargs)

    def _fault(self, method: str) -> str:
        """What befalls this call. Raises where that is an error."""
        drawn = self._draw.random()
        fault = self.rates.drawn(drawn) if self._methods is None or method in self._methods else ""
        if fault:
            self._counts[f"{self._name}.{method}: {fault}"] += 1
        if fault == "kill":
            self.cut()
        if fault == "disk_full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault == "error" or self._cut.is_set():
            raise InjectedError(f"{self._name}.{method} failed on purpose")
        return fault

    async def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fault = self._fault(method)
        await self._wait(fault)
        if fault == "clock_jump":
            args, kwargs = _later(getattr(self._part, method), args, kwargs, self.rates.jump_s)
        times = 2 if fault == "duplicate" else 1
        asked = [asyncio.ensure_future(getattr(self._part, method)(*args, **kwargs)) for _ in range(times)]
        cut = asyncio.ensure_future(self._cut.wait())
        try:
            await asyncio.wait([cut, asked[0]], return_when=asyncio.FIRST_COMPLETED)
            if asked[0].done() and fault != "drop":
                return asked[0].result()
            await asyncio.wait(asked[:1] if fault == "drop" else [cut])
            raise InjectedError(f"the answer of {self._name}.{method} was lost")
        except asyncio.CancelledError:
            for one in asked:
                one.cancel()
            raise
        finally:
            cut.cancel()
            for one in asked:  # nobody else looks at what became of it
                one.add_done_callback(lambda future: future.cancelled() or future.exception())
            self._passed.set()
            self._passed = asyncio.Event()

    async def _stream(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncIterator[Any]:
        fault = self._fault(method)
        await self._wait(fault)
        async with contextlib.aclosing(getattr(self._part, method)(*args, **kwargs)) as parts:
            async for part in parts:
                if self._cut.is_set() or fault == "drop":
                    raise InjectedError(f"the stream of {self._name}.{method} broke")
                yield part

    def _plain(self, method: str, found: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A plain method cannot wait: faults that would have it wait do not befall it."""
        fault = self._fault(method)
        if fault == "duplicate":
            found(*args, **kwargs)
        return found(*args, **kwargs)

    async def _wait(self, fault: str) -> None:
        if fault == "hang":
            await self._cut.wait()  # or until the caller gives up
            raise InjectedError(f"{self._name} was killed while it hung")
        if fault == "slow":
            await asyncio.sleep(self._draw.random() * self.rates.slow_s)
        if fault == "reorder":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.rates.slow_s):
                    await self._passed.wait()


def _later(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, at a later time."""
    bound = inspect.signature(method).bind(*args, **kwargs)
    if "now" in bound.arguments:
        bound.arguments["now"] += seconds
    return bound.args, bound.kwargs
