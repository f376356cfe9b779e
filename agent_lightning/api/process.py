"""A function of `work` in a process of its own, which starts and ends Ray, whatever runs in the caller's.

The process reads {"function": "train", "arguments": {...}, "answer": FILE} from its standard input, and writes
{"value": ...} or {"error": "one line", "user": true} to FILE.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from agent_lightning.core import files
from agent_lightning.core.errors import AgentLightningError, RunFailed, UserError
from agent_lightning.core.text import last_line, one_line
from agent_lightning.core.types import Policy


def run(function: str, **arguments: Any) -> Any:
    """Call a function of `work` and return what it returns. Raises UserError, and RunFailed for any other error."""
    with started(function, **arguments) as child:
        child.show_output(until=lambda: False)
        return child.answer()


@contextmanager
def started(function: str, **arguments: Any) -> Iterator[Child]:
    """A process that calls a function of `work`; it is stopped in order when the block ends."""
    width = str(shutil.get_terminal_size((100, 40)).columns)
    environment = {**os.environ, "COLUMNS": width, "PYTHONUNBUFFERED": "1"}
    with TemporaryDirectory(prefix="agl-call-") as folder:
        request = {"function": function, "arguments": arguments, "answer": f"{folder}/answer.json"}
        with open(f"{folder}/errors", "w+") as errors:
            # -P: no file of the folder where a notebook lies may stand for a module of Python's.
            command = [sys.executable, "-P", "-m", "agent_lightning.api.process"]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
                assert process.stdin is not None
                with process.stdin:
                    json.dump(request, process.stdin)
                try:
                    yield Child(process, Path(folder))
                finally:
                    if process.poll() is None:
                        process.send_signal(signal.SIGINT)
                        process.wait()


@dataclass(frozen=True, slots=True)
class Child:
    """A process that calls a function of `work`."""

    process: subprocess.Popen[str]
    folder: Path

    def show_output(self, until: Callable[[], bool]) -> None:
        """Write the process's output here, until the process ends or `until` is true after a line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            sys.stdout.write(line)
            if until():
                return
        self.process.wait()

    def has_answered(self) -> bool:
        return (self.folder / "answer.json").is_file()

    def answer(self) -> Any:
        """What the function has returned. Raises UserError, or RunFailed."""
        if not self.has_answered():
            text = last_line((self.folder / "errors").read_text(errors="replace"))
            raise RunFailed(text or f"it ended with exit code {self.process.wait()}")
        answer = json.loads((self.folder / "answer.json").read_text(encoding="utf-8"))
        if "error" in answer:
            raise (UserError if answer["user"] else RunFailed)(answer["error"])
        return answer["value"]


def main() -> int:
    """The process's own part. Returns its exit code."""
    request = json.load(sys.stdin)
    path = Path(request["answer"])

    def write(answer: Any) -> None:
        files.write_text(path, json.dumps(answer, default=str))

    async def call() -> None:
        from agent_lightning.api import work  # after the request is read: it takes a second

        def ready(policy: Policy) -> None:
            write({"value": {"base_url": policy.base_url, "model": policy.model, "api_key": policy.api_key}})
            sys.stdout.write("\n")  # the caller looks for the answer after each line

        function, more = request["function"], {"ready": ready} if request["function"] == "serve" else {}
        value = await getattr(work, function)(**request["arguments"], **more)
        if function != "serve":
            write({"value": value})

    try:
        asyncio.run(call())
    except (AgentLightningError, KeyboardInterrupt) as error:
        write({"error": one_line(error) or "stopped", "user": isinstance(error, UserError)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
