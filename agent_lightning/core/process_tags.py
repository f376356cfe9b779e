"""Tags that processes carry in their environment and their descendants inherit. Imports only the standard library.

As a script this file is a guard. It waits until its stdin is closed, because the process that started it closes it or
is gone, waits SECONDS more, and then kills every process whose tag NAME begins with START. If FOLDER is not "", it is
the temporary folder of a Ray cluster, and is removed; its logs are copied to LOGS before, if that is not "":

    python -I -S process_tags.py NAME START SECONDS FOLDER LOGS
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Final

CHILD: Final = "AGL_PROCESS_TREE"  # the name of the tag of a child process and its descendants
CLUSTER: Final = "AGL_CLUSTER"  # the name of the tag of all processes of a Ray cluster that was started for one run


def kill_tagged(start: str, name: str = CHILD) -> None:
    """Kill every process whose tag `name` begins with `start`."""
    tag = f"{name}={start}".encode()
    for _ in range(20):  # again, as a process may start another just before it is killed; but not forever
        # Without /proc there is nothing to look up.
        tagged = [process.name for process in Path("/proc").glob("[0-9]*") if tag in _environment(process)]
        if not tagged:
            return
        for process_id in tagged:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(process_id), signal.SIGKILL)


def _environment(process: Path) -> bytes:
    """The environment that a process was started with; b"" if it is another user's, has ended, or is a zombie."""
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def clean(folder: Path, logs: str) -> None:
    """Remove the folder of a Ray cluster; copy its logs that are not empty to the folder `logs`, unless that is ""."""

    def empty(parent: str, names: list[str]) -> list[str]:
        return [name for name in names if not (Path(parent) / name).lstat().st_size]

    for session in folder.glob("ray/session_[0-9]*") if logs else ():
        with contextlib.suppress(OSError):  # a full disk; what could be copied is
            shutil.copytree(session / "logs", Path(logs) / session.name, ignore=empty)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    tag_name, tag_start, grace_s, temporary, kept = sys.argv[1:]
    sys.stdin.buffer.read()  # returns when the other end of the pipe is closed
    time.sleep(float(grace_s))
    kill_tagged(tag_start, tag_name)
    if temporary:
        clean(Path(temporary), kept)
