"""Where each value of a config came from: an override, a file under conf/, or the default of its section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agent_lightning.config.load import SEARCH, Config, hydra_overrides, load, project_folder, to_mapping

OVERRIDE, DEFAULT = "override", "default"


def sources(overrides: Sequence[str]) -> tuple[Config, dict[str, tuple[Any, str]]]:
    """The config, and by dotted key its value and where the value came from. Raises ConfigError.

    Example: {"algorithm.lr": (0.0002, "conf/experiment/calc_tiny.yaml"), "seed": (1, "override"), …}
    """
    config = load(overrides)
    prepared = hydra_overrides(overrides)
    files = {key: name for file, package in _files(prepared) for key, name in _keys_of(file, package)}
    pairs = zip(overrides, prepared, strict=False)  # the places to look for files come after the overrides
    set_here = {word.partition("=")[0].lstrip("+~") for word, made in pairs if word[0] in "+~" or made.startswith("++")}
    origins: dict[str, tuple[Any, str]] = {}
    for key, value in leaves(to_mapping(config)):
        parts = key.split(".")
        prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        file = next((files[prefix] for prefix in prefixes if prefix in files), DEFAULT)
        origins[key] = (value, OVERRIDE if set_here.intersection(prefixes) else file)
    return config, origins


def _keys_of(file: Path, package: str) -> Iterator[tuple[str, str]]:
    """Every key that a YAML file sets, with the file's name as people know it."""
    values = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(values, dict)
    values.pop("defaults", None)
    conf = project_folder("conf")
    name = f"conf/{file.relative_to(conf).as_posix()}" if file.is_relative_to(conf) else str(file)
    for key, _ in leaves(values, f"{package}." if package else ""):
        yield key, name


def _files(prepared: list[str]) -> Iterator[tuple[Path, str]]:
    """The files that Hydra merges, in its order, each with the section that it fills ("" for the entire config)."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    conf = project_folder("conf")
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        merged = loader.compute_defaults_list("train", prepared, RunMode.RUN)
    places = [conf, *(Path(word[len(SEARCH) : -1]) for word in prepared if word.startswith(SEARCH))]
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
