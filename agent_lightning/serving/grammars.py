"""Grammars of tool calls: what vLLM lets the policy sample if a request has tools. Only replicas import this module."""

from __future__ import annotations

from typing import Any

from vllm.tool_parsers import ToolParserManager
from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag
from xgrammar import StructuralTag
from xgrammar.structural_tag import JSONSchemaFormat, OrFormat

_MAX_SPACES = 1
"""Spaces in a row in arguments: a policy that likes spaces would write them until its limit."""


def use_own_grammars(tool_parser: str) -> None:
    """Put a parser in place of vLLM's parser of this name. It reads the same calls, and its grammars differ in two
    ways: spaces are bounded, and an agent that gives tools and a `response_format` gets a tool call or an answer in
    that format, as from OpenAI, where vLLM lets the policy either call no tool or answer in any form."""
    if tool_parser not in (*ToolParserManager.lazy_parsers, *ToolParserManager.tool_parsers):
        return  # a plug-in's, which vLLM loads later
    base: Any = ToolParserManager.get_tool_parser(tool_parser)

    class Parser(base):  # type: ignore[misc]
        def get_structural_tag(self, request: Any, *, reasoning: bool = False) -> StructuralTag | None:
            tag = super().get_structural_tag(request, reasoning=reasoning)
            form = request.response_format
            if request.tool_choice == "auto" and form is not None and form.type in ("json_object", "json_schema"):
                calls = get_model_structural_tag(self.structural_tag_model, request.tools, "required", reasoning)
                schema = form.json_schema.json_schema if form.type == "json_schema" else {"type": "object"}
                assert calls is not None
                tag = StructuralTag(format=OrFormat(elements=[JSONSchemaFormat(json_schema=schema), calls.format]))
            return tag and StructuralTag.model_validate(_bounded(tag.model_dump()))

    if base.structural_tag_model is not None:
        ToolParserManager.register_module(tool_parser, module=Parser)


def _bounded(form: Any) -> Any:
    """A grammar as JSON in which no JSON has more than `_MAX_SPACES` spaces in a row."""
    if isinstance(form, list):
        return [_bounded(part) for part in form]
    if not isinstance(form, dict):
        return form
    if form.get("type") == "json_schema":
        return form | {"max_whitespace_cnt": _MAX_SPACES}
    return {name: _bounded(part) for name, part in form.items()}
