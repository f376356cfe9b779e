"""Tags that processes carry in their environment and their descendants inherit. Imports only the standard library.

As a script this file is a guard. It waits until its stdin is closed, because the process that started it closes it or
is gone, waits SECONDS more, and then kills every process whose tag NAME begins with START:

    python -I -S process_tags.py NAME START SECONDS
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

CHILD: Final = "AGL_PROCESS_TREE"
"""The name of the tag of a child process and its descendants."""
CLUSTER: Final = "AGL_CLUSTER"
"""The name of the tag of all processes of a Ray cluster that was started for one run."""
_ROUNDS: Final = 20
"""How often processes with the tag are looked up: a process may start another just before it is killed."""


def kill_tagged(start: str, name: str = CHILD) -> None:
    """Kill every process whose tag `name` begins with `start`."""
    tag = f"{name}={start}".encode()
    for _ in range(_ROUNDS):  # bounded, as processes may start others as fast as they are killed
        tagged = [pid for pid in _pids() if tag in _environment(pid)]
        if not tagged:
            return
        for pid in tagged:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _pids() -> list[int]:
    """The ids of all processes; empty if the system has no /proc."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return []


def _environment(pid: int) -> bytes:
    """The environment that a process was started with; b"" if it is another user's, has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _guard() -> None:
    name, start, grace = sys.argv[1:]
    sys.stdin.buffer.read()  # returns when the other end of the pipe is closed
    time.sleep(float(grace))
    kill_tagged(start, name)


if __name__ == "__main__":
    _guard()
