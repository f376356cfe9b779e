"""Agents, rewards and a small gateway that the tests run for real.

aiohttp is imported where it is used: a process that runs one of these agents starts in half the time without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agent_lightning.buffer.buffer import Buffer, verify_secret
from agent_lightning.core.errors import UnknownRollout
from agent_lightning.core.types import ModelCall, Outcome, Policy, RolloutKey, Task
from agent_lightning.learners.base import WeightBucket, Weights
from agent_lightning.testing.model import ToyLanguage

if TYPE_CHECKING:
    from aiohttp import web

RUN_SECRET = b"a secret of the tests"
Payload = Mapping[str, Any]


def skilled(words: Sequence[str]) -> Weights:
    """A toy policy that says the first of two words, a tool call, and the second when it has the result, which is 5."""
    language = ToyLanguage(words)
    table = np.tile(np.array([50.0, 0.0], np.float32), (language.num_states, 1))
    table[language.state(language.encode([{"role": "tool", "content": "5"}]))] = [0.0, 50.0]
    entry = {"name": "table", "dtype": "float32", "shape": list(table.shape), "offset": 0}
    data = np.frombuffer(table.tobytes(), np.uint8)
    return Weights(version=0, buckets=(WeightBucket(parameters=(entry,), data=data),))


def make_call(key: RolloutKey, call_id: str, *, started_at: float = 0.0, num_tokens: int = 2) -> ModelCall:
    return ModelCall(
        key=key,
        call_id=call_id,
        agent="agent",
        policy_version=0,
        prompt_T=np.arange(3, dtype=np.int32),
        response_T=np.arange(num_tokens, dtype=np.int32),
        logprob_T=np.zeros(num_tokens, dtype=np.float32),
        finish_reason="stop",
        started_at=started_at or time.time(),
        ended_at=time.time(),
    )


def make_task(number: int = 0, **payload: object) -> Task:
    return Task(task_id=f"task-{number}", payload={"number": number, **payload})


class SmallGateway:
    """Records a call for each request; a request that says {"fail": outcome} is refused for that reason."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer
        self._num_calls = 0

    async def chat(self, request: web.Request) -> web.Response:
        from aiohttp import web

        match = request.match_info
        key = RolloutKey.parse(match["rollout"], int(match["attempt"]))
        if not verify_secret(RUN_SECRET, key, match["secret"]):
            return web.json_response({"error": "wrong secret"}, status=403)
        body = await request.json()
        try:
            if fail := body.get("fail"):
                await self._buffer.note_failure(key, Outcome(fail), f"the gateway says {fail}")
                return web.json_response({"error": {"code": fail}}, status=400)
            self._num_calls += 1
            left = await self._buffer.record(make_call(key, f"call-{self._num_calls}"))
        except UnknownRollout as error:
            return web.json_response({"error": str(error)}, status=410)
        return web.json_response({"answer": body["number"] * 2, "left": left})


@dataclass(slots=True)
class Outage:
    """Of a gateway."""

    refused: int = 0
    over: bool = False


@asynccontextmanager
async def small_gateway(buffer: Buffer, outage: Outage | None = None) -> AsyncIterator[str]:
    """In an `outage`, all get the 404 of a proxy that has no gateway."""
    from aiohttp import web

    @web.middleware
    async def proxy(request: web.Request, handler: Any) -> web.StreamResponse:
        if outage is not None and not outage.over:
            outage.refused += 1
            raise web.HTTPNotFound(text="no such route")
        answer: web.StreamResponse = await handler(request)
        return answer

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    application = web.Application(middlewares=[proxy])
    application.router.add_get("/health", health)
    path = "/rollout/{rollout}/attempt/{attempt}/{secret}/{agent}/v1/chat/completions"
    application.router.add_post(path, SmallGateway(buffer).chat)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "http://{}:{}".format(*runner.addresses[0][:2])
    finally:
        await runner.cleanup()


async def ask(base_url: str, **body: object) -> int:
    from aiohttp import ClientSession

    async with (
        ClientSession(raise_for_status=True) as http,
        http.post(f"{base_url}/chat/completions", json=body) as got,
    ):
        return int((await got.json())["answer"])


def ask_blocking(base_url: str, **body: object) -> int:
    request = urllib.request.Request(f"{base_url}/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=5) as reply:
        return int(json.load(reply)["answer"])


def score(payload: Payload, output: object) -> bool:
    return output == 2 * payload["number"]


async def score_async(payload: Payload, output: object) -> float:
    await asyncio.sleep(0)
    return float(output == 2 * payload["number"])


def score_raises(payload: Payload, output: object) -> float:
    raise KeyError("no such answer")


async def score_hangs(payload: Payload, output: object) -> float:
    await asyncio.sleep(60)
    return 1.0


async def doubles(payload: Payload, policy: Policy) -> int:
    return await ask(policy.base_url, number=payload["number"])


def doubles_blocking(payload: Payload, policy: Policy) -> int:
    return ask_blocking(policy.base_url, number=payload["number"])


def doubles_from_environment(payload: Payload) -> int:
    print("agents may print", os.environ["AGL_MODEL"], os.environ["AGL_ROLLOUT_ID"])
    return ask_blocking(os.environ["OPENAI_BASE_URL"], number=payload["number"])


async def does(payload: Payload, policy: Policy) -> object:
    """One call, then what the payload asks for."""
    await ask(policy.base_url, number=payload["number"])
    match payload["do"]:
        case "raise":
            raise ValueError("first line\nsecond line")
        case "raise a timeout":
            raise TimeoutError("of its own")
        case "raise a group":
            raise ExceptionGroup("several", [ValueError("inner")])
        case "raise the url":
            raise ValueError(f"cannot reach {policy.base_url}")
        case "exit":
            sys.exit(3)
        case "cancel":
            raise asyncio.CancelledError
        case "hang":
            await asyncio.sleep(60)
        case "refuse to stop":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                return 1.0
        case "never stop":
            end = time.monotonic() + 5.0  # asyncio waits for it at the end of the test
            while time.monotonic() < end:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(1.0)
        case "none":
            return None
        case "nan":
            return math.nan
        case "infinity":
            return math.inf
        case "string":
            return "1.0"
        case "too much":
            return 1.5
        case "true":
            return True
        case "numpy":
            return np.float32(0.5)
    return 1.0


async def is_refused(payload: Payload, policy: Policy) -> float:
    """The gateway refuses its call; it raises, or handles that."""
    try:
        await ask(policy.base_url, number=1, fail=payload["fail"])
    except Exception:
        if not payload["handles"]:
            raise
    await ask(policy.base_url, number=1)
    if payload.get("own_bug"):
        raise KeyError("its own bug")
    return 1.0


async def calls_nothing(payload: Payload, policy: Policy) -> float:
    return 1.0


def blocks(payload: Payload, policy: Policy) -> float:
    time.sleep(payload.get("seconds", 3.0))
    return 1.0


def raises_stop_iteration(payload: Payload, policy: Policy) -> float:
    return next(iter(()))


def hangs_with_a_grandchild(payload: Payload, policy: Policy) -> float:
    """Writes its pid and its child's to a file, and hangs in a way that no signal but SIGKILL ends."""
    import signal

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(payload["pids"], "w") as file:
        file.write(f"{os.getpid()} {grandchild.pid}\n")
    time.sleep(60)
    return 1.0


def leaves_a_grandchild(payload: Payload, policy: Policy) -> float:
    """Returns while its child lives on and holds its stdout."""
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(payload["pids"], "w") as file:
        file.write(f"{os.getpid()} {grandchild.pid}\n")
    return 0.5


def dies(payload: Payload, policy: Policy) -> float:
    raise ValueError("it died")


def exits_quietly(payload: Payload, policy: Policy) -> float:
    os._exit(0)


def returns_the_payload(payload: Payload, policy: Policy) -> dict[str, object]:
    return {"payload": payload, "model": policy.model, "temperature": policy.sampling["temperature"]}


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that died and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kills_its_worker_once(payload: Payload, policy: Policy) -> float:
    """The first attempt starts a daemon and kills the worker that started it; both would go on."""
    ask_blocking(policy.base_url, number=1)
    if os.environ["AGL_ATTEMPT"] != "0":
        return 1.0
    daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    with open(payload["pids"], "w") as file:
        file.write(f"{os.getpid()} {daemon.pid}\n")
    os.kill(os.getppid(), 9)
    time.sleep(600)
    return 0.0


async def blocks_the_event_loop(payload: Payload, policy: Policy) -> float:
    time.sleep(600)
    return 0.0
