"""The config: Hydra at the edge, frozen sections below it.

`load(overrides)` composes conf/ over the defaults and checks every key once; nothing below ever sees a DictConfig.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from agent_lightning.config import section
from agent_lightning.config.learning import SamplingSplits
from agent_lightning.config.schema import RENAMED, Config
from agent_lightning.core.errors import ConfigError

__all__ = ["Config", "from_mapping", "load", "reload", "to_mapping", "to_yaml"]

SEARCH = "hydra.searchpath=[file://"


def project_folder(name: str) -> Path:
    """A folder that ships with the project (conf, examples): in the package where it was installed, else beside it."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def resolve_path(path: str) -> str:
    """A local path from here, or else from the project's folder; ~ is the home; anything else (a hub id) as it is."""
    path = os.path.expanduser(path)
    if Path(path).exists():
        return str(Path(path).resolve())
    parts = Path(path).parts
    shipped = project_folder(parts[0]).joinpath(*parts[1:]) if parts and not Path(path).is_absolute() else None
    return str(shipped) if shipped is not None and shipped.exists() else path


def load(overrides: Sequence[str]) -> Config:
    """Compose conf/train.yaml with Hydra overrides. Raises ConfigError, one line, naming the key.

    `experiment=` may also be a file of your own, in a folder named experiment: experiment=mine/experiment/big.yaml.
    Without it, `agent.target` and `data.train.path` are yours (conf/own/experiment/own.yaml).

    Example:

        load(["experiment=calc_tiny", "steps=20", "algorithm.lr=1e-3"]).algorithm.lr  # 0.001
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException

    conf = project_folder("conf")
    if not any(override.startswith("experiment=") for override in overrides):
        if not any(re.match(r"[+]*agent(\.target)?=", override) for override in overrides):
            own, names = "agent.target= and data.train.path= of your own", _options(conf / "experiment")
            raise ConfigError(f"experiment: missing; give experiment=NAME, or {own}; names are {names}")
        overrides = [f"experiment={conf}/own/experiment/own.yaml", *overrides]
    prepared = hydra_overrides(overrides)
    try:
        with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
            node = compose("train", overrides=prepared)
        values = _resolve(node)
    except OverrideParseException as error:
        given = error.override.removeprefix("++")
        raise ConfigError(f"{given}: cannot be read; quote a value that has special characters") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        text = one_line(error)
        if listed := re.match(r"Ambiguous value for argument '\+*([^=]*)=(.*)'", text):
            key, value = listed.groups()
            text = (
                f"{key}={value}: a list is written {key}=[{value}]; quote a text that has a comma: {key}='\"{value}\"'"
            )
        raise ConfigError(text) from error
    config = from_mapping(values)
    for override in prepared:
        key, value = _split(override)
        # An algorithm may bring its own method, and then the file chosen here would count for nothing.
        method = yaml.safe_load((conf / key / f"{value}.yaml").read_text()).get("method") if key == "credit" else None
        if method not in (None, config.credit.method):
            raise ConfigError(f"{override}: the algorithm's is credit.method={config.credit.method}; leave one out")
    return config


def reload(path: Path, overrides: Sequence[str]) -> Config:
    """A run's own config.yaml with dotted overrides on top: what `resume` starts from. Raises ConfigError.

    The file may have keys under their old names; the overrides may not.
    """
    for override in overrides:
        if _split(override)[0] == "experiment":
            raise ConfigError(f"{override}: a resumed run keeps its own experiment; leave it out")
    try:
        node: Any = OmegaConf.load(path)
        if not isinstance(node, Mapping):
            raise ConfigError("the config must be a mapping of keys to values")
        for old, new in RENAMED.items():
            name, old_key, new_key = *old.split("."), new.split(".")[1]
            if isinstance(node.get(name), Mapping) and old_key in node[name]:
                node[name][new_key] = node[name].pop(old_key)
        data = node.get("data")
        for source in (data.get("train"), data.get("val")) if isinstance(data, Mapping) else ():
            if isinstance(source, MutableMapping) and source.get("kind") == "calcx":  # a kind of earlier versions
                rows = source.get("num") or 1_000_000
                source.update(kind="generated", target="examples/calc_x/parts.py:rows", num=rows)
        values = _resolve(node, OmegaConf.from_dotlist(list(overrides)))
    except (OmegaConfBaseException, OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    return from_mapping(values)


def _resolve(*nodes: Any) -> Any:
    """The defaults with the nodes on top, as plain values: an interpolation may name any key. Raises ConfigError."""
    merged: Any = section.defaults(Config)
    for node in nodes:
        merged = _merge(merged, OmegaConf.to_container(node))
    try:
        return OmegaConf.to_container(OmegaConf.create(merged), resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; give it a value") from error


def _merge(low: Any, high: Any) -> Any:
    """`high` over `low`, key by key in mappings. (OmegaConf's refuses a mapping over a list without naming the key.)"""
    if not (isinstance(low, dict) and isinstance(high, dict)):
        return high
    return low | {key: _merge(low.get(key), value) for key, value in high.items()}


def rename_keys(words: Iterable[str]) -> list[str]:
    """KEY=VALUE words of an earlier sweep with each renamed key under its new name."""
    pairs = (word.partition("=") for word in words)
    return [f"{RENAMED.get(key, key)}{equals}{value}" for key, equals, value in pairs]


def from_mapping(values: Any) -> Config:
    """Check keys and values. Raises ConfigError naming the key's path.

    Example:

        {"algorithm": {"lrr": 1}}   -> ConfigError: algorithm.lrr: no such key; did you mean algorithm.lr?
        {"algorithm": {"lr": "x"}}  -> ConfigError: algorithm.lr=x: must be a number
    """
    if not isinstance(values, Mapping):
        raise ConfigError("the config must be a mapping of keys to values")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def to_yaml(config: Config) -> str:
    """The whole config, every default written out, and the rule by which `sampling` holds."""
    rule = "".join(f"# {line}\n" for line in cleandoc(SamplingSplits.__doc__ or "").splitlines()[2:])
    text = OmegaConf.to_yaml(OmegaConf.create(_escaped(to_mapping(config))))
    return text.replace("\nsampling:\n", f"\n{rule}sampling:\n")


def to_mapping(config: Config) -> dict[str, Any]:
    """The whole config as plain values."""
    return config.model_dump(mode="json")


def _escaped(value: Any) -> Any:
    """The value with each "${" written so that reading it again gives the same text."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not (equals and key):
        raise ConfigError(f"{override}: must have the form key=value")
    return key, value


def hydra_overrides(overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra wants them: the choice of a file as it is, a value with "++". Raises ConfigError.

    experiment=PATH/experiment/NAME.yaml is experiment=NAME, and PATH one more place to look for it.
    """
    conf = project_folder("conf")
    plain, places, prepared = [], [conf], []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "experiment" and value.endswith(".yaml"):
            file = Path(value).resolve()
            if not file.is_file() or file.parent.name != "experiment":
                raise ConfigError(f"{override}: must be a file in a folder named experiment, or a name without .yaml")
            places.append(file.parent.parent)
            override = f"experiment={file.stem}"
        plain.append(override)
    for override in plain:
        key, value = _split(override)
        if key[0] in "+~":
            prepared.append(override)
        elif len(value) < 256 and any((place / key / f"{value}.yaml").is_file() for place in places):
            # The groups of conf/ stand in the defaults list of train.yaml; a group of your own is added to it.
            prepared.append(override if (conf / key).is_dir() else f"+{override}")
        elif (conf / key).is_dir():
            raise ConfigError(f"{override}: unknown; choose one of {_options(conf / key)}")
        elif value == "default" and key in Config.model_fields:
            raise ConfigError(
                f"{override}: the defaults hold without it; leave it out, or set one of the keys of {key}"
            )
        else:
            # Hydra takes a plain key only where a file has it already, but most keys have their default in a section.
            # Which keys exist is checked later, against the sections.
            prepared.append(f"++{override}")
    return [*prepared, *(f"{SEARCH}{place}]" for place in places[1:])]


def _options(folder: Path) -> str:
    return ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))


def one_line(error: Exception) -> str:
    """The first line of the deepest cause's message, with the key in front if the error has it."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = f"{cause.full_key}: " if isinstance(cause, OmegaConfBaseException) and cause.full_key else ""
    return key + " ".join(lines[:1] or [type(cause).__name__])


def explain(error: ValidationError, root: type[section.Section] = Config) -> str:
    """The first refusal by the section `root` as one line; an unknown key comes before a wrong value.

    Example: "algorithm.lr=x: must be a number"
    """
    refusals = error.errors(include_url=False)
    extra = [refusal for refusal in refusals if refusal["type"] == "extra_forbidden"]
    refusal = (extra or refusals)[0]
    path, hint, limits = _locate(refusal, root)
    given = f"{path}={'null' if refusal['input'] is None else refusal['input']}"
    match refusal["type"]:
        case "extra_forbidden":
            return unknown(path)
        case "missing":
            return f"{path}: missing; give it a value"
        case "finite_number":
            return f"{given}: must be a finite number"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            return f"{given}: must be {limits}"
    if section.is_section(hint):
        return f"{given}: is a section; set one of its keys, such as {next(section.keys(hint, f'{path}.')).path}"
    return f"{given}: must be {section.in_words(hint)}"


def _locate(refusal: ErrorDetails, root: type[section.Section]) -> tuple[str, Any, str]:
    """The path of the refused value, such as "air.rules[0].cap", its type, and its bounds in words."""
    path = limits = ""
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
    """Why there is no such key: it was renamed, or it may be a slip for a similar key."""
    if path in RENAMED:
        return f"{path}: is now {RENAMED[path]}"
    known = [*(key.path for key in section.keys(Config)), *(path for path, _ in section.sections(Config))]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    last_parts = {key.rpartition(".")[2]: key for key in reversed(known)}
    close += [last_parts[name] for name in difflib.get_close_matches(path.rpartition(".")[2], last_parts, n=1)]
    return f"{path}: no such key; " + (f"did you mean {close[0]}?" if close else "`agl config` lists all keys")
