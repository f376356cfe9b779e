"""Child processes that end together with everything they have started.

A child has a process group of its own, and a tag in its environment that its descendants inherit. When it ends, its
group is killed, and then every process with the tag: also daemons that have left the group or the session. Only a
process that has left the group and cleared its environment escapes. Without /proc, only the group is killed.

If this process is killed with -9, its guard (`process_tags.py`) ends what its children have started.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import functools
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from agent_lightning.core import process_tags
from agent_lightning.core.errors import AgentProcessError
from agent_lightning.core.process_tags import CHILD, CLUSTER, kill_tagged
from agent_lightning.core.text import last_line

_TAIL: Final = 1 << 20
"""Bytes of a child's output that are kept: enough for any result, and a bound for a child that prints forever."""


def cpu_environment(threads: int) -> dict[str, str]:
    """The variables of a process that computes on a CPU with this many threads. Ray would give it one.

    Each operation of torch allocates tensors of many MB. By default glibc maps each one anew, and the kernel zeroes it
    page by page; with these settings memory is used again, in large pages: publishing 538 MB takes 1.5 s instead of
    3.5. A GLIBC_TUNABLES that is set already stays.
    """
    allocator = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1073741824:glibc.malloc.hugetlb=1"
    return {"OMP_NUM_THREADS": str(threads), "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", allocator)}


async def run_child(
    command: Sequence[str],
    *,
    stdin: str,
    env: Mapping[str, str],
    show: Callable[[str], None] = lambda text: None,
    show_stdout: Callable[[str], None] = lambda text: None,
) -> str:
    """Run a command to its end, and return the last MiB of its stdout. `show` gets its stderr as it comes, and
    `show_stdout` its stdout. If the caller is cancelled, the child is killed. Raises AgentProcessError, with the last
    line of its stderr, if its exit code is not 0."""
    pipe, tag = asyncio.subprocess.PIPE, f"{_guarded_tag(os.getpid())[0]}{uuid.uuid4().hex}"
    child = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env={**env, CHILD: tag}, start_new_session=True
    )
    stdout, stderr = bytearray(), bytearray()
    assert child.stdout is not None
    assert child.stderr is not None
    helpers = [
        asyncio.create_task(_feed(child, stdin.encode())),
        asyncio.create_task(_drain(child.stdout, stdout, show_stdout)),
        asyncio.create_task(_drain(child.stderr, stderr, show)),
    ]
    try:
        # Polled, because `child.wait()` also waits for the pipes, which a descendant may hold open.
        while child.returncode is None:
            await asyncio.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        # Shielded: a second cancellation must not leave a process behind.
        await asyncio.shield(asyncio.to_thread(kill_tagged, tag))
        _, stuck = await asyncio.wait(helpers, timeout=1.0)  # a descendant that escaped may hold the pipes
        for helper in stuck:
            helper.cancel()
        while child.returncode is None:  # SIGKILL cannot be refused
            await asyncio.sleep(0.005)
    if child.returncode != 0:
        raise AgentProcessError(last_line(stderr.decode(errors="replace")) or f"exit code {child.returncode}")
    return stdout.decode(errors="replace")


def guard(
    name: str, start: str, *, grace_s: float = 0.0, folder: Path | None = None, logs: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that kills every process whose tag `name` begins with `start`, copies the logs in their `folder`
    to `logs`, and removes `folder`. It does so `grace_s` seconds after its stdin is closed, which the end of this
    process does too, however it ends."""
    # In a session of its own, so that a signal to this session does not end it; without tags, so that no other guard
    # kills it.
    env = {key: value for key, value in os.environ.items() if key not in (CHILD, CLUSTER)}
    command = [sys.executable, "-I", "-S", process_tags.__file__, name, start, str(grace_s)]
    command += [str(folder or ""), str(logs.absolute() if logs else "")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, start_new_session=True)


@functools.cache
def _guarded_tag(pid: int) -> tuple[str, subprocess.Popen[bytes]]:
    """The beginning of the tags of all children of this process, and their guard, which starts with the first child. By
    process id, because a forked process inherits the cache. The cache keeps the pipe to the guard open."""
    start = f"{pid}.{uuid.uuid4().hex}."
    return start, guard(CHILD, start)


async def _feed(child: asyncio.subprocess.Process, text: bytes) -> None:
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the child need not read its input
        child.stdin.write(text)
        await child.stdin.drain()
        child.stdin.close()


async def _drain(stream: asyncio.StreamReader, tail: bytearray, show: Callable[[str], None]) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while chunk := await stream.read(1 << 16):
        show(decoder.decode(chunk))
        tail += chunk
        del tail[:-_TAIL]
