"""The base class of every section of the config, which decides how strict it is; and its keys in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from agent_lightning.core.text import one_line

AtLeast0 = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]

_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "a mapping",
}
_BOUNDS: Mapping[type, str] = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}


class Section(BaseModel):
    """A frozen part of the config. Unknown keys, wrong types, NaN and infinity are refused.

    A number may be given as text, as an environment variable is ("${oc.env:STEPS}"), and a text as a number.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        ser_json_inf_nan="constants",
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_true_as_number(cls, value: object, info: ValidationInfo) -> object:
        """Raise ValueError for a bool in a field of another type: Pydantic would take `true` for 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true and false are no numbers")
        return value


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the config that holds a value and no further keys."""

    path: str
    """Dotted, such as "algorithm.lr"."""
    field: FieldInfo

    @property
    def sentence(self) -> str:
        """What the key means, on one line."""
        return one_line(self.field.description or "")

    @property
    def kind(self) -> str:
        """The values that are allowed, such as "a whole number or null, at least 1"."""
        limit = bounds(self.field)
        return in_words(self.field.annotation) + (f", {limit}" if limit else "")


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether the type of a field is a section, not a value."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def keys(section: type[Section], prefix: str = "") -> Iterator[Key]:
    """Every key below a section, in the order in which they are written."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", field)


def sections(section: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Every section below a section, with its dotted path."""
    for name, field in section.model_fields.items():
        if is_section(field.annotation):
            yield f"{prefix}{name}", field.annotation
            yield from sections(field.annotation, f"{prefix}{name}.")


def defaults(section: type[Section]) -> dict[str, Any]:
    """The defaults of every key below a section as plain values; keys that must be given are left out."""
    values: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if field.is_required() and is_section(field.annotation):
            values[name] = defaults(field.annotation)
        elif not field.is_required():
            values[name] = field.get_default(call_default_factory=True)
    return section.model_construct(**values).model_dump(mode="json", warnings=False)


def in_words(annotation: Any) -> str:
    """A type in words that a person reads.

    Example:

        in_words(float | None)                    # "a number or null"
        in_words(Literal["k1", "k2"])             # "one of k1, k2"
        in_words(float | None | Literal["keep"])  # "a number or null, keep"
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_words(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, UnionType):
        arguments = tuple(option for option in arguments if get_origin(option) is not Callable)  # only Python has them
        words = [option for option in arguments if get_origin(option) is Literal]
        plain = " or ".join(in_words(option) for option in arguments if option not in words)
        if all(option is type(None) for option in arguments if option not in words):
            return f"{in_words(words[0])}, or null"
        return ", ".join([plain, *(word for option in words for word in get_args(option))])
    if origin is tuple:
        return f"a list; each item {in_words(arguments[0])}"
    return _WORDS.get(origin or annotation, "a mapping")


def bounds(field: FieldInfo) -> str:
    """The limits of a number, such as "at least 1" or "above 0 and at most 1"; "" if it has none."""
    limits = list(field.metadata)
    for part in (field.annotation, *get_args(field.annotation)):  # the limits inside an optional type too
        for item in part.__metadata__ if get_origin(part) is Annotated else ():
            limits += item.metadata if isinstance(item, FieldInfo) else [item]
    words = [f"{_BOUNDS[type(limit)]} {astuple(limit)[0]}" for limit in limits if type(limit) in _BOUNDS]
    both = re.fullmatch("at least (.*) and at most (.*)", text := " and ".join(words))
    return f"from {both[1]} to {both[2]}" if both else text
