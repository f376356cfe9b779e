"""What shows how a user's code failed: its line and frames, the last 4 KiB that it printed, and the worker's log."""

from __future__ import annotations

import logging
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Final, TextIO, cast

from opentelemetry import context

from agent_lightning.core.text import error_line, hide_secret

_PACKAGE: Final = str(Path(__file__).parents[1])
_LIBRARIES: Final = (*{sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}, "<frozen", "<string>")
_MOST_FRAMES: Final = 20
_LONGEST: Final = 8000  # characters of the frames that are kept: the last ones, since a traceback ends with the error
_PRINTED = context.create_key("agent_lightning.printed")
_KEPT: Final = 4096

log = logging.getLogger("agent_lightning.printed")
log.propagate = False  # it writes to the worker's log only: what was printed is on the standard streams already


def place_of(error: BaseException) -> str:
    """The user's line that failed, such as "mine/agent.py:12 in solve": the innermost frame of the error, or of its
    cause, that belongs to no library and not to this package; "" if there is none."""
    for cause in _causes(error, set()):
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if _is_users(frame.filename):
                path = Path(frame.filename)
                shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
                return f"{shown}:{frame.lineno} in {frame.name}"
        if isinstance(cause, SyntaxError) and cause.filename:
            return f"{cause.filename}:{cause.lineno}"
    return ""


def described(error: BaseException) -> str:
    """The error as one line, and the user's line that raised it: "KeyError: 'x' (mine/agent.py:12 in solve)"."""
    place = place_of(error)
    return error_line(error) + (f" ({place})" if place else "")


def frames_of(error: BaseException, *, secret: str = "") -> str:
    """The user's line that failed, and below it the traceback: at most 20 frames of each error, without those of this
    package above the user's code; "" if no code of the user is involved. `secret` is hidden."""
    if not (place := place_of(error)):
        return ""
    frames = error.__traceback__
    while frames is not None and not _is_users(frames.tb_frame.f_code.co_filename):
        frames = frames.tb_next  # from the worker to the user's code
    lines = traceback.format_exception(type(error), error, frames, limit=-_MOST_FRAMES)
    return hide_secret(f"{place}\n{''.join(lines).strip()[-_LONGEST:]}", secret)


def _causes(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """The error, the first member of a group before the group, and what it was raised from."""
    if id(error) in seen:
        return
    seen.add(id(error))
    if isinstance(error, BaseExceptionGroup):
        yield from _causes(error.exceptions[0], seen)
    yield error
    if (cause := error.__cause__ or error.__context__) is not None:
        yield from _causes(cause, seen)


def _is_users(file: str) -> bool:
    ours = file.startswith(_PACKAGE) and not file.startswith(f"{_PACKAGE}/examples/")
    return not (ours or file.startswith(_LIBRARIES) or "/site-packages/" in file or "/dist-packages/" in file)


class Printed:
    """The end of what the code of an attempt has printed.

    In modes async and thread, the context in which code runs tells whose output it is; OpenTelemetry's instrumentor of
    threads carries that context into threads and their pools. A process or a command has pipes of its own.
    """

    def __init__(self, name: str) -> None:
        self._name, self._line = name, ""  # the name begins each line in the worker's log
        self._tail, self._errors = "", ""

    def write(self, text: str) -> None:
        self._tail = (self._tail + text)[-_KEPT:]
        self._log(text)

    def write_error(self, text: str) -> None:
        """Add text of a stderr that has a pipe of its own, so that its place in the output is not known: its last 2 KiB
        are kept at the end."""
        self._errors = (self._errors + text)[-_KEPT // 2 :]
        self._log(text)

    def _log(self, text: str) -> None:
        *lines, rest = (self._line + text).split("\n")
        self._line = rest[-_KEPT:]
        for line in lines if log.handlers else ():
            log.info("%s: %s", self._name, line)

    def text(self) -> str:
        """The last 4 KiB."""
        errors = self._errors.encode("utf-8", "replace")[-_KEPT // 2 :]
        tail = self._tail.encode("utf-8", "replace")[-_KEPT + len(errors) :]
        return (tail + errors).decode("utf-8", "ignore")


@contextmanager
def keeping(printed: Printed) -> Iterator[None]:
    """Whatever runs in the block, and whatever it starts, prints into `printed` as well."""
    token = context.attach(context.set_value(_PRINTED, printed))
    try:
        yield
    finally:
        context.detach(token)


class _Stream:
    """A standard stream that shows each attempt what it prints."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        printed = context.get_value(_PRINTED)
        if isinstance(printed, Printed):
            printed.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def follow_streams(path: Path | None) -> None:
    """Follow this process's standard streams, and log what attempts print, and what this package reports, in the file.
    To be called before the agent's module is imported: a handler of `logging` keeps the stream that it first saw.
    Without the folder above, as on a node that does not share the run's folder, there is no file."""
    for name in ("stdout", "stderr"):
        stream = vars(sys)[name]
        if stream is not None and not isinstance(stream, _Stream):
            setattr(sys, name, cast(TextIO, _Stream(stream)))
    if path is not None and path.parent.parent.is_dir() and not log.handlers:
        path.parent.mkdir(exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=16 << 20, backupCount=1, encoding="utf-8", errors="replace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        for logger in (log, logging.getLogger("agent_lightning")):
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
