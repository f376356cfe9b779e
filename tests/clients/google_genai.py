"""Google's client."""

from __future__ import annotations

from typing import Any

from google import genai
from google.genai import types
from harness import MODEL, PARAMETERS, PLAIN, QUESTION, SYSTEM, Answer, Rollout, Seen, case


def client_of(rollout: Rollout) -> genai.Client:
    return genai.Client(api_key="any", http_options=types.HttpOptions(base_url=rollout.root))


async def ask(rollout: Rollout, streamed: bool, contents: Any, **config: Any) -> list[types.Content]:
    """The contents of the reply, in pieces where it is streamed."""
    settings = types.GenerateContentConfig(system_instruction=SYSTEM, **config)
    models = client_of(rollout).aio.models
    if not streamed:
        return [(await models.generate_content(model=MODEL, contents=contents, config=settings)).candidates[0].content]
    stream = await models.generate_content_stream(model=MODEL, contents=contents, config=settings)
    return [piece.candidates[0].content async for piece in stream if piece.candidates[0].content]


def text_of(contents: list[types.Content]) -> str:
    return "".join(part.text or "" for content in contents for part in content.parts or ())


@case("google-genai", "google-genai", "plain")
async def plain(rollout: Rollout, streamed: bool) -> Seen:
    return Seen(1, text_of(await ask(rollout, streamed, PLAIN)))


@case("google-genai", "google-genai", "tool")
async def tool(rollout: Rollout, streamed: bool) -> Seen:
    """Its automatic function calling, which runs the tool by itself."""

    def calculator(expression: str) -> str:  # it copies what it is given, and a method with its object
        """Work out one arithmetic expression."""
        return rollout.calculator(expression)

    contents = await ask(rollout, streamed, QUESTION, tools=[calculator])
    return Seen(2, text_of([content for content in contents if content.role == "model"]))


@case("google-genai", "google-genai", "forced tool")
async def forced(rollout: Rollout, streamed: bool) -> Seen:
    declared = types.FunctionDeclaration(name="calculator", parameters_json_schema=PARAMETERS)
    tools = [types.Tool(function_declarations=[declared])]
    named = {"allowed_function_names": ["calculator"]} if streamed else {}
    choice = types.ToolConfig(function_calling_config=types.FunctionCallingConfig(mode="ANY", **named))
    history: list[types.Content] = [types.UserContent(QUESTION)]
    history += await ask(rollout, streamed, history, tools=tools, tool_config=choice)
    parts = [
        types.Part.from_function_response(
            name="calculator", response={"result": rollout.calculator(**part.function_call.args)}
        )
        for content in history[1:]
        for part in content.parts or ()
        if part.function_call
    ]
    return Seen(2, text_of(await ask(rollout, streamed, [*history, types.UserContent(parts)], tools=tools)))


@case("google-genai", "google-genai", "structured")
async def structured(rollout: Rollout, streamed: bool) -> Seen:
    schema = {"response_mime_type": "application/json", "response_schema": Answer}
    return Seen(1, text_of(await ask(rollout, streamed, PLAIN, **schema)))
