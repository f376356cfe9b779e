"""Google's generateContent: contents made of parts; names in camelCase or snake_case, as Google's API reads both."""

from __future__ import annotations

import json
import re
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.alias_generators import to_camel

from agent_lightning.core.json_values import as_mapping, parse_json
from agent_lightning.serving.dialects import base
from agent_lightning.serving.dialects.base import BadRequest, Dialect, RequestContext, Stream, Strict, event, read
from agent_lightning.serving.dialects.fields import engine_form
from agent_lightning.serving.engine import Completion, Refusal

_STATUS = {403: "PERMISSION_DENIED", 404: "NOT_FOUND", 405: "UNIMPLEMENTED", 409: "ABORTED", 429: "RESOURCE_EXHAUSTED"}
_STATUS |= {500: "INTERNAL", 504: "DEADLINE_EXCEEDED"}
"""Google's names of errors, by their HTTP status; of all others it is INVALID_ARGUMENT."""
_MODES = {"AUTO": "auto", "VALIDATED": "auto", "ANY": "required", "NONE": "none", "MODE_UNSPECIFIED": "auto"}
_SAMPLING = {
    **{"temperature": "temperature", "topP": "top_p", "topK": "top_k", "candidateCount": "n", "seed": "seed"},
    **{"maxOutputTokens": "max_tokens", "stopSequences": "stop", "presencePenalty": "presence_penalty"},
    **{"frequencyPenalty": "frequency_penalty", "responseLogprobs": "logprobs", "logprobs": "top_logprobs"},
}
"""A field of generationConfig -> the field of a chat request."""
_TRANSLATED = ("responseSchema", "responseJsonSchema", "_responseJsonSchema", "responseMimeType", "thinkingConfig")
_HARMLESS = ("safety_settings", "labels", "model", "stream", "store")
_TEXT, _JSON = "text/plain", "application/json"
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


class _Google(Strict):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")


class _Loose(_Google):
    model_config = ConfigDict(extra="allow")


class _Call(_Loose):
    """A call of a function, or its result."""

    name: str
    id: str | None = None
    args: dict[str, Any] | None = None
    response: dict[str, Any] | None = None


class _Blob(_Loose):
    mime_type: str
    data: str


class _Part(_Google):
    text: str | None = None
    thought: bool | None = None
    thought_signature: str | None = None
    function_call: _Call | None = None
    function_response: _Call | None = None
    inline_data: _Blob | None = None


class _Content(_Google):
    role: Literal["user", "model", "function", "system"] | None = None
    parts: base.ListOf[_Part] | None = None


class _Function(_Loose):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    parameters_json_schema: dict[str, Any] | None = None


class _Tool(_Google):
    function_declarations: base.ListOf[_Function] | None = None


class _CallingConfig(_Google):
    mode: Literal["AUTO", "ANY", "NONE", "VALIDATED", "MODE_UNSPECIFIED"] | None = None
    allowed_function_names: list[str] | None = None


class _ToolConfig(_Google):
    function_calling_config: _CallingConfig | None = None


class _Request(_Google):
    contents: base.ListOf[_Content] | _Content
    system_instruction: _Content | None = None
    tools: base.ListOf[_Tool] | None = None
    tool_config: _ToolConfig | None = None
    generation_config: dict[str, Any] | None = None


class _Stream(Stream):
    """Writes an answer as responses that each hold a piece of it."""

    _sent: frozenset[int] = frozenset()
    """Indices of candidates with text that was sent."""

    def begin(self) -> str:
        return ""

    def delta(self, choice: Mapping[str, Any]) -> str:
        text = choice["delta"].get("content")
        if not text:
            return ""
        self._sent |= {choice["index"]}
        content = {"role": "model", "parts": [{"text": text}]}
        return event(_response(self._context, [{"index": choice["index"], "content": content}]))

    def end(self, completion: Completion) -> str:
        reply = Google().reply(self._context, completion)
        for candidate in reply["candidates"]:
            if candidate["index"] in self._sent:
                candidate["content"]["parts"] = [p for p in candidate["content"]["parts"] if "text" not in p]
        return event(reply)

    def fail(self, refusal: Refusal) -> str:
        return event(Google().error(refusal))


class Google(Dialect):
    """The dialect of POST /v1beta/models/NAME:generateContent."""

    prefix = "gen_"
    request = _Request
    stream = _Stream

    def to_engine(self, body: Mapping[str, Any]) -> dict[str, Any]:
        inner = body.get("generateContentRequest")  # a form of countTokens
        fields = {**body, **inner} if isinstance(inner, dict) else body
        left_out = (*_HARMLESS, *map(to_camel, _HARMLESS), "generateContentRequest")
        request = read(_Request, {name: v for name, v in fields.items() if v is not None and name not in left_out})
        chat = {"messages": _messages(request), **_generation(request.generation_config or {})}
        functions = [function for tool in request.tools or () for function in tool.function_declarations or ()]
        chat["tools"] = [{"type": "function", "function": _function(function)} for function in functions]
        if request.tool_config and (config := request.tool_config.function_calling_config):
            chat["tool_choice"] = _tool_choice(config)
        return engine_form(chat)

    def reply(self, context: RequestContext, completion: Completion) -> dict[str, Any]:
        usage = completion.reply["usage"]
        counts = {"promptTokenCount": "prompt_tokens", "candidatesTokenCount": "completion_tokens"}
        used = {name: usage[field] for name, field in (counts | {"totalTokenCount": "total_tokens"}).items()}
        candidates = [_candidate(choice, context) for choice in completion.reply["choices"]]
        return _response(context, candidates) | {"usageMetadata": used}

    def count(self, tokens: int) -> dict[str, Any]:
        return {"totalTokens": tokens}

    def error(self, refusal: Refusal) -> dict[str, Any]:
        status = _STATUS.get(refusal.status, "INVALID_ARGUMENT")
        why = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": refusal.code, "domain": "agent-lightning"}
        return {"error": {"code": refusal.status, "message": refusal.message, "status": status, "details": [why]}}


def _response(context: RequestContext, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    return {"candidates": candidates, "modelVersion": context.model, "responseId": context.reply_id}


def _candidate(choice: Mapping[str, Any], context: RequestContext) -> dict[str, Any]:
    """A choice of the engine's reply in Google's form; a call whose arguments are no JSON object is shown as text."""
    text, calls = choice["message"].get("content") or "", []
    for call in choice["message"].get("tool_calls") or ():
        function = call["function"]
        arguments = parse_json(function["arguments"] or "{}")
        if isinstance(arguments, dict):
            calls.append({"functionCall": {"id": call["id"], "name": function["name"], "args": arguments}})
        else:
            text += f"{function['name']}({function['arguments']})"
    reason = "MAX_TOKENS" if choice["finish_reason"] == "length" else "STOP"
    content = {"role": "model", "parts": [*([{"text": text}] if text or not calls else []), *calls]}
    candidate = {"index": choice["index"], "content": content, "finishReason": reason}
    entries = (choice.get("logprobs") or {}).get("content") if context.engine.get("logprobs") else None
    return candidate | ({"logprobsResult": _logprobs(entries)} if entries else {})


def _logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    def form(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {"token": entry["token"], "logProbability": entry["logprob"]}

    best = [{"candidates": [form(other) for other in entry.get("top_logprobs") or ()]} for entry in entries]
    return {"chosenCandidates": [form(entry) for entry in entries], "topCandidates": best}


def _messages(request: _Request) -> list[dict[str, Any]]:
    """The chat messages for the contents. Calls without an id get one, and a result without an id is that of the first
    call of its name that has none yet."""
    messages: list[dict[str, Any]] = []
    if request.system_instruction and (system := _texts_of(request.system_instruction)):
        messages.append({"role": "system", "content": system})
    waiting, answered = defaultdict[str, deque[str]](deque), set[str]()  # ids of calls, those that wait by their name
    for number, content in enumerate(request.contents if isinstance(request.contents, list) else [request.contents]):
        calls = []
        for index, part in enumerate(content.parts or ()):
            new_id = f"call_{number}_{index}"
            if (call := part.function_call) is not None:
                waiting[call.name].append(call.id or new_id)
                function = {"name": call.name, "arguments": json.dumps(call.args or {}, ensure_ascii=False)}
                calls.append({"id": call.id or new_id, "type": "function", "function": function})
            elif (result := part.function_response) is not None:
                ids = waiting[result.name]
                while ids and ids[0] in answered:
                    ids.popleft()
                call_id = result.id or (ids[0] if ids else new_id)
                answered.add(call_id)
                messages.append({"role": "tool", "tool_call_id": call_id, **_result(result.response or {})})
        role, text = {"model": "assistant", "system": "system"}.get(content.role or "", "user"), _texts_of(content)
        if text or calls:
            messages.append({"role": role, "content": text} | ({"tool_calls": calls} if calls else {}))
    if not messages or messages[-1]["role"] == "system":
        raise BadRequest("contents must not be empty", param="contents")
    return messages


def _texts_of(content: _Content) -> str | list[dict[str, Any]] | None:
    """The content of a chat message: texts and images, without thoughts."""
    parts: list[dict[str, Any]] = []
    for part in content.parts or ():
        if (blob := part.inline_data) is not None:
            if not blob.mime_type.startswith("image/"):
                raise BadRequest(f"inlineData of type {blob.mime_type!r} is not supported", "unsupported")
            parts.append({"type": "image_url", "image_url": {"url": f"data:{blob.mime_type};base64,{blob.data}"}})
        elif part.text is not None and not part.thought:
            parts.append({"type": "text", "text": part.text})
    return base.content_of(parts)


def _result(response: Mapping[str, Any]) -> dict[str, Any]:
    """Content and status of a tool's message: `output` or `result` alone is what the tool returned, `error` why it
    failed."""
    (name, value), *others = [*response.items()] or [("", "")]
    if others or name not in ("output", "result", "error", ""):
        value = dict(response)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {"content": text} | ({"status": "error"} if "error" in response else {})


def _function(function: _Function) -> dict[str, Any]:
    schema = function.parameters_json_schema or _json_schema(function.parameters or {})
    given = {"name": function.name, "description": function.description, "parameters": schema or None}
    return {name: value for name, value in given.items() if value is not None}


def _tool_choice(config: _CallingConfig) -> str | dict[str, Any]:
    mode, allowed = _MODES[config.mode or "AUTO"], config.allowed_function_names
    if not allowed or mode == "none":
        return mode
    tools = [{"type": "function", "function": {"name": name}} for name in allowed]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chat request for generationConfig. Raises BadRequest."""
    given = {name if name.startswith("_") else to_camel(name): v for name, v in config.items() if v is not None}
    if given.get("responseModalities") in ([], ["TEXT"]):
        del given["responseModalities"]
    for name in given.keys() - _SAMPLING.keys() - set(_TRANSLATED):
        raise BadRequest(f"generationConfig.{name} is not supported", "unsupported", param=f"generationConfig.{name}")
    values = {name: int(v) if isinstance(v, float) and v == int(v) else v for name, v in given.items()}  # 40.0 is 40
    chat: dict[str, Any] = {field: values[name] for name, field in _SAMPLING.items() if name in values}
    budget = as_mapping(given.get("thinkingConfig")).get("thinkingBudget")
    if budget is not None:
        chat["chat_template_kwargs"] = {"enable_thinking": budget != 0}
    if given.get("responseMimeType", _TEXT) not in (_TEXT, _JSON):
        raise BadRequest(f"generationConfig.responseMimeType must be {_TEXT} or {_JSON}", "unsupported")
    if given.get("responseMimeType") == _JSON:
        chat["response_format"] = {"type": "json_object"}
    schemas = (given.get("responseJsonSchema"), given.get("_responseJsonSchema"), given.get("responseSchema"))
    if schema := next((schema for schema in schemas if schema), None):
        named = {"name": "answer", "schema": _json_schema(schema), "strict": True}
        chat["response_format"] = {"type": "json_schema", "json_schema": named}
    return chat


def _json_schema(schema: Any) -> Any:
    """A schema of Google's, in which types are in capitals and numbers may be texts, as a JSON schema."""
    if isinstance(schema, list):
        return [_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: value for key, value in schema.items() if key not in ("nullable", "propertyOrdering", "example")}
    for key in ("items", "anyOf"):
        if key in plain:
            plain[key] = _json_schema(plain[key])
    if isinstance(properties := plain.get("properties"), dict):
        plain["properties"] = {name: _json_schema(value) for name, value in properties.items()}
    plain |= {key: int(plain[key]) for key in _COUNTS if re.fullmatch("[0-9]{1,9}", str(plain.get(key)))}
    if isinstance(kind := plain.get("type"), str):
        plain["type"] = [kind.lower(), "null"] if schema.get("nullable") else kind.lower()
    return plain
