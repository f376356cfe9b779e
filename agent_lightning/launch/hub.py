"""Models in a local folder or on the Hugging Face hub, and data sets on the hub."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

from agent_lightning.config.load import resolve_path
from agent_lightning.core.errors import UserError
from agent_lightning.core.hub import model_folder

T = TypeVar("T")

HUB_SECONDS: Final = 4.0  # seconds that a dry run waits for an answer of the hub


def find_model(path: str, revision: str | None = None) -> str:
    """The folder of a model; a model that only the hub has is downloaded. Raises UserError if neither has it."""
    return model_folder(path, revision) if is_on_hub(path) else local_folder(path)


def look_up(model: str, revision: str | None = None) -> tuple[str | None, dict[str, int], Callable[[str], Path]]:
    """The commit of a model on the hub, its files with their sizes in bytes, and what downloads one of them. If the hub
    cannot be reached, they are of the cache. Raises UserError if that has no such model."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    try:
        info = _ask_hub(
            partial(HfApi().model_info, model, revision=revision, files_metadata=True, timeout=HUB_SECONDS), model
        )
    except UserError:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise
        folder = Path(cached).parent
        files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        return folder.name, files, lambda name: folder / name
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    download = partial(hf_hub_download, model, revision=info.sha, etag_timeout=HUB_SECONDS)
    return info.sha, files, lambda name: Path(_ask_hub(partial(download, name), f"{model}/{name}"))


def check_data_set(path: str) -> None:
    """Look a data set up on the hub. Raises UserError."""
    from huggingface_hub import HfApi

    _ask_hub(partial(HfApi().dataset_info, path, timeout=HUB_SECONDS), path)


def is_on_hub(path: str) -> bool:
    """Whether a path has the form of a hub id, "owner/model", and is no local folder."""
    return not Path(resolve_path(path)).is_dir() and not path.startswith((".", "/", "~")) and path.count("/") == 1


def local_folder(path: str) -> str:
    """The folder of a model that is no hub id. Raises UserError if it has no model."""
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
