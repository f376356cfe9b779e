"""The RolloutWorker: leases rollouts, runs agents, scores what they return, and says how each one ended.

A bad rollout is data: whatever an agent does becomes one Outcome, here and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import logging
import math
import numbers
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from agent_lightning.buffer.buffer import Lease
from agent_lightning.core.errors import EngineError, RewardError, UnknownRollout
from agent_lightning.core.types import DEFAULT_AGENT, Outcome, Policy, RolloutKey
from agent_lightning.rollouts.agents import Agent, Mode, call, check, load, run_agent
from agent_lightning.rollouts.client import Rollout, close, install
from agent_lightning.rollouts.health import Find, is_healthy, wait_until_healthy

logger = logging.getLogger(__name__)

_LEASE_WAIT = 5.0
"""Seconds of one wait for work: it ends sooner where there is some."""
_GATEWAY_WAIT = 20.0
"""Seconds for which a rollout that met no gateway waits for one: less than the grace of a lease."""
_UNKNOWN_VERSION = -1
"""A worker does not follow the policy: the gateway stamps each call with the version that answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """What to run for each task, how to score it, and within which bounds."""

    target: str | Agent
    """A name for `agents.load`, a command line, or the function itself."""
    mode: Mode
    reward_target: str | Agent | None = None
    """`score(payload, output)`, async or plain; None where the agent returns its reward or emits it."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    timeout_s: float = 600.0
    """Of the agent and its scoring together."""
    concurrency: int = 8
    """Rollouts at a time in one worker."""
    tool_errors: tuple[str, ...] = ()
    """Globs of errors, as `one_line` writes them, that are the surroundings' and not the agent's: TOOL_ERROR."""
    instrumentors: tuple[str, ...] = ()
    """OpenTelemetry instrumentors to turn on, by the names of their entry points."""


class RolloutBuffer(Protocol):
    """The part of the Buffer that a worker uses."""

    async def lease(self, num: int, timeout: float, *, deadline: float, worker: str) -> list[Lease]: ...

    async def emitted(self, key: RolloutKey) -> float | None: ...

    async def finish(
        self, key: RolloutKey, *, reward: float | None, outcome: Outcome, error: str, output: str, retry: bool
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a rollout went, as its worker sees it."""

    outcome: Outcome
    reward: float | None = None
    error: str = ""
    output: str = ""


def to_reward(value: object, reward_range: tuple[float, float]) -> float:
    """A finite number in the range. Raises RewardError.

    Example:

        to_reward(True, (0.0, 1.0))   # 1.0
        to_reward("1", (0.0, 1.0))    # RewardError: the reward is a str, not a number
    """
    if not isinstance(value, numbers.Real | np.bool_):
        raise RewardError(f"the reward is a {type(value).__name__}, not a number")
    reward, (low, high) = float(value), reward_range
    if not math.isfinite(reward):
        raise RewardError(f"the reward is {reward}")
    if not low <= reward <= high:
        raise RewardError(f"the reward {reward:g} is outside [{low:g}, {high:g}]")
    return reward


def one_line(error: BaseException, *, secret: str = "") -> str:
    """An error as one line of at most 300 characters, without the secret that URLs in it would show.

    Example: ValueError("no\\nway") -> "ValueError: no"; of a group of errors, the first.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = _hide(str(error), secret).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


class RolloutWorker:
    """Runs agents until `stop`.

    Example:

        worker = RolloutWorker(buffer=buffer, agent=spec, policy_url="http://127.0.0.1:8000", model="policy")
        await worker.run()

    Raises ConfigError on construction where the agent or the reward function cannot be loaded.
    """

    def __init__(
        self,
        *,
        buffer: RolloutBuffer,
        agent: AgentSpec,
        policy_url: str,
        model: str,
        agent_name: str = DEFAULT_AGENT,
        worker: str = "",
        find: Find | None = None,
    ) -> None:
        """`policy_url`: root of the gateway. `agent_name`: of the calls whose URL says no other. `worker`: who this is,
        in the buffer's leases. `find`: the gateway that takes the place of one that is gone; None: the same URL."""
        check(agent.target, agent.mode)
        target = agent.reward_target
        self._score = load(target) if isinstance(target, str) else target
        self._buffer = buffer
        self._agent = agent
        self._policy_url = policy_url.rstrip("/")
        self._model = model
        self._agent_name = agent_name
        self._worker = worker
        self._find = find
        self._stopping = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Lease and run rollouts until `stop`. Raises where the buffer is gone; ConfigError for an instrumentor that is
        not installed."""
        # An agent in a process of its own turns them on there.
        install(self._agent.instrumentors if self._agent.mode in ("async", "thread") else ())
        async with asyncio.TaskGroup() as group:
            feeding = group.create_task(self._feed(group))
            await self._stopping.wait()  # ends with stop(), or with cancellation where `feeding` failed
            for task in (feeding, *self._running):
                task.cancel()

    async def stop(self) -> None:
        """Lease no more, and give back the rollouts that run: another worker may retry them."""
        self._stopping.set()

    async def is_alive(self) -> bool:
        """Answers, unless an agent blocks the event loop."""
        return True

    async def run_one(self, lease: Lease) -> None:
        """Run one attempt and tell the buffer how it ended."""
        try:
            ending = await self._blame(await self._attempt(lease))
        except asyncio.CancelledError:
            ending = Ending(outcome=Outcome.CANCELLED, error="the worker was stopped")
            await self._finish(lease.key, ending, retry=True)  # no fault of the rollout
            raise
        await self._finish(lease.key, ending, retry=False)

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        if self._find is not None:  # a worker that replaces another may be told of a gateway that is gone
            await self._is_answered()
        while True:  # ends by cancellation, in run()
            free = self._agent.concurrency - len(self._running)
            if free == 0:
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)  # ends: each has a deadline
                continue
            leases = await self._buffer.lease(free, _LEASE_WAIT, deadline=self._agent.timeout_s, worker=self._worker)
            for lease in leases:
                task = group.create_task(self.run_one(lease), name=lease.key.rollout_id)
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _attempt(self, lease: Lease) -> Ending:
        """The boundary that turns anything an agent or a reward function does into data."""
        agent, key, output = self._agent, lease.key, ""
        root = f"{self._policy_url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{lease.secret}"
        policy = Policy(version=_UNKNOWN_VERSION, base_url=f"{root}/{self._agent_name}/v1", model=self._model)
        rollout = Rollout(rollout_id=key.rollout_id, attempt=key.attempt, base_url=policy.base_url)
        blame = Outcome.AGENT_ERROR
        clock = asyncio.timeout(agent.timeout_s)
        try:
            async with clock:
                try:
                    result = await run_agent(
                        agent.target, agent.mode, lease.task, policy, rollout, instrumentors=agent.instrumentors
                    )
                finally:
                    await close(rollout)
                output = _hide(str(result), lease.secret)[:2000]
                blame = Outcome.BAD_REWARD
                reward = to_reward(await self._value(lease, result), agent.reward_range)
        except asyncio.CancelledError as error:
            if _is_being_cancelled():
                raise
            return Ending(outcome=blame, error=one_line(error), output=output)  # the agent's own doing
        except Exception as error:
            if not clock.expired():
                line = one_line(error, secret=lease.secret)
                of_tools = any(fnmatch.fnmatchcase(line, pattern) for pattern in agent.tool_errors)
                return Ending(outcome=Outcome.TOOL_ERROR if of_tools else blame, error=line, output=output)
        if clock.expired():  # also where the agent swallowed its cancellation
            return Ending(outcome=Outcome.TIMEOUT, error=f"not done after {agent.timeout_s:g} s", output=output)
        return Ending(outcome=Outcome.FINISHED, reward=reward, output=output)

    async def _blame(self, ending: Ending) -> Ending:
        """An agent that failed while no gateway answered is not at fault."""
        if ending.outcome is not Outcome.AGENT_ERROR or await self._is_answered():
            return ending
        return replace(ending, outcome=Outcome.ENGINE_ERROR, error=f"no gateway answered: {ending.error}"[:300])

    async def _is_answered(self) -> bool:
        """Else a gateway is waited for, so that the rollouts which run again are not all spent on it."""
        if await is_healthy(self._policy_url):
            return True
        with contextlib.suppress(EngineError):
            find = self._find or partial(wait_until_healthy, self._policy_url)
            self._policy_url = await find(_GATEWAY_WAIT)
        return False

    async def _value(self, lease: Lease, result: object) -> object:
        """What is to be the reward: the score, or the result; a command can only print its own as text."""
        if self._score is not None:
            return await call(self._score, dict(lease.task.payload), result)
        if result is None or result == "":
            emitted = await self._buffer.emitted(lease.key)
            if emitted is None:
                raise RewardError("the agent returned nothing and emitted no reward")
            return emitted
        if self._agent.mode == "command" and isinstance(result, str):
            return float(result)
        return result

    async def _finish(self, key: RolloutKey, ending: Ending, *, retry: bool) -> None:
        if ending.outcome is not Outcome.FINISHED:
            logger.info("rollout %s attempt %d: %s: %s", key.rollout_id, key.attempt, ending.outcome, ending.error)
        try:
            await self._buffer.finish(
                key, reward=ending.reward, outcome=ending.outcome, error=ending.error, output=ending.output, retry=retry
            )
        except UnknownRollout:  # cancelled, or its lease expired: the buffer has ended this attempt already
            logger.info("rollout %s attempt %d had ended already", key.rollout_id, key.attempt)


def _hide(text: str, secret: str) -> str:
    return text.replace(secret, "***") if secret else text


def _is_being_cancelled() -> bool:
    """Whether somebody cancels this task, as opposed to an agent that raised CancelledError by itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
