"""The meaning of the keys of the config: for `agl config`, and for docs/config.md, which is written by

python -m agent_lightning.config.reference > docs/config.md
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, get_args

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent_lightning.config import load, section
from agent_lightning.config.schema import Config
from agent_lightning.config.section import Section
from agent_lightning.core.errors import ConfigError
from agent_lightning.core.text import one_line

OVERRIDE, DEFAULT = "override", "default"


def show(words: Sequence[str], *, changed: bool = False, as_yaml: bool = False) -> str:
    """The answer of `agl config`: what the named keys mean, or all keys if no word is given.

    With overrides a table of all values, or YAML; `changed` leaves out the defaults. Raises ConfigError.
    """
    names = [word for word in words if "=" not in word and word[:1] not in "+~"]
    if names or not (words or changed or as_yaml):
        return "\n".join(describe(name) for name in names or Config.model_fields)
    config, values = sources(words)
    if as_yaml:
        return load.to_yaml(config)
    table = Table("key", "value", "from")
    for key, (value, source) in values.items():
        if not changed or source != DEFAULT:
            table.add_row(key, escape(str(value)), source)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100_000  # in a pipe nothing is cut
    console = Console(width=width, file=(text := StringIO()))
    console.print(table)
    return text.getvalue()


def sources(overrides: Sequence[str]) -> tuple[Config, dict[str, tuple[Any, str]]]:
    """The config, and by dotted key its value and where the value came from. Raises ConfigError.

    Example: {"algorithm.lr": (0.0002, "conf/experiment/calc_tiny.yaml"), "seed": (1, "override"), …}
    """
    config, conf = load.load(overrides), load.project_folder("conf")
    prepared = load.hydra_overrides(overrides)
    files: dict[str, str] = {}  # by dotted key
    for path, package in _files(prepared):
        content = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(content, dict)
        content.pop("defaults", None)
        name = f"conf/{path.relative_to(conf).as_posix()}" if path.is_relative_to(conf) else str(path)
        files |= dict.fromkeys((key for key, _ in leaves(content, f"{package}." if package else "")), name)
    pairs = zip(overrides, prepared, strict=False)  # the places to look for files come after the overrides
    set_here = {word.partition("=")[0].lstrip("+~") for word, made in pairs if word[0] in "+~" or made.startswith("++")}
    origins: dict[str, tuple[Any, str]] = {}
    for key, value in leaves(load.to_mapping(config)):
        prefixes = [*accumulate(key.split("."), "{}.{}".format)][::-1]
        file = next((files[prefix] for prefix in prefixes if prefix in files), DEFAULT)
        origins[key] = (value, OVERRIDE if set_here.intersection(prefixes) else file)
    return config, origins


def _files(prepared: list[str]) -> Iterator[tuple[Path, str]]:
    """The files that Hydra merges, in its order, each with the section that it fills ("" for the entire config)."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    conf = load.project_folder("conf")
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        merged = loader.compute_defaults_list("train", prepared, RunMode.RUN)
    places = [conf, *(Path(word[len(load.SEARCH) : -1]) for word in prepared if word.startswith(load.SEARCH))]
    for entry in merged.defaults:
        if entry.config_path is not None and not entry.config_path.startswith("hydra/"):
            files = [place / f"{entry.config_path}.yaml" for place in places]
            package = "" if entry.package in (None, "_global_") else str(entry.package)
            yield next((file for file in files if file.is_file()), files[0]), package


def leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested mapping that is no filled mapping itself, by its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe(path: str) -> str:
    """What a key means, or each key of a section. Raises ConfigError.

    Example:

        describe("algorithm.lr")
        # algorithm.lr: a number, at least 0; default 1e-06
        #   Learning rate of the policy.
    """
    below = dict(section.sections(Config)).get(path)
    keys = [key for key in section.keys(Config) if key.path == path or key.path.startswith(f"{path}.")]
    if not keys:
        raise ConfigError(load.unknown(path))
    values = dict(leaves(section.defaults(Config)))
    title = [] if below is None else [f"{path}: {_sentence(below)}\n"]
    described = (f"{key.path}: {key.kind}; {_default(values, key.path)}\n  {key.sentence}\n" for key in keys)
    return "\n".join([*title, *described])


def markdown() -> str:
    """The page docs/config.md: a table of keys for each section."""
    lines, tables = [_INTRODUCTION, *_rows(Config, section.defaults(Config))], dict[type[Section], str]()
    for path, kind, values in _sections():
        lines += ["", f"## {path}", "", _escape(_sentence(kind)), ""]
        if (first := tables.setdefault(kind, path)) == path:
            lines += _rows(kind, values)
        else:
            lines += [f"The keys of [{first}](#{first.replace('.', '')})."]
            defaults = section.defaults(kind)
            lines += [f"`{name}` is {value} by default." for name, value in values.items() if value != defaults[name]]
    return "\n".join(lines) + "\n"


_INTRODUCTION: Final = """\
# Config reference

<!-- Written by `python -m agent_lightning.config.reference > docs/config.md` from agent_lightning/config. -->

Every key of the config, with the default that holds if no file under `conf/` and no override sets another value.
`agl config KEY` prints what a key means; `agl config experiment=NAME` prints all values of an experiment, and where
each came from.
"""


def _sections() -> Iterator[tuple[str, type[Section], Mapping[str, Any]]]:
    """Every section, and every list of sections, with its defaults."""
    defaults = section.defaults(Config)
    for path, kind in section.sections(Config):
        values = defaults
        for part in path.split("."):
            values = values[part]
        yield path, kind, values
        for name, field in kind.model_fields.items():
            for item in get_args(field.annotation):
                if section.is_section(item):
                    yield f"{path}.{name}", item, section.defaults(item)


def _rows(kind: type[Section], values: Mapping[str, Any]) -> Iterator[str]:
    """A table of the keys of a section that hold values; nothing if it has only sections."""
    keys = [key for key in section.keys(kind) if "." not in key.path]
    yield from ("| key | value | default | meaning |", "|---|---|---|---|") if keys else ()
    for key in keys:
        default = _default(values, key.path).removeprefix("default ")
        yield f"| `{key.path}` | {_escape(key.kind)} | {_escape(default)} | {_escape(key.sentence)} |"


def _default(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "must be given"
    value = values[key]
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        items = (" ".join(f"{name}={part}" for name, part in item.items() if part not in ("", "*")) for item in value)
        return f"default {', '.join(items)}"
    return f"default {value if isinstance(value, str) and value else json.dumps(value)}"


def _sentence(kind: type[Section]) -> str:
    return one_line((kind.__doc__ or "").partition("Example:")[0])


def _escape(text: str) -> str:  # for a Markdown table
    return re.sub(r"([|*<])", r"\\\1", text)


if __name__ == "__main__":
    sys.stdout.write(markdown())
