"""Child processes that end with everything they started.

A child gets a group of its own, and a mark in its environment, which its descendants inherit. At its end the group is
killed, and then whoever has the mark: daemons that have left the group or the session too. What escapes is a process
that has left the group and cleared its environment. Where there is no /proc, it is the group only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from agent_lightning.errors import AgentProcessError

_TAIL: Final = 1 << 20
"""Bytes kept of what a child prints: enough for any result, and a bound on a child that prints forever."""
_MARK: Final = "AGL_PROCESS_TREE"
_ROUNDS: Final = 20
"""Looks for processes with the mark: one that is found may have started another just before it was killed."""


async def run_child(command: Sequence[str], *, stdin: str, env: Mapping[str, str]) -> str:
    """What a child prints, its last MiB. Raises AgentProcessError with its last line of stderr where it fails."""
    pipe, mark = asyncio.subprocess.PIPE, uuid.uuid4().hex
    child = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env={**env, _MARK: mark}, start_new_session=True
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
        await asyncio.shield(asyncio.to_thread(_kill_marked, mark))
        _, stuck = await asyncio.wait(helpers, timeout=1.0)  # one that escaped may hold the pipes
        for helper in stuck:
            helper.cancel()
        while child.returncode is None:  # ends: SIGKILL cannot be refused
            await asyncio.sleep(0.005)
    if child.returncode != 0:
        raise AgentProcessError(last_line(stderr.decode(errors="replace")) or f"exit code {child.returncode}")
    return stdout.decode(errors="replace")


def last_line(text: str) -> str:
    """The last that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _kill_marked(mark: str) -> None:
    sought = f"{_MARK}={mark}".encode()
    for _ in range(_ROUNDS):  # ends where none is left, or where they start others as fast as they are killed
        found = [pid for pid in _pids() if sought in _environment(pid)]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return []


def _environment(pid: int) -> bytes:
    """Of a process as it was started; b"" of one that is another user's, has ended, or waits to be buried."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


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
