"""Runs at fsspec places: in memory, and on a local S3 server if its packages are installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from agent_lightning.core.errors import UserError
from agent_lightning.run.storage import Mirror, check_place, exists, fetch, is_remote, local_root


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "memory":
        yield "memory://bucket/runs"
        fsspec.filesystem("memory").store.clear()
        return
    server = pytest.importorskip("moto.server", reason="pip install s3fs 'moto[server]'").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/runs"
    server.stop()


def a_run(folder: Path) -> Path:
    run = folder / "calc_tiny-s0"
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / "checkpoints" / "step-000002" / "weights").write_bytes(b"\x00" * 1000)
    (run / "checkpoints" / "step-000002" / "state.json").write_text("{}")
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_goes_out_and_comes_back(place: str, tmp_path: Path) -> None:
    check_place(place)
    run = a_run(tmp_path)
    assert not exists(place, run.name)
    mirror = Mirror(place, run)
    mirror.push()
    assert exists(place, run.name)
    assert files(fetch(mirror.url, tmp_path / "elsewhere")) == files(run)


def test_only_changed_files_are_copied_and_a_checkpoint_is_complete_last(tmp_path: Path) -> None:
    copied: list[str] = []

    class Watched(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
        protocol = "watched"
        cachable = False

        def put_file(self, lpath: str, rpath: str, **options: object) -> None:
            copied.append(Path(lpath).name)
            super().put_file(lpath, rpath, **options)

    fsspec.register_implementation("watched", Watched, clobber=True)
    run = a_run(tmp_path)
    mirror = Mirror("watched://bucket/runs", run)
    mirror.push()
    assert copied[-1] == "state.json"
    assert len(copied) == 4
    copied.clear()
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    mirror.push()
    assert copied == ["metrics.jsonl"]


def test_files_written_while_a_run_is_mirrored_are_copied_at_its_end(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    mirror = Mirror("memory://bucket/runs", run)
    with mirror.following():
        (run / "summary.json").write_text("{}")
    assert "summary.json" in files(fetch(mirror.url, tmp_path / "elsewhere"))
    fsspec.filesystem("memory").store.clear()


def test_an_interrupted_copy_leaves_no_checkpoint_that_looks_complete(tmp_path: Path) -> None:
    class Failing(type(fsspec.filesystem("memory"))):  # type: ignore[misc]
        protocol = "failing"
        cachable = False
        failing = True

        def put_file(self, lpath: str, rpath: str, **options: object) -> None:
            if self.failing and lpath.endswith("weights"):
                raise OSError("the connection is lost")
            super().put_file(lpath, rpath, **options)

        def get_file(self, rpath: str, lpath: str, **options: object) -> None:
            if self.failing and rpath.endswith("weights"):
                raise OSError("the connection is lost")
            super().get_file(rpath, lpath, **options)

    fsspec.register_implementation("failing", Failing, clobber=True)
    run = a_run(tmp_path)
    mirror = Mirror("failing://bucket/runs", run)
    with pytest.raises(UserError, match=r"not up to date, the files are in .*: OSError: the connection is lost"):
        mirror.push()
    state = "calc_tiny-s0/checkpoints/step-000002/state.json"
    assert not exists("failing://bucket/runs", state)
    Failing.failing = False
    mirror.push()
    assert exists("failing://bucket/runs", state)
    Failing.failing = True
    with pytest.raises(UserError, match="cannot be read: OSError: the connection is lost"):
        fetch(mirror.url, tmp_path / "elsewhere")
    assert not list((tmp_path / "elsewhere").rglob("state.json"))


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    for place, message in (
        ("nonsense://bucket/runs", "nonsense"),
        (str(tmp_path / "file" / "runs"), "cannot be written"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(UserError) as caught:
            check_place(place)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is nothing"):
        fetch("memory://bucket/none", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_place(str(tmp_path / "runs"))


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MiB are free on .*, a run needs"):
        check_place(str(tmp_path), least_free_mib=2**60)


def test_folders_are_folders() -> None:
    assert not is_remote("runs")
    assert not is_remote("file:///data/runs")
    assert local_root("file:///data/runs") == Path("/data/runs")
    assert is_remote("s3://bucket/runs")
