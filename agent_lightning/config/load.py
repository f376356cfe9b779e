"""The config: Hydra at the edge, typed dataclasses below it.

`load(overrides)` composes conf/ and checks every key and type once; nothing below ever sees a DictConfig.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from agent_lightning.config.checks import check
from agent_lightning.config.schema import SAMPLING_RULE, Config, SourceConfig
from agent_lightning.core.errors import ConfigError

__all__ = ["Config", "SourceConfig", "from_mapping", "load", "one_line", "reload", "to_mapping", "to_yaml"]

SEARCH = "hydra.searchpath=[file://"
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def project_folder(name: str) -> Path:
    """A folder that ships with the project (conf, examples): in the package where it was installed, else beside it."""
    package = Path(__file__).parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def resolve_path(path: str) -> str:
    """A local path from here, or else from the project's folder; anything else (a hub id) as it is."""
    if Path(path).exists():
        return str(Path(path).resolve())
    parts = Path(path).parts
    shipped = project_folder(parts[0]).joinpath(*parts[1:]) if parts and not Path(path).is_absolute() else None
    return str(shipped) if shipped is not None and shipped.exists() else path


def load(overrides: Sequence[str]) -> Config:
    """Compose conf/train.yaml with Hydra overrides. Raises ConfigError, one line, naming the key.

    `experiment=` may also be a file of one's own, in a folder named experiment: experiment=mine/experiment/big.yaml.

    Example:

        load(["experiment=calc_tiny", "steps=20", "algorithm.lr=1e-3"]).algorithm.lr  # 0.001
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException, OverrideParseException

    conf = project_folder("conf")
    prepared = with_plus(overrides)
    if not any(override.startswith("experiment=") for override in prepared):
        raise ConfigError(f"experiment: missing; give experiment=NAME, one of {_options(conf / 'experiment')}")
    try:
        with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
            node = compose("train", overrides=prepared)
        values = OmegaConf.to_container(node, resolve=True)
    except OverrideParseException as error:
        given = error.override.removeprefix("++")
        raise ConfigError(f"{given}: cannot be read; quote a value that has special characters") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(one_line(error)) from error
    config = from_mapping(values)
    for override in prepared:
        key, value = _split(override)
        # An algorithm may bring its own method, and then the file chosen here would count for nothing.
        method = yaml.safe_load((conf / key / f"{value}.yaml").read_text()).get("method") if key == "credit" else None
        if method not in (None, config.credit.method):
            raise ConfigError(f"{override}: the algorithm's is credit.method={config.credit.method}; leave one out")
    return config


def reload(path: Path, overrides: Sequence[str]) -> Config:
    """A run's own config.yaml with dotted overrides on top: what `resume` starts from. Raises ConfigError."""
    for override in overrides:
        key, _ = _split(override)
        if key == "experiment":
            raise ConfigError(f"{override}: a resumed run keeps its own experiment; leave it out")
    try:
        node = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(node, resolve=True)
    except (OmegaConfBaseException, OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error
    return from_mapping(values)


def from_mapping(values: Any) -> Config:
    """Check keys and types. Raises ConfigError naming the key's path.

    Example:

        {"algorithm": {"lrr": 1}}   -> ConfigError: algorithm.lrr: no such key; did you mean algorithm.lr?
        {"algorithm": {"lr": "x"}}  -> ConfigError: algorithm.lr=x: must be a number
    """
    if not isinstance(values, Mapping):
        raise ConfigError("the config must be a mapping of keys to values")
    _check_keys(values, Config, "")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, values)) from error
    assert isinstance(config, Config)
    check(config)
    return config


def to_yaml(config: Config) -> str:
    """The whole config, every default written out, and the rule by which `sampling` holds."""
    rule = "".join(f"# {line}\n" for line in SAMPLING_RULE.splitlines())
    return OmegaConf.to_yaml(OmegaConf.structured(config)).replace("\nsampling:\n", f"\n{rule}sampling:\n")


def to_mapping(config: Config) -> dict[str, Any]:
    """The whole config as plain values."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _split(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: must have the form key=value")
    return key, value


def with_plus(overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra wants them. Raises ConfigError.

    experiment=PATH/experiment/NAME.yaml is experiment=NAME, and PATH one more place to look for it.
    """
    conf, plain, places = project_folder("conf"), [], []
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "experiment" and value.endswith(".yaml"):
            file = Path(value).resolve()
            if not file.is_file() or file.parent.name != "experiment":
                raise ConfigError(f"{override}: must be a file in a folder named experiment, or a name without .yaml")
            places.append(file.parent.parent)
            override = f"experiment={file.stem}"
        plain.append(override)
    found = [_prepare(override, conf, places) for override in plain]
    return [*found, *(f"{SEARCH}{place}]" for place in places)]


def _prepare(override: str, conf: Path, search: Sequence[Path]) -> str:
    """The override as Hydra wants it: the choice of a file as it is, a value with "++".

    Hydra takes a plain key only where a file has it already, but many keys have their default in a dataclass. Which
    keys there are is checked later, against the dataclasses.
    """
    key, value = _split(override)
    if key[0] in "+~":
        return override
    if not (conf / key).is_dir():
        return f"++{override}"
    if not any((folder / key / f"{value}.yaml").is_file() for folder in (conf, *search)):
        raise ConfigError(f"{override}: unknown; choose one of {_options(conf / key)}")
    return override


def _options(folder: Path) -> str:
    return ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))


def _check_keys(values: Mapping[Any, Any], section: type, prefix: str) -> None:
    """Raise ConfigError for a key that `section` does not have, and for a value where a section belongs."""
    hints = get_type_hints(section)
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in hints:
            raise ConfigError(f"{path}: no such key{_suggestion(path)}")
        origin = get_origin(hints[key])
        if (origin is list and not isinstance(value, list)) or (origin is dict and not isinstance(value, Mapping)):
            raise ConfigError(f"{path}={'null' if value is None else value}: must be {_in_words(hints[key])}")
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                example = next(_keys(hints[key], f"{path}."))
                raise ConfigError(f"{path}={value}: is a section; set one of its keys, such as {example}")
            _check_keys(value, hints[key], f"{path}.")


def _keys(section: type, prefix: str = "") -> Iterator[str]:
    """The dotted path of every value below a section."""
    for name, hint in get_type_hints(section).items():
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _suggestion(path: str) -> str:
    known = [*_keys(Config), *get_type_hints(Config)]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    last_parts = {key.rpartition(".")[2]: key for key in reversed(known)}
    close += [last_parts[name] for name in difflib.get_close_matches(path.rpartition(".")[2], last_parts, n=1)]
    return f"; did you mean {close[0]}?" if close else "; config_types.py and conf/ say which there are"


def _explain(error: OmegaConfBaseException, values: Mapping[str, Any]) -> str:
    """A wrong type as one line: where, what was given, what belongs there."""
    if not error.full_key:
        return one_line(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: missing; give it a value"
    parts = re.split(r"[.\[\]]+", str(error.full_key).rstrip("]"))
    hint: Any = Config
    given: Any = values
    for part in parts:
        # Below a section is a field; below a list or a mapping, an item.
        hint = get_type_hints(hint)[part] if is_dataclass(hint) else get_args(hint)[-1]
        given = given[int(part)] if isinstance(given, list) else given[part]
    return f"{error.full_key}={'null' if given is None else given}: must be {_in_words(hint)}"


def _in_words(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_in_words(option) for option in get_args(hint))
    if get_origin(hint) is list:
        return f"a list; each item {_in_words(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "a mapping"
    return _WORDS.get(hint, str(hint))


def one_line(error: Exception) -> str:
    """The first line of what the deepest cause says, and the key where it is known."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = f"{cause.full_key}: " if isinstance(cause, OmegaConfBaseException) and cause.full_key else ""
    return key + " ".join(lines[:1] or [type(cause).__name__])
