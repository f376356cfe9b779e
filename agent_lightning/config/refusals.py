"""A value that the config refuses, as one line: which key, what was given, and what belongs there."""

from __future__ import annotations

import difflib
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from agent_lightning.config import section
from agent_lightning.config.schema import RENAMED, Config

_OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def explain(error: ValidationError, root: type[section.Section] = Config) -> str:
    """The first refusal by the section `root` as one line; an unknown key comes before a wrong value.

    Example: "algorithm.lr=x: must be a number"
    """
    refusals = error.errors(include_url=False)
    unknown = [refusal for refusal in refusals if refusal["type"] == "extra_forbidden"]
    return _explain((unknown or refusals)[0], root)


def _explain(refusal: ErrorDetails, root: type[section.Section]) -> str:
    path, hint, limits = _locate(refusal, root)
    value = refusal["input"]
    given = f"{path}={'null' if value is None else value}"
    match refusal["type"]:
        case "extra_forbidden":
            return unknown(path)
        case "missing":
            return f"{path}: missing; give it a value"
        case "finite_number":
            return f"{given}: must be a finite number"
        case kind if kind in _OUT_OF_BOUNDS:
            return f"{given}: must be {limits}"
    if section.is_section(hint):
        return f"{given}: is a section; set one of its keys, such as {next(section.keys(hint, f'{path}.')).path}"
    return f"{given}: must be {section.in_words(hint)}"


def _locate(refusal: ErrorDetails, root: type[section.Section]) -> tuple[str, Any, str]:
    """The path of the refused value, such as "air.rules[0].cap", its type, and its bounds in words."""
    path, limits = "", ""
    hint: Any = root
    for part in refusal["loc"]:
        if section.is_section(hint):
            path, field = f"{path}.{part}".removeprefix("."), hint.model_fields.get(str(part))
            if field is None:
                break
            hint, limits = field.annotation, section.bounds(field)
        elif get_origin(hint) is tuple:
            path, hint = f"{path}[{part}]", get_args(hint)[0]
        elif get_origin(hint) is dict:
            path, hint = f"{path}.{part}", get_args(hint)[1]
    return path, hint, limits


def unknown(path: str) -> str:
    """Why there is no such key: it has another name now, or it was meant to be another."""
    if path in RENAMED:
        return f"{path}: is now {RENAMED[path]}"
    known = [*(key.path for key in section.keys(Config)), *(path for path, _ in section.sections(Config))]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    last_parts = {key.rpartition(".")[2]: key for key in reversed(known)}
    close += [last_parts[name] for name in difflib.get_close_matches(path.rpartition(".")[2], last_parts, n=1)]
    return f"{path}: no such key; " + (f"did you mean {close[0]}?" if close else "`agl config` lists all keys")
