"""Where each value of a config came from: an override, a file under conf/, or the default of its dataclass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agent_lightning.config.load import SEARCH, Config, load, project_folder, to_mapping, with_plus

OVERRIDE, DEFAULT = "override", "default"


def sources(overrides: Sequence[str]) -> tuple[Config, dict[str, tuple[Any, str]]]:
    """The config, and by dotted key its value and where that is from. Raises ConfigError.

    Example: {"algorithm.lr": (0.0002, "conf/experiment/calc_tiny.yaml"), "seed": (1, "override"), …}
    """
    config = load(overrides)
    said: dict[str, str] = {}
    for file, package in _files(overrides):
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        assert isinstance(values, dict)
        values.pop("defaults", None)
        for key, _ in _leaves(values, f"{package}." if package else ""):
            conf = project_folder("conf")
            said[key] = f"conf/{file.relative_to(conf).as_posix()}" if file.is_relative_to(conf) else str(file)
    given = [override.partition("=")[0].lstrip("+~") for override in overrides]
    found: dict[str, tuple[Any, str]] = {}
    for key, value in _leaves(to_mapping(config), ""):
        parts = key.split(".")
        ways = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        is_group = {way for way in ways if (project_folder("conf") / way).is_dir()}
        overridden = any(way in given and way not in is_group for way in ways)
        from_file = next((said[way] for way in ways if way in said), DEFAULT)
        found[key] = (value, OVERRIDE if overridden else from_file)
    return config, found


def _files(overrides: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """The files that Hydra merges, in its order, each with the section that it fills ("" for the whole)."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    conf = project_folder("conf")
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        prepared = with_plus(overrides)
        merged = loader.compute_defaults_list("train", prepared, RunMode.RUN)
    places = [conf, *(Path(word[len(SEARCH) : -1]) for word in prepared if word.startswith(SEARCH))]
    for one in merged.defaults:
        if one.config_path is not None and not one.config_path.startswith("hydra/"):
            files = [place / f"{one.config_path}.yaml" for place in places]
            yield (
                next((file for file in files if file.is_file()), files[0]),
                "" if one.package in (None, "_global_") else str(one.package),
            )


def _leaves(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
