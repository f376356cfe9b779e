"""Processes known by a mark in their environment, which all that they start inherits. The standard library only.

As a script it is a guard: it waits until whoever started it is gone, however that ended, and kills what that has left:

    python -I -S process_tags.py NAME MARK SECONDS   # ends what has a mark that begins so, once its stdin is closed
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

MARK: Final = "AGL_PROCESS_TREE"
"""Of a child and all that it starts."""
CLUSTER: Final = "AGL_CLUSTER"
"""Of a Ray cluster that was started for one run."""
_ROUNDS: Final = 20
"""Looks for processes with the mark: one that is found may have started another just before it was killed."""


def kill_marked(start: str, name: str = MARK) -> None:
    """Kill every process whose mark of this name begins so."""
    sought = f"{name}={start}".encode()
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


def _guard() -> None:
    name, start, grace = sys.argv[1:]
    sys.stdin.buffer.read()  # ends when the pipe's other end is closed: its owner has ended
    time.sleep(float(grace))
    kill_marked(start, name)


if __name__ == "__main__":
    _guard()
