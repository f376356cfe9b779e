"""The RolloutWorker: it leases rollouts, runs agents, scores their results, and reports how each attempt ended.

A bad rollout is data: whatever an agent does becomes one Outcome, in this module and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from agent_lightning.buffer.breaker import last_failed_tool
from agent_lightning.buffer.buffer import Lease
from agent_lightning.config.running import AgentConfig
from agent_lightning.core import types
from agent_lightning.core.errors import AgentProcessError, EngineError, RewardConfigError, RewardError, UnknownRollout
from agent_lightning.core.text import error_line, hide_secret
from agent_lightning.core.types import Ending, ModelCall, Outcome, Policy, RolloutKey
from agent_lightning.rollouts.agents import bypass_proxies, call, check, load, run_agent
from agent_lightning.rollouts.client import Rollout, close, install
from agent_lightning.rollouts.evidence import Printed, follow_streams, frames_of, keeping, place_of
from agent_lightning.rollouts.rewards import read_printed, to_reward
from agent_lightning.rollouts.supervise import FindGateway, is_healthy, wait_until_healthy
from agent_lightning.spans.assemble import assemble, emitted_rewards
from agent_lightning.spans.tree import RawSpan

logger = logging.getLogger(__name__)

_LEASE_WAIT = 5.0  # longest wait for a lease, in seconds; it ends as soon as there is work
_GATEWAY_WAIT = 20.0  # seconds that a rollout without a gateway waits for one: less than the grace period of a lease
_LONGEST_OUTPUT = 2000  # characters of an agent's result that are kept
_UNKNOWN_VERSION = -1  # a worker does not follow the updates; the gateway notes the policy version of each call


class RolloutBuffer(Protocol):
    """The part of the Buffer that a worker uses."""

    async def lease(self, num: int, timeout: float, *, deadline: float, worker: str) -> list[Lease]: ...
    async def recorded_calls(self, key: RolloutKey) -> tuple[ModelCall, ...]: ...
    async def recorded_spans(self, key: RolloutKey) -> tuple[RawSpan, ...]: ...
    async def alarm(self, trouble: str) -> None: ...
    async def finish(self, key: RolloutKey, ending: Ending, *, failed_tool: str, retry: bool) -> None: ...


class RolloutWorker:
    """Runs agents until `stop` is called.

        worker = RolloutWorker(buffer=buffer, agent=config.agent, policy_url="http://127.0.0.1:8000", model="policy")
        await worker.run()

    Raises ConfigError on construction if the agent or the reward function cannot be loaded.
    """

    def __init__(
        self,
        *,
        buffer: RolloutBuffer,
        agent: AgentConfig,
        policy_url: str,
        model: str,
        concurrency: int = 64,
        agent_name: str = types.DEFAULT_AGENT,
        worker: str = "",
        find: FindGateway | None = None,
        log: Path | None = None,
    ) -> None:
        """`policy_url` is the gateway's root. `concurrency` rollouts run at a time. `agent_name` names the agent in the
        URL of its calls. `worker` names this worker in the buffer's leases. `find` locates a gateway when this one is
        gone; None waits for the same URL. `log` is the file in the run's folder for what agents print."""
        follow_streams(log)
        check(agent.target, agent.mode)
        self._score = load(agent.reward) if isinstance(agent.reward, str) else agent.reward
        self._buffer, self._agent, self._worker, self._find = buffer, agent, worker, find
        self._policy_url, self._model, self._agent_name = policy_url.rstrip("/"), model, agent_name
        self._concurrency = concurrency
        self._stopping = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Lease and run rollouts until `stop`. Raises if the buffer is gone, and ConfigError if an instrumentor is not
        installed."""
        # An agent in a process of its own turns its instrumentors on in that process.
        install(self._agent.instrument if self._agent.mode in ("async", "thread") else ())
        async with asyncio.TaskGroup() as group:
            feeding = group.create_task(self._feed(group))
            await self._stopping.wait()  # ends with stop(), or by cancellation if `feeding` failed
            for task in (feeding, *self._running):
                task.cancel()

    async def stop(self) -> None:
        """Lease no more rollouts, and return the running ones: another worker may retry them."""
        self._stopping.set()

    async def is_alive(self) -> bool:
        """Return True; a caller waits in vain if an agent blocks the event loop."""
        return True

    async def run_one(self, lease: Lease) -> None:
        """Run one attempt; report its ending to the buffer and, if it failed, its last tool if that had no success."""
        key, failed_tool = lease.key, ""
        try:
            printed = Printed(key.rollout_id)
            with keeping(printed):
                ending = await self._attempt(lease, printed)
            ending = replace(ending, printed=hide_secret(printed.text(), lease.secret))
            if ending.outcome is Outcome.AGENT_ERROR and not await self._reach_gateway():  # the agent is not at fault
                error = f"no gateway answered: {ending.error}"[:300]
                ending = replace(ending, outcome=Outcome.ENGINE_ERROR, error=error)
            if ending.outcome is not Outcome.FINISHED:
                # A worker reads the spans, because there are many workers; the buffer is one process and only stores.
                with contextlib.suppress(UnknownRollout):  # the attempt has ended already
                    calls, spans = await self._buffer.recorded_calls(key), await self._buffer.recorded_spans(key)
                    failed_tool = last_failed_tool((await asyncio.to_thread(assemble, key, calls, spans)).tools)
        except asyncio.CancelledError:
            ending = Ending(outcome=Outcome.CANCELLED, error="the worker was stopped")
            await self._finish(key, ending, retry=True)  # the rollout did nothing wrong
            raise
        await self._finish(key, ending, failed_tool=failed_tool, retry=False)

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        if self._find is not None:  # a worker that replaces a dead one may have got the URL of a gateway that is gone
            await self._reach_gateway()
        while True:  # ends by cancellation, in run()
            free = self._concurrency - len(self._running)
            if free == 0:
                # This wait ends, because every task has a deadline.
                await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
                continue
            leases = await self._buffer.lease(free, _LEASE_WAIT, deadline=self._agent.timeout_s, worker=self._worker)
            for lease in leases:
                task = group.create_task(self.run_one(lease), name=lease.key.rollout_id)
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _attempt(self, lease: Lease, printed: Printed) -> Ending:
        """Run agent and reward function; whatever they do, even an error, becomes an Ending."""
        agent, key, output = self._agent, lease.key, ""
        root = f"{self._policy_url}/rollout/{key.rollout_id}/attempt/{key.attempt}/{lease.secret}"
        policy = Policy(version=_UNKNOWN_VERSION, base_url=f"{root}/{self._agent_name}/v1", model=self._model)
        rollout = Rollout(rollout_id=key.rollout_id, attempt=key.attempt, base_url=policy.base_url)
        os.environ.update(bypass_proxies(os.environ, policy.base_url))
        blame = Outcome.AGENT_ERROR
        clock = asyncio.timeout(agent.timeout_s)
        try:
            async with clock:
                try:
                    result = await run_agent(
                        agent.target, agent.mode, lease.task, policy, rollout, agent.instrument, printed
                    )
                finally:
                    await close(rollout)
                output = hide_secret(str(result), lease.secret)[:_LONGEST_OUTPUT]
                blame = Outcome.BAD_REWARD if self._score is None else Outcome.SCORER_ERROR
                reward, parts = to_reward(await self._value(lease, result), agent)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling() > 0:  # else the agent raised CancelledError by itself
                raise
            return self._failed(blame, error, lease, output)
        except Exception as error:
            if not clock.expired():
                if isinstance(error, RewardConfigError):
                    await self._buffer.alarm(f"rollout {key.rollout_id}: {error}")
                return self._failed(blame, error, lease, output)
        if clock.expired():  # also if the agent swallowed its cancellation
            scoring = blame is Outcome.SCORER_ERROR
            outcome, who = (blame, "the reward function was ") if scoring else (Outcome.TIMEOUT, "")
            return Ending(outcome=outcome, error=f"{who}not done after {agent.timeout_s:g} s", output=output)
        outcome = Outcome.UNSCORED if reward is None else Outcome.FINISHED
        return Ending(outcome=outcome, reward=reward, reward_parts=parts, output=output)

    def _failed(self, blame: Outcome, error: BaseException, lease: Lease, output: str) -> Ending:
        """The ending of an attempt with an error in the agent's code or in the reward function, as `blame` says."""
        line, place, trace = error_line(error, secret=lease.secret), place_of(error), ""
        if isinstance(error, AgentProcessError):
            trace = hide_secret(error.trace, lease.secret) or frames_of(error, secret=lease.secret)
        elif not isinstance(error, RewardError):
            trace = frames_of(error, secret=lease.secret)
        is_tool_error = any(fnmatch.fnmatchcase(line, pattern) for pattern in self._agent.tool_errors)
        line = f"{line} ({place})" if place and trace else line
        return Ending(outcome=Outcome.TOOL_ERROR if is_tool_error else blame, error=line, output=output, trace=trace)

    async def _reach_gateway(self) -> bool:
        """Whether the gateway answers. If not, wait for one, so that retries are not all used up meanwhile."""
        if await is_healthy(self._policy_url):
            return True
        with contextlib.suppress(EngineError):
            waiting = self._find(_GATEWAY_WAIT) if self._find else wait_until_healthy(self._policy_url, _GATEWAY_WAIT)
            self._policy_url = await waiting
        return False

    async def _value(self, lease: Lease, result: object) -> object:
        """The reward before it is checked: the score, the agent's result, or what the agent emitted. A command prints
        its reward as text."""
        if self._score is not None:
            return await call(self._score, dict(lease.task.payload), result)
        if result is None or result == "":
            rewards = emitted_rewards(lease.key, await self._buffer.recorded_spans(lease.key))
            if not rewards:
                raise RewardError("the agent returned nothing and emitted no reward")
            return rewards
        return read_printed(result) if self._agent.mode == "command" and isinstance(result, str) else result

    async def _finish(self, key: RolloutKey, ending: Ending, *, failed_tool: str = "", retry: bool) -> None:
        if ending.outcome is not Outcome.FINISHED:
            logger.info("rollout %s attempt %d: %s: %s", key.rollout_id, key.attempt, ending.outcome, ending.error)
        try:
            await self._buffer.finish(key, ending, failed_tool=failed_tool, retry=retry)
        except UnknownRollout:  # the buffer has ended the attempt: it was cancelled, or its lease expired
            logger.info("rollout %s attempt %d had ended already", key.rollout_id, key.attempt)
