"""The toy world: the system in one process, to test an agent in seconds without a GPU, Ray or vLLM.

The policy is a table of logits: the last message of the prompt chooses the row, and the answer is one word of a small
vocabulary. Everything else is real: HTTP, gateway, buffer, rollout workers, credit, batches, weights and the loop.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import uvicorn

from agent_lightning.buffer.breaker import Breaker
from agent_lightning.buffer.buffer import Buffer
from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.learning import AlgorithmConfig
from agent_lightning.config.running import Agent, AgentConfig, BufferConfig, LoopConfig
from agent_lightning.core.types import Floats, Group, Split, Task
from agent_lightning.credit.assign import CreditRules
from agent_lightning.credit.failures import Retries
from agent_lightning.rollouts.supervise import Workers
from agent_lightning.rollouts.worker import RolloutWorker
from agent_lightning.run.loop import Loop
from agent_lightning.run.sampler import Evaluation
from agent_lightning.run.state import Plan, State, checkpoint_folder, newest_checkpoint, read_state, write_state
from agent_lightning.run.tasks import TaskCursor
from agent_lightning.serving.gate import Gate
from agent_lightning.serving.gateway import Gateway, GatewayConfig, application
from agent_lightning.serving.policy import PolicyBoard
from agent_lightning.testing.model import PAD, ToyEngine, ToyLanguage, ToyLearner

MODEL: Final = "policy"
SAMPLING: Final[Mapping[Split, Mapping[str, float | int]]] = {
    "train": {"temperature": 1.0, "max_tokens": 16},
    "val": {"temperature": 0.0, "max_tokens": 16},
}


@dataclass(kw_only=True)
class QuietObserver:
    """The Observer of a run: keeps its records in memory, and has checkpoints written into a folder."""

    checkpoints: Path | None = None
    every: int = 0  # a checkpoint is due after so many steps (0: never), and after the last step
    records: list[dict[str, float]] = field(default_factory=list)  # the metrics of each training step
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # step and mean reward of each evaluation
    groups: list[Group] = field(default_factory=list)
    """The groups of training and evaluation, in the order in which they were taken."""
    doing: str = ""  # what the run waits for

    def waiting_for(self, text: str) -> None:
        self.doing = text

    def record_rollouts(
        self, step: int, version: int, groups: Sequence[Group], logprobs: Mapping[tuple[str, str], Floats] | None = None
    ) -> None:
        self.groups.extend(groups)

    def record_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self.evaluations.append((step, evaluation.reward))

    def record_step(self, step: int, record: Mapping[str, float]) -> None:
        self.records.append(dict(record))

    def checkpoint_folder(self, state: State, *, force: bool) -> Path | None:
        due = force or (self.every and state.step % self.every == 0)
        return checkpoint_folder(self.checkpoints, state.step) if due and self.checkpoints else None

    def complete_checkpoint(self, folder: Path, state: State) -> None:
        write_state(folder, state)


@dataclass(slots=True, kw_only=True)
class ToyWorld:
    """A run with all its parts, started by `async with ToyWorld(agent=…, tasks=…, words=…) as world`. In the block,
    `loop` is ready to run, `url` is the root URL of the gateway, and the other parts can be inspected.

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

    agent: AgentConfig | Agent  # an async function that returns its reward, or the section of any agent
    concurrency: int = 32  # rollouts that a worker runs at a time
    tasks: Sequence[Task]
    words: Sequence[str]  # the policy's answers
    val_tasks: Sequence[Task] = ()  # if empty, the training tasks
    algorithm: AlgorithmConfig = AlgorithmConfig()  # the size of a group; a step has all tasks
    retries: Retries = field(default_factory=Retries)
    breaker: Breaker | None = None
    overlap: LoopConfig = LoopConfig()
    max_len: int = 4096
    sampling: Mapping[Split, Mapping[str, float | int]] = field(default_factory=lambda: SAMPLING)
    lr: float = 8.0
    seed: int = 0
    seeded: bool = False
    """Whether samples depend on `seed` and the rollout only, not on the order of calls; see GatewayConfig.seed."""
    checkpoints: Path | None = None
    checkpoint_every: int = 0
    resume: bool = False  # continue from the newest checkpoint in `checkpoints`
    journal: Path | None = None  # the folder of the buffer's journal
    buffer_config: BufferConfig = BufferConfig()
    num_workers: int = 1
    link: Callable[[Any, str, str], Any] = lambda part, name, method: part
    """Puts a link between two parts, for tests with faults: given a part, the link's name ("engine" and "recorder" from
    the gateway, a worker's name from this worker to the buffer) and the method that alone has faults ("" for all)."""

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
            agent=self._agent(),
            first_group=state.next_group,
            journal=self.journal,
            config=self.buffer_config,
        )
        self.board = PolicyBoard()
        gate = Gate("keep" if self.overlap.overlaps else "wait")
        self.engine = ToyEngine(language, seed=self.seed, max_len=self.max_len, gate=gate)
        self.learner = ToyLearner(language, lr=self.lr)
        self.observer = QuietObserver(checkpoints=self.checkpoints, every=self.checkpoint_every)
        config = GatewayConfig(
            model=MODEL, run_secret=run_secret, sampling=self.sampling, seed=self.seed if self.seeded else None
        )
        gateway = Gateway(
            engine=self.link(self.engine, "engine", ""), recorder=self.link(self.buffer, "recorder", ""), config=config
        )
        self.loop = self._loop(state)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.buffer.close)
            if self.resume and self.journal is not None:
                await self.buffer.resume(state.step, state.next_group, state.version if self.overlap.overlaps else None)
            running = await stack.enter_async_context(asyncio.TaskGroup())
            self.url = await stack.enter_async_context(serve_locally(gateway))
            await self.engine.join(self.board)
            stack.callback(running.create_task(self.engine.follow()).cancel)
            # Nothing is killed: a worker in this process ends when its task is cancelled.
            self.workers = Workers(self._worker, number=self.num_workers, buffer=self.buffer, kill=lambda worker: None)
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
                return False  # an error of the block is raised as it is, not in a group
            raise

    async def train(self, *, steps: int) -> State:
        """Train until the run has made `steps` steps in all. Raises StepFailed, EngineError."""
        self.loop.plan = replace(self.loop.plan, steps=steps)
        return await self.loop.run()

    async def generate(self, tasks: Sequence[Task], *, num_rollouts: int) -> list[Group]:
        """Run training rollouts of each task to their ends, without training, and return the groups."""
        for task in tasks:
            await self.buffer.admit(task, split="train", num_rollouts=num_rollouts)
        return await take_groups(self.buffer, len(tasks), split="train")

    def stop(self) -> None:
        """Stop the running step: `train` writes a checkpoint and returns."""
        self.loop.stop.set()

    def _worker(self, name: str) -> RolloutWorker:
        buffer = self.link(self.buffer, name, "finish")
        return RolloutWorker(
            buffer=buffer,
            agent=self._agent(),
            concurrency=self.concurrency,
            policy_url=self.url,
            model=MODEL,
            worker=name,
        )

    def _agent(self) -> AgentConfig:
        return self.agent if isinstance(self.agent, AgentConfig) else AgentConfig(target=self.agent, timeout_s=10.0)

    def _loop(self, state: State) -> Loop:
        plan = Plan(
            steps=0,
            algorithm=self.algorithm.model_copy(update={"tasks_per_step": len(self.tasks)}),
            loop=self.overlap,
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


class _QuietServer(uvicorn.Server):
    """A server that leaves signals alone: Ctrl-C in a test or a notebook must reach its owner."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@asynccontextmanager
async def serve_locally(gateway: Gateway) -> AsyncIterator[str]:
    """Serve a gateway in this event loop, on a free port; yields its root URL, such as "http://127.0.0.1:41234"."""
    config = uvicorn.Config(
        application(gateway),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=60,  # longer than an event loop may be busy, so that clients can reuse their connections
        timeout_graceful_shutdown=1,
    )
    server = _QuietServer(config)
    # IPPROTO_TCP is given because asyncio disables Nagle's delay of 40 ms only for sockets that declare it.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(2048)  # clients may connect before the server accepts
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
