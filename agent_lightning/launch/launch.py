"""Starts the parts of a run from its config, and stops them again: Ray, buffer, service, learner, rollout workers."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent_lightning.buffer.breaker import Breaker
from agent_lightning.buffer.buffer import Buffer
from agent_lightning.config.learning import CreditConfig
from agent_lightning.config.load import Config, resolve_path
from agent_lightning.core import hub, ray_private
from agent_lightning.core.errors import PartDied
from agent_lightning.core.threads import start_thread
from agent_lightning.core.types import POLICY
from agent_lightning.credit.failures import Retries
from agent_lightning.launch import backend, checks, placement
from agent_lightning.launch.models import ModelFacts
from agent_lightning.learners.base import Learner
from agent_lightning.rollouts.supervise import Workers, wait_until_healthy
from agent_lightning.rollouts.worker import RolloutWorker
from agent_lightning.run.state import State
from agent_lightning.serving.call_log import CallLog
from agent_lightning.serving.policy import PolicyBoard

if TYPE_CHECKING:
    from agent_lightning.learners.verl import VerlLearner
    from agent_lightning.learners.verl_groups import Training
    from agent_lightning.serving.app import Deployment, Service

logger = logging.getLogger(__name__)

PATIENCE_SECONDS: Final = 15.0


@dataclass(slots=True, kw_only=True)
class System:
    """The running parts of a run; `buffer` and `board` are proxies of actors."""

    buffer: Buffer
    board: PolicyBoard
    service: Service
    learner: Learner | None  # None if nothing is trained


@asynccontextmanager
async def system(
    config: Config,
    *,
    train: bool,
    workers: int,
    journal: Path | None = None,
    resumed: State | None = None,
    calls: Path | None = None,
    logs: Path | None = None,
    joined: Callable[[], None] = lambda: None,
) -> AsyncIterator[System]:
    """Start all parts of a run, and stop them when the block ends. May be cancelled while it starts. Raises UserError
    or EngineError if a part cannot start, JournalError, and PartDied if a process is gone that cannot be replaced.

    Args:
        train: whether there is a learner.
        workers: the number of rollout workers on all nodes together.
        journal: the folder of the buffer's journal; None: the buffer keeps its rollouts in memory only.
        resumed: the state of the checkpoint from which the run continues.
        calls: the file to which the gateway writes model calls, without end, in place of the buffer.
        logs: the folder for workers/, what agents print, and for ray/, the logs of a cluster that the run starts.
        joined: called when Ray's core runs in this process.
    """
    facts = checks.require(config, trains=train).model
    ray_private.prepare_environment(_passed_on(config))
    # These imports take seconds, so they come after the checks that refuse a config at once.
    from agent_lightning.core import actors
    from agent_lightning.serving import app

    async with AsyncExitStack() as stack:
        own = await _start_ray(config, stack, logs)
        joined()
        run_secret = secrets.token_bytes(32)
        # The loss of another node must not take the buffer or the board with it.
        here = actors.on_node(actors.nodes()[0].node_id)
        buffer = await _start_buffer(config, run_secret, journal, resumed, here)
        board = actors.spawn(PolicyBoard, options=here)
        start = partial(
            app.start,
            name=f"agl-{secrets.token_hex(3)}",
            config=_deployment(config, facts),
            gateway=_gateway(config, facts, run_secret),
            recorder=buffer if calls is None else actors.spawn(CallLog, calls.absolute(), options=here),
            board=board,
            replica=backend.choose(config).replica(),
            alone=own,
        )
        serving = start_thread(start, "serving")
        learning = start_thread(partial(_learner, config, facts, serving) if train else lambda: None, "learner")
        if not own:  # the end of a cluster of our own ends the service too
            stack.callback(lambda: None if serving.exception() else serving.result().stop())
        await _all_ended(serving, learning)
        service, learner = serving.result(), learning.result()
        await wait_until_healthy(service.url, 60.0)
        await _start_workers(config, buffer, service, workers, stack, logs)
        try:
            yield System(buffer=buffer, board=board, service=service, learner=learner)
        except actors.ActorDied as error:
            raise PartDied(f"a process of the run has died: {actors.who_died(error)}") from error


@asynccontextmanager
async def supervised(
    config: Config, *, logs: Path | None = None, joined: Callable[[], None] = lambda: None
) -> AsyncIterator[VerlLearner]:
    """Start a learner of chats, without engine, agents and buffer, and stop it at the end of the block. `logs` and
    `joined`: see `system`. Raises UserError if it cannot start, and PartDied if one of its processes is gone."""
    facts = checks.require_supervised(config).model
    ray_private.prepare_environment(_passed_on(config))
    from agent_lightning.core import actors
    from agent_lightning.learners.verl import VerlLearner

    off = {"kl_coef": 0.0, "importance_sampling": "none", "entropy_coef": 0.0}  # all that belongs to rollouts
    async with AsyncExitStack() as stack:
        await _start_ray(config, stack, logs)
        joined()
        settings = replace(
            training(config, *_source(config, facts)),
            algorithm=config.algorithm.model_copy(update=off),
            credit=CreditConfig(),
            sft=True,
            total_steps=config.steps * config.algorithm.epochs,
            temperature=1.0,
        )
        learner = await asyncio.wrap_future(start_thread(partial(VerlLearner, settings), "learner"))
        try:
            yield learner
        except actors.ActorDied as error:
            raise PartDied(f"a process of the run has died: {actors.who_died(error)}") from error


def _passed_on(config: Config) -> tuple[str, ...]:
    """The variables that a running cluster gets from here; the processes of one that is started inherit all."""
    return () if checks.cluster_is_own(config) else (*hub.ENVIRONMENT, *config.hardware.pass_env)


def _source(config: Config, facts: ModelFacts | None) -> tuple[str, str | None]:
    """Where the processes load the model from: a folder, or hub id and commit."""
    return (config.model.path, None) if facts is None else (facts.location, facts.revision)


async def _start_buffer(
    config: Config, run_secret: bytes, journal: Path | None, resumed: State | None, options: dict[str, Any]
) -> Buffer:
    """The buffer, with the rollouts of its journal if the run is resumed. Raises JournalError."""
    from agent_lightning.core import actors

    buffer = actors.spawn(
        Buffer,
        options=options,
        restarts=journal is not None,
        run_secret=run_secret,
        retries=Retries(
            max_attempts=config.agent.max_attempts, failures=config.algorithm.failures, limits=config.agent.retry
        ),
        breaker=Breaker(config.agent.breaker),
        agent=config.agent,
        first_group=resumed.next_group if resumed is not None else None,
        journal=journal.absolute() if journal is not None else None,
        config=config.buffer,
    )
    if resumed is not None and journal is not None:
        newest = resumed.version if config.loop.overlaps else None  # without lag the steps are repeated exactly
        ready = await buffer.resume(resumed.step, resumed.next_group, newest)
        logger.warning("resumed from step %d: the journal has %d rollouts that need not run again", resumed.step, ready)
    return buffer


async def _start_ray(config: Config, stack: AsyncExitStack, logs: Path | None) -> bool:
    """Join a cluster or start one; whether it was started, and ends with this run. Raises UserError."""
    from agent_lightning.core import actors

    await asyncio.sleep(0)  # a cancellation during the imports takes effect here
    stack.callback(actors.shutdown_ray)
    # In a thread of asyncio's pool, which stays: Ray's processes end with the thread that started them
    # (PR_SET_PDEATHSIG).
    join = partial(actors.init_ray, config.hardware.address, checks.own_cpus(config), logs=logs and logs / "ray")
    joining = asyncio.ensure_future(asyncio.to_thread(join))
    try:
        return await asyncio.shield(joining)
    except asyncio.CancelledError:
        await asyncio.gather(joining, return_exceptions=True)  # Ray can be shut down only once it has started
        raise


async def _all_ended(*threads: Future[Any]) -> None:
    """Wait for threads, also if some of them fail. If it is cancelled, they get PATIENCE_SECONDS more: a thread that
    calls Ray while Ray is shut down prints a trace, or ends the process."""
    ending = asyncio.gather(*map(asyncio.wrap_future, threads), return_exceptions=True)
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        await asyncio.wait((ending,), timeout=PATIENCE_SECONDS)
        raise


def _learner(config: Config, facts: ModelFacts | None, serving: Future[Service]) -> Learner:
    if config.hardware.placement == "together":
        # vLLM measures the free memory of its GPU: another process must not change it meanwhile.
        serving.result()
    return backend.choose(config).learner(*_source(config, facts))


def training(config: Config, model: str, revision: str | None = None) -> Training:
    """How the policy is trained, from the model in this folder, or from this commit of a model on the hub."""
    from agent_lightning.learners.verl_groups import Training

    algorithm, lora = config.algorithm, config.model.lora
    return Training(
        model_path=model,
        model_revision=revision,
        algorithm=algorithm,
        credit=config.credit,
        critic=config.critic,
        learner=config.learner,
        lora=lora.model_copy(update={"path": resolve_path(lora.path)}) if lora.path else lora,
        device=config.hardware.device,
        gpu_share=placement.learner_gpu(config) or 1.0,
        dtype=config.model.dtype,
        seed=config.seed,
        total_steps=config.steps * algorithm.epochs * algorithm.batches_per_step,
        temperature=config.sampling.train.temperature,
        verl=config.verl,
    )


def _deployment(config: Config, facts: ModelFacts | None) -> Deployment:
    """How the policy is served."""
    from agent_lightning.serving.app import Deployment

    port = config.serving.port or ray_private.free_port(config.serving.host)
    model, revision = _source(config, facts)
    overrides = facts.engine_overrides if facts is not None else {}
    return Deployment(
        model=config.model.model_copy(update={"path": model}),
        revision=revision,
        serving=config.serving.model_copy(update={"port": port, "gateways": config.fixed_gateways}),
        device=config.hardware.device,
        bundles=backend.choose(config).replica_bundles(),
        seed=config.seed,
        engine=({"hf_overrides": overrides} if overrides else {}) | dict(config.vllm),
    )


def _gateway(config: Config, model: ModelFacts | None, run_secret: bytes) -> Any:
    from agent_lightning.serving.gateway import GatewayConfig

    sampling = config.sampling
    return GatewayConfig(
        model=POLICY,
        run_secret=run_secret,
        sampling={"train": sampling.train.model_dump(), "val": sampling.val.model_dump()},
        seed=config.seed if sampling.seeded else None,
        vocab_size=model.vocab_size if model is not None else 2**31,
        call_timeout_s=config.agent.call_timeout_s or config.agent.timeout_s / 2,
    )


async def _start_workers(
    config: Config, buffer: Buffer, service: Service, number: int, stack: AsyncExitStack, logs: Path | None
) -> None:
    """Start the rollout workers of all nodes; in a cluster that is joined, follow its nodes until the stack closes."""
    from agent_lightning.core import actors
    from agent_lightning.launch.nodes import Nodes, find_local_gateway

    per_node = config.fixed_gateways is None
    find = partial(find_local_gateway, service.app) if per_node else partial(wait_until_healthy, service.url)

    def make_workers(node: str, number: int, url: str) -> Workers:
        def make(name: str) -> RolloutWorker:
            return actors.spawn(
                RolloutWorker,
                options=actors.on_node(node),
                buffer=buffer,
                agent=config.agent,
                concurrency=config.rollout.concurrency,
                policy_url=url,
                find=find,
                model=POLICY,
                worker=name,
                log=logs and logs.absolute() / "workers" / f"{name}.log",
            )

        hung_s, name = config.rollout.unresponsive_timeout_s, f"worker-{node[:8]}"
        return Workers(make, number=number, buffer=buffer, kill=actors.kill, unresponsive_timeout_s=hung_s, name=name)

    nodes = Nodes(find, make_workers, service.scale_gateways if per_node else None)
    await nodes.start(number)
    stack.push_async_callback(nodes.stop)
    if number and not checks.cluster_is_own(config):
        following = asyncio.create_task(nodes.follow())
        stack.callback(following.cancel)
