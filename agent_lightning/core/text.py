"""Texts for people: errors as one line, and secrets hidden from what is shown, recorded or sent."""

from __future__ import annotations

import re
import traceback
from typing import AnyStr

_ATTEMPT_URL = re.compile(r"(/attempt/\d+/)[0-9a-f]{32}")


def one_line(text: object) -> str:
    """The text with every run of white space, line breaks too, as one space."""
    return " ".join(str(text).split())


def error_line(error: BaseException, *, secret: str = "") -> str:
    """An error as one line of at most 300 characters: its type and the first line of its message, `secret` hidden.

    A group of errors is shown as its first member. Only `\\n` ends a line: other separators may be a user's text.

    Example: error_line(ValueError("no\\nway")) -> "ValueError: no"
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    message = str(traceback.TracebackException(type(error), error, None))  # str(error) may raise an error of its own
    first = hide_secret(message, secret).strip().split("\n")[0].strip()
    return f"{type(error).__name__}: {first or 'no message'}"[:300]


def last_line(text: str) -> str:
    """The last line that is not blank, without white space at its ends; "" if there is none."""
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")


def hide_secret(text: AnyStr, secret: str) -> AnyStr:
    """The text or bytes with each occurrence of `secret` replaced by as many stars, so that lengths and offsets stay.
    Every text that leaves an attempt passes here: agents tell the model, their instrumentor or their error messages the
    URL that they call, and the URL holds the attempt's secret."""
    if not secret:
        return text
    if isinstance(text, bytes):
        return text.replace(secret.encode(), b"*" * len(secret.encode()))
    return text.replace(secret, "*" * len(secret))


def hide_attempt_secrets(text: str) -> str:
    """The text with the secret of every attempt's URL hidden; works without knowing the secrets.
    Example: ".../attempt/1/0123456789abcdef0123456789abcdef/v1" -> ".../attempt/1/***/v1"
    """
    return _ATTEMPT_URL.sub(r"\1***", text)


def replace_surrogates(text: str) -> str:
    """The text with each half of a surrogate pair as "?": a model can be made to write one, and it is no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
