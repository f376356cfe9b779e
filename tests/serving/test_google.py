"""Google's generateContent: requests as its clients write them, and the same tokens and spans as in other formats."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from test_gateway import Rig, open_rig, url_of

from agent_lightning.serving.dialects.base import BadRequest
from agent_lightning.serving.dialects.google import Google

HELLO = {"contents": [{"role": "user", "parts": [{"text": "hello"}]}]}
DECLARED = {"name": "calculator", "parameters": {"type": "OBJECT", "properties": {"expression": {"type": "STRING"}}}}
TOOLS = [{"functionDeclarations": [DECLARED]}]


async def post(
    rig: Rig, action: str = "generateContent", model: str = "gemini-2.5-flash", **body: Any
) -> httpx.Response:
    url = f"{url_of(rig.key).removesuffix('/v1')}/v1beta/models/{model}:{action}"
    return await rig.http.post(url, json=HELLO | body, headers={"x-goog-api-key": "any"})


def chat(**body: Any) -> dict[str, Any]:
    return Google().to_engine(HELLO | body)


async def test_a_call_is_answered_and_recorded_like_any_other() -> None:
    async with open_rig(words=("yes",)) as rig:
        first = (await post(rig, model="ORG/NAME")).json()
        await rig.http.post(
            f"{url_of(rig.key)}/chat/completions", json={"messages": [{"role": "user", "content": "hello"}]}
        )
        google, openai = (await rig.end()).calls
    (candidate,) = first["candidates"]
    assert candidate == {"index": 0, "finishReason": "STOP", "content": {"role": "model", "parts": [{"text": "yes"}]}}
    assert first["usageMetadata"] == {"promptTokenCount": 8, "candidatesTokenCount": 2, "totalTokenCount": 10}
    assert (first["modelVersion"], first["responseId"]) == ("ORG/NAME", google.call_id)
    assert (google.request, google.reply) == (openai.request, openai.reply)
    assert google.prompt_T.tolist() == openai.prompt_T.tolist()


@pytest.mark.parametrize("words", [("yes",), ("call:2+3;4",)])
async def test_a_stream_adds_up_to_the_answer(words: tuple[str, ...]) -> None:
    async with open_rig(words=words) as rig:
        whole = (await post(rig, tools=TOOLS)).json()
        streamed = await post(rig, "streamGenerateContent?alt=sse", tools=TOOLS)
        chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n") if line]
        assert len((await rig.end()).calls) == 2
    parts = [part for chunk in chunks for part in chunk["candidates"][0]["content"]["parts"]]

    def plain(parts: list[dict[str, Any]]) -> list[Any]:
        return [part.get("text") or (part["functionCall"]["name"], part["functionCall"]["args"]) for part in parts]

    assert plain(parts) == plain(whole["candidates"][0]["content"]["parts"])
    assert chunks[-1]["candidates"][0]["finishReason"] == "STOP"
    assert chunks[-1]["usageMetadata"] == whole["usageMetadata"]


async def test_choices_log_probabilities_and_counts() -> None:
    async with open_rig() as rig:
        config = {"candidateCount": 2, "responseLogprobs": True, "logprobs": 0}
        first, second = (await post(rig, generationConfig=config)).json()["candidates"]
        assert (first["index"], second["index"]) == (0, 1)
        assert len(first["logprobsResult"]["chosenCandidates"]) == 2
        for body in ({}, {"contents": None, "generateContentRequest": {"model": "models/m", **HELLO}}):
            assert (await post(rig, "countTokens", **body)).json() == {"totalTokens": 8}
        assert len((await rig.end()).calls) == 2


async def test_models_are_listed_in_googles_form() -> None:
    async with open_rig() as rig:
        root = f"{url_of(rig.key).removesuffix('/v1')}/v1beta/models"
        assert [model["name"] for model in (await rig.http.get(root)).json()["models"]] == ["models/policy"]
        assert (await rig.http.get(f"{root}/gemini-pro")).json()["name"] == "models/gemini-pro"


def test_what_contents_become() -> None:
    contents = [
        {"role": "user", "parts": [{"text": "how much?"}]},
        {
            "role": "model",
            "parts": [
                {"text": "hm", "thought": True},
                {"text": "I compute."},
                {"functionCall": {"name": "calculator", "args": {"expression": "2+3"}}},
                {"functionCall": {"name": "calculator", "args": {"expression": "4"}}},
                {"functionCall": {"name": "look", "id": "x"}, "thoughtSignature": "AA=="},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"name": "calculator", "response": {"result": "5"}}},
                {"functionResponse": {"name": "look", "id": "x", "response": {"error": "no such place"}}},
                {"functionResponse": {"name": "calculator", "response": {"output": {"value": 4}}}},
                {"text": "go on"},
            ],
        },
    ]
    request = chat(contents=contents, system_instruction={"parts": [{"text": "be brief"}]}, tools=TOOLS)
    system, asked, called, *told, last = request["messages"]
    assert (system["role"], system["content"], asked["content"]) == ("system", "be brief", "how much?")
    ids = [call["id"] for call in called["tool_calls"]]
    assert (called["content"], len(set(ids)), ids[2]) == ("I compute.", 3, "x")
    assert [(m["role"], m["tool_call_id"], m["content"]) for m in told] == [
        ("tool", ids[0], "5"),
        ("tool", "x", "no such place"),
        ("tool", ids[1], '{"value": 4}'),
    ]
    assert [message.get("status") for message in told] == [None, "error", None]
    assert (last["role"], last["content"]) == ("user", "go on")
    assert request["tools"][0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
    }


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"generationConfig": {"temperature": 0.5, "topP": 0.9, "topK": 40.0}}, {"top_p": 0.9, "top_k": 40}),
        ({"generation_config": {"max_output_tokens": 5, "stop_sequences": ["x"]}}, {"max_tokens": 5, "stop": ["x"]}),
        ({"generationConfig": {"seed": 3, "candidateCount": 2}}, {"seed": 3, "n": 2}),
        ({"generationConfig": {"responseMimeType": "application/json"}}, {"response_format": {"type": "json_object"}}),
        ({"generationConfig": {"responseMimeType": "text/plain", "thinkingConfig": None}}, {}),
        (
            {"generationConfig": {"thinkingConfig": {"thinkingBudget": 0}}},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        ({"tools": TOOLS, "toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, {"tool_choice": "required"}),
        ({"tools": TOOLS, "tool_config": {"function_calling_config": {"mode": "NONE"}}}, {"tool_choice": "none"}),
        ({"tools": TOOLS, "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}}}, {"tool_choice": "auto"}),
        ({"tools": [], "toolConfig": {}, "safetySettings": [{}], "labels": {"a": "b"}}, {}),
        ({"tools": [{"functionDeclarations": [{"name": "f"}]}]}, {}),
        ({"systemInstruction": None, "cachedContent": None}, {}),
    ],
)
def test_what_fields_become(body: dict[str, Any], expected: dict[str, Any]) -> None:
    request = chat(**body)
    assert {name: request.get(name) for name in expected} == expected
    assert request["messages"] == [{"role": "user", "content": "hello"}]


def test_allowed_functions_and_schemas() -> None:
    other = {"name": "other", "parametersJsonSchema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    choice = {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["other"]}}
    request = chat(tools=[{"functionDeclarations": [DECLARED, other]}], toolConfig=choice)
    assert [tool["function"]["name"] for tool in request["tools"]] == ["other"]
    assert request["tool_choice"] == "required"
    schema = {
        "type": "OBJECT",
        "properties": {
            "type": {"type": "STRING", "nullable": True, "enum": ["A", "B"]},
            "list": {"type": "ARRAY", "items": {"type": "INTEGER"}, "minItems": "1"},
            "any": {"anyOf": [{"type": "NUMBER"}, {"type": "NULL"}]},
        },
        "propertyOrdering": ["type", "list", "any"],
        "required": ["list"],
    }
    config = {"responseMimeType": "application/json", "responseSchema": schema}
    assert chat(generationConfig=config)["response_format"]["json_schema"]["schema"] == {
        "type": "object",
        "properties": {
            "type": {"type": ["string", "null"], "enum": ["A", "B"]},
            "list": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
            "any": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        },
        "required": ["list"],
    }


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"contents": []}, "invalid_request", "contents must not be empty"),
        ({"contents": [{"parts": [{"fileData": {"fileUri": "u"}}]}]}, "unsupported", "fileData is not supported"),
        (
            {"contents": [{"parts": [{"inlineData": {"mimeType": "audio/wav", "data": ""}}]}]},
            "unsupported",
            "audio/wav",
        ),
        ({"contents": [{"role": "nobody", "parts": []}]}, "unsupported", "contents[0].role must be"),
        ({"contents": [{"parts": [{"text": 5}]}]}, "invalid_request", "contents[0].parts[0].text must be a string"),
        ({"tools": [{"googleSearch": {}}]}, "unsupported", "tools[0].googleSearch is not supported"),
        ({"cachedContent": "c"}, "unsupported", "cachedContent is not supported"),
        ({"generationConfig": {"speechConfig": {}}}, "unsupported", "generationConfig.speechConfig is not supported"),
        ({"generationConfig": {"responseModalities": ["IMAGE"]}}, "unsupported", "responseModalities"),
        ({"generationConfig": {"responseMimeType": "text/x.enum"}}, "unsupported", "responseMimeType"),
        ({"generationConfig": {"temperature": "hot"}}, "invalid_request", "temperature must be a number"),
        ({"generationConfig": {"candidateCount": 17}}, "invalid_request", "n must be a number from 1 to 16"),
        ({"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}}, "invalid_request", "tools must not be empty"),
        ({"nonsense": 1}, "unsupported", "nonsense is not supported"),
    ],
)
async def test_what_is_refused_is_an_error_of_googles(body: dict[str, Any], code: str, words: str) -> None:
    async with open_rig() as rig:
        response = await post(rig, **body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["status"]) == (400, 400, "INVALID_ARGUMENT")
        assert error["details"][0]["reason"] == code
        assert words in error["message"]


async def test_other_errors() -> None:
    async with open_rig() as rig:
        url = f"{url_of(rig.key).removesuffix('/v1')}/v1beta/models/m"
        wrong = await rig.http.post(url.replace("/agent", "x/agent") + ":generateContent", json=HELLO)
        assert (wrong.status_code, wrong.json()["error"]["status"]) == (403, "PERMISSION_DENIED")
        assert (await rig.http.get(f"{url}:generateContent")).json()["error"]["status"] == "UNIMPLEMENTED"
        assert "alt=sse" in (await post(rig, "streamGenerateContent")).json()["error"]["message"]
        unknown = await rig.http.post(f"{url}:embedContent", json=HELLO, headers={"x-goog-api-key": "k"})
        assert (unknown.status_code, unknown.json()["error"]["status"]) == (405, "UNIMPLEMENTED")
        rig.engine.fail_next(2)
        assert (await post(rig)).json()["error"]["status"] == "INTERNAL"
        assert (await post(rig, "streamGenerateContent?alt=sse")).json()["error"]["status"] == "INTERNAL"


def test_a_body_without_contents() -> None:
    with pytest.raises(BadRequest, match="contents is required"):
        Google().to_engine({})
