"""The board: published means that every replica has it."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from agent_lightning.core.errors import EngineError
from agent_lightning.learners.base import WeightBucket, Weights
from agent_lightning.serving.engine import Completion
from agent_lightning.serving.policy import Follower, PolicyBoard
from agent_lightning.testing.model import ToyEngine, ToyLanguage


def weights(version: int) -> Weights:
    """Weights of a toy policy, which prefers its last word the more the higher the version is."""
    table = np.zeros((1024, 2), np.float32)
    table[:, 1] = version
    entry = {"name": "table", "dtype": "float32", "shape": [1024, 2], "offset": 0}
    bucket = WeightBucket(parameters=(entry,), data=np.frombuffer(table.tobytes(), np.uint8))
    return Weights(version=version, buckets=(bucket,))


def version_of(current: Weights | None) -> int | None:
    return current and current.version


async def test_without_replicas_nobody_is_waited_for() -> None:
    board = PolicyBoard()
    assert await board.publish(weights(1), timeout=1.0) == 0


async def test_publish_waits_for_every_replica() -> None:
    board = PolicyBoard()
    for replica in ("a", "b"):
        assert await board.join(replica) is None
    publishing = asyncio.create_task(board.publish(weights(1), timeout=5.0))
    assert version_of(await board.wait_for_newer(0, timeout=1.0)) == 1
    await board.note_installed("a", 1)
    await asyncio.sleep(0.02)
    assert not publishing.done()
    assert await board.versions() == {"a": 1, "b": 0}
    await board.note_installed("b", 1)
    assert await publishing == 2


async def test_a_late_joiner_gets_the_current_weights() -> None:
    board = PolicyBoard()
    await board.publish(weights(1), timeout=1.0)
    assert version_of(await board.join("late")) == 1
    publishing = asyncio.create_task(board.publish(weights(2), timeout=5.0))
    await asyncio.sleep(0.01)
    assert version_of(await board.join("later")) == 2
    await board.note_installed("late", 2)
    await asyncio.sleep(0.01)
    assert not publishing.done()  # the one that joined meanwhile is waited for too
    await board.note_installed("later", 2)
    assert await publishing == 2


async def test_a_replica_that_leaves_is_not_waited_for() -> None:
    board = PolicyBoard()
    for replica in ("a", "b"):
        await board.join(replica)
    publishing = asyncio.create_task(board.publish(weights(1), timeout=5.0))
    await board.note_installed("a", 1)
    await board.leave("b")
    assert await publishing == 1
    await board.leave("b")  # twice does no harm


async def test_a_failure_reaches_the_publisher() -> None:
    board = PolicyBoard()
    await board.join("a")
    publishing = asyncio.create_task(board.publish(weights(1), timeout=5.0))
    await asyncio.sleep(0)
    await board.note_failure("a", "out of memory")
    with pytest.raises(EngineError, match=r"version 1 could not be installed: .*out of memory"):
        await publishing


async def test_a_failure_of_one_version_is_not_one_of_the_next() -> None:
    board = PolicyBoard()
    await board.join("a")
    await board.note_failure("a", "out of memory")
    await board.note_installed("a", 2)
    assert await board.publish(weights(2), timeout=1.0) == 1


async def test_a_timeout_names_the_late_ones() -> None:
    board = PolicyBoard()
    for replica in ("quick", "slow-2", "slow-1"):
        await board.join(replica)
    await board.note_installed("quick", 1)
    with pytest.raises(EngineError, match=r"version 1 not installed after 0 s by \['slow-1', 'slow-2'\]"):
        await board.publish(weights(1), timeout=0.05)
    await board.note_installed("slow-1", 1)
    await board.note_installed("slow-2", 1)
    assert await board.publish(weights(1), timeout=0.05) == 3  # the board goes on


async def test_waiting_for_newer_weights_waits_and_gives_up() -> None:
    board = PolicyBoard()
    assert await board.wait_for_newer(0, timeout=0.01) is None
    waiting = asyncio.create_task(board.wait_for_newer(1, timeout=5.0))
    await board.publish(weights(1), timeout=1.0)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await board.publish(weights(2), timeout=1.0)
    assert version_of(await waiting) == 2


async def test_a_cancelled_publisher_leaves_the_board_usable() -> None:
    board = PolicyBoard()
    await board.join("a")
    publishing = asyncio.create_task(board.publish(weights(1), timeout=5.0))
    await asyncio.sleep(0.01)
    publishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await publishing
    async with asyncio.timeout(1):
        await board.note_installed("a", 1)
        assert await board.publish(weights(1), timeout=1.0) == 1


async def test_replicas_follow_under_load_and_each_call_has_one_version() -> None:
    board = PolicyBoard()
    language = ToyLanguage(("no", "yes"))
    engines = [ToyEngine(language, seed=seed, delay_s=0.002) for seed in range(3)]
    for engine in engines:
        await engine.join(board)
    following = [asyncio.create_task(engine.follow()) for engine in engines]
    stopping = asyncio.Event()
    wrong: list[float] = []

    async def call(engine: ToyEngine) -> None:
        while not stopping.is_set():
            question = [{"role": "user", "content": "?"}]
            completion = await engine.generate({"messages": question, "model": "policy", "temperature": 1.0})
            (choice,) = completion.choices
            sign = 1 if language.words[int(choice.response_T[0]) - 264] == "yes" else -1
            expected = -np.log1p(np.exp(-sign * completion.policy_version))
            wrong.extend([] if np.isclose(choice.logprob_T[0], expected, atol=1e-6) else [choice.logprob_T[0]])

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        for engine in engines * 4:
            group.create_task(call(engine))
        for version in range(1, 21):
            assert await board.publish(weights(version), timeout=5.0) == 3
            assert set((await board.versions()).values()) == {version}
            assert {engine.version for engine in engines} == {version}
        stopping.set()
    assert not wrong
    for task in following:
        task.cancel()
    await asyncio.wait(following)


async def test_a_replica_that_is_not_heard_of_is_struck_off_and_the_others_are_not_kept_waiting() -> None:
    board, language = PolicyBoard(heartbeat_timeout=0.4), ToyLanguage(("no", "yes"))
    dead, alive = ToyEngine(language), ToyEngine(language)
    for engine in (dead, alive):
        await engine.join(board)
    following = asyncio.create_task(alive.follow())
    started = time.monotonic()
    assert await board.publish(weights(1), timeout=30.0) == 1
    assert 0.1 < time.monotonic() - started < 5.0
    assert (alive.version, list((await board.versions()).values())) == (1, [1])
    following.cancel()


async def test_a_replica_that_was_cut_off_answers_nothing_until_it_has_the_current_weights() -> None:
    board, language = PolicyBoard(heartbeat_timeout=0.3), ToyLanguage(("no", "yes"))
    engine = ToyEngine(language)
    await engine.join(board)
    await asyncio.sleep(0.4)  # nobody hears of it: for all that it knows, it is struck off
    assert await board.publish(weights(1), timeout=30.0) == 0
    request = {"messages": [{"role": "user", "content": "?"}], "model": "policy"}
    asking = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0.1)
    assert not asking.done()
    following = asyncio.create_task(engine.follow())
    completion = await asyncio.wait_for(asking, 5.0)
    assert isinstance(completion, Completion)
    assert completion.policy_version == 1
    following.cancel()


async def test_an_engine_that_dies_while_it_installs_is_not_the_publishers_failure() -> None:
    board, dead = PolicyBoard(heartbeat_timeout=0.3), False

    async def install(new: Weights) -> None:
        nonlocal dead
        dead = True
        raise ConnectionError("the engine's process is gone")

    async def alive() -> None:
        if dead:
            raise RuntimeError("dead")

    follower = Follower(board, install, alive)
    await follower.join()
    following = asyncio.create_task(follower.run())
    assert await board.publish(weights(1), timeout=30.0) == 0
    with pytest.raises(ExceptionGroup):
        await following
