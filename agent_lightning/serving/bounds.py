"""What a body from outside may be: how large, how deep, and that the secret of its URL is not kept with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request

from agent_lightning.serving.engine import Refusal

HIDDEN = "*"
"""Stands for each character of a secret: the text keeps its length, so also a binary format stays whole."""


def is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested in each other more than `limit` times. Goes level by level: a body that is
    made to exhaust a stack cannot exhaust this one.

    Example: is_deeper({"messages": [{}]}, 3)  # False; with 2, True
    """
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return bool(level)


def without(secret: str, text: str) -> str:
    """The text, without a secret: some agents tell the model, or their instrumentor, the URL that they call."""
    return text.replace(secret, HIDDEN * len(secret)) if secret else text


@dataclass(slots=True)
class Held:
    """What is in memory of one attempt's requests."""

    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes of a request, and of all that an attempt has in flight."""

    one: int
    all_together: int


@asynccontextmanager
async def reading(request: Request, held: Held, limits: Limits) -> AsyncIterator[bytes | Refusal]:
    """The body of a request, never more of it in memory than there may be; it is held until the block ends."""
    raw, found = bytearray(), None
    try:
        async for part in request.stream():
            raw += part
            held.bytes += len(part)
            if len(raw) > limits.one:
                found = Refusal(status=413, message=f"the request is over {limits.one} bytes", code="size")
                break
            if held.bytes > limits.all_together:
                message = f"this rollout has requests of over {limits.all_together} bytes in flight: try again later"
                found = Refusal(status=429, message=message, code="busy", type="rate_limit_error")
                break
    except ClientDisconnect:
        found = Refusal(status=400, message="the client went away", code="disconnected")
    try:
        yield bytes(raw) if found is None else found
    finally:
        held.bytes -= len(raw)
