"""Injected faults: calls between two parts of a run fail, hang or are lost, at given rates, decided by a seed.

    faults = Faults(seed=1)
    engine = faults.between(ToyEngine(language), "engine", Rates(error=0.1, hang=0.05))  # used like the engine
    gateway = Gateway(engine=engine, ...)
    ...
    faults.counts  # Counter({"engine.generate: error": 12, "engine.generate: hang": 4})

A Link stands for the network between two processes. Nothing is patched: a part gets another part with a link around it.
To kill a part, cut its links: what it has sent is still carried out, but it gets no answer.
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
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar, cast

T = TypeVar("T")

_SECONDS: Final = ("slow_s", "jump_s")


class InjectedError(ConnectionError):
    """A call that failed on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The share of calls, from 0 to 1, that has each fault; a call has at most one."""

    error: float = 0.0
    """The call fails before it reaches the part."""
    drop: float = 0.0
    """The part carries out the call, and its answer is lost."""
    hang: float = 0.0
    """The call gets no answer, and ends when the caller gives up."""
    slow: float = 0.0
    """The call is late by up to `slow_s`."""
    duplicate: float = 0.0
    """The part gets the call twice at the same time; the caller gets the first answer."""
    reorder: float = 0.0
    """The call waits until another call has overtaken it, `slow_s` at most."""
    disk_full: float = 0.0
    """The call fails as a write to a full disk does."""
    clock_jump: float = 0.0
    """The argument `now` is `jump_s` too late."""
    kill: float = 0.0
    """The link is cut: this call, all calls in flight and all later ones fail, until `mend`."""
    slow_s: float = 0.05
    """Seconds."""
    jump_s: float = 3600.0
    """Seconds."""

    def fault(self, number: float) -> str:
        """The name of the fault for a random number from 0 to 1; "" for no fault."""
        for name, rate in asdict(self).items():
            number -= 0.0 if name in _SECONDS else rate
            if number < 0:
                return name
        return ""


class Faults:
    """The links of a run, and their faults so far. The same seed and the same calls give the same faults."""

    def __init__(self, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        """How often each fault has happened: "link.method: fault", and "name: kill -9" for killed processes."""
        self.links: dict[str, Link] = {}
        self.seed = seed
        self._random = random.Random(f"{seed}/kills")

    def between(self, part: T, name: str, rates: Rates, *, methods: Collection[str] | None = None) -> T:
        """`part` behind a link of this name; faults happen to calls of `methods`, or of all methods if None."""
        link = self.links[name] = Link(part, name, rates, self, methods)
        return cast(T, link)

    def linking(self, rates: Mapping[str, Rates]) -> Callable[[Any, str, str], Any]:
        """What `ToyWorld(link=...)` takes: it puts each part behind a link with the rates of the link's name, or of the
        method that alone has faults: "engine" and "recorder" from the gateway, "finish" from the workers to the buffer.
        """

        def link(part: Any, name: str, method: str) -> Any:
            methods = {method} if method else None
            return self.between(part, name, rates.get(method or name, Rates()), methods=methods)

        return link

    def victim(self, names: Sequence[str]) -> str:
        """Choose the next of these names to kill."""
        return self._random.choice(names)

    def pause(self, mean: float) -> float:
        """Draw the seconds until the next kill. Kills are a Poisson process: every moment is equally likely."""
        return self._random.expovariate(1.0 / mean)

    def kill_process(self, name: str, process_id: int) -> bool:
        """Send SIGKILL to a process; False if it is dead already."""
        try:
            os.kill(process_id, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.counts[f"{name}: kill -9"] += 1
        return True


class Link:
    """A part whose coroutines, plain methods and streams are called through faults."""

    def __init__(self, part: object, name: str, rates: Rates, faults: Faults, methods: Collection[str] | None) -> None:
        self.rates = rates
        """May be changed at any time."""
        self._part = part
        self._name = name
        self._draw = random.Random(f"{faults.seed}/{name}")
        self._counts = faults.counts
        self._methods = methods
        self._cut = asyncio.Event()
        self._passed = asyncio.Event()

    def cut(self) -> None:
        """Make all calls fail with InjectedError from now on, those in flight too."""
        self._cut.set()

    def mend(self, part: object | None = None) -> None:
        """Carry calls again, to `part` if it replaces the old one."""
        self._part = self._part if part is None else part
        self._cut = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        member = self._member(name)
        if name.startswith("_") or not inspect.ismethod(member):
            return member
        if inspect.isasyncgenfunction(member):
            return lambda *args, **kwargs: self._stream(name, args, kwargs)
        if inspect.iscoroutinefunction(member) or isinstance(self._part, Link):
            return lambda *args, **kwargs: self._call(name, args, kwargs)
        return lambda *args, **kwargs: self._plain(name, member, args, kwargs)

    def _member(self, name: str) -> Any:
        """A member of the part that the link carries calls to now, which `mend` may have replaced."""
        return getattr(self._part, name)

    def _fault(self, method: str) -> str:
        """Draw the fault of this call, and count it. Raises InjectedError or OSError if the call is to fail."""
        number = self._draw.random()
        fault = self.rates.fault(number) if self._methods is None or method in self._methods else ""
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
            bound = inspect.signature(self._member(method)).bind(*args, **kwargs)
            if "now" in bound.arguments:
                bound.arguments["now"] += self.rates.jump_s
            args, kwargs = bound.args, bound.kwargs
        times = 2 if fault == "duplicate" else 1
        calls = [asyncio.ensure_future(self._member(method)(*args, **kwargs)) for _ in range(times)]
        cut = asyncio.ensure_future(self._cut.wait())
        try:
            await asyncio.wait([cut, calls[0]], return_when=asyncio.FIRST_COMPLETED)
            if calls[0].done() and fault != "drop":
                return calls[0].result()
            await asyncio.wait(calls[:1] if fault == "drop" else [cut])
            raise InjectedError(f"the answer of {self._name}.{method} was lost")
        except asyncio.CancelledError:
            for call in calls:
                call.cancel()
            raise
        finally:
            cut.cancel()
            for call in calls:  # retrieve errors that nobody waits for, so that asyncio does not log them
                call.add_done_callback(lambda future: future.cancelled() or future.exception())
            self._passed.set()
            self._passed = asyncio.Event()

    async def _stream(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncIterator[Any]:
        fault = self._fault(method)
        await self._wait(fault)
        async with contextlib.aclosing(self._member(method)(*args, **kwargs)) as parts:
            async for part in parts:
                if self._cut.is_set() or fault == "drop":
                    raise InjectedError(f"the stream of {self._name}.{method} broke")
                yield part

    def _plain(self, method: str, member: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a plain method, which cannot wait: faults of time do not happen to it."""
        fault = self._fault(method)
        if fault == "duplicate":
            member(*args, **kwargs)
        return member(*args, **kwargs)

    async def _wait(self, fault: str) -> None:
        if fault == "hang":
            await self._cut.wait()  # unless the caller gives up first
            raise InjectedError(f"{self._name} was killed while it hung")
        if fault == "slow":
            await asyncio.sleep(self._draw.random() * self.rates.slow_s)
        if fault == "reorder":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.rates.slow_s):
                    await self._passed.wait()
