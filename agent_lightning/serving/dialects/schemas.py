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

_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")


def check_schema(schema: Any, field: str) -> None:
    """Raises BadRequest if a JSON schema is not valid where a grammar looks; it names the keyword and `field`."""
    if not isinstance(schema, dict):
        if not isinstance(schema, bool):
            raise BadRequest(f"{field}: a JSON schema must be an object", param=field)
        return
    for keyword, value in schema.items():
        inner: Any = ()
        match keyword:
            case "type":
                kinds = value if isinstance(value, list) and value else [value]
                is_valid = all(kind in _TYPES for kind in kinds)
            case "properties" | "$defs" | "definitions":
                is_valid = isinstance(value, dict)
                inner = value.values() if is_valid else ()
            case "anyOf" | "oneOf" | "allOf":
                is_valid = isinstance(value, list) and bool(value)
                inner = value if is_valid else ()
            case "items" | "additionalProperties":
                is_valid, inner = True, (value,)
            case "enum":
                is_valid = isinstance(value, list) and bool(value)
            case "required":
                is_valid = isinstance(value, list) and all(isinstance(name, str) for name in value)
            case _:
                is_valid = True
        if not is_valid:
            raise BadRequest(f"{field}: {keyword!r} of the JSON schema is not valid", param=field)
        for part in inner:
            check_schema(part, field)


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
