"""Bodies of requests: encodings, charsets, odd JSON, and what they may cost."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib

import pytest
from test_gateway import HELLO, code_of, open_rig, url_of

BODY = {"messages": [{"role": "user", "content": "héllo 日本 😀"}]}
JSON = json.dumps(BODY)
PLAIN = json.dumps(BODY, ensure_ascii=False)
LATIN = json.dumps({"messages": [{"role": "user", "content": "héllo"}]}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (gzip.compress(PLAIN.encode(), mtime=0), {"content-encoding": "gzip"}),
        (zlib.compress(PLAIN.encode()), {"content-encoding": "deflate"}),
        (PLAIN.encode("utf-8-sig"), {}),
        (PLAIN.encode("utf-16"), {"content-type": "application/json; charset=utf-16"}),
        (PLAIN.encode("utf-16-be"), {"content-type": "application/json; charset=UTF-16BE"}),
        (PLAIN.encode("utf-32"), {}),
        (PLAIN.encode("utf-8"), {"content-type": 'application/json; charset="utf8"'}),
        (LATIN.encode("latin-1"), {"content-type": "application/json; charset=iso-8859-1"}),
        (LATIN.encode("cp1252"), {"content-type": "application/json; charset=windows-1252"}),
        (JSON.encode(), {"content-type": "text/plain"}),
        (JSON.encode(), {"content-type": "application/x-www-form-urlencoded"}),
        (b" \n\t" + JSON.encode() + b"\n", {}),
    ],
)
async def test_what_is_read(content: bytes, headers: dict[str, str]) -> None:
    async with open_rig() as rig:
        reply = await rig.http.post(f"{url_of(rig.key)}/chat/completions", content=content, headers=headers)
        assert reply.status_code == 200, reply.text
        (call,) = (await rig.end()).calls
    assert json.loads(call.request)[0]["content"] in ("héllo 日本 😀", "héllo")


@pytest.mark.parametrize(
    ("content", "headers", "code", "words"),
    [
        (b"", {}, 400, "is empty"),
        (b"\xef\xbb\xbf", {}, 400, "is empty"),
        (b'{"a": 1,}', {}, 400, "not JSON: line 1, column 9"),
        (b"\x1f\x8b" + b"x" * 50, {}, 400, "not UTF-8 text: byte 1"),
        (gzip.compress(JSON.encode(), mtime=0)[:-9], {"content-encoding": "gzip"}, 400, "truncated"),
        (JSON.encode(), {"content-encoding": "gzip"}, 400, "not gzip"),
        (JSON.encode(), {"content-encoding": "snappy"}, 415, "send gzip, x-gzip, deflate"),
        (JSON.encode(), {"content-type": "application/json; charset=klingon"}, 415, "send UTF-8"),
        (JSON.encode(), {"content-type": "application/json; charset=zip"}, 415, "send UTF-8"),
        (JSON.encode(), {"content-type": "application/json; charset=punycode"}, 415, "send UTF-8"),
        (LATIN.encode("latin-1"), {}, 400, "not UTF-8 text: byte"),
        (b'{"messages": [], "messages": [{}]}', {}, 400, "the key 'messages' stands in one object more than once"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', {}, 400, "the key 'role'"),
        (b'{"temperature": NaN}', {}, 400, "NaN is no number in JSON"),
        (b'{"temperature": -Infinity}', {}, 400, "-Infinity is no number in JSON"),
        (b'{"temperature": 1e999}', {}, 400, "1e999 is too large"),
        (b'{"n": 1' + b"0" * 5000 + b"}", {}, 400, "more than 4300 digits"),
        (
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            {},
            400,
            "messages[0].content: half of a surrogate",
        ),
        (b'{"messages": [{"role": "user", "\\uDfff": 1}]}', {}, 400, "a key of messages[0]: half of a surrogate"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}, 400, "nested more than 64 levels"),
        (b'{"messages": ' + b"[" * 70 + b"]" * 70 + b"}", {}, 400, "nested more than 64 levels"),
        (b"[]", {}, 400, "not a JSON object"),
        (b'{"messages": [' + b"null," * 300_000 + b"null]}", {}, 413, "more than 200000 values"),
        (b'{"messages": [' + b"{}," * 30_000 + b"{}]}", {}, 413, "more than 20000 objects"),
    ],
)
async def test_what_is_refused_says_what_is_wrong(
    content: bytes, headers: dict[str, str], code: int, words: str
) -> None:
    async with open_rig() as rig:
        for end in ("chat/completions", "messages"):
            reply = await rig.http.post(f"{url_of(rig.key)}/{end}", content=content, headers=headers)
            error = reply.json()["error"]
            assert (reply.status_code, reply.json().get("type", "")) == (code, "error" if end == "messages" else "")
            assert words in error["message"]
            assert len(error["message"]) < 400
        assert not (await rig.end()).calls


async def test_commas_in_texts_are_no_values() -> None:
    async with open_rig(max_len=10**7) as rig:
        content = '\\",[{\\\\"' * 300_000
        body = {"messages": [{"role": "user", "content": content}]}
        reply = await rig.http.post(f"{url_of(rig.key)}/chat/completions", json=body)
        assert reply.status_code == 200, reply.text


async def test_packed_bodies_count_by_what_they_hold() -> None:
    async with open_rig(max_body_bytes=100_000, max_bytes_in_flight=250_000) as rig:
        url = f"{url_of(rig.key)}/chat/completions"
        packed = {"content-encoding": "gzip"}
        bomb = gzip.compress(b"0" * 50_000_000)
        assert code_of(await rig.http.post(url, content=bomb, headers=packed)) == (413, "size")
        rig.engine.delay_s = 0.3
        body = gzip.compress(json.dumps({"messages": HELLO, "user": "x" * 90_000}).encode())
        replies = await asyncio.gather(*(rig.http.post(url, content=body, headers=packed) for _ in range(4)))
        assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429]
