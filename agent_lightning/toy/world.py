"""The toy world: the whole system in one process and in seconds, without a GPU, Ray or vLLM.

The policy is a table of logits: what was asked last chooses the row, and one word of a small vocabulary is the
answer. Everything else is real: HTTP, gateway, buffer, rollout workers, credit, batches, weights and the loop.

    async def solve(task, policy):
        messages = [{"role": "user", "content": task["question"]}]
        async with AsyncOpenAI(base_url=policy.base_url, api_key=policy.api_key) as client:
            reply = await client.chat.completions.create(model=policy.model, messages=messages)
        return float(reply.choices[0].message.content == task["answer"])

    tasks = [Task(task_id="sky", payload={"question": "The sky is", "answer": "blue"})]
    async with ToyWorld(agent=solve, tasks=tasks, words=("red", "green", "blue")) as world:
        state = await world.train(steps=20)
        state.val_rewards  # [(0, 0.0), (20, 1.0)]
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route

from agent_lightning.buffer.breaker import Breaker
from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.journal import JournalConfig
from agent_lightning.core.types import Group, ModelCall, Outcome, RolloutKey, Split, Task, Trajectory
from agent_lightning.credit.failures import Retries
from agent_lightning.credit.rules import CreditRules
from agent_lightning.credit.tools import tool_calls
from agent_lightning.rollouts.agents import Agent
from agent_lightning.rollouts.supervise import Workers
from agent_lightning.rollouts.worker import AgentSpec, RolloutWorker
from agent_lightning.run.loop import Loop
from agent_lightning.run.state import Plan, State, checkpoint_folder, newest_checkpoint, read_state, write_state
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.serving.gateway import Gateway, GatewayConfig
from agent_lightning.serving.policy import PolicyBoard
from agent_lightning.toy.faults import Faults, InjectedError, Link, Rates
from agent_lightning.toy.toy import END, FIRST_WORD, PAD, ToyEngine, ToyLanguage, ToyLearner

__all__ = [
    "END",
    "FIRST_WORD",
    "Faults",
    "InjectedError",
    "Link",
    "QuietObserver",
    "Rates",
    "ToyEngine",
    "ToyLanguage",
    "ToyLearner",
    "ToyWorld",
    "application",
    "group",
    "model_call",
    "serve_locally",
    "trajectory",
]

T = TypeVar("T")
MODEL: Final = "policy"
SAMPLING: Final[Mapping[Split, Mapping[str, float | int]]] = {
    "train": {"temperature": 1.0, "max_tokens": 16},
    "val": {"temperature": 0.0, "max_tokens": 16},
}


class QuietObserver:
    """Keeps what it is told. Checkpoints, where it has a folder for them, every so many steps and after the last."""

    def __init__(self, checkpoints: Path | None = None, *, every: int = 0) -> None:
        self.records: list[dict[str, float]] = []
        """One of each training step."""
        self.evaluations: list[tuple[int, float]] = []
        self.groups: list[Group] = []
        """Of training and evaluation, in the order in which they were done."""
        self.doing = ""
        self._checkpoints = checkpoints
        self._every = every

    def waiting_for(self, text: str) -> None:
        self.doing = text

    def record_rollouts(self, step: int, version: int, groups: Sequence[Group]) -> None:
        self.groups.extend(groups)

    def record_evaluation(self, step: int, reward: float, rows: int) -> None:
        self.evaluations.append((step, reward))

    def record_step(self, step: int, record: Mapping[str, float]) -> None:
        self.records.append(dict(record))

    def checkpoint_folder(self, state: State, *, force: bool) -> Path | None:
        due = force or (self._every and state.step % self._every == 0)
        return checkpoint_folder(self._checkpoints, state.step) if due and self._checkpoints else None

    def complete_checkpoint(self, folder: Path, state: State) -> None:
        write_state(folder, state)


@dataclass(slots=True, kw_only=True)
class ToyWorld:
    """A whole run, wired and started: `async with ToyWorld(agent=…, tasks=…, words=…) as world`.

    In the block, `loop` is ready to run, `url` is the root of the gateway, and the other parts can be looked at.
    """

    agent: AgentSpec | Agent
    """An async function that returns its reward, or anything that an AgentSpec can say."""
    tasks: Sequence[Task]
    words: Sequence[str]
    """What the policy can answer."""
    val_tasks: Sequence[Task] = ()
    """Empty: the training tasks."""
    rollouts_per_task: int = 8
    max_calls: int = 20
    retries: Retries = field(default_factory=Retries)
    breaker: Breaker | None = None
    max_len: int = 4096
    lr: float = 8.0
    seed: int = 0
    seeded: bool = False
    """What a rollout samples depends on `seed` and the rollout, not on when it asks; see GatewayConfig.seed."""
    checkpoints: Path | None = None
    checkpoint_every: int = 0
    resume: bool = False
    """Go on from the newest checkpoint in `checkpoints`."""
    journal: JournalConfig | None = None
    num_workers: int = 1
    faults: Faults | None = None
    rates: Mapping[str, Rates] = field(default_factory=dict)
    """What goes wrong on the way to a part: "engine" and "recorder" from the gateway, "finish" from the workers.
    The links are in `faults.links`; that of a worker to the buffer has its name, and cutting it kills the worker."""

    buffer: Buffer = field(init=False)
    board: PolicyBoard = field(init=False)
    engine: ToyEngine = field(init=False)
    learner: ToyLearner = field(init=False)
    observer: QuietObserver = field(init=False)
    workers: Workers = field(init=False)
    loop: Loop = field(init=False)
    url: str = field(init=False)
    _stack: AsyncExitStack = field(init=False, repr=False)

    async def __aenter__(self) -> Self:
        state = State(cursor=TaskCursor(seed=self.seed))
        if self.resume and self.checkpoints is not None:
            state = read_state(newest_checkpoint(self.checkpoints))
        language, run_secret = ToyLanguage(tuple(self.words)), secrets.token_bytes(32)
        self.buffer = Buffer(
            run_secret=run_secret,
            retries=self.retries,
            breaker=self.breaker,
            max_calls=self.max_calls,
            first_group=state.next_group,
            journal=self.journal,
        )
        self.board = PolicyBoard()
        self.engine = ToyEngine(language, seed=self.seed, max_len=self.max_len)
        self.learner = ToyLearner(language, lr=self.lr)
        self.observer = QuietObserver(self.checkpoints, every=self.checkpoint_every)
        config = GatewayConfig(
            model=MODEL, run_secret=run_secret, sampling=SAMPLING, seed=self.seed if self.seeded else None
        )
        gateway = Gateway(
            engine=self._way(self.engine, "engine"), recorder=self._way(self.buffer, "recorder"), config=config
        )
        self.loop = self._loop(state)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.buffer.close)
            if self.resume and self.journal is not None:
                await self.buffer.resume(state.step, state.next_group)
            running = await stack.enter_async_context(asyncio.TaskGroup())
            self.url = await stack.enter_async_context(serve_locally(gateway))
            await self.engine.join(self.board)
            stack.callback(running.create_task(self.engine.follow()).cancel)
            self.workers = Workers(self._worker, number=self.num_workers, buffer=self.buffer, kill=_nothing_to_kill)
            running.create_task(self.workers.run())
            stack.push_async_callback(self.workers.stop)
            if self.resume and self.checkpoints is not None:
                await self.loop.restore(newest_checkpoint(self.checkpoints))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return await self._stack.__aexit__(kind, error, trace)
        except BaseExceptionGroup as several:
            if several.exceptions == (error,):
                return False  # the block's own error goes on as it is
            raise

    async def train(self, *, steps: int) -> State:
        """Run the loop until `steps` steps are done in all. Raises StepFailed, EngineError."""
        self.loop.plan = replace(self.loop.plan, steps=steps)
        return await self.loop.run()

    def stop(self) -> None:
        """Give up the step that runs: `train` returns after a checkpoint."""
        self.loop.stop.set()

    def _way(self, part: T, name: str) -> T:
        rates = self.rates.get(name, Rates())
        return part if self.faults is None else self.faults.between(part, name, rates)

    def _worker(self, name: str) -> RolloutWorker:
        buffer = self.buffer
        if self.faults is not None:
            buffer = self.faults.between(buffer, name, self.rates.get("finish", Rates()), methods={"finish"})
        return RolloutWorker(buffer=buffer, agent=self._spec(), policy_url=self.url, model=MODEL, worker=name)

    def _spec(self) -> AgentSpec:
        if isinstance(self.agent, AgentSpec):
            return self.agent
        return AgentSpec(target=self.agent, mode="async", timeout_s=10.0, concurrency=32)

    def _loop(self, state: State) -> Loop:
        plan = Plan(
            steps=0,
            tasks_per_step=len(self.tasks),
            rollouts_per_task=self.rollouts_per_task,
            dynamic_sampling_rounds=0,
            rollouts_per_batch=None,
            epochs=1,
            eval_every=0,
            rules=CreditRules(max_tokens=self.max_len),
            pad_token=PAD,
            row_multiple=1,
        )
        return Loop(
            plan=plan,
            state=state,
            buffer=self.buffer,
            board=self.board,
            learner=self.learner,
            observer=self.observer,
            train_tasks=self.tasks,
            val_tasks=self.val_tasks or self.tasks,
        )


def _nothing_to_kill(worker: object) -> None:
    """A worker of this process ends with its task."""


class _QuietServer(uvicorn.Server):
    """Signals stay the caller's: Ctrl-C in a test or a notebook must not only stop the server."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def application(gateway: Gateway) -> Starlette:
    """An ASGI application that is nothing but the gateway."""
    return Starlette(routes=[Route("/{path:path}", gateway.handle, methods=["GET", "POST"])])


@asynccontextmanager
async def serve_locally(gateway: Gateway) -> AsyncIterator[str]:
    """A gateway on a free port of this machine, in this event loop; yields its root, "http://127.0.0.1:41234"."""
    config = uvicorn.Config(
        application(gateway),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=60,  # a busy event loop must not close a connection that a client is about to use again
        timeout_graceful_shutdown=1,
    )
    server = _QuietServer(config)
    # The protocol by name: asyncio turns Nagle's 40 ms off only for sockets that say that they are TCP.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)  # clients may connect before the server accepts
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


def model_call(
    key: RolloutKey,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    agent: str = "agent",
    version: int = 0,
    started_at: float = 0.0,
    logprobs: Sequence[float] | None = None,
    call_id: str | None = None,
) -> ModelCall:
    """A call by its tokens: model_call(key, [1, 5], [6]). Without `logprobs`, each token's is -1."""
    return ModelCall(
        key=key,
        call_id=call_id or f"{key.rollout_id}-{key.attempt}-{agent}-{started_at:g}-{list(prompt)}",
        agent=agent,
        policy_version=version,
        prompt_T=np.array(prompt, np.int32),
        response_T=np.array(response, np.int32),
        logprob_T=np.array([-1.0] * len(response) if logprobs is None else logprobs, np.float32),
        finish_reason="stop",
        started_at=started_at,
        ended_at=started_at,
    )


def trajectory(
    key: RolloutKey, *calls: ModelCall, reward: float | None = 1.0, outcome: Outcome = Outcome.FINISHED
) -> Trajectory:
    """A finished attempt of these calls and their tools; an `outcome` other than FINISHED has no reward."""
    rewarded = reward if outcome is Outcome.FINISHED else None
    return Trajectory(
        key=key, task_id=key.group_id, calls=calls, reward=rewarded, outcome=outcome, tools=tool_calls(calls)
    )


def group(*trajectories: Trajectory) -> Group:
    """The group of these trajectories, which share split and number; its task is made up."""
    group_id = trajectories[0].key.group_id
    task = Task(task_id=group_id, payload={})
    return Group(group_id=group_id, task=task, trajectories=trajectories)
