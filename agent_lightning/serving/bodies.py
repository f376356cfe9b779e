"""The body of a request: read, inflated and parsed within bounds, beside the event loop if it is large.

    bytes -> inflated -> text -> number of values counted -> JSON -> a dict that a span can hold

Whatever a body holds, reading it costs its attempt bounded time and memory, and the others next to nothing: large
bodies are read by one thread, those of an attempt one after the other.
"""

from __future__ import annotations

import asyncio
import codecs
import gc
import json
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from agent_lightning.core.errors import DataError
from agent_lightning.core.inflate import UnknownEncoding, inflate
from agent_lightning.core.json_values import is_deeper
from agent_lightning.serving.calls import Attempt
from agent_lightning.serving.dialects.base import BadRequest

T = TypeVar("T")

_LARGE = 16 * 1024
"""Bytes from which on a body is not read in the event loop; below, a thread would cost more than the reading."""
_CHARSETS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
_CHARSET = re.compile(r"""(?i);\s*charset\s*=\s*["']?([^\s;"']+)""")
_ONE_BYTE = ("ascii", "iso8859-1", "cp1252")
"""Charsets that must be declared; the others are told by the first bytes, as JSON begins with ASCII."""


def prepare_process() -> None:
    """Let the event loop of this process wait less for the threads that read bodies. What is imported is left out of
    garbage collections, and a thread gives Python's lock away after 0.5 ms instead of 5: a request takes it several
    times."""
    gc.freeze()
    sys.setswitchinterval(0.0005)


class Reader:
    """Reads the bodies of all attempts."""

    def __init__(
        self, *, max_bytes: int, max_bytes_in_flight: int, max_depth: int, max_values: int, max_objects: int
    ) -> None:
        """`max_bytes` bounds a body, before and after it is inflated, and `max_bytes_in_flight` all bodies of an
        attempt that are being read or answered; the others bound the JSON of a body."""
        self._max_bytes, self._max_bytes_in_flight = max_bytes, max_bytes_in_flight
        self._max_depth, self._limits = max_depth, {"values": max_values, "objects": max_objects}
        # One: threads take turns with the event loop for Python's lock, so more of them would delay it more.
        self._thread = ThreadPoolExecutor(1, "bodies")

    @asynccontextmanager
    async def reading(self, request: Request, attempt: Attempt) -> AsyncIterator[bytes]:
        """The inflated body of a request, which counts as in flight until the block ends. Raises BadRequest if the
        client goes away, or if the body is too large or cannot be inflated."""
        raw, held = bytearray(), 0

        def hold(size: int) -> None:
            nonlocal held
            held, attempt.bytes_in_flight = held + size, attempt.bytes_in_flight + size
            if held > self._max_bytes:
                raise BadRequest(f"the request is over {self._max_bytes} bytes", "size", 413)
            if attempt.bytes_in_flight > self._max_bytes_in_flight:
                limit = f"requests of over {self._max_bytes_in_flight} bytes in flight"
                raise BadRequest(f"this rollout has {limit}: try again later", "busy", 429, type="rate_limit_error")

        try:
            async for part in request.stream():
                raw += part
                hold(len(part))
            encoding, plain = request.headers.get("content-encoding", ""), bytes(raw)
            if encoding:
                plain = await self.apart(attempt, _LARGE, lambda: inflate(bytes(raw), encoding, self._max_bytes))
                hold(max(0, len(plain) - len(raw)))
            yield plain
        except ClientDisconnect:
            raise BadRequest("the client went away", "disconnected") from None
        except UnknownEncoding as error:
            raise BadRequest(str(error), "unsupported", 415) from None
        except DataError as error:
            raise BadRequest(str(error)) from None
        finally:
            attempt.bytes_in_flight -= held

    async def apart(self, attempt: Attempt, size: int, work: Callable[[], T]) -> T:
        """The result of work on a body of `size` bytes: for a large one, of the thread's work, when it has done the
        earlier work of the attempt."""
        if size < _LARGE:
            return work()
        async with attempt.reading:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def parse(self, raw: bytes, content_type: str) -> dict[str, Any]:
        """The JSON object that a body holds, of which every text is UTF-8 and every number finite. Raises BadRequest,
        whose message says what is wrong and where."""
        text = _decode(raw, content_type)
        _check_size(text, self._limits)
        try:
            body = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_float)
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise BadRequest(f"the request is not JSON: {place}" if text.strip() else "the request is empty") from None
        except ValueError:  # Python reads no longer ones
            raise BadRequest("the request has a number of more than 4300 digits") from None
        except RecursionError:
            raise BadRequest(f"the request is nested more than {self._max_depth} levels deep") from None
        if is_deeper(body, self._max_depth):
            raise BadRequest(f"the request is nested more than {self._max_depth} levels deep")
        if not isinstance(body, dict):
            raise BadRequest("the request is not a JSON object")
        if "\\ud" in text or "\\uD" in text:
            _check_surrogates(body)
        return body


def _decode(raw: bytes, content_type: str) -> str:
    """The text of a body, without a byte order mark. Raises BadRequest."""
    match = _CHARSET.search(content_type)
    declared = match[1] if match else "utf-8"
    try:
        charset = codecs.lookup(declared).name
    except LookupError:
        charset = ""
    if charset not in (*_CHARSETS, *_ONE_BYTE):
        raise BadRequest(f"charset {declared[:50]!r} is not read: send UTF-8", "unsupported", 415)
    charset = charset if charset in _ONE_BYTE else json.detect_encoding(raw)
    try:
        return raw.decode(charset)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request is not {charset.upper()} text: byte {error.start}") from None


def _check_size(text: str, limits: Mapping[str, int]) -> None:
    """Raises BadRequest for a JSON text with more values or objects than the limits, before any of them is made."""
    for exact in (False, True):
        if exact:  # without what is in strings: a backslash occurs nowhere else
            text = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
        objects = text.count("{")
        counts = {"values": objects + text.count(",") + text.count("["), "objects": objects}
        excess = [name for name, limit in limits.items() if counts[name] >= limit]
        if not excess:
            return
    raise BadRequest(f"the request has more than {limits[excess[0]]} {excess[0]}", "size", 413)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BadRequest(f"the key {name[:100]!r} stands in one object more than once")
    return value


def _no_number(text: str) -> NoReturn:
    raise BadRequest(f"{text} is no number in JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise BadRequest(f"the number {text[:50]} is too large")
    return value


def _check_surrogates(body: Mapping[str, Any]) -> None:
    """Raises BadRequest, which names the place, for half of a surrogate pair: no span can hold it."""
    level: list[tuple[str, Any]] = [("", body)]
    while level:  # ends: the depth is bounded
        inner: list[tuple[str, Any]] = []
        for place, value in level:
            if isinstance(value, str):
                _check_text(value, place)
            elif isinstance(value, dict):
                for key, item in value.items():
                    _check_text(key, f"a key of {place or 'the request'}")
                    inner.append((f"{place}.{key}".lstrip("."), item))
            elif isinstance(value, list):
                inner += [(f"{place}[{index}]", item) for index, item in enumerate(value)]
        level = inner


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        message = f"{place[:200]}: half of a surrogate pair ({half}), which is no text"
        raise BadRequest(message, param=place[:200]) from None
