"""Compressed bodies of HTTP requests, inflated within a limit."""

from __future__ import annotations

import importlib
import io
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from agent_lightning.core.errors import DataError


class UnknownEncoding(DataError):
    """The encoding cannot be read here. The message says which can."""


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """The content of a body whose `content-encoding` header is `encoding`. At most `limit` + 1 bytes are inflated, by
    which the caller sees that there are more. Raises UnknownEncoding, and DataError for a body that does not have its
    encoding.
    Example: inflate(gzip.compress(b"hello"), "gzip", 4) -> b"hello"; inflate(b"hello", "", 4) -> b"hello" """
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    readers = _readers()
    if name not in readers:
        raise UnknownEncoding(f"content-encoding {name[:50]!r} cannot be read: send {', '.join(readers)} or none")
    try:
        return readers[name](body, limit)[: limit + 1]
    except DataError:
        raise
    except Exception as error:  # each library has an error of its own
        raise DataError(f"the body is not {name}, as its content-encoding says") from error


def _readers() -> Mapping[str, Callable[[bytes, int], bytes]]:
    """The encodings that can be read, each with a function of the body and the limit; br and zstd need a library."""
    readers = {"gzip": _inflate_zlib, "x-gzip": _inflate_zlib, "deflate": _inflate_zlib}
    with suppress(ImportError):
        zstandard = importlib.import_module("zstandard")
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**23)  # what RFC 9659 has every server take
        readers["zstd"] = lambda body, limit: bytes(decompressor.stream_reader(io.BytesIO(body)).read(limit + 1))
    with suppress(ImportError, AttributeError):
        brotli = importlib.import_module("brotli")
        brotli.Decompressor.can_accept_more_data  # noqa: B018  # older versions inflate without a limit
        readers["br"] = lambda body, limit: _inflate_brotli(brotli.Decompressor(), body, limit)
    return readers


def _inflate_zlib(body: bytes, limit: int) -> bytes:
    """Gzip, and both forms that are called deflate: with zlib's header and without. Raises zlib.error."""
    bare = body[:2] != b"\x1f\x8b" and (len(body) < 2 or body[0] & 15 != 8 or int.from_bytes(body[:2]) % 31)
    stream = zlib.decompressobj(wbits=-15 if bare else 47)
    plain = stream.decompress(body, limit + 1)
    if len(plain) <= limit and (not stream.eof or stream.unused_data):
        raise DataError("the compressed body is truncated, or goes on after its end")
    return plain


def _inflate_brotli(stream: Any, body: bytes, limit: int) -> bytes:
    plain = b""
    while not stream.is_finished() and len(plain) <= limit:  # ends: what is truncated gives nothing more
        more = stream.process(b"" if plain else body, output_buffer_limit=limit + 1)
        if not more:
            raise DataError("the compressed body is truncated")
        plain += more
    return plain
