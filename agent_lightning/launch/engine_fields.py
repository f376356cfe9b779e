"""`verl.*` and `vllm.*` against the fields of their own classes, read from the source: an import takes ten seconds."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from agent_lightning.core.errors import ConfigError

_CLASSES: Final = {
    "verl": ("workers/config/engine.py", "FSDPEngineConfig"),
    "vllm": ("engine/arg_utils.py", "AsyncEngineArgs"),
}
"""The class whose fields each section holds, and its file in the package."""
_SAMPLING: Final = ("generation_config", "override_generation_config", "logits_processors", "logprobs_mode")
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "None": (type(None),),
    "Optional": (type(None),),
}


def check(section: str, values: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key of `verl` or `vllm` that their class does not have, for a value of another type, and
    for engine arguments that would change what is sampled behind the config's back."""
    known = _fields(*_CLASSES[section], section) if values else {}
    for name, value in values.items():
        if section == "vllm" and name in _SAMPLING:
            raise ConfigError(f"vllm.{name}: would sample otherwise than the config says; use the keys of sampling")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {section}.{close[0]}?" if close else ""
            raise ConfigError(f"{section}.{name}: no field of {section}'s {_CLASSES[section][1]}{hint}")
        words = re.findall(r"\w+", known[name])
        types = tuple(kind for word in words if word in _TYPES for kind in _TYPES[word])
        is_bool_for_number = isinstance(value, bool) and bool not in types
        if all(word in _TYPES for word in words) and (is_bool_for_number or not isinstance(value, types)):
            raise ConfigError(f"{section}.{name}={value}: must be {known[name]}")


def _fields(file: str, kind: str, package: str) -> dict[str, str]:
    """The fields of a dataclass and of its bases in the same file: each name with its annotation."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{package} is not installed: run `agl doctor`")
    tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def collect(name: str) -> dict[str, str]:
        node = classes.get(name)
        if node is None:
            return {}
        inherited = [collect(base.id) for base in node.bases if isinstance(base, ast.Name)]
        own = {
            item.target.id: ast.unparse(item.annotation)
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        return {name: kind for fields in (*inherited, own) for name, kind in fields.items()}

    return collect(kind)
