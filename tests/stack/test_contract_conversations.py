"""The contract on vLLM, continued: conversations of Responses, Google's format, paths and encodings."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import contract
import httpx
import pytest
from policy_server import PolicyServer

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
JSON = {"content-type": "application/json"}
CHAT = {"model": "policy", "messages": contract.CHAT, "max_tokens": 8}
CONTENTS = [{"role": "user", "parts": [{"text": contract.QUESTION}]}]
SYSTEM = {"parts": [{"text": contract.SYSTEM}]}
DECLARED = {
    "name": "calculator",
    "description": "Computes.",
    "parameters": {
        "type": "OBJECT",
        "properties": {"expression": {"type": "STRING", "enum": ["85-76", "1+1"]}},
        "required": ["expression"],
    },
}
TOOLS = [{"functionDeclarations": [DECLARED]}]
SCHEMA = {"type": "OBJECT", "properties": {"ok": {"type": "BOOLEAN"}}, "required": ["ok"]}


@pytest.fixture
def http(policy_server: PolicyServer) -> Iterator[httpx.Client]:
    """A client of a rollout of its own; paths begin with the root of the rollout."""
    with policy_server.rollout("val") as rollout, httpx.Client(base_url=rollout.root, timeout=60.0) as client:
        yield client


def answer(http: httpx.Client, path: str, body: Any, headers: dict[str, str] = JSON) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = http.post(path, content=content, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_conversation_is_continued_as_if_all_of_it_had_been_sent(http: httpx.Client) -> None:
    tools = {"instructions": contract.SYSTEM, "tools": [contract.flat()]}
    first = answer(
        http, "v1/responses", {"input": contract.QUESTION, "tool_choice": "required", "max_output_tokens": 60, **tools}
    )
    results = [{"type": "function_call_output", "call_id": item["call_id"], "output": "9"} for item in first["output"]]
    assert results
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    ways: list[dict[str, Any]] = [
        {"input": [contract.USER, *first["output"], *results]},
        {"input": [contract.USER, *references, *results]},
        {"input": results, "previous_response_id": first["id"]},
    ]
    replies = [answer(http, "v1/responses", {**way, **tools}) for way in ways]
    texts = [[item.get("content", [{}])[0].get("text") for item in reply["output"]] for reply in replies]
    assert texts[0] == texts[1] == texts[2]
    assert len({reply["usage"]["input_tokens"] for reply in replies}) == 1
    third = answer(http, "v1/responses", {"input": "Why?", "previous_response_id": replies[2]["id"]})
    assert third["previous_response_id"] == replies[2]["id"]
    for body, status, code in (
        ({"previous_response_id": "resp_" + "0" * 32}, 400, "previous_response_not_found"),
        ({"input": [{"type": "item_reference", "id": "rs_1"}]}, 404, "not_found"),
        ({"conversation": "conv_1"}, 400, "unsupported"),
    ):
        refused = http.post("v1/responses", json={"input": "x", **body})
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert refused.json()["error"]["param"] in body


OBJECT = {"responseMimeType": "application/json", "responseSchema": SCHEMA}
GOOGLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"reason": "STOP"}),
    "nulls": ({"tools": None, "toolConfig": None, "generationConfig": None}, {"reason": "STOP"}),
    "empty tools": ({"tools": [], "toolConfig": {}}, {"reason": "STOP"}),
    "any": ({"tools": TOOLS, "toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, {"call": "calculator"}),
    "none": ({"tools": TOOLS, "tool_config": {"function_calling_config": {"mode": "NONE"}}}, {"call": ""}),
    "length": ({"generationConfig": {"maxOutputTokens": 1}}, {"reason": "MAX_TOKENS"}),
    "schema": (
        {"generationConfig": {"responseMimeType": "application/json", "responseSchema": SCHEMA}},
        {"keys": {"ok"}},
    ),
    "an object": ({"generationConfig": {"responseJsonSchema": contract.SCHEMA}}, {"keys": {"ok"}}),
    "two candidates": ({"generationConfig": {"candidateCount": 2, "topK": 40.0, "seed": 1}}, {"num": 2}),
    "a result": (
        {
            "tools": TOOLS,
            "contents": [
                *CONTENTS,
                {"role": "model", "parts": [{"functionCall": {"name": "calculator", "args": {"expression": "85-76"}}}]},
                {"role": "user", "parts": [{"functionResponse": {"name": "calculator", "response": {"error": "no"}}}]},
            ],
        },
        {},
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", GOOGLE)
def test_googles_requests(http: httpx.Client, name: str, stream: bool) -> None:
    fields, expected = GOOGLE[name]
    body = {"contents": CONTENTS, "systemInstruction": SYSTEM, **fields}
    action = "streamGenerateContent?alt=sse" if stream else "generateContent"
    reply = http.post(f"v1beta/models/ORG/NAME:{action}", json=body)
    assert reply.status_code == 200, reply.text
    events = [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n") if line] if stream else []
    chunks = events or [reply.json()]
    assert {chunk["modelVersion"] for chunk in chunks} == {"ORG/NAME"}
    parts = [part for chunk in chunks for c in chunk["candidates"] if not c["index"] for part in c["content"]["parts"]]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    last = chunks[-1]["candidates"]
    assert len(last) == expected.get("num", 1)
    assert last[0]["finishReason"] == expected.get("reason", last[0]["finishReason"])
    if "call" in expected:
        assert {call["name"] for call in calls} == ({expected["call"]} if expected["call"] else set())
    if "keys" in expected:
        assert json.loads("".join(part["text"] for part in parts)).keys() == expected["keys"]
    assert chunks[-1]["usageMetadata"]["promptTokenCount"] > 10


def test_googles_tokens_are_those_of_a_chat(http: httpx.Client) -> None:
    body = {"contents": CONTENTS, "systemInstruction": SYSTEM}
    google = answer(http, "v1beta/models/m:generateContent", body)
    chat = answer(http, "v1/chat/completions", {"messages": contract.CHAT})
    assert google["candidates"][0]["content"]["parts"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert google["usageMetadata"]["promptTokenCount"] == chat["usage"]["prompt_tokens"]
    counted = answer(http, "v1beta/models/m:countTokens", body)
    assert counted == {"totalTokens": chat["usage"]["prompt_tokens"]}


PATHS = ("v1/chat/completions/", "v1//chat//completions", "chat/completions", "v1/v1/chat/completions")
PATHS += ("openai/deployments/policy/chat/completions?api-version=2024-10-21", "v1beta/openai/chat/completions")
RAW = json.dumps(CHAT)
BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "gzip": (gzip.compress(RAW.encode()), {"content-encoding": "gzip"}),
    "deflate": (zlib.compress(RAW.encode()), {"content-encoding": "deflate"}),
    "byte order mark": (RAW.encode("utf-8-sig"), {}),
    "utf-16": (RAW.encode("utf-16"), {"content-type": "application/json; charset=utf-16"}),
    "latin-1": (RAW.encode("latin-1"), {"content-type": "application/json; charset=iso-8859-1"}),
}


def test_paths_and_encodings_change_nothing(http: httpx.Client) -> None:
    plain = answer(http, "v1/chat/completions", CHAT)["choices"]
    for path in PATHS:
        assert answer(http, path, CHAT)["choices"] == plain, path
    for name, (content, headers) in BODIES.items():
        assert answer(http, "v1/chat/completions", content, JSON | headers)["choices"] == plain, name


def test_methods_and_models(http: httpx.Client) -> None:
    assert http.get("v1/models/ORG/NAME").json()["id"] == http.get("v1/models/ORG%2FNAME").json()["id"] == "ORG/NAME"
    assert http.head("v1/models").status_code == 200
    assert http.options("v1/chat/completions").headers["allow"] == "POST, OPTIONS"
    refused = http.get("v1/chat/completions")
    assert (refused.status_code, refused.json()["error"]["code"]) == (405, "method_not_allowed")
    assert http.get("v1/messages").json()["type"] == "error"
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    socket = http.get("v1/responses", headers=upgrade | {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="})
    assert (socket.status_code, socket.json()["error"]["code"]) == (426, "unsupported")
