"""Runs kept where fsspec can write: s3://bucket/runs, gs://, az://, or any folder, a shared one too.

A run is written on the driver's disk, as ever, and mirrored: whatever changed is copied every half minute, after the
last step, and when the run is stopped. A checkpoint's `state.json` is copied last, so half a copy is no checkpoint.
"""

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

logger = logging.getLogger(__name__)
LEAST_FREE_MIB = 256
PUSH_SECONDS = 30.0


def is_remote(place: str) -> bool:
    """Whether a place is another than a folder: "s3://bucket/runs"."""
    return "://" in place and not place.startswith("file://")


def local_root(place: str) -> Path:
    """The folder that runs are written to; of a remote place, the one that is mirrored. Raises UserError."""
    if is_remote(place):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "agent-lightning" / "runs"
    return Path(place.removeprefix("file://"))


def check_place(place: str, least_free_mib: float = LEAST_FREE_MIB) -> None:
    """Can be written, and has room. Raises UserError."""
    folder = local_root(place)
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"runs_dir={place}: {there} cannot be written; choose another folder")
    free = shutil.disk_usage(there).free / 2**20
    if free < least_free_mib:
        raise UserError(f"runs_dir={place}: {free:.0f} MiB are free on {there}, a run needs {least_free_mib:.0f}")
    if is_remote(place):
        files, path = _open(place)
        probe = f"{path}/.agl-{secrets.token_hex(4)}"
        try:
            files.pipe_file(probe, b"")
            files.rm_file(probe)
        except Exception as error:  # each file system has errors of its own
            raise UserError(f"runs_dir={place}: cannot be written: {_said(error)}") from error


class Mirror:
    """A run's folder, and its copy under `place`.

    Example: Mirror("s3://bucket/runs", Path("…/calc_tiny-s0")).push() -> s3://bucket/runs/calc_tiny-s0/metrics.jsonl, …
    """

    def __init__(self, place: str, folder: Path) -> None:
        self.url = f"{place.rstrip('/')}/{folder.name}"
        self._folder = folder
        self._files, self._path = _open(self.url)
        self._sent: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def push(self) -> None:
        """Copy what is new or has changed. Raises what the file system raises."""
        with self._lock:
            found = [path for path in self._folder.rglob("*") if path.is_file()]
            for path in sorted(found, key=lambda one: (one.name == "state.json", one)):
                size, changed = path.stat().st_size, path.stat().st_mtime_ns
                if self._sent.get(path) != (size, changed):
                    self._files.put_file(str(path), f"{self._path}/{path.relative_to(self._folder).as_posix()}")
                    self._sent[path] = (size, changed)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Push while the block runs, and after it. A push that fails is told, and tried again: the run goes on."""
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(PUSH_SECONDS):
                self._try_push()

        thread = threading.Thread(target=work, daemon=True, name="mirror")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._try_push()

    def _try_push(self) -> None:
        try:
            self.push()
        except Exception as error:  # a boundary: a lost service must not end the training
            logger.warning("%s: not up to date, the files are in %s: %s", self.url, self._folder, _said(error))


def taken(place: str, name: str) -> bool:
    """Whether there is a run of this name at a remote place."""
    if not is_remote(place):
        return False
    files, path = _open(place)
    return bool(files.exists(f"{path}/{name}"))


def fetch(url: str, root: Path) -> Path:
    """A run from a remote place into a folder below `root`. Raises UserError where there is none."""
    files, path = _open(url)
    folder = root / url.rstrip("/").rpartition("/")[2]
    try:
        names = files.find(path)
        for name in names:
            target = folder / name.removeprefix(path).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(name, str(target))
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"{url}: cannot be read: {_said(error)}") from error
    if not names:
        raise UserError(f"{url}: there is nothing")
    return folder


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:  # a package for this protocol is missing; an unknown protocol
        raise UserError(f"{url}: {_said(error)}") from error
    return files, path.rstrip("/")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
