"""No call sees two versions, whatever the interleaving and whoever is cancelled."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.serving.gate import Gate


class Guarded:
    """A version behind a gate, and what was seen at the wrong time."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.version = 0
        self.calls = 0
        self.updates = 0
        self.done = 0
        self.errors: list[str] = []

    async def call(self, ticks: int) -> None:
        async with self.gate.call():
            version, self.calls = self.version, self.calls + 1
            try:
                for _ in range(ticks):
                    await asyncio.sleep(0)
                    if self.updates or self.version != version:
                        self.errors.append("a call saw an update")
            finally:
                self.calls -= 1
        self.done += 1

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
        st.sampled_from(["call", "call", "call", "update"]),
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


async def interleave(actions: list[tuple[str, int, int, int | None]]) -> Guarded:
    guarded = Guarded()
    tasks: list[asyncio.Task[None]] = []
    for kind, ticks, pause, cancelled_after in actions:
        work = guarded.call(ticks) if kind == "call" else guarded.update(ticks)
        tasks.append(asyncio.create_task(work))
        if cancelled_after is not None:
            tasks.append(asyncio.create_task(cancel_after(tasks[-1], cancelled_after)))
        for _ in range(pause):
            await asyncio.sleep(0)
    async with asyncio.timeout(2):
        await asyncio.gather(*tasks, return_exceptions=True)
        before = guarded.done  # whoever was cancelled, the gate still opens both ways
        await guarded.update(1)
        await guarded.call(1)
    assert guarded.done == before + 2
    return guarded


@given(ACTIONS)
@settings(max_examples=200, deadline=None)
def test_no_interleaving_lets_a_call_see_an_update(actions: list[tuple[str, int, int, int | None]]) -> None:
    guarded = asyncio.run(interleave(actions))
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

    async with asyncio.timeout(2), asyncio.TaskGroup() as group:
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

    async with asyncio.timeout(2):
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
