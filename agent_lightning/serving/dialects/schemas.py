"""JSON schemas of a request's format, as far as a grammar can hold a policy to them. Pure."""

from __future__ import annotations

from typing import Any

from agent_lightning.serving.dialects.base import BadRequest

_FORMATS = (
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"),
    *("uri-template", "json-pointer", "relative-json-pointer"),
)
_NOT_ENFORCED = {
    "integer": ("multipleOf",),
    "number": ("multipleOf",),
    "array": ("uniqueItems", "contains", "minContains", "maxContains"),
    "object": ("patternProperties", "propertyNames"),
}
"""By the type of a value, the keywords that no grammar of xgrammar 0.2 follows: vLLM refuses a schema with them."""


def enforced(schema: Any, field: str, *, strict: bool) -> Any:
    """The schema without the keywords that cannot be enforced. If it is strict, they are refused: BadRequest names the
    keyword, and `field`, the field of the request that holds the schema.

    Example: {"type": "integer", "multipleOf": 5} -> {"type": "integer"}
    """
    if isinstance(schema, list):
        return [enforced(part, field, strict=strict) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    ignored = set(_NOT_ENFORCED.get(kind, ()) if isinstance(kind, str) else ())
    if kind == "string":
        ignored |= set() if schema.get("format") in _FORMATS else {"format"}
        ignored |= {"minLength", "maxLength"} if schema.keys() & ({"pattern", "format"} - ignored) else set()
    for keyword in sorted(ignored & schema.keys()):
        if strict and schema[keyword] is not False:
            message = f"{field}: {keyword!r} of a {kind} cannot be enforced: leave it out, or do not set strict"
            raise BadRequest(message, "unsupported", param=field)
    return {key: enforced(part, field, strict=strict) for key, part in schema.items() if key not in ignored}
