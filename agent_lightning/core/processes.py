"""Child processes that end with everything they started.

A child gets a group of its own, and a mark in its environment, which its descendants inherit. At its end the group is
killed, and then whoever has the mark: daemons that have left the group or the session too. What escapes is a process
that has left the group and cleared its environment. Where there is no /proc, it is the group only.

Where this process itself is killed with -9, its guard (`process_tags.py`) ends what its children have started.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Final

from agent_lightning.core import process_tags as marks
from agent_lightning.core.errors import AgentProcessError
from agent_lightning.core.process_tags import CLUSTER, MARK, kill_marked
from agent_lightning.core.text import last_line

_TAIL: Final = 1 << 20
"""Bytes kept of what a child prints: enough for any result, and a bound on a child that prints forever."""


async def run_child(command: Sequence[str], *, stdin: str, env: Mapping[str, str]) -> str:
    """What a child prints, its last MiB. Raises AgentProcessError with its last line of stderr where it fails."""
    pipe, mark = asyncio.subprocess.PIPE, f"{_guarded(os.getpid())}{uuid.uuid4().hex}"
    child = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env={**env, MARK: mark}, start_new_session=True
    )
    stdout, stderr = bytearray(), bytearray()
    assert child.stdout is not None
    assert child.stderr is not None
    helpers = [
        asyncio.create_task(_feed(child, stdin.encode())),
        asyncio.create_task(_drain(child.stdout, stdout)),
        asyncio.create_task(_drain(child.stderr, stderr)),
    ]
    try:
        # Polled, as `child.wait()` also waits for the pipes, which a descendant may hold open. Ends: exit or cancel.
        while child.returncode is None:
            await asyncio.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        # Shielded: a second cancellation must not leave a process behind.
        await asyncio.shield(asyncio.to_thread(kill_marked, mark))
        _, stuck = await asyncio.wait(helpers, timeout=1.0)  # one that escaped may hold the pipes
        for helper in stuck:
            helper.cancel()
        while child.returncode is None:  # ends: SIGKILL cannot be refused
            await asyncio.sleep(0.005)
    if child.returncode != 0:
        raise AgentProcessError(last_line(stderr.decode(errors="replace")) or f"exit code {child.returncode}")
    return stdout.decode(errors="replace")


def guard(name: str, start: str, *, grace_s: float = 0.0) -> subprocess.Popen[bytes]:
    """A process that ends all whose mark `name` begins with `start`, `grace_s` after its stdin is closed or this
    process is gone, whatever ends it. Whoever started it holds it."""
    # A session of its own, so that it outlives whoever kills this one's; no mark, as another's guard may not end it.
    env = {key: value for key, value in os.environ.items() if key not in (MARK, CLUSTER)}
    command = [sys.executable, "-I", "-S", marks.__file__, name, start, str(grace_s)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, start_new_session=True)


@functools.cache
def _guarded(pid: int) -> str:
    """What every mark of this process begins with."""
    start = f"{pid}.{uuid.uuid4().hex}."
    _guards.append(guard(MARK, start))
    return start


_guards: Final[list[subprocess.Popen[bytes]]] = []


async def _feed(child: asyncio.subprocess.Process, text: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read
        child.stdin.write(text)
        await child.stdin.drain()
        child.stdin.close()


async def _drain(stream: asyncio.StreamReader, tail: bytearray) -> None:
    while chunk := await stream.read(1 << 16):
        tail += chunk
        del tail[:-_TAIL]
