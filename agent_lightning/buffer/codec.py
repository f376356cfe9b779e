"""Events <-> bytes: one byte for the event's number (`events.KINDS`), then MessagePack.

Nothing is unpickled: a decoder makes exactly the dataclass of the number, from plain values, and arrays from their raw
bytes. Values in a task's payload that MessagePack lacks (NumPy's arrays and numbers, huge integers) are extensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any, Final, get_args

import msgspec
import numpy as np

from agent_lightning.buffer.events import KINDS, Base, Event
from agent_lightning.core.errors import DataError
from agent_lightning.core.text import replace_surrogates

_NUMBER_OF: Final = {kind: bytes((number,)) for number, kind in KINDS.items()}
_ARRAY, _INTEGER = 1, 2
_DTYPES: Final = frozenset("?bhilqBHILQefd")
"""Character codes of the arrays that a payload may hold: numbers of fixed size, no objects."""
_NAMES_IN_FORMAT_1: Final = {"checkpoint_epoch": "era", "complete": "whole", "partly_advanced": "partly"}
"""Fields of Base, StoredGroup and Milestone -> their names in journals of format 1."""


def encode(event: Event) -> bytes:
    """The event as a record's payload. Raises DataError for a value that is not plain data."""
    number = _NUMBER_OF[type(event)]
    try:
        return number + _ENCODER.encode(event)
    except (UnicodeEncodeError, OverflowError):  # rare: half of a surrogate pair, or a number beyond 64 bits
        return number + _ENCODER.encode(_encodable(event))


def decode(payload: bytes | memoryview) -> Event:
    """The event in a record's payload. Raises ValueError if the payload holds no event."""
    if not len(payload) or payload[0] not in KINDS:
        raise ValueError("it is no event that this version knows")
    kind, content = KINDS[payload[0]], payload[1:]
    try:
        try:
            event: Event = _DECODERS[kind].decode(content)
        except msgspec.ValidationError:
            if kind is not Base:
                raise
            base = msgspec.msgpack.decode(content, ext_hook=_from_extension)
            for part in (base, *base["groups"], *base["milestones"]):
                part |= {name: part.pop(old) for name, old in _NAMES_IN_FORMAT_1.items() if old in part}
                if part.get("stage") == "left":
                    part["stage"] = "orphaned"
            event = msgspec.convert(base, Base, dec_hook=_to_array)
    except (msgspec.MsgspecError, TypeError, LookupError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no {kind.__name__}: {error}") from None
    return event


def kind_of(payload: bytes | memoryview) -> str:
    """The name of the event in a payload, without decoding it."""
    return KINDS[payload[0]].__name__ if len(payload) and payload[0] in KINDS else "unknown"


def _to_extension(value: object) -> object:
    """A value that msgspec does not know, as one that it knows. Raises DataError."""
    if isinstance(value, np.ndarray | np.generic) and value.dtype.char in _DTYPES:
        shape = ",".join(map(str, value.shape)) if isinstance(value, np.ndarray) else "-"
        return msgspec.msgpack.Ext(_ARRAY, f"{value.dtype.str} {shape} ".encode() + value.tobytes())
    if isinstance(value, np.str_):
        return str(value)
    raise DataError(
        f"a task or span holds a {type(value).__name__}, which the journal cannot keep: use plain values and arrays, "
        f"or buffer.journal=false"
    )


def _encodable(value: Any) -> Any:
    """The value, with extensions for huge integers and "?" for halves of surrogate pairs."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return msgspec.msgpack.Ext(_INTEGER, str(value).encode())
    if isinstance(value, Mapping):
        return {_encodable(name): _encodable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    if is_dataclass(value):
        return {item.name: _encodable(getattr(value, item.name)) for item in fields(value)}
    return value


def _from_extension(code: int, data: memoryview) -> object:
    """The value of an extension. Raises ValueError."""
    raw = bytes(data)
    if code == _INTEGER:
        return int(raw)
    if code != _ARRAY:
        raise ValueError(f"extension {code} is not known")
    dtype, shape, content = raw.split(b" ", 2)
    array = np.frombuffer(content, _dtype(dtype))
    if shape == b"-":
        return array[0]
    return array if b"," not in shape and shape else array.reshape([int(size) for size in shape.split(b",") if size])


@lru_cache(64)
def _dtype(name: bytes) -> np.dtype[Any]:
    dtype = np.dtype(name.decode())
    if dtype.char not in _DTYPES:
        raise ValueError(f"arrays of {dtype} are not read")
    return dtype


def _to_array(annotation: Any, value: Any) -> Any:
    """The value of a field that is annotated as an array, e.g. NDArray[np.int32]. Raises ValueError."""
    if isinstance(value, np.ndarray) and value.dtype is _annotated_dtype(annotation):
        return value
    raise ValueError(f"{type(value).__name__} is not {annotation}")


@lru_cache(64)
def _annotated_dtype(annotation: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(get_args(get_args(annotation)[1])[0])
    return dtype


_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_to_extension)
_DECODERS: Final[Mapping[type[Event], msgspec.msgpack.Decoder[Any]]] = {
    kind: msgspec.msgpack.Decoder(kind, dec_hook=_to_array, ext_hook=_from_extension) for kind in KINDS.values()
}
