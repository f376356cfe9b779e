"""The fields of chat and completion requests, and the form in which every engine takes a chat request. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from agent_lightning.serving.dialects.base import BadRequest, ListOf, Strict, content_of, read
from agent_lightning.serving.dialects.schemas import check_schema, enforced

_SPEED = ("cache_salt", "prediction", "priority", "prompt_cache_key", "prompt_cache_retention", "service_tier")
_IDS = ("metadata", "request_id", "safety_identifier", "session_id", "store", "user")
_ABOUT_REPLY = ("include_reasoning", "prompt_logprobs", "return_token_ids", "stream_interval")
HARMLESS = frozenset((*_SPEED, *_IDS, *_ABOUT_REPLY))
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


class _SoundPart(Strict):
    type: Literal["audio_url"]
    audio_url: _Url


class _VideoPart(Strict):
    type: Literal["video_url"]
    video_url: _Url


class _Recording(Strict):
    data: str
    format: str


class _RecordingPart(Strict):
    type: Literal["input_audio"]
    input_audio: _Recording


_MediaPart = _ImagePart | _SoundPart | _VideoPart | _RecordingPart
Part = Annotated[_TextPart | _RefusalPart | _MediaPart, Field(discriminator="type")]


class _Name(Strict):
    name: str


class _Parameters(Strict):
    type: Literal["object"] = "object"
    properties: dict[str, Any] | None = None
    required: list[str] | None = None


class _Function(_Name):
    description: str | None = None
    parameters: _Parameters = _Parameters()  # without any, a grammar would take any JSON, and a template fail
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
    id: str = ""
    type: Literal["function"] = "function"
    function: _CalledFunction


class _Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[Part] | None = None
    name: str | None = None
    tool_calls: ListOf[_ToolCall] | None = None
    tool_call_id: str | None = None


class _JsonSchema(Strict):
    name: str = "answer"
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class _PlainFormat(Strict):
    type: Literal["text", "json_object", "structural_tag"]


class _SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: _JsonSchema


class _StructuredOutputs(Strict):
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None


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
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d+$")], float] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[ListOf[str], Field(max_length=4)] | None = None
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
    allowed_token_ids: Annotated[ListOf[int], Field(min_length=1)] | None = None
    bad_words: ListOf[str] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    response_format: Annotated[_PlainFormat | _SchemaFormat, Field(discriminator="type")] | None = None
    structured_outputs: _StructuredOutputs | None = None
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
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: ListOf[dict[str, str]] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    thinking_token_budget: int | None = Field(None, ge=0)


def engine_form(chat: Mapping[str, Any], *, schema_field: str = "response_format") -> dict[str, Any]:
    """A chat request as every engine takes it. A null is an absent field. Raises BadRequest, which names the field;
    `schema_field` is the dialect's name of `response_format`.

    Example: {"messages": […], "tools": [], "tool_choice": "auto", "user": null} -> {"messages": […]}
    """
    request = known_fields(Chat, chat, schema_field)
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
    for tool in tools:
        if tool["function"].get("strict") or choice not in ("auto", "none"):  # its arguments follow a grammar
            check_schema(tool["function"]["parameters"], "tools")
    if tools:
        request |= {"tools": tools, "tool_choice": choice}
    else:
        request.pop("parallel_tool_calls", None)
    if request.get("top_logprobs") and not request.get("logprobs"):
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    continues = request.get("continue_final_message", False)
    if continues and (request["messages"][-1]["role"] != "assistant" or request.get("add_generation_prompt")):
        message = "continue_final_message needs a last message of the assistant, and no add_generation_prompt"
        raise BadRequest(message, param="continue_final_message")
    if continues:
        request["add_generation_prompt"] = False
    return request


def known_fields(
    model: type[Sampled], body: Mapping[str, Any], schema_field: str = "response_format"
) -> dict[str, Any]:
    """The fields of a body that say something to an engine. Raises BadRequest if one of them is not supported."""
    given = {
        name: value
        for name, value in body.items()
        if value is not None and name not in HARMLESS and (name not in _NEUTRAL or value != _NEUTRAL[name])
    }
    request = read(model, given).model_dump(exclude_none=True, by_alias=True)
    for name in ("stop", "bad_words"):  # an empty text would be in every answer
        if name in request:
            texts = [request[name]] if isinstance(request[name], str) else request[name]
            request[name] = [text for text in texts if text]
    if request.get("response_format", {}).get("type") == "json_schema":
        form = request["response_format"]["json_schema"]
        check_schema(form["schema"], schema_field)
        form["schema"] = enforced(form["schema"], schema_field, strict=form.get("strict", False))
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
