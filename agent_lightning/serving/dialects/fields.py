"""The fields of chat and completion requests, and the form in which every engine takes a chat request. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from agent_lightning.serving.dialects.base import BadRequest, ListOf, Strict, content_of, read

_CACHING = ("prompt_cache_key", "prompt_cache_retention", "prediction", "service_tier")
HARMLESS = frozenset((*_CACHING, "metadata", "safety_identifier", "store", "user"))
"""Fields that do not change what a model is asked; they are left out."""
_NEUTRAL: Mapping[str, Any] = {
    "audio": {},
    "best_of": 1,
    "echo": False,
    "function_call": "none",
    "functions": [],
    "modalities": ["text"],
    "use_beam_search": False,
    "verbosity": "medium",
}
"""Values that ask for what is done anyway, of fields that are not supported otherwise; they are left out too."""


class _TextPart(Strict):
    type: Literal["text"]
    text: str


class _RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


class _Url(Strict):
    url: str


class _ImagePart(Strict):
    type: Literal["image_url"]
    image_url: _Url


class _MediaPart(Strict):
    type: Literal["input_audio", "audio_url", "video_url"]


Part = Annotated[_TextPart | _RefusalPart | _ImagePart | _MediaPart, Field(discriminator="type")]


class _Name(Strict):
    name: str


class _Function(_Name):
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(Strict):
    type: Literal["function"] = "function"
    function: _Function


class _NamedTool(Strict):
    type: Literal["function"]
    function: _Name


class _ToolSet(Strict):
    mode: Literal["auto", "required"]
    tools: ListOf[_NamedTool]


class _AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: _ToolSet


class _CalledFunction(_Name):
    arguments: str


class _ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _CalledFunction


class _Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[Part] | None = None
    tool_calls: ListOf[_ToolCall] | None = None
    tool_call_id: str | None = None


class _JsonSchema(Strict):
    name: str = "answer"
    schema_: dict[str, Any] = Field(alias="schema")


class _PlainFormat(Strict):
    type: Literal["text", "json_object", "structural_tag"]


class _SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: _JsonSchema


class _StreamOptions(Strict):
    include_usage: bool | None = None


class Sampled(Strict):
    """The fields that chat and completion requests share: OpenAI's, and vLLM's own. Others are refused, since a field
    that nobody reads could change what is asked."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | ListOf[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: ListOf[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: ListOf[int] | None = None
    bad_words: ListOf[str] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    structured_outputs: dict[str, Any] | None = None
    return_tokens_as_token_ids: bool | None = None
    vllm_xargs: dict[str, Any] | None = None


class Chat(Sampled):
    """A chat request."""

    messages: Annotated[ListOf[_Message], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: ListOf[_Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | _AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    response_format: Annotated[_PlainFormat | _SchemaFormat, Field(discriminator="type")] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: ListOf[dict[str, str]] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    thinking_token_budget: int | None = Field(None, ge=0)


def engine_form(chat: Mapping[str, Any]) -> dict[str, Any]:
    """A chat request as every engine takes it. A null is an absent field. Raises BadRequest, which names the field.

    Example: {"messages": […], "tools": [], "tool_choice": "auto", "user": null} -> {"messages": […]}
    """
    request = known_fields(Chat, chat)
    request["messages"] = [_message(message, index) for index, message in enumerate(request["messages"])]
    tools, choice = request.pop("tools", []), request.pop("tool_choice", "auto")
    if isinstance(choice, dict) and "allowed_tools" in choice:
        names = {tool["function"]["name"] for tool in choice["allowed_tools"]["tools"]}
        tools = [tool for tool in tools if tool["function"]["name"] in names]
        choice = choice["allowed_tools"]["mode"]
    if isinstance(choice, dict) and not any(tool["function"]["name"] == choice["function"]["name"] for tool in tools):
        name = choice["function"]["name"]
        raise BadRequest(f"tool_choice must name one of the tools, not {name!r}", param="tool_choice")
    if choice == "required" and not tools:
        raise BadRequest("tool_choice is 'required': tools must not be empty", param="tools")
    if tools:
        return request | {"tools": [_tool(tool) for tool in tools], "tool_choice": choice}
    request.pop("parallel_tool_calls", None)
    return request


def known_fields(model: type[Sampled], body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body that say something to an engine. Raises BadRequest if one of them is not supported."""
    given = {
        name: value
        for name, value in body.items()
        if value is not None and name not in HARMLESS and (name not in _NEUTRAL or value != _NEUTRAL[name])
    }
    request = read(model, given).model_dump(exclude_none=True, by_alias=True)
    if isinstance(stop := request.get("stop"), list):
        request["stop"] = [text for text in stop if text]
    return request


def _message(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message in the words that chat templates know."""
    role, content = message["role"], message.get("content")
    if content is None and role not in ("assistant", "tool"):
        raise BadRequest(f"messages[{index}].content is required", param=f"messages[{index}].content")
    if isinstance(content, list):
        parts = [{"type": "text", "text": p["refusal"]} if p["type"] == "refusal" else p for p in content]
        content = content_of(parts)
    if role == "developer":  # the newer name: templates that do not know it leave the message out
        message = message | {"role": "system"}
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
        content = content or ""
    return message | {"content": content}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool whose arguments are an object: without `parameters` a grammar would take any JSON, and a template fail."""
    function = tool["function"]
    return tool | {"function": function | {"parameters": {"type": "object", **function.get("parameters", {})}}}
