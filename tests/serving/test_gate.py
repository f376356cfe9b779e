"""No call sees two versions unless the rule is "keep", whatever the interleaving and whoever is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.core.types import OnWeightUpdate
from agent_lightning.serving.gate import Gate


class Guarded:
    """A version behind a gate, and the calls that have seen it at the wrong time."""

    def __init__(self, rule: OnWeightUpdate = "wait") -> None:
        self.gate = Gate(rule)
        self.version = 0
        self.calls = 0
        self.updates = 0
        self.done = 0
        self.errors: list[str] = []

    async def call(self, ticks: int) -> None:
        assert await self.gate.complete(lambda: self._work(ticks)) == ticks
        self.done += 1

    async def stream(self, ticks: int) -> None:
        assert [part async for part in self.gate.stream(lambda: self._parts(ticks))] == list(range(ticks))
        self.done += 1

    async def _work(self, ticks: int) -> int:
        return len([part async for part in self._parts(ticks)])

    async def _parts(self, ticks: int) -> AsyncGenerator[int, None]:
        version, self.calls = self.version, self.calls + 1
        try:
            for tick in range(ticks):
                await asyncio.sleep(0)
                if self.updates or self.version != version:
                    self.errors.append("a call saw an update")
                yield tick
        finally:
            self.calls -= 1

    async def update(self, ticks: int) -> None:
        async with self.gate.update():
            self.updates += 1
            try:
                for _ in range(ticks):
                    if self.calls or self.updates > 1:
                        self.errors.append("an update was not alone")
                    await asyncio.sleep(0)
                self.version += 1
            finally:
                self.updates -= 1
        self.done += 1


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["call", "call", "stream", "update"]),
        st.integers(0, 6),  # ticks that it takes
        st.integers(0, 4),  # ticks until the next one starts
        st.none() | st.integers(0, 12),  # ticks after which it is cancelled
    ),
    max_size=24,
)


async def cancel_after(task: asyncio.Task[None], ticks: int) -> None:
    for _ in range(ticks):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # twice: the second may arrive while the first is being handled


async def interleave(actions: list[tuple[str, int, int, int | None]], rule: OnWeightUpdate) -> Guarded:
    guarded = Guarded(rule)
    tasks: list[asyncio.Task[None]] = []
    for kind, ticks, pause, cancelled_after in actions:
        work = {"call": guarded.call, "stream": guarded.stream, "update": guarded.update}[kind](ticks)
        tasks.append(asyncio.create_task(work))
        if cancelled_after is not None:
            tasks.append(asyncio.create_task(cancel_after(tasks[-1], cancelled_after)))
        for _ in range(pause):
            await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks, return_exceptions=True)
        before = guarded.done  # whoever was cancelled, the gate still opens both ways
        await guarded.update(1)
        await guarded.call(1)
    assert guarded.done == before + 2
    return guarded


@given(ACTIONS, st.sampled_from(["wait", "restart"]))
@settings(max_examples=300, deadline=None)
def test_no_interleaving_lets_a_call_see_an_update(
    actions: list[tuple[str, int, int, int | None]], rule: OnWeightUpdate
) -> None:
    guarded = asyncio.run(interleave(actions, rule))
    assert not guarded.errors
    assert (guarded.calls, guarded.updates) == (0, 0)


async def test_many_calls_are_in_flight_at_once() -> None:
    gate = Gate()
    async with asyncio.timeout(1), AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(gate.call())


async def test_an_update_waits_for_calls_and_holds_new_ones() -> None:
    gate, order = Gate(), []
    release = asyncio.Event()

    async def call(name: str) -> None:
        async with gate.call():
            order.append(f"{name} begins")
            await release.wait()
            order.append(f"{name} ends")

    async def update() -> None:
        async with gate.update():
            order.append("update")

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(call("early"))
        await asyncio.sleep(0.01)
        group.create_task(update())
        await asyncio.sleep(0.01)
        group.create_task(call("late"))
        await asyncio.sleep(0.01)
        release.set()
    assert order == ["early begins", "early ends", "update", "late begins", "late ends"]


async def test_a_cancelled_waiting_update_does_not_lock_the_gate() -> None:
    gate = Gate()

    async def update() -> None:
        async with gate.update():
            pytest.fail("a call is in flight")

    async with asyncio.timeout(20):
        async with gate.call():
            waiting = asyncio.create_task(update())
            await asyncio.sleep(0.01)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
            async with gate.call():
                pass
        async with gate.update():
            pass


async def test_errors_inside_leave_the_gate_open() -> None:
    gate = Gate()
    for enter in (gate.call, gate.update):
        with pytest.raises(ValueError, match="inside"):
            async with enter():
                raise ValueError("inside")
    async with asyncio.timeout(1), gate.update():
        pass


async def test_a_call_that_makes_an_answer_of_its_cancellation_is_made_again_too() -> None:
    gate = Gate("restart")

    async def work() -> str:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            return "the client is gone"
        return "whole"

    async with asyncio.timeout(20):
        calling = asyncio.create_task(gate.complete(work))
        await asyncio.sleep(0.01)
        async with gate.update():
            pass
        assert await calling == "whole"


async def test_a_call_that_is_made_again_ends_with_what_its_own_failure_was() -> None:
    gate, tries = Gate("restart"), 0

    async def work() -> None:
        nonlocal tries
        tries += 1
        await asyncio.sleep(0.05)
        raise TimeoutError("of its own")

    async with asyncio.timeout(20):
        calling = asyncio.create_task(gate.complete(work))
        await asyncio.sleep(0.01)
        async with gate.update():
            assert not calling.done()
        with pytest.raises(TimeoutError, match="of its own"):
            await calling
    assert tries == 2
