"""Runs at places that fsspec can write: s3://bucket/runs, gs://, az://, or any folder, also a shared one. A run is
always written to the driver's disk. A run at a remote place is mirrored from there: files that changed are copied
every half minute, after the last step, and when the run is stopped."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent_lightning.core.errors import UserError
from agent_lightning.core.text import error_line
from agent_lightning.run.state import STATE_FILE

# Why not fsspec.generic.rsync: it writes each file to the temporary folder on its way (checkpoints need that space
# again), ignores files that fail, takes a file of the same size for the same file, and cannot copy state.json last.

logger = logging.getLogger(__name__)
PUSH_SECONDS = 30.0


def is_remote(place: str) -> bool:
    """Whether a place is not a local folder. Example: "s3://bucket/runs"."""
    return "://" in place and not place.startswith("file://")


def local_root(place: str) -> Path:
    """The local folder that runs are written to; for a remote place, the folder in the cache that is mirrored."""
    if not is_remote(place):
        return Path(place.removeprefix("file://"))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agent-lightning" / "runs"


def check_place(place: str, least_free_mib: float = 256) -> None:
    """Check that runs can be written to a place and that its disk has room. Raises UserError."""
    folder = local_root(place)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"runs_dir={place}: {existing} cannot be written; choose another folder")
    if (free := shutil.disk_usage(existing).free / 2**20) < least_free_mib:
        raise UserError(f"runs_dir={place}: {free:.0f} MiB are free on {existing}, a run needs {least_free_mib:.0f}")
    if is_remote(place):
        file_system, path = _open(place)
        probe = f"{path}/.agl-{secrets.token_hex(4)}"
        with _explained_as(f"runs_dir={place}: cannot be written"):
            file_system.pipe_file(probe, b"")
            file_system.rm_file(probe)


class Mirror:
    """Copies a run's folder to a remote place.
    Example: Mirror("s3://bucket/runs", Path("…/calc_tiny-s0")).push() -> s3://bucket/runs/calc_tiny-s0/config.yaml, …
    """

    def __init__(self, place: str, folder: Path) -> None:
        self.url = f"{place.rstrip('/')}/{folder.name}"
        self._folder = folder
        self._file_system, self._path = _open(self.url)
        self._pushed: dict[Path, tuple[int, int]] = {}
        """Size and time of change (ns) of each file when it was last copied."""

    def push(self) -> None:
        """Copy files that are new or have changed. Raises UserError; files that were copied before stay copied."""
        with _explained_as(f"{self.url}: not up to date, the files are in {self._folder}"):
            for path in sorted(filter(Path.is_file, self._folder.rglob("*")), key=_copy_order):
                version = path.stat().st_size, path.stat().st_mtime_ns
                if self._pushed.get(path) != version:
                    self._file_system.put_file(str(path), f"{self._path}/{path.relative_to(self._folder).as_posix()}")
                    self._pushed[path] = version

    @contextmanager
    def following(self) -> Iterator[None]:
        """Push every half minute while the block runs, and once after it. A push that fails is logged and tried again:
        a lost service must not end the training."""
        ended = threading.Event()

        def push_until_ended() -> None:
            is_last = False
            while not is_last:
                is_last = ended.wait(PUSH_SECONDS)
                try:
                    self.push()
                except UserError as error:
                    logger.warning("%s", error)

        thread = threading.Thread(target=push_until_ended, daemon=True, name="mirror")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def exists(place: str, name: str) -> bool:
    """Whether a remote place has a run of this name; a local folder is checked when the run's folder is made."""
    if not is_remote(place):
        return False
    file_system, path = _open(place)
    return bool(file_system.exists(f"{path}/{name}"))


def local_copy(url: str) -> Path:
    """The local folder into which a run at a remote place is fetched."""
    return local_root(url) / url.rstrip("/").rpartition("/")[2]


def fetch(url: str, root: Path, *, without: str = "") -> Path:
    """Copy a run, or a folder of runs, from a remote place into a folder in `root`, except files below a folder of the
    name `without`. With `without`, files that the folder has with the same size are not copied again. Raises
    UserError if there is nothing."""
    file_system, path = _open(url)
    folder = root / url.rstrip("/").rpartition("/")[2]
    with _explained_as(f"{url}: cannot be read"):
        sizes = {name: entry["size"] for name, entry in file_system.find(path, detail=True).items()}
        names = sorted(sizes, key=lambda name: _copy_order(Path(name)))
        for name in names:
            target = folder / name.removeprefix(path).lstrip("/")
            if without in target.relative_to(folder).parts[:-1]:
                continue
            if without and target.exists() and target.stat().st_size == sizes[name]:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            file_system.get_file(name, str(target))
    if not names:
        raise UserError(f"{url}: there is nothing")
    return folder


def _copy_order(path: Path) -> tuple[bool, Path]:
    """A sort key that puts state.json last: a checkpoint whose copy was interrupted must not look complete."""
    return path.name == STATE_FILE, path


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Raises UserError for an unknown protocol or a missing package."""
    import fsspec

    with _explained_as(url):
        file_system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return file_system, path.rstrip("/")


@contextmanager
def _explained_as(problem: str) -> Iterator[None]:
    """Turn an error in the block, of whatever class a file system has for it, into a UserError of one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{problem}: {error_line(error)}") from error
