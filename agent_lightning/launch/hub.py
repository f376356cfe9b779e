"""Models in a local folder or on the Hugging Face hub, and data sets on the hub."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

from agent_lightning.config.load import resolve_path
from agent_lightning.core.errors import UserError
from agent_lightning.core.text import error_line

T = TypeVar("T")

HUB_SECONDS: Final = 4.0  # seconds that a dry run waits for an answer of the hub
_MODEL_FILES: Final = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def find_model(path: str) -> str:
    """The folder of a model; a model that only the hub has is downloaded. Raises UserError if neither has it."""
    if not _is_on_hub(path):
        return _local_folder(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(path, allow_patterns=_MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path={path}: neither a local folder nor reachable on the hub ({error_line(error)})"
        ) from error


def read_model_config(path: str) -> dict[str, Any]:
    """A model's own config.json; of a model that only the hub has, that file alone is downloaded. Raises UserError."""
    if not _is_on_hub(path):
        file = Path(_local_folder(path)) / "config.json"
    else:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json")
        download = partial(hf_hub_download, path, "config.json", etag_timeout=HUB_SECONDS)
        file = Path(cached if isinstance(cached, str) else _ask_hub(download, path, "; no estimate"))
    return cast(dict[str, Any], json.loads(file.read_text()))


def check_data_set(path: str) -> None:
    """Look a data set up on the hub. Raises UserError."""
    from huggingface_hub import HfApi

    _ask_hub(partial(HfApi().dataset_info, path, timeout=HUB_SECONDS), path)


def _is_on_hub(path: str) -> bool:
    """Whether a path has the form of a hub id, "owner/model", and is no local folder."""
    return not Path(resolve_path(path)).is_dir() and not path.startswith((".", "/", "~")) and path.count("/") == 1


def _local_folder(path: str) -> str:
    folder = Path(resolve_path(path))
    if not folder.is_dir():
        raise UserError(f"model.path={path}: no such folder; give a folder in Hugging Face format, or a hub id")
    if not (folder / "config.json").exists():
        raise UserError(f"model.path={path}: {folder} has no config.json; point to a folder in Hugging Face format")
    return str(folder)


def _ask_hub(question: Callable[[], T], path: str, consequence: str = "") -> T:
    """The hub's answer. Raises UserError after a few seconds; the hub's own client would try for half a minute."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname or "huggingface.co"
    obstacle = _connect(host)
    if obstacle:
        raise UserError(f"{host} cannot be reached from here ({obstacle})")
    try:
        return question()
    except Exception as error:  # a hub that cannot be reached fails in many ways
        raise UserError(f"{path}: not reachable from here ({type(error).__name__}){consequence}") from error


@cache
def _connect(host: str) -> str:
    """Why a host cannot be reached, "" if it can; cached, so that a dry run waits for a lost hub only once."""
    try:
        socket.create_connection((host, 443), timeout=HUB_SECONDS).close()
    except OSError as error:
        return str(error)
    return ""
