"""Events <-> bytes: one byte that says which, then MessagePack.

Nothing is unpickled: a decoder makes exactly the dataclass that its kind says, of plain values, and arrays from their
raw bytes. What is not plain in a task's payload (NumPy's arrays and numbers, huge whole numbers) goes as an extension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, Final, get_args

import msgspec
import numpy as np

from agent_lightning.buffer.events import (
    Admitted,
    Advanced,
    Base,
    Called,
    CallFailed,
    Cancelled,
    Checkpointed,
    Ended,
    Event,
    Leased,
    Released,
    Resumed,
    Taken,
    Traced,
)
from agent_lightning.core.errors import DataError

_KINDS: Final[Mapping[int, type[Event]]] = {
    1: Base,
    2: Admitted,
    3: Leased,
    4: Called,
    5: Traced,
    6: CallFailed,
    7: Ended,
    8: Cancelled,
    9: Taken,
    10: Advanced,
    11: Checkpointed,
    12: Released,
    13: Resumed,
}
"""Numbers are never used again for something else."""
_NUMBER_OF: Final = {kind: bytes((number,)) for number, kind in _KINDS.items()}
_ARRAY, _INTEGER = 1, 2
_DTYPES: Final = frozenset("?bhilqBHILQefd")
"""Of arrays in a payload: numbers of fixed size, no objects."""


def encode(event: Event) -> bytes:
    """Raises DataError for a value that is not plain data."""
    number = _NUMBER_OF[type(event)]
    try:
        return number + _ENCODER.encode(event)
    except (UnicodeEncodeError, OverflowError):  # rare: half of a surrogate pair, or a number beyond 64 bits
        return number + _ENCODER.encode(_plain(event))


def decode(payload: bytes | memoryview) -> Event:
    """Raises ValueError for what is no event."""
    if not len(payload) or payload[0] not in _DECODERS:
        raise ValueError("it is no event that this version knows")
    try:
        event: Event = _DECODERS[payload[0]].decode(payload[1:])
    except (msgspec.MsgspecError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no {_KINDS[payload[0]].__name__}: {error}") from None
    return event


def kind_of(payload: bytes | memoryview) -> str:
    """The name of the event in a payload, without reading it."""
    return _KINDS[payload[0]].__name__ if len(payload) and payload[0] in _KINDS else "unknown"


def _to_plain(value: object) -> object:
    """What msgspec asks for a value that it does not know."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.char in _DTYPES:
        shape = ",".join(map(str, value.shape)) if isinstance(value, np.ndarray) else "-"
        return msgspec.msgpack.Ext(_ARRAY, f"{value.dtype.str} {shape} ".encode() + value.tobytes())
    if isinstance(value, np.str_):
        return str(value)
    raise DataError(
        f"a task or span holds a {type(value).__name__}, which the journal cannot keep: use plain values and arrays, "
        f"or buffer.journal=false"
    )


def _plain(value: Any) -> Any:
    """The same without what MessagePack cannot say."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_INTEGER, str(value).encode())
    if isinstance(value, Mapping):
        return {_plain(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if is_dataclass(value):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return value


def _from_ext(code: int, data: memoryview) -> object:
    """Raises ValueError."""
    raw = bytes(data)
    if code == _INTEGER:
        return int(raw)
    if code != _ARRAY:
        raise ValueError(f"extension {code} is not known")
    kind, shape, content = raw.split(b" ", 2)
    array = np.frombuffer(content, _dtype(kind))
    if shape == b"-":
        return array[0]
    return array if b"," not in shape and shape else array.reshape([int(size) for size in shape.split(b",") if size])


@lru_cache(64)
def _dtype(kind: bytes) -> np.dtype[Any]:
    dtype = np.dtype(kind.decode())
    if dtype.char not in _DTYPES:
        raise ValueError(f"arrays of {dtype} are not read")
    return dtype


def _from_plain(kind: Any, value: Any) -> Any:
    """An array where a noun has one: NDArray[np.int32] of the extension."""
    if isinstance(value, np.ndarray) and value.dtype is _asked_for(kind):
        return value
    raise ValueError(f"{type(value).__name__} is not {kind}")


@lru_cache(64)
def _asked_for(kind: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(get_args(get_args(kind)[1])[0])
    return dtype


_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_to_plain)
_DECODERS: Final = {
    number: msgspec.msgpack.Decoder(kind, dec_hook=_from_plain, ext_hook=_from_ext) for number, kind in _KINDS.items()
}
