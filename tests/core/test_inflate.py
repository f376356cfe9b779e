"""Compressed bodies."""

from __future__ import annotations

import gzip
import importlib.util
import zlib

import pytest

from agent_lightning.core.errors import DataError
from agent_lightning.core.inflate import UnknownEncoding, inflate

TEXT = b'{"messages": []}'
RAW = zlib.compressobj(wbits=-15)
PACKED = {
    "": TEXT,
    "identity": TEXT,
    "gzip": gzip.compress(TEXT, mtime=0),
    " GZIP ": gzip.compress(TEXT, mtime=0),
    "x-gzip": gzip.compress(TEXT, mtime=0),
    "deflate": zlib.compress(TEXT),
    "deflate ": RAW.compress(TEXT) + RAW.flush(),
}


@pytest.mark.parametrize("encoding", PACKED)
def test_what_is_inflated(encoding: str) -> None:
    assert inflate(PACKED[encoding], encoding, 100) == TEXT
    if encoding.strip() not in ("", "identity"):
        assert inflate(PACKED[encoding], encoding, 5) == TEXT[:6]


@pytest.mark.parametrize(("name", "library"), [("br", "brotli"), ("zstd", "zstandard")])
def test_encodings_that_need_a_library(name: str, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        with pytest.raises(UnknownEncoding, match=f"'{name}' cannot be read: send gzip, x-gzip, deflate"):
            inflate(TEXT, name, 100)
        return
    packed = importlib.import_module(library).compress(b"0" * 10_000_000)
    assert inflate(packed, name, 10_000_000) == b"0" * 10_000_000
    assert len(inflate(packed, name, 1000)) == 1001
    with pytest.raises(DataError):
        inflate(b"no such thing", name, 100)


@pytest.mark.parametrize(
    ("body", "encoding", "words"),
    [
        (TEXT, "gzip", "not gzip"),
        (b"", "gzip", "truncated"),
        (gzip.compress(TEXT, mtime=0)[:-5], "gzip", "truncated"),
        (gzip.compress(TEXT, mtime=0) * 2, "gzip", "after its end"),
        (TEXT, "deflate", "not deflate"),
        (TEXT, "snappy", "'snappy' cannot be read: send gzip, x-gzip, deflate"),
        (TEXT, "gzip, gzip", "cannot be read"),
        (TEXT, "x" * 10_000, "cannot be read"),
    ],
)
def test_what_is_not(body: bytes, encoding: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        inflate(body, encoding, 1000)
